// Wakes up now and then during a launch. The count of steps finds most endless loops, but not one
// that the compiler has reduced to a jump to itself.
#pragma once
#include <signal.h>
#include <sys/syscall.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

namespace simt {

class Watchdog {
 public:
  // `wake(address)` is called in a signal handler, with the address of the instruction interrupted.
  Watchdog(void (*wake)(const void* address), double seconds) {
    callback() = wake;
    struct sigaction action = {};
    action.sa_sigaction = handle;
    action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_RESTART;  // the handler may never return
    sigaction(SIGNAL, &action, nullptr);

    sigevent event = {};
    event.sigev_notify = SIGEV_THREAD_ID;
    event.sigev_signo = SIGNAL;
    event._sigev_un._tid = static_cast<pid_t>(syscall(SYS_gettid));
    timer_create(CLOCK_THREAD_CPUTIME_ID, &event, &timer_);
    const time_t whole = static_cast<time_t>(seconds);
    const timespec period = {whole, static_cast<long>((seconds - whole) * 1e9)};
    const itimerspec times = {period, period};
    timer_settime(timer_, 0, &times, nullptr);
  }
  ~Watchdog() { timer_delete(timer_); }
  Watchdog(const Watchdog&) = delete;

 private:
  static inline const int SIGNAL = SIGRTMIN + 7;

  static void (*&callback())(const void*) {
    static void (*wake)(const void*);
    return wake;
  }
  static void handle(int, siginfo_t*, void* context) {
    const auto& registers = static_cast<ucontext_t*>(context)->uc_mcontext;
#if defined(__x86_64__)
    callback()(reinterpret_cast<const void*>(registers.gregs[REG_RIP]));
#elif defined(__aarch64__)
    callback()(reinterpret_cast<const void*>(registers.pc));
#else
    (void)registers;
#endif
  }
  timer_t timer_;
};

}  // namespace simt
