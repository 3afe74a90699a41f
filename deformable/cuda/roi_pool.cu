// roi_pool.py: the largest pixels of cells, and the gradient of all that lets one value win.
//
// Rows are the bins of all RoIs. Layouts, all contiguous:
//   image (N, H, W, C)   y, grad_y, winner_y, winner_x (rows, C)   runs: roi.cuh
#include "roi_gather.cuh"
#include "roi_winner.cuh"

// A thread row goes through one cell, its lanes through the channels: a read and a comparison for
// every pixel, VEC channels at a time. Returns the largest value, or where it lies (roi_winner.cuh):
// two numbers per output, which the backward finds anew instead of keeping them.
extern "C" __global__ void __launch_bounds__(256, 2)
    maximum(const T* __restrict__ image, const Run* __restrict__ runs,
            const int* __restrict__ images, T* __restrict__ y, A* __restrict__ winner_y,
            A* __restrict__ winner_x, const RoIGeometry g) {
  const index_t row = static_cast<index_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= g.rows()) return;

  const Bin bin = bin_of(g, row);
  const Run& along_y = runs[run_y(g, row, bin)];
  const Run& along_x = runs[run_x(g, row, bin)];
  const bool lost = isnan(along_y.start);  // and along x: both are the RoI's
  const int height = static_cast<int>(along_y.total), width = static_cast<int>(along_x.total);
  for (int c = threadIdx.x * VEC; c < g.channels; c += blockDim.x * VEC) {
    Winner winner;
    for (int i = 0; i < height; ++i) {
      const T* pixel = image + c + pixel_offset(g, images[bin.roi], along_y.pixel + i,
                                                along_x.pixel, 0);
      for (int j = 0; j < width; ++j) {
        winner.offer(load(pixel + static_cast<int64>(j) * g.channels), i, j);
      }
    }
    winner.store_to(static_cast<int64>(row) * g.channels + c, lost, y, winner_y, winner_x);
  }
}

__device__ __forceinline__ A hat(A distance) { return max(static_cast<A>(0), 1 - abs(distance)); }

// A block gathers the gradient of a tile of pixels, a thread that of COLUMNS of them, from the bins
// whose winner lies within a pixel of them. It reads the winner's row for every row of pixels that
// the bin sees, the rest only where that row is near. Every pixel is written once.
extern "C" __global__ void __launch_bounds__(256, sizeof(A) == 8 ? 1 : 2)
    winner_gradient(const T* __restrict__ grad_y, const A* __restrict__ winner_y,
                    const A* __restrict__ winner_x, const Run* __restrict__ runs,
                    const int* __restrict__ order, const Reach* __restrict__ reaches,
                    T* __restrict__ grad_image, const RoIGeometry g) {
  __shared__ List<int> near;
  __shared__ List<Hit> hits;
  const PixelTile tile = pixel_tile(g);
  Vector sums[COLUMNS];
  for (int i = 0; i < COLUMNS; ++i) sums[i] = zero();
  for_bins_that_see(tile, g, runs, {order, reaches}, near, hits, [&](int found) {
    for (int b = 0; b < found && tile.channel < g.channels; ++b) {
      const Hit hit = hits.item[b];
      const int y = tile.y + threadIdx.y - runs[hit.y].pixel;
      if (y < 0 || y >= runs[hit.y].pixels) continue;
      const int64 at = static_cast<int64>(hit.row) * g.channels + tile.channel;
      Vector along_y = load(winner_y + at);
      bool any = false;
#pragma unroll
      for (int k = 0; k < VEC; ++k) {
        along_y.value[k] = hat(y - along_y.value[k]);
        any = any || along_y.value[k] != 0;
      }
      if (!any) continue;
      const int x = tile.x - runs[hit.x].pixel;
      const Vector grad = load(grad_y + at), at_x = load(winner_x + at);
#pragma unroll
      for (int k = 0; k < VEC; ++k) {
#pragma unroll
        for (int i = 0; i < COLUMNS; ++i) {
          const A weight = along_y.value[k] * hat(x + i - at_x.value[k]);
          if (weight != 0) sums[i].value[k] += weight * grad.value[k];
        }
      }
    }
  });
  store_pixels(g, tile, sums, grad_image);
}
