// _fused_backward.py: the gradients of offsets, masks and columns, grad_y x weights, as one kernel.
//
// The gradient of a column, of one channel of a sample, is used where it is computed: its products
// with the four corners of the sample make the gradients of the offset and the mask. It is stored only
// for the gradient of the image, if that is wanted too.
//
// A block computes 32·WARPS output positions, a warp 32, for some taps of an offset group. It goes
// through their columns in tiles of TILE_N, and through the sum over output channels in steps:
//
//   plan      once per sample: pixels of its corners and fractions, into shared memory
//   product   on tensor cores, grad_y from global memory, weights by cp.async, both one step ahead
//   dots      of what a lane has of a tile with the channels of the four corners
//   store     columns, 16 bytes per lane; after the last tile of a sample its own gradients
//
// The product is that of fused_conv.cu for a plain 1x1 convolution, from output channels to columns:
// 16 bytes of grad_y are a lane's fragment of A, and its sums are of consecutive columns:
//
//    columns of a tile         | lane t = 0 | t = 1 | t = 2 | t = 3 | t = 0 | t = 1 | ..
//    unit of the lane          | ------------- 0 ------------------ | ----- 1 ------ ..
//    with one sample per tile, | ----------- units 0 .. 3 --------- | - units 4 .. 7 ..
//    with two                  |  sample 0, units 0, 1  |  sample 1 | sample 0, units 2, 3 ..
//
// Where a run (fused_conv.cu) has fewer channels than a tile, the lanes of a quad share a tile among
// 2 or 4 samples, taps that follow each other: a slot. Tiles go by slot, by run, through the run.
//
// Macros: DTYPE, TERMS, TILE_N, CORNERS (1: neither offsets nor masks), VEC (channels per load and
// store), OFFSET, MASK, WARPS.
#include "fused_product.cuh"

constexpr int TILE_M = 32 * WARPS, THREADS = 32 * WARPS;
constexpr int N8 = TILE_N / 8;
constexpr int UNITS = TILE_N / (4 * UNIT);              // of a lane
constexpr int STAGE = N8 * 32 * (TERMS == 3 ? 2 : 1);   // units of weights in a step
constexpr int CHAIN = 4;                                // steps, as in fused_conv.cu
constexpr u32 STEP_BYTES = 4 * sizeof(Unit);            // of a row of grad_y
constexpr int TOTALS = TERMS == 3 ? 2 * N8 * THREADS : 0;  // of four sums each
constexpr int KEPT = TERMS == 3 && CORNERS == 4 ? ROWS * THREADS : 0;  // dots, during a product
constexpr int BLOCKS = 2;  // of a multiprocessor: registers

struct Layout {
  int outs, run;    // output channels of a group of weights; channels of a run
  int out_units;    // of a group of weights, in grad_y: they end with zeros
  int runs, rows;   // runs of a group of weights, and of a pixel
  int rows_shared;  // consecutive rows with the same samples, those of an offset group
  int lane_bits;    // 1 << lane_bits lanes of a quad share a sample
  int samples;      // of a slot: 4 >> lane_bits
  int slots;        // of an offset group
  int chunks;       // tiles to get through a run
  int steps;        // of a tile, to get through the output channels
  int split;        // slots of a block
};

// ---- weights (O, C / groups, kh, kw) -> packed (tiles, steps, [high, low], TILE_N, 64 bytes), and
// one more step of zeros, which is fetched though never used
extern "C" __global__ void __launch_bounds__(256)
    pack_weights(const T* __restrict__ weight, Unit* __restrict__ packed, const Strides strides,
                 const ConvGeometry g, const Layout l, const int64 units) {
  const int64 i = static_cast<int64>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= units) return;

  const int in_stage = i % STAGE, lane = in_stage % 32, j = in_stage / 32 % N8, column = lane / 4;
  const int part = in_stage / (32 * N8);  // 0: all or the high parts, 1: the low parts
  const int64 stage = i / STAGE, tile = stage / l.steps, row_and_slot = tile / l.chunks;
  const int step = stage - tile * l.steps, chunk = tile - row_and_slot * l.chunks;
  const int slot = row_and_slot / l.rows_shared % l.slots;
  const int row = row_and_slot / l.rows_shared / l.slots * l.rows_shared +
                  row_and_slot % l.rows_shared;
  const int t = column / 2, tap = slot * l.samples + (t >> l.lane_bits);
  const int unit = ((chunk * UNITS + j / SPAN) << l.lane_bits) + (t & ((1 << l.lane_bits) - 1));
  const int channel = unit * UNIT + j % SPAN * 2 + column % 2, group = row / l.runs;

  float value[UNIT];
#pragma unroll
  for (int e = 0; e < UNIT; ++e) {
    const int out = (step * 4 + lane % 4) * UNIT + e;
    const bool exists = group < g.groups && out < l.outs && tap < g.taps() && channel < l.run;
    const float w = exists ? static_cast<float>(weight[strides(
                                 group * l.outs + out, (row - group * l.runs) * l.run + channel,
                                 tap / g.kernel_w, tap % g.kernel_w)])
                           : 0;
    const float low = isinf(w) ? 0 : w - high_part(w);
    value[e] = TERMS == 1 ? w : part == 0 ? high_part(w) : low;
  }
  Math<T>::round(packed[i], value);
}

// ---- the gradients

struct alignas(16) SamplePlan {
  int pixel[4];  // its runs' first row, or OUTSIDE
  A ly, lx, scale;
};

// Plans a slot for one output position; only the thread's warp reads that. Taps behind the last one
// repeat it, for nothing. Returns if all corners of all samples of the warp exist.
__device__ __forceinline__ bool plan_slot(const ConvGeometry& g, const Layout& l,
                                          const Places& places, int position, int first_tap,
                                          int offset_group, SamplePlan* own) {
  const OutputPixel out = output_pixel(g, position);
  bool inside = true;
  __syncwarp();  // the last plan has been read
  for (int n = 0; n < l.samples; ++n) {
    const int tap = min(first_tap + n, g.taps() - 1);
    const Sample s = offset_sample(g, places, out, tap / g.kernel_w * g.dilation_h,
                                   tap % g.kernel_w * g.dilation_w, offset_group * g.taps() + tap);
    SamplePlan p;
    p.ly = s.ly, p.lx = s.lx, p.scale = s.scale;
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      const int pixel = corner_pixel(s, corner, g.height, g.width);
      p.pixel[corner] = pixel < 0 ? OUTSIDE : (out.image * g.height * g.width + pixel) * l.rows;
      inside &= pixel != OUTSIDE;
    }
    own[n * TILE_M] = p;
  }
  return __all_sync(0xffffffffu, inside);  // read behind the barriers of a product
}

typedef float Sums[N8][2][4];  // of an n8 tile with 16 rows, twice

// The lane's units of its rows of grad_y, or zeros where they do not `exist`.
template <bool CHECKED>
__device__ __forceinline__ void load_rows(Unit (&a)[ROWS], const char* const (&rows)[ROWS], u32 byte,
                                          bool exist) {
#pragma unroll
  for (int r = 0; r < ROWS; ++r) a[r] = load_unit<UNIT, CHECKED>(rows[r] + byte, exist, UNIT);
}

// Remembers whether a sum is NaN.
__device__ __forceinline__ void look_for_nan(bool& nan, const Sums& sums) {
#pragma unroll
  for (int j = 0; j < N8; ++j) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < 4; ++i) nan |= isnan(sums[j][half][i]);
    }
  }
}

// Unit u of row r of a tile's sums, zeros from column `left` on.
__device__ __forceinline__ void take(float (&value)[UNIT], const Sums& sums, int u, int r, int left) {
#pragma unroll
  for (int e = 0; e < UNIT; ++e) {
    value[e] = e < left ? sums[u * SPAN + e / 2][r / 2][r % 2 * 2 + e % 2] : 0;
  }
}

// Adds the products with the corners' channels. CHECKED: zeros outside, and from channel `left` on.
template <bool CHECKED>
__device__ __forceinline__ void add_dots(A (&dots)[4], const float (&value)[UNIT],
                                         const int (&pixel)[4], const char* channels, int run_bytes,
                                         int left) {
#pragma unroll
  for (int corner = 0; corner < 4; ++corner) {
    const char* const from = advance(channels, pixel[corner], run_bytes);
    float seen[UNIT];
    Math<T>::unpack(seen, load_unit<VEC, CHECKED>(from, pixel[corner] >= 0, left));
#pragma unroll
    for (int e = 0; e < UNIT; ++e) dots[corner] += seen[e] * value[e];
  }
}

// VEC columns at a time of those that exist, only infinite ones unless `all`.
__device__ __forceinline__ void store_unit(T* to, const float (&value)[UNIT], int left, bool all) {
#pragma unroll
  for (int v = 0; v < UNIT; v += VEC) {
    if (v >= left) continue;
    Pack<T> part;
#pragma unroll
    for (int e = 0; e < VEC; ++e) part.value[e] = static_cast<T>(value[v + e]);
    if (!all) {
#pragma unroll
      for (int e = 0; e < VEC; ++e) {
        if (isinf(value[v + e])) to[v + e] = part.value[e];
      }
    } else if constexpr (VEC == UNIT) {  // the compiler makes four stores of one of a struct
      __stcg(reinterpret_cast<uint4*>(to), reinterpret_cast<const uint4&>(part));
    } else {
      *reinterpret_cast<Pack<T>*>(to + v) = part;
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    column_gradient(const Unit* __restrict__ grad_y, const T* __restrict__ image,
                    const OFFSET* __restrict__ offset, const MASK* __restrict__ mask,
                    const Unit* __restrict__ packed, T* __restrict__ grad_columns,
                    OFFSET* __restrict__ grad_offset, MASK* __restrict__ grad_mask,
                    const ConvGeometry g, const Layout l, const Strides offset_strides,
                    const Strides mask_strides, const int64 first, const int64 count) {
  DYN_SHARED(Unit, ring);  // the weights of two steps, totals, dots, the plan
  Quad* const totals = reinterpret_cast<Quad*>(ring + 2 * STAGE);
  Quad* const kept = totals + TOTALS;
  SamplePlan* const plan = reinterpret_cast<SamplePlan*>(kept + KEPT);
  const Places places = {offset, mask, offset_strides, mask_strides};

  // a grid of tiles of `count` positions from `first` on, parts of the slots, and offset groups
  const int tile_row = blockIdx.x * TILE_M, first_position = static_cast<int>(first) + tile_row;
  const int rows = static_cast<int>(count) - tile_row;
  const int first_slot = blockIdx.y * l.split, last_slot = min(first_slot + l.split, l.slots);
  const int offset_group = blockIdx.z, taps = g.taps();
  const bool dots_wanted = CORNERS == 4 && grad_offset;

  const int thread = threadIdx.x, lane = thread % 32, t = lane % 4;
  const int warp_row = thread - lane, row = warp_row + lane / 4;
  const int own_unit = t & ((1 << l.lane_bits) - 1), own_sample = t >> l.lane_bits;
  const SamplePlan* const own_plan = plan + own_sample * TILE_M + row;
  const int run_bytes = l.run * sizeof(T);
  const char* own_rows[ROWS];  // those behind the end repeat the last one, for nothing
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const int64 position = first_position + min(row + 8 * r, rows - 1);
    own_rows[r] = reinterpret_cast<const char*>(grad_y + position * (g.groups * l.out_units) + t);
  }

  const int64 column_step = static_cast<int64>(taps) * (g.channels / g.groups);  // to the next row
  const int64 first_step = static_cast<int64>(offset_group * l.slots + first_slot) *
                           l.rows_shared * l.chunks * l.steps;
  for (bool corrected = true;; corrected = false) {
    const Unit* const weights = packed + first_step * STAGE + thread;
    u32 fetched = 0;  // units
    const auto fetch = [&](int stage) {
#pragma unroll
      for (int i = 0; i < STAGE; i += THREADS) {
        cp_async<16>(ring + stage + thread + i, weights + fetched + i);
      }
      cp_async_commit();
      fetched += STAGE;
    };

    bool nan = false;
    int stage = 0;  // of the ring
    fetch(stage);
    for (int slot = first_slot; slot < last_slot; ++slot) {
      // all samples of the warp, and all of their corners
      bool inside = warp_row + 32 <= rows && (slot + 1) * l.samples <= taps;
      if (dots_wanted) {
        inside &= plan_slot(g, l, places, first_position + min(thread, rows - 1), slot * l.samples,
                            offset_group, plan + thread);
      }
      const int tap = slot * l.samples + own_sample;
      Quad dots[ROWS] = {};
#pragma unroll
      for (int i = 0; i < KEPT; i += THREADS) kept[thread + i] = {};
      for (int run = 0; run < l.rows_shared; ++run) {
        const int image_row = offset_group * l.rows_shared + run, group = image_row / l.runs;
        for (int chunk = 0; chunk < l.chunks; ++chunk) {
          Sums sums = {};
#pragma unroll
          for (int i = 0; i < TOTALS; i += THREADS) totals[thread + i] = {};
          // bytes of a row of grad_y that belong to the group
          const u32 begin = group * l.out_units * sizeof(Unit);
          const u32 end = begin + l.out_units * sizeof(Unit);
          Unit next[ROWS];
          const auto load_next = [&](u32 byte) {
            const bool exist = byte + t * sizeof(Unit) < end;
            if (byte + STEP_BYTES <= end) {
              load_rows<false>(next, own_rows, byte, exist);
            } else {
              load_rows<true>(next, own_rows, byte, exist);
            }
          };
          load_next(begin);
          for (u32 byte = begin; byte < end; byte += STEP_BYTES) {
            if (TERMS == 3 && byte > begin && (byte - begin) % (CHAIN * STEP_BYTES) == 0) {
              promote<false, THREADS>(sums, totals + thread);
            }
            Unit a[ROWS];
#pragma unroll
            for (int r = 0; r < ROWS; ++r) a[r] = moved(next[r]);
            load_next(byte + STEP_BYTES);
            cp_async_wait<0>();
            __syncthreads();
            fetch(stage ^ STAGE);
            if (corrected) {
              multiply_step<true>(sums, a, ring + stage + lane, TILE_N);
            } else {
              multiply_step<false>(sums, a, ring + stage + lane, TILE_N);
            }
            stage ^= STAGE;
          }
          if constexpr (TERMS == 3) {
            promote<true, THREADS>(sums, totals + thread);
            look_for_nan(nan, sums);
          }
#pragma unroll
          for (int i = 0; i < KEPT; i += THREADS) dots[i / THREADS] = kept[thread + i];

          const T* const pixels = image + image_row * l.run;
          T* const columns =
              grad_columns + column_offset(g, count, tile_row + row, tap, image_row * l.run);
          const auto use = [&](const bool whole) {  // a run of whole units, and all samples inside
#pragma unroll
            for (int u = 0; u < UNITS; ++u) {
              const int channel = (((chunk * UNITS + u) << l.lane_bits) + own_unit) * UNIT;
              const int left = whole ? UNIT : l.run - channel;
#pragma unroll
              for (int r = 0; r < ROWS; ++r) {
                // as a branch, it also keeps the loads of too many corners apart
                if (channel >= l.run) break;
                float value[UNIT];
                take(value, sums, u, r, left);
                if (dots_wanted) {
                  const char* const from = reinterpret_cast<const char*>(pixels + channel);
                  const int(&pixel)[4] = own_plan[8 * r].pixel;
                  if (whole) {
                    add_dots<false>(dots[r].value, value, pixel, from, run_bytes, left);
                  } else {
                    add_dots<true>(dots[r].value, value, pixel, from, run_bytes, left);
                  }
                }
                if (grad_columns && (whole || (row + 8 * r < rows && tap < taps))) {
                  store_unit(columns + 8 * r * column_step + channel, value, left, corrected);
                }
              }
            }
          };
          if (VEC == UNIT && inside) {
            use(true);
          } else {
            use(false);
          }
#pragma unroll
          for (int i = 0; i < KEPT; i += THREADS) kept[thread + i] = dots[i / THREADS];
        }
      }

      if (dots_wanted) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
#pragma unroll
          for (int corner = 0; corner < 4; ++corner) {
            float& dot = dots[r].value[corner];
            if (l.lane_bits > 0) dot += __shfl_xor_sync(0xffffffffu, dot, 1);
            if (l.lane_bits > 1) dot += __shfl_xor_sync(0xffffffffu, dot, 2);
          }
          if (own_unit || row + 8 * r >= rows || tap >= taps) continue;
          const SamplePlan& p = own_plan[8 * r];
          Sample sample = {};
          sample.ly = p.ly, sample.lx = p.lx, sample.scale = p.scale;
          const SampleGradient grad = sample_gradient(sample, dots[r].value);
          const int64 position = first_position + row + 8 * r;
          const int64 to = (position * g.offset_groups + offset_group) * taps + tap;
          if (corrected || isinf(grad.y)) grad_offset[2 * to] = static_cast<OFFSET>(grad.y);
          if (corrected || isinf(grad.x)) grad_offset[2 * to + 1] = static_cast<OFFSET>(grad.x);
          if (grad_mask && (corrected || isinf(grad.mask))) {
            grad_mask[to] = static_cast<MASK>(grad.mask);
          }
        }
      }
    }

    cp_async_wait<0>();
    if (TERMS != 3 || !corrected || !any_of_block(nan)) break;
  }
}
