// _fused_backward.py: the gradient of the weights, grad_yᵀ x columns, without a buffer of columns.
//
// A block computes TILE_O output channels x UNITS units of columns of a group of weights, summed over
// its part of the output positions; the parts are added later, always in the same order. It takes
// STAGE positions at a time:
//
//   plan      once per sample: pixels and weights of its corners, for several stages
//   gather    a unit (16 bytes) of every corner per thread, and grad_y, for the next stage
//   blend     weighted sum of the corners in float32, into shared memory beside grad_y
//   multiply  on tensor cores
//   store     float32 sums of the part
//
// Both factors lie in shared memory as they are in global memory, a row per position, but an mma sums
// over positions: its fragments are columns of these rows. ldmatrix transposes what has 16 bits; of
// 32 bits a register holds a single element, which any lane may read:
//
//            16 elements of a row                     as A: rows 0-7 and 8-15 of the mma
//                0-7      8-15                        as B: columns of two n8 tiles, {0, 2} and {1, 3}
//   first half  +--------+--------+
//   of the K    |   0    |   1    |   registers of a fragment (K is 16 positions for
//   positions   +--------+--------+   16-bit elements and 8 for float32)
//   second      |   2    |   3    |
//   half        +--------+--------+
//
// Columns are counted in units: (run, tap, unit of the run), see fused_conv.cu for runs. A thread
// gathers the same unit of columns for one position of every stage.
//
// Macros: DTYPE, TERMS, TILE_O, CORNERS, VEC (channels per load), OFFSET, MASK, WARPS, UNITS (of the
// columns of a tile), PLANS (samples that are planned at once, at most).
#include "fused_product.cuh"

constexpr int THREADS = 32 * WARPS;
constexpr int STAGE = THREADS / UNITS;  // positions: a thread gathers one unit
constexpr int TILE_C = UNITS * UNIT;
constexpr int WARPS_O = TILE_O == 128 ? 4 : 2, WARPS_C = WARPS / WARPS_O;
constexpr int M16 = TILE_O / WARPS_O / 16, N16 = TILE_C / WARPS_C / 16;  // tiles of a warp
constexpr int K = 2 * UNIT;                                              // positions of an mma
constexpr int PITCH_O = TILE_O + 8, PITCH_C = TILE_C + 8;  // rows of a fragment in different banks
constexpr int UNITS_O = TILE_O / UNIT;
constexpr int COPIED = (STAGE * UNITS_O + THREADS - 1) / THREADS;

struct Layout {
  int outs, run;         // output channels of a group of weights; channels of a run
  int out_units;         // of a group of weights, in grad_y: they end with zeros
  int rows;              // runs of a pixel: the image is read as rows of a run
  int rows_shared;       // consecutive rows with the same samples, those of an offset group
  int samples;           // of a group of weights: all taps of its runs
  int run_units;         // units of a run
  int planned;           // positions that are planned together
  int plans;             // samples that the units of a tile have, at most
  int tiles_o, tiles_c;  // of a group of weights
  int split;             // positions of a part
};

struct SamplePlan {
  Pixels rows;  // of `run` channels, to be exact
  Weights weights;
};

typedef float Sums[M16][2 * N16][4];

// Plans samples of a group of weights for `planned` positions from `first` on, of which `left` exist.
__device__ __forceinline__ void plan_samples(const ConvGeometry& g, const Layout& l,
                                             const Places& places, int group, int first_sample,
                                             int first, int left, SamplePlan* plan) {
  const int taps = g.taps();
  for (int i = threadIdx.x; i < l.plans * l.planned; i += THREADS) {
    const int n = i / l.planned, position = i - n * l.planned;
    const int sample = first_sample + n, run = sample / taps, tap = sample - run * taps;
    const int row = group * (l.samples / taps) + run;
    const bool exists = position < left && sample < l.samples;
    SamplePlan p = {};
    if (exists) {
      plan_sample(g, places, output_pixel(g, first + position), tap / g.kernel_w * g.dilation_h,
                  tap % g.kernel_w * g.dilation_w, row / l.rows_shared * taps + tap, p.rows,
                  p.weights);
    }
#pragma unroll
    for (int corner = 0; corner < CORNERS; ++corner) {
      int& pixel = p.rows.corner[corner];
      pixel = exists && pixel >= 0 ? pixel * l.rows + row : OUTSIDE;
    }
    plan[i] = p;
  }
}

// A fragment, as drawn above, of K rows of a tile.
template <int PITCH>
__device__ __forceinline__ void load_fragment(u32 (&r)[4], const T* tile) {
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(T) == 2) {
    ldmatrix_x4_trans(r, tile + (lane % 8 + lane / 16 * 8) * PITCH + lane / 8 % 2 * 8);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      r[i] = reinterpret_cast<const u32*>(tile)[(lane % 4 + i / 2 * 4) * PITCH + lane / 4 + i % 2 * 8];
    }
  }
}

// Adds the products of K positions: of each of the fragments a with one fragment, two n8 tiles.
__device__ __forceinline__ void multiply(Sums& sums, int n, const u32 (&a)[M16][4],
                                         const u32 (&b)[4]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const u32 columns[2] = {b[half], b[half + 2]};
#pragma unroll
    for (int m = 0; m < M16; ++m) Math<T>::mma(sums[m][2 * n + half], a[m], columns);
  }
}

// The products of a stage; `corrected` as in fused_product.cuh, where three terms stand for one.
template <bool CORRECTED>
__device__ __forceinline__ void multiply_stage(Sums& sums, const T* tile_y, const T* tile_c) {
#pragma unroll
  for (int k = 0; k < STAGE; k += K) {
    u32 a[M16][4], a_low[M16][4];
#pragma unroll
    for (int m = 0; m < M16; ++m) {
      load_fragment<PITCH_O>(a[m], tile_y + k * PITCH_O + 16 * m);
#pragma unroll
      for (int i = 0; i < 4 && TERMS == 3; ++i) split_tf32(a[m][i], a[m][i], a_low[m][i]);
    }
#pragma unroll
    for (int n = 0; n < N16; ++n) {
      u32 b[4], b_low[4];
      load_fragment<PITCH_C>(b, tile_c + k * PITCH_C + 16 * n);
#pragma unroll
      for (int i = 0; i < 4 && TERMS == 3; ++i) split_tf32(b[i], b[i], b_low[i]);
      if constexpr (TERMS == 3 && CORRECTED) {
        multiply(sums, n, a_low, b);
        multiply(sums, n, a, b_low);
      }
      multiply(sums, n, a, b);
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    weight_gradient(const Unit* __restrict__ grad_y, const T* __restrict__ image,
                    const OFFSET* __restrict__ offset, const MASK* __restrict__ mask,
                    float* __restrict__ parts, const ConvGeometry g, const Layout l,
                    const Strides offset_strides, const Strides mask_strides,
                    const int64 first_tile) {
  DYN_SHARED(SamplePlan, plan);  // (samples, positions)
  T* const tile_y = reinterpret_cast<T*>(plan + PLANS);
  T* const tile_c = tile_y + STAGE * PITCH_O;
  const Places places = {offset, mask, offset_strides, mask_strides};

  // a grid of tiles (groups, output channels, columns) and parts of the positions
  const int tile = static_cast<int>(first_tile) + blockIdx.x;
  const int group_and_o = tile / l.tiles_c, group = group_and_o / l.tiles_o;
  const int first_out_unit = (group_and_o - group * l.tiles_o) * UNITS_O;
  const int first_unit = (tile - group_and_o * l.tiles_c) * UNITS;
  const int begin = blockIdx.y * l.split;
  const int end = begin + min(l.split, g.batch * g.positions() - begin);

  // the unit of columns that the thread gathers
  const int first_sample = first_unit / l.run_units, unit = first_unit + threadIdx.x % UNITS;
  const int own_sample = unit / l.run_units, own_row = threadIdx.x / UNITS;
  const int own_channel = (unit - own_sample * l.run_units) * UNIT;
  const SamplePlan* const own_plan = plan + (own_sample - first_sample) * l.planned + own_row;
  Unit* const own_column =
      reinterpret_cast<Unit*>(tile_c + own_row * PITCH_C + threadIdx.x % UNITS * UNIT);
  const int run_bytes = l.run * sizeof(T), out_bytes = g.groups * l.out_units * sizeof(Unit);
  const char* const channels = reinterpret_cast<const char*>(image + own_channel);

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_o = warp % WARPS_O * M16 * 16, warp_c = warp / WARPS_O * N16 * 16;

  for (bool corrected = true;; corrected = false) {
    Sums sums = {};
    Unit seen[CORNERS], copied[COPIED];
    int in_plan = l.planned - STAGE;  // the first position of the stage
    for (int now = begin - STAGE; now < end; now += STAGE) {
      __syncthreads();  // the stage before this one has been multiplied
      if (now >= begin) {
        blend(*own_column, seen, own_plan[in_plan].weights);
#pragma unroll
        for (int i = 0; i < COPIED; ++i) {
          const int at = i * THREADS + threadIdx.x;
          if (STAGE * UNITS_O % THREADS && at >= STAGE * UNITS_O) continue;
          *reinterpret_cast<Unit*>(tile_y + at / UNITS_O * PITCH_O + at % UNITS_O * UNIT) = copied[i];
        }
      }
      __syncthreads();

      const int next = now + STAGE;
      if (next < end) {
        in_plan += STAGE;
        if (in_plan == l.planned) {
          in_plan = 0;
          plan_samples(g, l, places, group, first_sample, next, end - next, plan);
          __syncthreads();
        }
        const Pixels at = own_plan[in_plan].rows;
#pragma unroll
        for (int corner = 0; corner < CORNERS; ++corner) {
          const int row = at.corner[corner];
          seen[corner] = load_unit<VEC, true>(advance(channels, row, run_bytes), row >= 0,
                                              l.run - own_channel);
        }
#pragma unroll
        for (int i = 0; i < COPIED; ++i) {
          const int at = i * THREADS + threadIdx.x, position = next + at / UNITS_O;
          const int out_unit = first_out_unit + at % UNITS_O;
          const bool exists = position < end && at < STAGE * UNITS_O && out_unit < l.out_units;
          const Unit* const outs = grad_y + group * l.out_units + out_unit;
          copied[i] = load_unit<UNIT, true>(
              advance(reinterpret_cast<const char*>(outs), position, out_bytes), exists, UNIT);
        }
      }

      if (now < begin) continue;
      if constexpr (TERMS == 3) {
        // tensor cores truncate: the sums of many stages are added outside of them
        Sums stage_sums = {};
        if (corrected) {
          multiply_stage<true>(stage_sums, tile_y + warp_o, tile_c + warp_c);
        } else {
          multiply_stage<false>(stage_sums, tile_y + warp_o, tile_c + warp_c);
        }
#pragma unroll
        for (int i = 0; i < M16 * 2 * N16 * 4; ++i) {
          sums[i / 4 / (2 * N16)][i / 4 % (2 * N16)][i % 4] +=
              stage_sums[i / 4 / (2 * N16)][i / 4 % (2 * N16)][i % 4];
        }
      } else {
        multiply_stage<false>(sums, tile_y + warp_o, tile_c + warp_c);
      }
    }

    // a part has whole tiles, (tiles, TILE_O, TILE_C)
    float* const to = parts + (static_cast<int64>(blockIdx.y) * gridDim.x + blockIdx.x) *
                                  (TILE_O * TILE_C);
    bool nan = false;
#pragma unroll
    for (int m = 0; m < M16; ++m) {
#pragma unroll
      for (int n = 0; n < 2 * N16; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float left = sums[m][n][2 * half], right = sums[m][n][2 * half + 1];
          float* const pair = to + (warp_o + 16 * m + 8 * half + lane / 4) * TILE_C + warp_c +
                              8 * n + lane % 4 * 2;
          if (corrected) {
            *reinterpret_cast<float2*>(pair) = make_float2(left, right);
          } else {
            if (isinf(left)) pair[0] = left;
            if (isinf(right)) pair[1] = right;
          }
          nan |= isnan(left) || isnan(right);
        }
      }
    }
    if (TERMS != 3 || !corrected || !any_of_block(nan)) break;
  }
}

// The gradient of the weights (O, C / groups, kh, kw): the sums of all parts, in the order of the
// parts, where they are in these tiles.
extern "C" __global__ void __launch_bounds__(256)
    add_parts(const float* __restrict__ parts, T* __restrict__ grad_weight, const ConvGeometry g,
              const Layout l, const int64 first_tile, const int64 tiles, const int64 count) {
  const int64 i = static_cast<int64>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int depth = g.channels / g.groups, taps = g.taps();
  const int64 row = i / taps;
  const int tap = static_cast<int>(i - row * taps), out = static_cast<int>(row / depth);

  const int channel = static_cast<int>(row - static_cast<int64>(out) * depth);
  const int group = out / l.outs, o = out - group * l.outs, run = channel / l.run;
  const int column = (run * taps + tap) * l.run_units * UNIT + channel - run * l.run;
  const int64 tile = static_cast<int64>(group * l.tiles_o + o / TILE_O) * l.tiles_c +
                     column / TILE_C - first_tile;
  if (tile < 0 || tile >= tiles) return;  // also behind the last output channel

  float sum = 0;
  for (int64 part = 0; part < count; ++part) {
    sum += parts[((part * tiles + tile) * TILE_O + o % TILE_O) * TILE_C + column % TILE_C];
  }
  grad_weight[i] = static_cast<T>(sum);
}
