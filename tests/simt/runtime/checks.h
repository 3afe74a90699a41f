// The checks on one access to memory: bounds, alignment, and races with those before it.
#pragma once
#include <cstdint>

#include "machine.h"

namespace simt {

bool happened_before(const Stamp& stamp, const Region& region) {
  if (stamp.block <= m.blocks_before) return true;
  if (stamp.block != m.block) return region.shared;
  if (stamp.thread == m.current || stamp.epoch < m.epoch) return true;
  return stamp.thread / WARP == m.current / WARP &&
         stamp.clock <= m.thread().clocks[stamp.thread % WARP];
}
bool same_moment(const Stamp& a, const Stamp& b) {
  return a.block == b.block && a.thread == b.thread && a.epoch == b.epoch && a.clock == b.clock;
}
void check_race(const Region& region, const char* p, const Stamp& earlier, Access now,
                const char* then, const void* address) {
  if (happened_before(earlier, region) || (now == ATOMIC && earlier.atomic)) return;
  fail(address, "race on %s at byte %td: %s here, %s by thread %d of block %zu", region.name,
       p - region.base, ACCESS[now], earlier.atomic ? "atomic" : then, earlier.thread,
       m.launch->first_block + earlier.block - m.blocks_before - 1);
}
void check_races(Region& region, const char* p, size_t size, Access access, const void* address) {
  const Stamp me = {m.block, short(m.current), short(access == ATOMIC), m.epoch,
                    m.thread().clocks[m.current % WARP]};
  const size_t first = (p - region.base) / region.grain,
               last = (p + size - 1 - region.base) / region.grain;
  for (size_t i = first; i <= last; ++i) {
    Cell& cell = region.history[i];
    check_race(region, p, cell.writer, access, "written", address);
    if (access != READ) {
      for (const Stamp& reader : cell.readers)
        check_race(region, p, reader, access, "read", address);
      // its atomic does not make up for a plain write by which the same thread still races
      const bool hidden = same_moment(cell.writer, me) && !cell.writer.atomic;
      cell.writer = me;
      if (hidden) cell.writer.atomic = false;
    } else {
      const Stamp& newest = cell.readers[0];
      if (newest.block != me.block || newest.thread / WARP != m.current / WARP)
        cell.readers[1] = newest;
      cell.readers[0] = me;
    }
  }
}
[[noreturn]] void fail_out_of_bounds(const char* p, size_t size, Access access,
                                     const void* address) {
  ptrdiff_t distance = 0;
  const Region* region = m.memory.nearest(p, size, &distance);
  if (!region)
    fail(address, "out of bounds: %s of %zu bytes at %p", ACCESS[access], size,
         static_cast<const void*>(p));
  fail(address, "out of bounds: %s of %zu bytes, %td bytes %s %s (%zu bytes)", ACCESS[access], size,
       labs(distance), distance < 0 ? "before the start of" : "past the end of", region->name,
       region->size);
}
void check_access(const void* vp, size_t size, Access access, const void* address) {
  const char* p = static_cast<const char*>(vp);
  if (!m.running || m.fibers.owns(p)) return;
  spend(1, address);
  Region* region = m.memory.find(p);
  if (!region || p + size > region->base + region->size)
    fail_out_of_bounds(p, size, access, address);
  if (access != READ && !region->writable)
    fail(address, "write to %s, which is read only", region->name);
  const bool power_of_two = !(size & (size - 1));
  if (power_of_two && size <= 16 && reinterpret_cast<uintptr_t>(p) % size)
    fail(address, "misaligned: %s of %zu bytes at byte %td of %s", ACCESS[access], size,
         p - region->base, region->name);
  if (region->history) check_races(*region, p, size, access, address);
}
// Larger pieces, and copies of structs, whose parts may be aligned to less than the whole.
void check_range(const void* vp, size_t size, Access access, const void* address) {
  const char* p = static_cast<const char*>(vp);
  const size_t step = (reinterpret_cast<uintptr_t>(p) | size) % 4 ? 1 : 4;
  for (size_t i = 0; i < size; i += step) check_access(p + i, step, access, address);
}

}  // namespace simt
