// Runs kernels that were compiled with ../dialect: a scheduler of fibers, block after block, with
// the barriers and warp collectives of CUDA, and a check on every access to memory.
//
// Kernel libraries are compiled with -fsanitize=thread,undefined, so that the compiler announces
// each access and each doubtful operation by a call, and linked without those sanitizers'
// libraries: hooks.h answers the calls instead. This file is compiled without sanitizers.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "checks.h"
#include "machine.h"
#include "scheduler.h"
#include "watchdog.h"

extern "C" {
unsigned char* simt_dynamic_shared;
}

namespace simt {

// ---- what kernels call, see dialect/runtime.h
#define CALLER __builtin_return_address(0)
extern "C" {

void simt_access(const void* address, size_t size, int kind) {
  check_access(address, size, Access(kind), CALLER);
}

void simt_require_aligned(const void* address, size_t size, const char* what) {
  if (reinterpret_cast<uintptr_t>(address) % size)
    fail(CALLER, "misaligned: %s needs an address aligned to %zu bytes", what, size);
}

void simt_trap(const char* why) { fail(CALLER, "trap: %s", why); }

int simt_barrier(int line, bool vote) {
  Thread& thread = m.thread();
  thread.what = "__syncthreads";
  thread.line = line;
  thread.address = CALLER;
  spend(STEPS_OF_A_WAIT, CALLER);
  if (m.living < m.thread_count)
    fail(CALLER, "barrier divergence: __syncthreads of line %d after %d threads have returned",
         line, m.thread_count - m.living);
  ++m.at_barrier;
  m.vote |= vote;
  suspend(State::AT_BARRIER);
  return m.voted;
}

void simt_warp(const char* what, int line, unsigned mask, const void* in, void* out,
               Collective run) {
  Thread& thread = m.thread();
  thread.what = what;
  thread.line = line;
  thread.address = CALLER;
  thread.mask = mask;
  thread.in = in;
  thread.out = out;
  thread.run = run;
  spend(STEPS_OF_A_WAIT, CALLER);
  const int lane = m.current % WARP;
  if (!(mask >> lane & 1))
    fail(CALLER, "%s of line %d: the mask %08x does not name the calling lane %d", what, line, mask,
         lane);
  thread.state = State::IN_WARP;
  m.warp().waiting |= 1u << lane;
  complete_collective(m.current / WARP, mask);
  if (m.failed) m.fibers.leave(thread.fiber);
  if (thread.state == State::IN_WARP) suspend(State::IN_WARP);
}

// A copy lands as late as it may, when it is waited for; but it may land at any time from now on,
// so it counts as a write both now and then.
void simt_copy_async(void* shared, const void* global, size_t size, bool read) {
  if (reinterpret_cast<uintptr_t>(shared) % size ||
      (read && reinterpret_cast<uintptr_t>(global) % size))
    fail(CALLER, "misaligned: cp_async needs addresses aligned to %zu bytes", size);
  if (read) check_range(global, size, READ, CALLER);
  check_range(shared, size, WRITE, CALLER);
  m.thread().copies.push_back({shared, global, size, read, m.thread().copy_groups, CALLER});
}
void simt_commit_copies() { ++m.thread().copy_groups; }
void simt_wait_for_copies(int groups_left) {
  Thread& thread = m.thread();
  auto lands = [&](const CopyInFlight& copy) {
    if (copy.group >= thread.copy_groups - groups_left) return false;
    if (copy.read) memcpy(copy.shared, copy.global, copy.size);
    else memset(copy.shared, 0, copy.size);
    check_range(copy.shared, copy.size, WRITE, CALLER);
    return true;
  };
  thread.copies.erase(std::remove_if(thread.copies.begin(), thread.copies.end(), lands),
                      thread.copies.end());
}

// ---- what Python calls
// The text of the first error, or null.
const char* simt_launch(const Launch* launch) {
  m.launch = launch;
  gridDim = {launch->grid[0], launch->grid[1], launch->grid[2]};
  blockDim = {launch->block[0], launch->block[1], launch->block[2]};
  m.thread_count = blockDim.x * blockDim.y * blockDim.z;
  m.threads.resize(m.thread_count);
  m.warps.resize((m.thread_count + WARP - 1) / WARP);
  m.random.seed(launch->seed);
  m.failed = false;
  m.error_address = nullptr;
  m.steps_left = m.steps_at_last_wake = launch->steps;

  std::vector<unsigned char> dynamic(launch->dynamic_shared + 128);
  simt_dynamic_shared = dynamic.data() + -reinterpret_cast<uintptr_t>(dynamic.data()) % 128;

  m.memory.clear();
  for (size_t i = 0; i < launch->region_count; ++i) m.memory.add(launch->regions[i]);
  if (launch->dynamic_shared)
    m.memory.add({reinterpret_cast<char*>(simt_dynamic_shared), launch->dynamic_shared,
                  "dynamic shared memory", 2, true, true, false, nullptr});
  auto add_constant = [](void* p, size_t size) {
    m.memory.add({static_cast<char*>(p), size, "", 1, false, false, true, nullptr});
  };
  for (uint3* variable : {&threadIdx, &blockIdx, &blockDim, &gridDim})
    add_constant(variable, sizeof *variable);
  add_constant(&simt_dynamic_shared, sizeof simt_dynamic_shared);
  if (launch->check_races) m.memory.open_histories();

  m.running = true;
  {
    Watchdog watchdog(wake_up, 0.25);
    run_blocks(*launch);
  }
  m.running = false;

  m.memory.clear();
  if (m.failed) m.fibers.reset();
  return m.failed ? m.error : nullptr;
}
const void* simt_error_address() { return m.error_address; }

#include "hooks.h"
}
}  // namespace simt
