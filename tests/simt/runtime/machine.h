// The state of a launch, and how an error ends it.
#pragma once
#include <cstdarg>
#include <cstdio>
#include <random>
#include <vector>

#include "fiber.h"
#include "memory.h"

struct uint3 {
  unsigned x, y, z;
};
uint3 threadIdx, blockIdx, blockDim, gridDim;  // those of the thread that runs

namespace simt {

constexpr int WARP = 32;
constexpr size_t STEPS_OF_A_WAIT = 64;  // waiting takes time as so many accesses do
typedef void (*Collective)(const void* const* in, void* const* out, unsigned lanes);
enum Access { READ, WRITE, ATOMIC };
const char* const ACCESS[] = {"read", "write", "atomic"};
enum Order { FORWARD, REVERSED, RANDOM };

// What Python asks for; mirrored by module.py.
struct Launch {
  void (*call)(void**);
  void** arguments;
  unsigned grid[3], block[3];
  size_t dynamic_shared;
  const Region* regions;
  size_t region_count;
  int order;
  unsigned seed;
  int check_races;
  size_t first_block;
  const char* code;  // the kernel library's instructions
  size_t code_size;
  size_t steps;  // memory accesses and basic blocks before the launch counts as endless
};

enum class State { NEW, READY, AT_BARRIER, IN_WARP, DONE };  // of a thread

struct CopyInFlight {
  void* shared;
  const void* global;
  size_t size;
  bool read;
  int group;
  const void* address;  // of the call that started it
};

struct Thread {
  State state;
  Fiber* fiber;
  // what it waits in, and where
  const char* what;
  int line;
  const void* address;
  // if that is a collective: with which lanes, its argument, its result, and what it computes
  unsigned mask;
  const void* in;
  void* out;
  Collective run;
  unsigned clocks[WARP];  // what this thread knows of the time of each lane of its warp
  std::vector<CopyInFlight> copies;
  int copy_groups;
};

struct Warp {
  unsigned waiting;  // lanes that wait in a collective
  unsigned alive;    // lanes that have not returned
};

void run_thread();

struct Machine {
  FiberPool fibers{run_thread};
  Memory memory;
  const Launch* launch;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::mt19937 random;
  int thread_count, current, living, at_barrier;
  bool vote, voted;        // whether a thread at the barrier says yes; at the last one
  unsigned block;          // the one that runs, as in a Stamp
  unsigned blocks_before;  // of earlier launches
  unsigned epoch;  // barriers that this block has passed, plus one
  size_t steps_left, steps_at_last_wake;
  bool running;  // false outside launches: then nothing is checked
  bool failed;
  char error[2048];
  const void* error_address;  // in the kernel library, where the error arose; or null

  Thread& thread() { return threads[current]; }
  Warp& warp() { return warps[current / WARP]; }
};

Machine& machine() {
  static Machine instance;
  return instance;
}
Machine& m = machine();

// ---- errors: the first one counts, and ends the launch
void record_error(const void* address, const char* format, va_list arguments) {
  if (m.failed) return;
  char message[1500];
  vsnprintf(message, sizeof message, format, arguments);
  snprintf(m.error, sizeof m.error, "%s [block (%u, %u, %u) thread (%u, %u, %u)]", message,
           blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z);
  m.error_address = address;
  m.failed = true;
}
__attribute__((format(printf, 2, 3))) void report(const void* address, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  record_error(address, format, arguments);
  va_end(arguments);
}
// For use on a fiber: it is abandoned where it stands.
__attribute__((format(printf, 2, 3))) [[noreturn]] void fail(const void* address,
                                                             const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  record_error(address, format, arguments);
  va_end(arguments);
  m.fibers.leave(m.thread().fiber);
  abort();
}
void spend(size_t steps, const void* address) {
  if (m.steps_left <= steps) fail(address, "this launch seems to run for ever");
  m.steps_left -= steps;
}

void wake_up(const void* address) {
  // in the runtime itself, or in a library, the launch must not be left: it is not stuck there
  const char* p = static_cast<const char*>(address);
  if (!m.running || p < m.launch->code || p >= m.launch->code + m.launch->code_size) return;
  if (m.steps_left == m.steps_at_last_wake) fail(p + 1, "this launch seems to run for ever");
  m.steps_at_last_wake = m.steps_left;
}

}  // namespace simt
