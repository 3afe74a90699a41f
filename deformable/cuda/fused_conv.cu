// _fused.py: a convolution as one kernel. The columns exist only in registers, where they are made
// and multiplied: no buffer of columns, no shared memory for them.
//
// A block computes 32·WARPS output positions x TILE_N output channels, a warp 32 positions. It goes
// through the product in steps; a step is, for every position, 64 bytes of channels of a sample:
//
//   plan      once per sample: pixels and weights of its corners, into shared memory
//   gather    16 bytes of every corner's channels per lane, for the next step
//   blend     weighted sum of the corners in float32
//   multiply  on tensor cores, with weights that cp.async brings STAGES - 1 steps ahead
//   store     bias, rounding, 16 bytes per lane
//
// What a lane has blended IS its fragment of A. An mma wants of lane 4·q + t, in row q (and q + 8), the
// columns t' of its K in registers r0 and r1; it does not care which channels these are as long as B
// agrees. So the K of the two mma's of a step are shared out like this (16-bit channels; of 32-bit
// ones a register holds one, and a step 16):
//
//    channel of the step   0 1  2 3  4 5  6 7 | 8 9 10 11 12 13 14 15 | 16 ..         | 24 .. 31
//    held by lane          ------ t = 0 ----- | ------- t = 1 ------- | --- t = 2 --- | - t = 3 -
//    register of the lane   0    1    2    3  |  0    1     2     3   | 0   1   2   3 | 0  1  2  3
//    mma and K of it       0:0  0:8  1:0  1:8 | 0:2  0:10  1:2   1:10 | 0:4 ..        | 0:6 .. 1:14
//
// A lane loads 16 bytes of consecutive channels, and B, read the same way, is 16 bytes of consecutive
// channels of one output channel: the packed weights (steps, TILE_N, 64 bytes) need no other order.
// The output channels are permuted likewise, so that the sums that a lane holds of several n8 tiles are
// consecutive and leave as 16 bytes (`out_channel`).
//
// Samples are counted (run, tap): a run is the channels that share a sample and lie in one group of
// weights. Where a run has fewer than 64 bytes the lanes of a quad share a step among 2 or 4 samples.
//
// Macros: DTYPE, TERMS (3: float32 by three TF32 products), TILE_N, WARPS, BLOCKS (per SM), CORNERS,
// VEC (channels per load), OFFSET, MASK, OUT (float: partial sums of a split product).
#include "fused_plan.cuh"
#include "ptx.cuh"

constexpr int STAGES = 3;
constexpr int UNIT = 16 / sizeof(T);  // channels that a lane holds of a row
constexpr int ROWS = 4;               // of a lane: q, q + 8, q + 16, q + 24
constexpr int TILE_M = 32 * WARPS, THREADS = 32 * WARPS;
constexpr int N8 = TILE_N / 8;
constexpr int STAGE = N8 * 32 * (TERMS == 3 ? 2 : 1);  // 16-byte units of weights in a step
constexpr int SPAN = UNIT / 2;  // n8 tiles of which a lane's sums are consecutive output channels

struct Layout {
  int depth, outs;  // channels and output channels of a group of weights
  int run;          // channels
  int runs;         // of a group of weights
  int rows;         // runs of a pixel: the image is read as rows of a run
  int rows_shared;  // consecutive rows with the same samples, those of an offset group
  int lanes;        // of a quad that share a sample: 1, 2 or 4
  int chunks;       // steps to get through a run
  int slots;        // steps with samples of their own: 4 / lanes samples each
  int planned;      // slots that are planned together
  int steps;        // of the whole product
  int split;        // steps of a block
  int tiles;        // of the output channels of a group
};

// A step's place in the product. Steps go through the slots that are planned together, then through the
// chunks of their runs, then on to the next plan.
struct Step {
  int first_slot, slots;  // of the plan
  int slot, chunk;        // slot within the plan
};

__device__ __forceinline__ Step step_at(const Layout& l, int step) {
  const int plan = step / (l.planned * l.chunks), rest = step - plan * l.planned * l.chunks;
  const int slots = min(l.planned, l.slots - plan * l.planned);
  return {plan * l.planned, slots, rest % slots, rest / slots};
}

// A sample: a tap of a run.
struct SampleId {
  int run, i, j;
};

__device__ __forceinline__ SampleId sample_at(const ConvGeometry& g, int sample) {
  const int run = sample / g.taps(), tap = sample - run * g.taps(), i = tap / g.kernel_w;
  return {run, i, tap - i * g.kernel_w};
}

__device__ __forceinline__ void advance(const ConvGeometry& g, SampleId& sample) {
  if (++sample.j < g.kernel_w) return;
  sample.j = 0;
  if (++sample.i < g.kernel_h) return;
  sample.i = 0;
  ++sample.run;
}

// Column c of n8 tile j is this output channel of the tile.
__device__ __forceinline__ int out_channel(int j, int c) {
  return j / SPAN * 8 * SPAN + c / 2 * 2 * SPAN + j % SPAN * 2 + c % 2;
}

__device__ __forceinline__ float high_part(float x) {  // the bits that TF32 has
  return __uint_as_float(__float_as_uint(x) & 0xffffe000u);
}

// What a lane holds of a row: 16 bytes of channels, which are registers of a fragment.
struct alignas(16) Unit {
  u32 reg[4];
};

// A unit as floats, rounding to one, and d += a b on tensor cores.
template <typename S> struct Math;
template <> struct Math<__half> {
  static __device__ __forceinline__ void unpack(float (&v)[8], const Unit& u) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = __half22float2(reinterpret_cast<const __half2&>(u.reg[i]));
      v[2 * i] = pair.x, v[2 * i + 1] = pair.y;
    }
  }
  static __device__ __forceinline__ void round(Unit& u, const float (&v)[8]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const __half2 pair = __floats2half2_rn(v[2 * i], v[2 * i + 1]);
      u.reg[i] = reinterpret_cast<const u32&>(pair);
    }
  }
  static __device__ __forceinline__ void mma(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    mma_m16n8k16_f16(d, a, b);
  }
};
template <> struct Math<__nv_bfloat16> {
  static __device__ __forceinline__ void unpack(float (&v)[8], const Unit& u) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      v[2 * i] = __uint_as_float(u.reg[i] << 16);
      v[2 * i + 1] = __uint_as_float(u.reg[i] & 0xffff0000u);
    }
  }
  static __device__ __forceinline__ void round(Unit& u, const float (&v)[8]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(v[2 * i], v[2 * i + 1]);
      u.reg[i] = reinterpret_cast<const u32&>(pair);
    }
  }
  static __device__ __forceinline__ void mma(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    mma_m16n8k16_bf16(d, a, b);
  }
};
template <> struct Math<float> {
  static __device__ __forceinline__ void unpack(float (&v)[4], const Unit& u) {
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = __uint_as_float(u.reg[i]);
  }
  static __device__ __forceinline__ void round(Unit& u, const float (&v)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) u.reg[i] = TERMS == 3 ? __float_as_uint(v[i]) : to_tf32(v[i]);
  }
  static __device__ __forceinline__ void mma(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    mma_m16n8k8_tf32(d, a, b);
  }
};

// ---- weights (O, C / groups, kh, kw) -> (groups, tiles, steps, [high, low], TILE_N, 64 bytes)
extern "C" __global__ void __launch_bounds__(256)
    pack_weights(const T* __restrict__ weight, const Strides strides, Unit* __restrict__ packed,
                 const ConvGeometry g, const Layout l, const int64 units) {
  const int64 i = static_cast<int64>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= units) return;

  const int in_stage = i % STAGE, lane = in_stage % 32, j = in_stage / 32 % N8, t = lane % 4;
  const int part = in_stage / (32 * N8);  // 0: all or the high parts, 1: the low parts
  const int64 stage = i / STAGE;
  const int tile = stage / l.steps, group = tile / l.tiles;
  const int out = (tile - group * l.tiles) * TILE_N + out_channel(j, lane / 4);
  const Step at = step_at(l, stage - static_cast<int64>(tile) * l.steps);
  const SampleId sample =
      sample_at(g, (at.first_slot + at.slot) * (4 / l.lanes) + t / l.lanes);

  float value[UNIT];
#pragma unroll
  for (int e = 0; e < UNIT; ++e) {
    const int channel = (at.chunk * l.lanes + t % l.lanes) * UNIT + e;
    const bool exists = out < l.outs && sample.run < l.runs && channel < l.run;
    const float w =
        exists ? static_cast<float>(weight[strides(
                     group * l.outs + out, sample.run * l.run + channel, sample.i, sample.j)])
               : 0;
    const float low = isinf(w) ? 0 : w - high_part(w);
    value[e] = TERMS == 1 ? w : part == 0 ? high_part(w) : low;
  }
  Math<T>::round(packed[i], value);
}

// ---- the product

struct SamplePlan {
  Pixels rows[TILE_M];
  Weights weights[TILE_M];
};

// Plans the next slots for the thread's own output position; only its warp reads that. Answers a bit for
// each slot: all corners of all 32 positions of the warp lie inside.
__device__ __forceinline__ u32 plan_slots(const ConvGeometry& g, const Layout& l,
                                          const Places& places, const OutputPixel& out, int group,
                                          int slots, SampleId& sample, SamplePlan* plan) {
  u32 inside = 0xffffffffu;
  __syncwarp();  // the last plan has been read
  for (int n = 0; n < slots * (4 / l.lanes); ++n) {
    const int row_of_pixel = group * l.runs + sample.run;
    Pixels rows;
    Weights weights;
#pragma unroll
    for (int corner = 0; corner < CORNERS; ++corner) {
      rows.corner[corner] = -1;
      weights.corner[corner] = 0;
    }
    if (out.image >= 0 && sample.run < l.runs) {
      plan_sample(g, places, out, row_of_pixel / l.rows_shared, sample.i, sample.j, rows, weights);
    }
    bool all = true;
#pragma unroll
    for (int corner = 0; corner < CORNERS; ++corner) {
      int& row = rows.corner[corner];
      all &= row >= 0;
      row = row < 0 ? -1 : row * l.rows + row_of_pixel;
    }
    plan[n].rows[threadIdx.x] = rows;
    if (CORNERS > 1) plan[n].weights[threadIdx.x] = weights;
    if (!__all_sync(0xffffffffu, all)) inside &= ~(1u << n * l.lanes / 4);
    advance(g, sample);
  }
  __syncwarp();
  return inside;
}

// A unit by loads of VEC channels. CHECKED: zeros if it does not `exist`, and from channel `left` on.
template <bool CHECKED>
__device__ __forceinline__ Unit load_unit(const char* from, bool exists, int left) {
  Unit u = {};
#pragma unroll
  for (int v = 0; v < UNIT; v += VEC) {
    if (CHECKED && !(exists && v < left)) continue;
    const char* at = from + v * sizeof(T);
    if constexpr (VEC * sizeof(T) == 16) {
      const uint4 r = __ldg(reinterpret_cast<const uint4*>(at));
      u = {r.x, r.y, r.z, r.w};
    } else if constexpr (VEC * sizeof(T) == 8) {
      const uint2 r = __ldg(reinterpret_cast<const uint2*>(at));
      u.reg[v / VEC * 2] = r.x, u.reg[v / VEC * 2 + 1] = r.y;
    } else if constexpr (VEC * sizeof(T) == 4) {
      u.reg[v / VEC] = __ldg(reinterpret_cast<const u32*>(at));
    } else {
      u.reg[v / 2] |= __ldg(reinterpret_cast<const unsigned short*>(at)) << v % 2 * 16;
    }
  }
  return u;
}

// The lane's units of the corners of its rows; a row of `image` is a run of channels.
template <bool CHECKED>
__device__ __forceinline__ void gather(Unit (&seen)[ROWS][CORNERS], const char* image,
                                       int run_bytes, const Pixels* rows, int left) {
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const Pixels at = rows[8 * r];
#pragma unroll
    for (int corner = 0; corner < CORNERS; ++corner) {
      const int row = at.corner[corner];
      seen[r][corner] = load_unit<CHECKED>(advance(image, row, run_bytes), row >= 0, left);
    }
  }
}

__device__ __forceinline__ void blend(Unit& a, const Unit (&seen)[CORNERS], const Weights& weights) {
  if constexpr (CORNERS == 1 && sizeof(T) == 2) {
    a = seen[0];
  } else {
    float sum[UNIT];
    if constexpr (CORNERS == 1) {
      Math<T>::unpack(sum, seen[0]);
    } else {
#pragma unroll
      for (int e = 0; e < UNIT; ++e) sum[e] = 0;
#pragma unroll
      for (int corner = 0; corner < CORNERS; ++corner) {
        float value[UNIT];
        Math<T>::unpack(value, seen[corner]);
#pragma unroll
        for (int e = 0; e < UNIT; ++e) sum[e] += weights.corner[corner] * value[e];
      }
    }
    Math<T>::round(a, sum);
  }
}

// sum += two mma's: the products of 16 rows, from row 16·m of the warp on, with an n8 tile.
__device__ __forceinline__ void multiply(float (&sum)[4], const Unit (&a)[ROWS], int m, const Unit& b) {
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const Unit &upper = a[2 * m], &lower = a[2 * m + 1];
    const u32 fragment[4] = {upper.reg[i], lower.reg[i], upper.reg[i + 1], lower.reg[i + 1]};
    const u32 weights[2] = {b.reg[i], b.reg[i + 1]};
    Math<T>::mma(sum, fragment, weights);
  }
}

typedef float Sums[2][N8][4];

// The products of a step. Three TF32 products stand for one of float32: with x = high + low,
// a b = low high' + high low' + high high' but for 2^-22 of it. Tensor cores add with truncation, so
// that a step's sum, of 16 channels, is added to the others outside of them.
__device__ __forceinline__ void multiply_step(Sums& sums, const Unit (&a)[ROWS], const Unit* stage,
                                              bool corrected) {
  if constexpr (TERMS == 1) {
#pragma unroll
    for (int j = 0; j < N8; ++j) {
      const Unit b = stage[32 * j];
#pragma unroll
      for (int m = 0; m < 2; ++m) multiply(sums[m][j], a, m, b);
    }
  } else {
    Unit high[ROWS], low[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float x = __uint_as_float(a[r].reg[i]), upper = high_part(x);
        high[r].reg[i] = __float_as_uint(upper);
        low[r].reg[i] = __float_as_uint(x - upper);
      }
    }
#pragma unroll
    for (int j = 0; j < N8; ++j) {
      const Unit b_high = stage[32 * j], b_low = stage[32 * (N8 + j)];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        float sum[4] = {0, 0, 0, 0};
        if (corrected) {
          multiply(sum, low, m, b_high);
          multiply(sum, high, m, b_low);
        }
        multiply(sum, high, m, b_high);
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[m][j][i] += sum[i];
      }
    }
  }
}

// The tile's sums leave for y (positions, O), only infinite ones unless `all`. Answers if one is NaN.
__device__ __forceinline__ bool store(OUT* __restrict__ y, const T* __restrict__ bias,
                                      const Sums& sums, int position, int positions, int channels,
                                      int first, int last, bool all) {
  constexpr int PART = 16 / sizeof(OUT);
  struct alignas(16) Part {
    OUT value[PART];
  };
  const bool whole = all && channels % PART == 0 && first % PART == 0;
  bool nan = false;
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    if (position + 8 * r >= positions) continue;
    OUT* const line = y + static_cast<int64>(position + 8 * r) * channels;
#pragma unroll
    for (int j = 0; j < N8; j += SPAN) {
#pragma unroll
      for (int i = 0; i < UNIT; i += PART) {
        const int channel = first + j * 8 + i;
        Part part;
        bool store[PART];
#pragma unroll
        for (int k = 0; k < PART; ++k) {
          const float sum = sums[r / 2][j + (i + k) / 2][r % 2 * 2 + (i + k) % 2];
          store[k] = channel + k < last && (all || isinf(sum));
          nan |= isnan(sum);
          part.value[k] = sum + (bias && channel + k < last ? static_cast<float>(bias[channel + k]) : 0);
        }
        if (whole && channel + PART <= last) {
          *reinterpret_cast<Part*>(line + channel) = part;
        } else {
#pragma unroll
          for (int k = 0; k < PART; ++k) {
            if (store[k]) line[channel + k] = part.value[k];
          }
        }
      }
    }
  }
  return nan;
}

__device__ __forceinline__ bool any_of_block(bool mine) {
  __shared__ int found[WARPS];
  const bool any = __any_sync(0xffffffffu, mine);
  __syncthreads();  // nobody reads an earlier answer, or the ring, any more
  if (threadIdx.x % 32 == 0) found[threadIdx.x / 32] = any;
  __syncthreads();
  bool all_found = false;
#pragma unroll
  for (int w = 0; w < WARPS; ++w) all_found |= found[w];
  return all_found;
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    fused_conv(const T* __restrict__ image, const OFFSET* __restrict__ offset,
               const MASK* __restrict__ mask, const Unit* __restrict__ packed,
               const T* __restrict__ bias, OUT* __restrict__ y, const ConvGeometry g,
               const Layout l, const Strides offset_strides, const Strides mask_strides) {
  __shared__ OutputPixel outputs[TILE_M];
  DYN_SHARED(Unit, ring);
  SamplePlan* const plan = reinterpret_cast<SamplePlan*>(ring + STAGES * STAGE);
  const Places places = {offset, mask, offset_strides, mask_strides};

  // consecutive blocks compute the same positions: what one has gathered the others find in L2
  const int tiles = g.groups * l.tiles, positions = g.batch * g.positions();
  const int tiles_m = (positions + TILE_M - 1) / TILE_M;
  const int tile = blockIdx.x % tiles, rest = blockIdx.x / tiles;
  const int tile_m = rest % tiles_m, part = rest / tiles_m, group = tile / l.tiles;
  const int begin = part * l.split, steps = min(l.split, l.steps - begin);

  const int lane = threadIdx.x % 32, t = lane % 4;
  const int warp_row = threadIdx.x - lane, row = warp_row + lane / 4;
  const int per_slot = 4 / l.lanes, sample_of_slot = t / l.lanes, unit = t % l.lanes;
  const int run_bytes = l.run * sizeof(T), step_bytes = 16 * l.lanes;
  const char* const units = reinterpret_cast<const char*>(image + unit * UNIT);

  // a thread plans one position (and multiplies four, of its own warp)
  const int position = tile_m * TILE_M + threadIdx.x;
  outputs[threadIdx.x] = output_pixel(g, min(position, positions - 1));
  if (position >= positions) outputs[threadIdx.x].image = -1;

  // a warp copies a piece of its own of the weights: the addresses of a lane differ by constants
  const int piece = warp_row * (STAGE / THREADS) + lane;
  for (bool corrected = true;; corrected = false) {
    const Unit* from = packed + (static_cast<int64>(tile) * l.steps + begin) * STAGE + piece;
    const auto fetch = [&](int step, int stage) {
      if (step < steps) {
  #pragma unroll
        for (int i = 0; i < STAGE / WARPS; i += 32) {
          cp_async<16>(ring + stage * STAGE + piece + i, from + i);
        }
        from += STAGE;
      }
      cp_async_commit();
    };
    for (int stage = 0; stage < STAGES - 1; ++stage) fetch(stage, stage);

    Sums sums = {};
    Unit seen[ROWS][CORNERS], a[ROWS];
    Step at = step_at(l, begin);
    SampleId sample = sample_at(g, at.first_slot * per_slot);
    const char* channels = units + at.chunk * step_bytes;
    int left = run_bytes - at.chunk * step_bytes;
    u32 inside = 0;
    bool planned = false;
    for (int step = -1, stage = STAGES - 1; step < steps; ++step) {
      if (step >= 0) {
        const Weights* weights = plan[at.slot * per_slot + sample_of_slot].weights + row;
  #pragma unroll
        for (int r = 0; r < ROWS; ++r) blend(a[r], seen[r], weights[8 * r]);
        if (++at.slot == at.slots) {
          at.slot = 0;
          channels += step_bytes;
          left -= step_bytes;
          if (left <= 0) {
            channels = units;
            left = run_bytes;
            at.first_slot += l.planned;
            planned = false;
          }
        }
      }
      if (step + 1 < steps) {
        if (!planned) {
          at.slots = min(l.planned, l.slots - at.first_slot);
          inside = plan_slots(g, l, places, outputs[threadIdx.x], group, at.slots, sample, plan);
          planned = true;
        }
        const Pixels* rows = plan[at.slot * per_slot + sample_of_slot].rows + row;
        if (inside >> at.slot & 1 && left >= step_bytes) {
          gather<false>(seen, channels, run_bytes, rows, 0);
        } else {
          gather<true>(seen, channels, run_bytes, rows, left / sizeof(T) - unit * UNIT);
        }
      }
      if (step >= 0) {
        cp_async_wait<STAGES - 2>();
        __syncthreads();
        fetch(step + STAGES - 1, stage == 0 ? STAGES - 1 : stage - 1);
        multiply_step(sums, a, ring + stage * STAGE + lane, corrected);
      }
      stage = stage == STAGES - 1 ? 0 : stage + 1;
    }

    const int first = group * l.outs + (tile - group * l.tiles) * TILE_N;
    const bool nan = store(y + static_cast<int64>(part) * positions * g.out_channels, bias, sums,
                           tile_m * TILE_M + row, positions, g.out_channels, first + t * UNIT,
                           (group + 1) * l.outs, corrected);
    if (TERMS == 1 || !corrected || !any_of_block(nan)) break;
  }
}

// y = bias + the sums of the parts of a split product, always in the order of the parts.
extern "C" __global__ void __launch_bounds__(256)
    add_parts(const float* __restrict__ sums, const T* __restrict__ bias, T* __restrict__ y,
              const int64 size, const int64 channels, const int64 parts) {
  const int64 i = static_cast<int64>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= size) return;

  float sum = 0;
  for (int64 part = 0; part < parts; ++part) sum += sums[part * size + i];
  y[i] = static_cast<T>(sum + (bias ? static_cast<float>(bias[i % channels]) : 0));
}
