// What a kernel may touch, and who touched it last: bounds, alignment and races.
#pragma once
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace simt {

using std::ptrdiff_t;
using std::size_t;

// Who made an access, and when. An access happens before another one of the same block if a
// barrier lies between them (`epoch` counts barriers), or if both are of one warp and __syncwarp
// has told the later thread of the earlier one's `clock` (each lane keeps a clock for every lane of
// its warp). Nothing orders the threads of different blocks.
struct Stamp {
  unsigned block;  // blocks are counted over all launches, from 1
  short thread;
  short atomic;
  unsigned epoch, clock;
};

// The history of a few bytes: the last writer and the last readers, of two different warps. (A
// third warp's read is forgotten, so a race with it alone can be missed; forgetting never invents
// one.)
struct Cell {
  Stamp writer, readers[2];
};

struct Region {
  char* base;
  size_t size;
  const char* name;
  int grain;  // bytes per cell of the history
  bool writable;
  bool shared;    // shared memory: poisoned before every block, which sees its own accesses alone
  bool internal;  // the kernel library's own constants: not named in messages, no history
  Cell* history;

  bool contains(const char* p) const { return p >= base && p < base + size; }
  size_t cells() const { return size / grain + 1; }
};

// Memory for the histories of a launch. It is used again without being cleared: stamps with a block
// of an earlier launch count for nothing.
class Histories {
 public:
  void open(Region& region) {
    const size_t cells = region.cells();
    const bool fits = kept_ && cells <= MOST_CELLS - used_;
    region.history = fits ? kept_ + used_ : map(cells);
    if (fits) used_ += cells;
  }
  void close(Region& region) {
    if (region.history && !keeps(region.history))
      munmap(static_cast<void*>(region.history), region.cells() * sizeof(Cell));
    region.history = nullptr;
  }
  void reuse() { used_ = 0; }
  void forget() { madvise(static_cast<void*>(kept_), MOST_CELLS * sizeof(Cell), MADV_DONTNEED); }

 private:
  static constexpr size_t MOST_CELLS = (256 << 20) / sizeof(Cell);

  static Cell* map(size_t cells) {
    void* memory = mmap(nullptr, cells * sizeof(Cell), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return memory == MAP_FAILED ? nullptr : static_cast<Cell*>(memory);
  }
  bool keeps(const Cell* cell) const { return cell >= kept_ && cell < kept_ + MOST_CELLS; }

  Cell* const kept_ = map(MOST_CELLS);
  size_t used_ = 0;
};

class Memory {
 public:
  void clear() {
    for (Region& region : regions_) histories_.close(region);
    histories_.reuse();
    regions_.clear();
    last_ = 0;
  }
  void add(const Region& region) { regions_.push_back(region); }
  void open_histories() {
    for (Region& region : regions_)
      if (!region.internal) histories_.open(region);
  }
  void forget_histories() { histories_.forget(); }
  // A block sees none of the shared memory of the one before: floats become NaN, integers -1.
  void begin_block() {
    for (Region& region : regions_)
      if (region.shared) memset(region.base, 0xff, region.size);
  }
  Region* find(const char* p) {
    if (last_ < regions_.size() && regions_[last_].contains(p)) return &regions_[last_];
    for (Region& region : regions_)
      if (region.contains(p)) {
        last_ = &region - regions_.data();
        return &region;
      }
    return nullptr;
  }
  // The region that an access outside all of them most likely meant, and how far it is away.
  const Region* nearest(const char* p, size_t size, ptrdiff_t* distance) const {
    const Region* best = nullptr;
    for (const Region& region : regions_) {
      if (region.internal) continue;
      ptrdiff_t d = p < region.base ? p - region.base : p + size - (region.base + region.size);
      if (!best || labs(d) < labs(*distance)) {
        best = &region;
        *distance = d;
      }
    }
    return best;
  }

 private:
  std::vector<Region> regions_;
  Histories histories_;
  size_t last_ = 0;  // where the previous access was: the next is likely there too
};

}  // namespace simt
