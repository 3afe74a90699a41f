// roi_align.py: means of bins, of all operators of the family that average, and maxima of samples.
//
// Rows are the bins of all RoIs. Layouts, all contiguous:
//   image (N, H, W, planes, depth)   y, grad_y (rows, depth)   mask (K, PH, PW)   runs: roi.cuh
// A mean is separable, Σ_y weight_y Σ_x weight_x pixel: every pixel that a bin sees is read once,
// however many samples lie around it, and its weights are shared by all channels.
#include "roi_gather.cuh"
#include "roi_winner.cuh"

constexpr int BATCH = 16;

// A thread row computes one bin. Its lanes list what weighs something in a tile of pixels, then each
// sums channels. For VEC outputs it reads every pixel of the list once, at most (2 s)^2 of them for
// s x s samples: 9 instructions per pixel and 4 channels, and per bin two runs and 2 TILE weights. It
// writes every output once.
extern "C" __global__ void __launch_bounds__(256, 2)
    average(const T* __restrict__ image, const Run* __restrict__ runs,
            const A* __restrict__ table, const int* __restrict__ images,
            const double* __restrict__ mask, T* __restrict__ y, const RoIGeometry g,
            const Rule rule) {
  __shared__ Weights tables[ROWS];
  const index_t row = static_cast<index_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= g.rows()) return;  // only the lanes of a thread row ever wait for each other

  const Bin bin = bin_of(g, row);
  const index_t number_y = run_y(g, row, bin), number_x = run_x(g, row, bin);
  const Run &along_y = runs[number_y], &along_x = runs[number_x];
  const A scale = mean_of(rule, along_y, along_x) * mask_of(g, mask, row);
  const bool lost = isnan(along_y.start) || isnan(along_x.start) || isnan(scale);
  const bool one_tile = along_y.pixels <= TILE && along_x.pixels <= TILE;
  const index_t corner = pixel_offset(g, images[bin.roi], along_y.pixel, along_x.pixel,
                                      plane_of(g, bin));
  const int depth = g.depth();
  Weights& weights = tables[threadIdx.y];
  for (int first = 0; first < depth; first += blockDim.x * VEC) {
    const int c = first + threadIdx.x * VEC;
    Vector sum = zero();
    for (int ty = 0; ty < along_y.pixels; ty += TILE) {
      for (int tx = 0; tx < along_x.pixels; tx += TILE) {
        if (first == 0 || !one_tile) {
          list_weights(weights, [&](int axis, int place) -> Weight {
            const int step = (axis ? tx : ty) + place;
            const A weight = weight_of(runs, table, axis ? number_x : number_y, step,
                                       axis ? g.width : g.height);
            // the mask may be infinite
            return {axis || weight == 0 ? weight : weight * scale, step * step_of(g, axis), 0};
          });
        }
        if (c >= depth) continue;
        for (int i = 0; i < weights.count[0]; ++i) {
          const Weight& at_y = weights.along[0][i];
          const index_t line = corner + c + at_y.offset;
          Vector of_line = zero();
#pragma unroll 4  // so many loads on their way
          for (int j = 0; j < weights.count[1]; ++j) {
            const Weight& at_x = weights.along[1][j];
            add(of_line, at_x.weight, load(image + (line + at_x.offset)));
          }
          add(sum, at_y.weight, of_line);
        }
      }
    }
    if (c < depth) store(y + static_cast<int64>(row) * depth + c, lost ? filled(nan("")) : sum);
  }
}

// A block gathers the gradient of a tile of pixels, a thread that of COLUMNS of them. The weights of
// BATCH bins are looked up together. Then a bin takes one addition per pixel and channel, and one
// read of its gradient per row of pixels in which it weighs something. Every pixel is written once.
extern "C" __global__ void __launch_bounds__(256, 1)
    average_gradient(const T* __restrict__ grad_y, const Run* __restrict__ runs,
                     const int* __restrict__ order, const Reach* __restrict__ reaches,
                     T* __restrict__ grad_image, const A* __restrict__ table,
                     const double* __restrict__ mask, const RoIGeometry g, const Rule rule) {
  __shared__ List<int> near;
  __shared__ List<Hit> hits;
  __shared__ A weights[BATCH][ROWS + COLUMNS];  // of a column and of a row of pixels
  const PixelTile tile = pixel_tile(g);
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;
  const int depth = g.depth();
  Vector sums[COLUMNS];
  for (int i = 0; i < COLUMNS; ++i) sums[i] = zero();
  for_bins_that_see(tile, g, runs, {order, reaches}, near, hits, [&](int found) {
    for (int first = 0; first < found; first += BATCH) {
      const int size = min(BATCH, found - first);
      for (int i = thread; i < size * (ROWS + COLUMNS); i += threads) {
        const int b = i / (ROWS + COLUMNS), place = i % (ROWS + COLUMNS);
        const bool along_y = place < ROWS;
        const Hit hit = hits.item[first + b];
        const index_t number = along_y ? hit.y : hit.x;
        const int step = (along_y ? tile.y + place : tile.x + place - ROWS) - runs[number].pixel;
        A weight = 0;
        if (step >= 0) {
          weight = weight_of(runs, table, number, step, along_y ? g.height : g.width);
        }
        if (along_y && weight != 0) {
          weight *= mean_of(rule, runs[hit.y], runs[hit.x]) * mask_of(g, mask, hit.row);
        }
        weights[b][place] = weight;
      }
      __syncthreads();
      for (int b = 0; b < size && tile.channel < depth; ++b) {
        const A along_y = weights[b][threadIdx.y];
        if (along_y == 0) continue;
        const int64 row = hits.item[first + b].row;
        const Vector grad = load(grad_y + row * depth + tile.channel);
#pragma unroll
        for (int i = 0; i < COLUMNS; ++i) {
          const A along_x = weights[b][ROWS + i];
          if (along_x != 0) add(sums[i], along_y * along_x, grad);
        }
      }
      __syncthreads();
    }
  });
  store_pixels(g, tile, sums, grad_image);
}

// ---- maxima

// Where a sample lies along an axis, between `pixel` and the next one, and what these weigh.
struct Place {
  int pixel;
  A weight[2];
};

// The i-th of the samples that count, in the order of the definition.
__device__ __forceinline__ Place place_of(const Run& run, int64 i, int size) {
  const double at = run.position(run.backwards ? run.end - 1 - i : run.first + i);
  const double inside = fmin(fmax(at, 0.), size - 1.);
  const double fraction = inside - floor(inside);
  return {static_cast<int>(floor(inside)), {static_cast<A>(1 - fraction), static_cast<A>(fraction)}};
}

// Products that are rounded before they are added, as in NumPy: where samples are equal but for their
// rounding, that tells which of them is the largest.
__device__ __forceinline__ float product(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double product(double a, double b) { return __dmul_rn(a, b); }

// Whether the first sample, by the definition, is outside.
__device__ __forceinline__ bool skips(const Run& run) {
  return run.backwards ? run.end < run.total : run.first > 0;
}

// A thread row finds the largest sample of one bin, for each channel: its value, or where it lies,
// from the first pixel on that the bin sees (roi_winner.cuh). A sample reads its corners.
extern "C" __global__ void __launch_bounds__(256, 2)
    maximum(const T* __restrict__ image, const Run* __restrict__ runs,
            const int* __restrict__ images, T* __restrict__ y, A* __restrict__ winner_y,
            A* __restrict__ winner_x, const RoIGeometry g) {
  __shared__ Place tables[ROWS][TILE];
  const index_t row = static_cast<index_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= g.rows()) return;  // only the lanes of a thread row ever wait for each other

  const Bin bin = bin_of(g, row);
  const Run& along_y = runs[run_y(g, row, bin)];
  const Run& along_x = runs[run_x(g, row, bin)];
  const int64 kept_y = static_cast<int64>(along_y.end - along_y.first);
  const int64 kept_x = static_cast<int64>(along_x.end - along_x.first);
  // Samples outside are all 0: the first of them, before sample number `stand_in`, stands for all
  int64 stand_in = -1;
  if (static_cast<double>(kept_y) * kept_x < along_y.total * along_x.total) {
    stand_in = skips(along_y) || skips(along_x) ? 0
               : kept_x < along_x.total         ? kept_x
                                                : kept_y * kept_x;
  }
  const bool lost = isnan(along_y.start) || isnan(along_x.start);
  const int image_index = images[bin.roi], depth = g.depth();
  for (int first = 0; first < depth; first += blockDim.x * VEC) {
    const int c = first + threadIdx.x * VEC;
    Winner winner;
    int64 number = 0;
    for (int64 i = 0; i < kept_y; ++i) {
      const Place at_y = place_of(along_y, i, g.height);
      for (int64 tx = 0; tx < kept_x; tx += TILE) {
        const int size = static_cast<int>(min(static_cast<int64>(TILE), kept_x - tx));
        if (kept_x > TILE || (first == 0 && i == 0)) {
          __syncwarp(row_lanes());
          for (int j = threadIdx.x; j < size; j += blockDim.x) {
            tables[threadIdx.y][j] = place_of(along_x, tx + j, g.width);
          }
          __syncwarp(row_lanes());
        }
        for (int j = 0; j < size && c < depth; ++j, ++number) {
          if (number == stand_in) winner.offer(zero(), NOWHERE, NOWHERE);
          const Place at_x = tables[threadIdx.y][j];
          Vector value = zero();
          for (int corner = 0; corner < 4; ++corner) {
            const A weight = at_y.weight[corner >> 1] * at_x.weight[corner & 1];
            if (weight == 0) continue;
            const index_t pixel = pixel_offset(g, image_index, at_y.pixel + (corner >> 1),
                                               at_x.pixel + (corner & 1), 0);
            const Vector seen = load(image + c + pixel);
#pragma unroll
            for (int e = 0; e < VEC; ++e) value.value[e] += product(weight, seen.value[e]);
          }
          winner.offer(value, at_y.pixel - along_y.pixel + at_y.weight[1],
                       at_x.pixel - along_x.pixel + at_x.weight[1]);
        }
      }
    }
    if (number == stand_in) winner.offer(zero(), NOWHERE, NOWHERE);
    if (c < depth) winner.store_to(static_cast<int64>(row) * depth + c, lost, y, winner_y, winner_x);
  }
}
