// Gradients of an image without a single atomic operation: a block owns a tile of pixels and goes
// through the bins of the image's RoIs that see one of them, always in the same order.
#pragma once
#include "roi.cuh"

// ROWS x COLUMNS pixels of one plane: thread rows are its rows, lanes its channels.
struct PixelTile {
  int image, plane, y, x, channel;
};

__device__ __forceinline__ PixelTile pixel_tile(const RoIGeometry& g) {
  const unsigned depth = blockDim.x * VEC;
  const unsigned counts[4] = {(g.depth() + depth - 1) / depth, static_cast<unsigned>(g.planes()),
                              static_cast<unsigned>((g.width + COLUMNS - 1) / COLUMNS),
                              static_cast<unsigned>((g.height + ROWS - 1) / ROWS)};
  unsigned at[4], rest = blockIdx.x;
  for (int i = 0; i < 4; ++i) {
    at[i] = rest % counts[i];
    rest /= counts[i];
  }
  return {static_cast<int>(rest), static_cast<int>(at[1]), static_cast<int>(at[3] * ROWS),
          static_cast<int>(at[2] * COLUMNS), static_cast<int>(at[0] * depth + threadIdx.x * VEC)};
}

// The bins of a RoI that see a plane.
struct PlaneBins {
  int y, x, height, width, offsets;

  __device__ index_t count() const { return static_cast<index_t>(height) * width; }
  __device__ Bin of(int roi, int i) const { return {roi, y + i / width, x + i % width, offsets}; }
};

__device__ __forceinline__ PlaneBins bins_of_plane(const RoIGeometry& g, int plane) {
  const int group = plane / g.classes;
  const int group_y = group / g.group_w, group_x = group % g.group_w;
  // the smallest bin with bin * groups / bins >= group
  const auto first = [](int64 group, int groups, int bins) {
    return static_cast<int>((group * bins + groups - 1) / groups);
  };
  const int y = first(group_y, g.group_h, g.pooled_h), x = first(group_x, g.group_w, g.pooled_w);
  return {y, x, first(group_y + 1, g.group_h, g.pooled_h) - y,
          first(group_x + 1, g.group_w, g.pooled_w) - x, plane % g.classes};
}

__device__ __forceinline__ bool sees(const Run& run, int first, int count) {
  return run.pixel < first + count && run.pixel + run.pixels > first;
}

// Whether a bin of the RoI may see one of these rows or columns of pixels: those that are not shifted
// lie between the outermost ones, where these are inside of the image.
__device__ __forceinline__ bool may_see(const RoIGeometry& g, const Run* runs, int roi, int pooled,
                                        int first, int count) {
  if (g.shifted()) return true;
  const Run& one = runs[static_cast<index_t>(roi) * pooled];
  const Run& other = runs[static_cast<index_t>(roi) * pooled + pooled - 1];
  if (one.pixels == 0 || other.pixels == 0) return true;
  return min(one.pixel, other.pixel) < first + count &&
         max(one.pixel + one.pixels, other.pixel + other.pixels) > first;
}

// Some of the items that the threads of a block have looked at, in the order of the threads.
struct List {
  index_t item[256];
  int found[8];
};

// Lists the items that are a hit and answers how many. All threads of the block take part, and none
// needs any more what was in the list.
__device__ __forceinline__ int gather_hits(bool hit, index_t item, List& list) {
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  const int warp = thread / 32, lane = thread % 32;
  const unsigned hits = __ballot_sync(~0u, hit);
  if (lane == 0) list.found[warp] = __popc(hits);
  __syncthreads();
  int before = __popc(hits & ((1u << lane) - 1)), total = 0;
  for (int w = 0; w < blockDim.x * blockDim.y / 32; ++w) {
    if (w < warp) before += list.found[w];
    total += list.found[w];
  }
  if (hit) list.item[before] = item;
  __syncthreads();
  return total;
}

// Calls use(n) for list after list of the n bins that see a pixel of the tile, always in the same
// order: first the RoIs of the image are looked through, then the bins of those that may see it.
// `keys` are image * RoIs + RoI, sorted; those of an image begin where `starts` says.
template <class Use>
__device__ __forceinline__ void for_bins_that_see(const PixelTile& tile, const RoIGeometry& g,
                                                  const Run* runs_y, const Run* runs_x,
                                                  const int64* keys, const int64* starts,
                                                  List& rois, List& rows, Use use) {
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;
  const PlaneBins bins = bins_of_plane(g, tile.plane);
  const int64* own = keys + starts[tile.image];
  const int count = static_cast<int>(starts[tile.image + 1] - starts[tile.image]);
  for (int next = 0; next < count; next += threads) {
    int roi = 0;
    bool hit = thread < count - next;
    if (hit) {
      roi = static_cast<int>(own[next + thread] - static_cast<int64>(tile.image) * g.rois);
      hit = may_see(g, runs_y, roi, g.pooled_h, tile.y, ROWS) &&
            may_see(g, runs_x, roi, g.pooled_w, tile.x, COLUMNS);
    }
    const index_t candidates = gather_hits(hit, roi, rois) * bins.count();
    for (index_t first = 0; first < candidates; first += threads) {
      index_t row = 0;
      hit = thread < candidates - first;
      if (hit) {
        const index_t place = (first + thread) / bins.count();
        const Bin bin = bins.of(static_cast<int>(rois.item[place]),
                                static_cast<int>(first + thread - place * bins.count()));
        row = row_of(g, bin);
        hit = sees(run_y(g, runs_y, row, bin), tile.y, ROWS) &&
              sees(run_x(g, runs_x, row, bin), tile.x, COLUMNS);
      }
      const int found = gather_hits(hit, row, rows);
      use(found);
      __syncthreads();
    }
  }
}

// Stores a thread's pixels, COLUMNS of one row.
__device__ __forceinline__ void store_pixels(const RoIGeometry& g, const PixelTile& tile,
                                             const Vector (&sums)[COLUMNS], T* image) {
  const int y = tile.y + threadIdx.y;
  if (y >= g.height || tile.channel >= g.depth()) return;
#pragma unroll
  for (int i = 0; i < COLUMNS; ++i) {
    if (tile.x + i >= g.width) continue;
    store(image + pixel_offset(g, tile.image, y, tile.x + i, tile.plane) + tile.channel, sums[i]);
  }
}
