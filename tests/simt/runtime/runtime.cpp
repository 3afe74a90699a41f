// Runs kernels that were compiled with ../dialect: a scheduler of fibers, block after block, with the
// barriers and warp collectives of CUDA, and a check on every access to memory.
//
// Kernel libraries are compiled with -fsanitize=thread,undefined, so that the compiler announces each
// access and each doubtful operation by a call, and linked without those sanitizers' libraries:
// hooks.h answers the calls instead. This file is compiled without sanitizers.
#include <algorithm>
#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "fiber.h"
#include "memory.h"
#include "watchdog.h"

struct uint3 {
  unsigned x, y, z;
};
uint3 threadIdx, blockIdx, blockDim, gridDim;
extern "C" {
unsigned char* simt_dynamic_shared;
}

namespace simt {

constexpr int WARP = 32;
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

enum class State { NEW, READY, AT_BARRIER, IN_WARP, DONE };

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
  // where it waits, and for AT a collective with what
  const char* what;
  int line;
  const void* address;
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
  int block_index;
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
  snprintf(m.error, sizeof m.error, "%s [block (%u, %u, %u) thread (%u, %u, %u)]", message, blockIdx.x,
           blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z);
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
__attribute__((format(printf, 2, 3))) [[noreturn]] void fail(const void* address, const char* format, ...) {
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

// ---- scheduling
void set_current(int thread) {
  m.current = thread;
  threadIdx = {thread % blockDim.x, thread / blockDim.x % blockDim.y, thread / blockDim.x / blockDim.y};
}
void suspend(State state) {
  const int me = m.current;
  m.thread().state = state;
  m.fibers.leave(m.thread().fiber);
  set_current(me);
}

// Runs the collective that lanes of `mask` wait in, if all of them that are alive have come.
void complete_collective(int warp_index, unsigned mask) {
  Warp& warp = m.warps[warp_index];
  Thread* lane = &m.threads[warp_index * WARP];
  const unsigned lanes = mask & warp.waiting;
  if (!lanes || (mask & warp.alive & ~warp.waiting)) return;

  const int leader = __builtin_ctz(lanes);
  const Thread& a = lane[leader];
  const void* in[WARP] = {};
  void* out[WARP] = {};
  for (unsigned rest = lanes; rest; rest &= rest - 1) {
    const int i = __builtin_ctz(rest);
    const Thread& b = lane[i];
    if (b.what != a.what || b.mask != a.mask || b.line != a.line) {
      report(b.address, "warp divergence: lane %d is at %s(mask %08x) of line %d, lane %d at %s(mask %08x) of line %d",
             leader, a.what, a.mask, a.line, i, b.what, b.mask, b.line);
      return;
    }
    in[i] = b.in;
    out[i] = b.out;
  }
  if (a.run) {
    a.run(in, out, lanes);
  } else {  // __syncwarp: every lane learns what any of them knew, and a new time begins
    unsigned known[WARP] = {};
    for (unsigned rest = lanes; rest; rest &= rest - 1)
      for (int j = 0; j < WARP; ++j) known[j] = std::max(known[j], lane[__builtin_ctz(rest)].clocks[j]);
    for (unsigned rest = lanes; rest; rest &= rest - 1) {
      const int i = __builtin_ctz(rest);
      memcpy(lane[i].clocks, known, sizeof known);
      ++lane[i].clocks[i];
    }
  }
  for (unsigned rest = lanes; rest; rest &= rest - 1) lane[__builtin_ctz(rest)].state = State::READY;
  warp.waiting &= ~lanes;
}

void finish_thread() {
  Thread& thread = m.thread();
  if (!thread.copies.empty()) fail(thread.copies[0].address, "a cp_async was never waited for");
  thread.state = State::DONE;
  --m.living;
  for (const Thread& other : m.threads)
    if (m.at_barrier && other.state == State::AT_BARRIER)
      fail(other.address, "barrier divergence: this thread has returned while %d others wait at the __syncthreads of line %d",
           m.at_barrier, other.line);
  m.warp().alive &= ~(1u << m.current % WARP);
  const int warp = m.current / WARP;
  for (unsigned rest = m.warp().waiting; rest; rest &= rest - 1)
    complete_collective(warp, m.threads[warp * WARP + __builtin_ctz(rest)].mask);
}

// What every fiber does: one thread of a block, then, woken again, another.
void run_thread() {
  for (;;) {
    m.launch->call(m.launch->arguments);
    finish_thread();
    Fiber* fiber = m.thread().fiber;
    m.fibers.give_back(fiber);
    m.fibers.leave(fiber);
  }
}

void begin_block(int block_index) {
  m.block_index = block_index;
  const unsigned i = block_index;
  blockIdx = {i % gridDim.x, i / gridDim.x % gridDim.y, i / gridDim.x / gridDim.y};
  m.memory.begin_block();
  m.living = m.thread_count;
  m.at_barrier = 0;
  m.epoch = 1;
  for (int t = 0; t < m.thread_count; ++t) {
    Thread& thread = m.threads[t];
    thread.state = State::NEW;
    thread.copies.clear();
    thread.copy_groups = 0;
    memset(thread.clocks, 0, sizeof thread.clocks);
    thread.clocks[t % WARP] = 1;
  }
  for (size_t w = 0; w < m.warps.size(); ++w) {
    const int lanes = m.thread_count - int(w) * WARP;
    m.warps[w] = {0, lanes >= WARP ? ~0u : (1u << lanes) - 1};
  }
}

// Runs each thread that can run until it waits for others. False: none could.
bool run_ready_threads(std::vector<int>& order) {
  if (m.launch->order == RANDOM) std::shuffle(order.begin(), order.end(), m.random);
  bool progress = false;
  for (int t : order) {
    Thread& thread = m.threads[t];
    if (thread.state == State::NEW)
      thread.fiber = m.fibers.take();
    else if (thread.state != State::READY)
      continue;
    thread.state = State::READY;
    progress = true;
    set_current(t);
    m.fibers.enter(thread.fiber);
    if (m.failed) break;
  }
  return progress;
}

void open_barrier() {
  const Thread& last = m.thread();
  for (int t = 0; t < m.thread_count; ++t) {
    Thread& thread = m.threads[t];
    if (thread.state != State::AT_BARRIER) continue;
    if (thread.line != last.line) {
      report(thread.address, "barrier divergence: thread %d is at the __syncthreads of line %d, thread %d at that of line %d",
             t, thread.line, m.current, last.line);
      return;
    }
    thread.state = State::READY;
  }
  m.at_barrier = 0;
  ++m.epoch;
}

void report_deadlock() {
  int a = 0;
  while (m.threads[a].state == State::DONE) ++a;
  auto waits_elsewhere = [&](const Thread& b) {
    return b.state != State::DONE && (b.what != m.threads[a].what || b.line != m.threads[a].line);
  };
  int b = a;
  while (b + 1 < m.thread_count && !waits_elsewhere(m.threads[b])) ++b;
  set_current(a);
  report(m.threads[a].address, "deadlock: thread %d waits at %s of line %d, thread %d at %s of line %d, %d threads have returned", a,
         m.threads[a].what, m.threads[a].line, b, m.threads[b].what, m.threads[b].line, m.thread_count - m.living);
}

void run_block(int block_index, std::vector<int>& order) {
  begin_block(block_index);
  while (m.living && !m.failed) {
    const bool progress = run_ready_threads(order);
    if (m.failed) return;
    if (m.living && m.at_barrier == m.living)
      open_barrier();
    else if (!progress)
      report_deadlock();
  }
}

// ---- the checks on one access
bool happened_before(const Stamp& stamp) {
  if (!stamp.block) return true;
  if (stamp.block != m.block_index + 1) return false;
  if (stamp.thread == m.current || stamp.epoch < m.epoch) return true;
  return stamp.thread / WARP == m.current / WARP && stamp.clock <= m.thread().clocks[stamp.thread % WARP];
}
void check_race(const Region& region, const char* p, const Stamp& earlier, Access now, const char* then,
                const void* address) {
  if (happened_before(earlier) || (now == ATOMIC && earlier.atomic)) return;
  fail(address, "race on %s at byte %td: %s here, %s by thread %d of block %d", region.name, p - region.base, ACCESS[now],
       earlier.atomic ? "atomic" : then, earlier.thread, earlier.block - 1);
}
void check_races(Region& region, const char* p, size_t size, Access access, const void* address) {
  const Stamp me = {m.block_index + 1, short(m.current), short(access == ATOMIC), m.epoch,
                    m.thread().clocks[m.current % WARP]};
  const size_t first = (p - region.base) / region.grain, last = (p + size - 1 - region.base) / region.grain;
  for (size_t i = first; i <= last; ++i) {
    Cell& cell = region.history[i];
    check_race(region, p, cell.writer, access, "written", address);
    if (access != READ) {
      for (const Stamp& reader : cell.readers) check_race(region, p, reader, access, "read", address);
      cell.writer = me;
    } else {
      const Stamp& newest = cell.readers[0];
      if (newest.block != me.block || newest.thread / WARP != m.current / WARP) cell.readers[1] = newest;
      cell.readers[0] = me;
    }
  }
}
[[noreturn]] void fail_out_of_bounds(const char* p, size_t size, Access access, const void* address) {
  ptrdiff_t distance = 0;
  const Region* region = m.memory.nearest(p, size, &distance);
  if (!region) fail(address, "out of bounds: %s of %zu bytes at %p", ACCESS[access], size, static_cast<const void*>(p));
  fail(address, "out of bounds: %s of %zu bytes, %td bytes %s %s (%zu bytes)", ACCESS[access], size, labs(distance),
       distance < 0 ? "before the start of" : "past the end of", region->name, region->size);
}
void check_access(const void* vp, size_t size, Access access, const void* address) {
  const char* p = static_cast<const char*>(vp);
  if (!m.running || m.fibers.owns(p)) return;
  spend(1, address);
  Region* region = m.memory.find(p);
  if (!region || p + size > region->base + region->size) fail_out_of_bounds(p, size, access, address);
  if (access != READ && !region->writable) fail(address, "write to %s, which is read only", region->name);
  const bool power_of_two = !(size & (size - 1));
  if (power_of_two && size <= 16 && reinterpret_cast<uintptr_t>(p) % size)
    fail(address, "misaligned: %s of %zu bytes at byte %td of %s", ACCESS[access], size, p - region->base, region->name);
  if (region->history) check_races(*region, p, size, access, address);
}
// Larger pieces, and copies of structs, whose parts may be aligned to less than the whole.
void check_range(const void* vp, size_t size, Access access, const void* address) {
  const char* p = static_cast<const char*>(vp);
  const size_t step = (reinterpret_cast<uintptr_t>(p) | size) % 4 ? 1 : 4;
  for (size_t i = 0; i < size; i += step) check_access(p + i, step, access, address);
}

// ---- a launch
void run_blocks(const Launch& launch) {
  std::vector<int> order(m.thread_count);
  for (int t = 0; t < m.thread_count; ++t) order[t] = launch.order == REVERSED ? m.thread_count - 1 - t : t;

  const size_t total = size_t(gridDim.x) * gridDim.y * gridDim.z;
  const size_t first = launch.first_block, count = total - first;
  std::vector<size_t> blocks(count);
  for (size_t b = 0; b < count; ++b) blocks[b] = first + (launch.order == REVERSED ? count - 1 - b : b);
  if (launch.order == RANDOM) std::shuffle(blocks.begin(), blocks.end(), m.random);

  for (size_t b = 0; b < count && !m.failed; ++b) run_block(int(blocks[b]), order);
}

// ---- what kernels call, see dialect/runtime.h
#define CALLER __builtin_return_address(0)
extern "C" {

void simt_access(const void* address, size_t size, int kind) { check_access(address, size, Access(kind), CALLER); }

void simt_require_aligned(const void* address, size_t size, const char* what) {
  if (reinterpret_cast<uintptr_t>(address) % size) fail(CALLER, "misaligned: %s needs an address aligned to %zu bytes", what, size);
}

void simt_trap(const char* why) { fail(CALLER, "trap: %s", why); }

void simt_barrier(int line) {
  Thread& thread = m.thread();
  thread.what = "__syncthreads";
  thread.line = line;
  thread.address = CALLER;
  spend(64, CALLER);
  if (m.living < m.thread_count)
    fail(CALLER, "barrier divergence: __syncthreads of line %d after %d threads have returned", line,
         m.thread_count - m.living);
  ++m.at_barrier;
  suspend(State::AT_BARRIER);
}

void simt_warp(const char* what, int line, unsigned mask, const void* in, void* out, Collective run) {
  Thread& thread = m.thread();
  thread.what = what;
  thread.line = line;
  thread.address = CALLER;
  thread.mask = mask;
  thread.in = in;
  thread.out = out;
  thread.run = run;
  spend(64, CALLER);
  const int lane = m.current % WARP;
  if (!(mask >> lane & 1)) fail(CALLER, "%s of line %d: the mask %08x does not name the calling lane %d", what, line, mask, lane);
  thread.state = State::IN_WARP;
  m.warp().waiting |= 1u << lane;
  complete_collective(m.current / WARP, mask);
  if (m.failed) m.fibers.leave(thread.fiber);
  if (thread.state == State::IN_WARP) suspend(State::IN_WARP);
}

// A copy lands as late as it may, when it is waited for; but it may land at any time from now on, so
// it counts as a write both now and then.
void simt_copy_async(void* shared, const void* global, size_t size, bool read) {
  if (reinterpret_cast<uintptr_t>(shared) % size || (read && reinterpret_cast<uintptr_t>(global) % size))
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
    if (copy.read)
      memcpy(copy.shared, copy.global, copy.size);
    else
      memset(copy.shared, 0, copy.size);
    check_range(copy.shared, copy.size, WRITE, CALLER);
    return true;
  };
  thread.copies.erase(std::remove_if(thread.copies.begin(), thread.copies.end(), lands), thread.copies.end());
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
    m.memory.add({reinterpret_cast<char*>(simt_dynamic_shared), launch->dynamic_shared, "dynamic shared memory", 2, true,
                  true, false, nullptr});
  auto add_constant = [](void* p, size_t size) {
    m.memory.add({static_cast<char*>(p), size, "", 1, false, false, true, nullptr});
  };
  for (uint3* variable : {&threadIdx, &blockIdx, &blockDim, &gridDim}) add_constant(variable, sizeof *variable);
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
