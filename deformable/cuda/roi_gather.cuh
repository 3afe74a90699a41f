// Gradients of an image without atomic operations on floating-point numbers: a block owns a tile of
// pixels and goes through the bins of the image's RoIs that see one of them, always in the same order.
#pragma once
#include "roi.cuh"

// ---- lists

// Some of the items that the threads of a block have looked at, in the order of the threads: up to
// 256 of them, 8 warps.
template <class Item> struct List {
  Item item[256];
  int found[8];
};

// Lists the items that are a hit and returns how many. All threads of the block take part; what was
// in the list is overwritten when all of them are here.
template <class Item>
__device__ __forceinline__ int gather_hits(bool hit, const Item& item, List<Item>& list) {
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

// ---- tiles of pixels

// ROWS x COLUMNS pixels of one plane: thread rows are its rows, lanes its channels.
struct PixelTile {
  int image, plane, y, x, channel;
};

__device__ __forceinline__ PixelTile pixel_tile(const RoIGeometry& g) {
  unsigned rest = blockIdx.x;
  const auto digit = [&](unsigned base) {  // of the block's number, the lowest first
    const unsigned it = rest % base;
    rest /= base;
    return static_cast<int>(it);
  };
  const int depth = blockDim.x * VEC;
  const int chunk = digit(quotient_up(g.depth(), depth)), plane = digit(g.planes());
  const int x = digit(quotient_up(g.width, COLUMNS)), y = digit(quotient_up(g.height, ROWS));
  const int channel = chunk * depth + threadIdx.x * VEC;
  return {static_cast<int>(rest), plane, y * ROWS, x * COLUMNS, channel};
}

// The pixels that the bins of a RoI see lie within these.
struct Reach {
  int y, end_y, x, end_x;
};

// The RoIs by their images: those of an image are order[first], ..., in their order. The first of
// every image, and the end, lie behind the order.
struct RoIs {
  const int* order;
  const Reach* reaches;
};

// The bins of a RoI that see a plane.
struct PlaneBins {
  int y, x, height, width, offsets;

  __device__ index_t count() const { return static_cast<index_t>(height) * width; }
  __device__ Bin of(int roi, index_t i) const {
    return {roi, y + static_cast<int>(i / width), x + static_cast<int>(i % width), offsets};
  }
};

__device__ __forceinline__ PlaneBins bins_of_plane(const RoIGeometry& g, int plane) {
  const int group = plane / g.classes;
  const int group_y = group / g.group_w, group_x = group % g.group_w;
  const int y = first_of_part(group_y, g.group_h, g.pooled_h);
  const int x = first_of_part(group_x, g.group_w, g.pooled_w);
  return {y, x, first_of_part(group_y + 1, g.group_h, g.pooled_h) - y,
          first_of_part(group_x + 1, g.group_w, g.pooled_w) - x, plane % g.classes};
}

__device__ __forceinline__ bool overlap(int first, int end, int tile, int size) {
  return first < tile + size && end > tile;
}

__device__ __forceinline__ bool sees(const Run& run, int tile, int size) {
  return overlap(run.pixel, run.pixel + run.pixels, tile, size);
}

// A bin that sees a pixel of the tile: its row, and its runs along y and along x.
struct Hit {
  index_t row, y, x;
};

// Calls use(n) for list after list of the n bins that see a pixel of the tile, always in the same
// order: first the RoIs of the image are looked through, 16 bytes of each, then the bins of those
// that reach the tile.
template <class Use>
__device__ __forceinline__ void for_bins_that_see(const PixelTile& tile, const RoIGeometry& g,
                                                  const Run* runs, const RoIs& rois,
                                                  List<int>& near, List<Hit>& hits, Use use) {
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;
  const PlaneBins bins = bins_of_plane(g, tile.plane);
  const int* const first = rois.order + g.rois + tile.image;
  const int end = first[1];
  for (int next = first[0]; next < end; next += threads) {
    int roi = 0;
    bool is_hit = thread < end - next;
    if (is_hit) {
      roi = rois.order[next + thread];
      const Reach reach = rois.reaches[roi];
      is_hit = overlap(reach.y, reach.end_y, tile.y, ROWS) &&
               overlap(reach.x, reach.end_x, tile.x, COLUMNS);
    }
    const index_t candidates = gather_hits(is_hit, roi, near) * bins.count();
    for (index_t first = 0; first < candidates; first += threads) {
      Hit hit = {};
      is_hit = thread < candidates - first;
      if (is_hit) {
        const index_t place = (first + thread) / bins.count();
        const Bin bin = bins.of(near.item[place], first + thread - place * bins.count());
        const index_t row = row_of(g, bin);
        hit = {row, run_y(g, row, bin), run_x(g, row, bin)};
        is_hit = sees(runs[hit.y], tile.y, ROWS) && sees(runs[hit.x], tile.x, COLUMNS);
      }
      use(gather_hits(is_hit, hit, hits));
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
    if (tile.x + i >= g.width) return;
    store(image + pixel_offset(g, tile.image, y, tile.x + i, tile.plane) + tile.channel, sums[i]);
  }
}
