// Fibers: call stacks that the scheduler changes between by hand. Every CUDA thread of a block runs
// on one, so that it can stop in the middle of a kernel, at a barrier, and let the others go on.
#pragma once
#include <sys/mman.h>

#include <cstdlib>
#include <vector>
#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace simt {

#ifdef __x86_64__
// A suspended context is its stack pointer; the registers that a call must keep lie on its stack.
struct Context {
  void* stack_pointer;
};
extern "C" void simt_change_stack(void** save, void* load);
asm(R"(
.text
.globl simt_change_stack
.hidden simt_change_stack
.type simt_change_stack, @function
simt_change_stack:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size simt_change_stack, . - simt_change_stack
)");
inline void change_context(Context& from, Context& to) {
  simt_change_stack(&from.stack_pointer, to.stack_pointer);
}
inline void prepare_context(Context& context, char* stack, size_t size, void (*entry)()) {
  constexpr int SAVED_REGISTERS = 6;
  void** top = reinterpret_cast<void**>(stack + size);
  *--top = nullptr;  // at its entry a function expects the stack 8 bytes off a multiple of 16
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < SAVED_REGISTERS; ++i) *--top = nullptr;
  context.stack_pointer = top;
}
#else
struct Context {
  ucontext_t context;
};
inline void change_context(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
inline void prepare_context(Context& context, char* stack, size_t size, void (*entry)()) {
  getcontext(&context.context);
  context.context.uc_stack = {stack, 0, size};
  context.context.uc_link = nullptr;
  makecontext(&context.context, entry, 0);
}
#endif

struct Fiber {
  char* stack;
  Context context;
};

// All fibers run `entry`, which must never return. Their stacks lie in one piece of address space,
// so that an access to one is recognised at once.
class FiberPool {
 public:
  static constexpr size_t STACK_SIZE = 256 << 10, MOST_FIBERS = 1024;

  explicit FiberPool(void (*entry)()) : entry_(entry) {
    void* stacks = mmap(nullptr, STACK_SIZE * MOST_FIBERS, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stacks == MAP_FAILED) abort();
    stacks_ = static_cast<char*>(stacks);
    all_.reserve(MOST_FIBERS);
  }
  Fiber* take() {
    if (free_.empty()) create();
    Fiber* fiber = free_.back();
    free_.pop_back();
    return fiber;
  }
  void give_back(Fiber* fiber) { free_.push_back(fiber); }
  // After an error fibers stand anywhere in a kernel: start all of them anew.
  void reset() {
    free_.clear();
    for (Fiber& fiber : all_) {
      prepare_context(fiber.context, fiber.stack, STACK_SIZE, entry_);
      free_.push_back(&fiber);
    }
  }
  bool owns(const void* address) const {
    return address >= stacks_ && address < stacks_ + STACK_SIZE * MOST_FIBERS;
  }
  void enter(Fiber* fiber) { change_context(scheduler_, fiber->context); }
  void leave(Fiber* fiber) { change_context(fiber->context, scheduler_); }

 private:
  void create() {
    if (all_.size() == MOST_FIBERS) abort();
    all_.push_back({stacks_ + all_.size() * STACK_SIZE, {}});
    Fiber& fiber = all_.back();
    prepare_context(fiber.context, fiber.stack, STACK_SIZE, entry_);
    free_.push_back(&fiber);
  }
  void (*entry_)();
  char* stacks_;
  Context scheduler_;
  std::vector<Fiber> all_;
  std::vector<Fiber*> free_;
};

}  // namespace simt
