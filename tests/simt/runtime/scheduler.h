// Runs the threads of a block in turns, each until it waits for others: barriers and collectives.
#pragma once
#include <algorithm>
#include <climits>

#include "machine.h"

namespace simt {

void set_current(int thread) {
  m.current = thread;
  threadIdx = {thread % blockDim.x, thread / blockDim.x % blockDim.y,
               thread / blockDim.x / blockDim.y};
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
      report(b.address,
             "warp divergence: lane %d is at %s(mask %08x) of line %d, lane %d at %s(mask %08x) of "
             "line %d",
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
      for (int j = 0; j < WARP; ++j)
        known[j] = std::max(known[j], lane[__builtin_ctz(rest)].clocks[j]);
    for (unsigned rest = lanes; rest; rest &= rest - 1) {
      const int i = __builtin_ctz(rest);
      memcpy(lane[i].clocks, known, sizeof known);
      ++lane[i].clocks[i];
    }
  }
  for (unsigned rest = lanes; rest; rest &= rest - 1)
    lane[__builtin_ctz(rest)].state = State::READY;
  warp.waiting &= ~lanes;
}

void report_return_before_barrier() {
  for (const Thread& other : m.threads)
    if (other.state == State::AT_BARRIER)
      fail(other.address,
           "barrier divergence: this thread has returned while %d others wait at the __syncthreads "
           "of line %d",
           m.at_barrier, other.line);
}

void finish_thread() {
  Thread& thread = m.thread();
  if (!thread.copies.empty()) fail(thread.copies[0].address, "a cp_async was never waited for");
  thread.state = State::DONE;
  --m.living;
  if (m.at_barrier) report_return_before_barrier();
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

void begin_block(size_t index) {
  m.block = m.blocks_before + unsigned(index - m.launch->first_block) + 1;
  const unsigned i = index;
  blockIdx = {i % gridDim.x, i / gridDim.x % gridDim.y, i / gridDim.x / gridDim.y};
  m.memory.begin_block();
  m.living = m.thread_count;
  m.at_barrier = 0;
  m.vote = false;
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
    if (thread.state == State::NEW) thread.fiber = m.fibers.take();
    else if (thread.state != State::READY) continue;
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
      report(thread.address,
             "barrier divergence: thread %d is at the __syncthreads of line %d, thread %d at that "
             "of line %d",
             t, thread.line, m.current, last.line);
      return;
    }
    thread.state = State::READY;
  }
  m.at_barrier = 0;
  m.voted = m.vote;
  m.vote = false;
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
  report(m.threads[a].address,
         "deadlock: thread %d waits at %s of line %d, thread %d at %s of line %d, %d threads have "
         "returned",
         a, m.threads[a].what, m.threads[a].line, b, m.threads[b].what, m.threads[b].line,
         m.thread_count - m.living);
}

void run_block(size_t index, std::vector<int>& order) {
  begin_block(index);
  while (m.living && !m.failed) {
    const bool progress = run_ready_threads(order);
    if (m.failed) return;
    if (m.living && m.at_barrier == m.living) open_barrier();
    else if (!progress) report_deadlock();
  }
}

void run_blocks(const Launch& launch) {
  std::vector<int> order(m.thread_count);
  for (int t = 0; t < m.thread_count; ++t)
    order[t] = launch.order == REVERSED ? m.thread_count - 1 - t : t;

  const size_t total = size_t(gridDim.x) * gridDim.y * gridDim.z;
  const size_t first = launch.first_block, count = total - first;
  if (count > UINT_MAX - m.blocks_before) {
    m.memory.forget_histories();
    m.blocks_before = 0;
  }
  std::vector<size_t> blocks(count);
  for (size_t b = 0; b < count; ++b)
    blocks[b] = first + (launch.order == REVERSED ? count - 1 - b : b);
  if (launch.order == RANDOM) std::shuffle(blocks.begin(), blocks.end(), m.random);

  for (size_t b = 0; b < count && !m.failed; ++b) run_block(blocks[b], order);
  m.blocks_before += count;
}

}  // namespace simt
