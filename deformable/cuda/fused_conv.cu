// _fused.py: a convolution as one kernel. The columns exist only in registers, where they are made
// and multiplied: no buffer of columns, no shared memory for them.
//
// A block computes 32·WARPS output positions x TILE_N output channels, a warp 32 positions. It goes
// through the product in steps; a step is, for every position, 64 bytes of channels of a sample:
//
//   plan      once per sample: pixels and weights of its corners, into shared memory
//   gather    16 bytes of every corner's channels per lane, for the next step
//   blend     weighted sum of the corners in float32
//   multiply  on tensor cores, with weights that cp.async has brought meanwhile
//   promote   of three terms: the sums of CHAIN steps are added to totals in shared memory
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
// Macros: DTYPE, TERMS (3: float32 by three TF32 products), TILE_N, WARPS, CORNERS,
// VEC (channels per load), OFFSET, MASK, OUT (float: partial sums of a split product).
#include "fused_product.cuh"

constexpr int TILE_M = 32 * WARPS, THREADS = 32 * WARPS;
// of a multiprocessor, which limits registers; channels that are loaded one by one take more
constexpr int BLOCKS = (TILE_N * TERMS < 64 && VEC > 1 ? 12 : 8) / WARPS;
constexpr int N8 = TILE_N / 8;
constexpr int STAGE = N8 * 32 * (TERMS == 3 ? 2 : 1);  // 16-byte units of weights in a step
constexpr int CHAIN = 4;  // steps; with K = 4608 the error is 1e-6 of the scale
constexpr int TOTALS = TERMS == 3 ? 2 * N8 * THREADS : 0;  // of four sums each

struct Layout {
  int depth, outs;  // channels and output channels of a group of weights
  int run;          // channels
  int run_bytes;
  int runs;         // of a group of weights
  int rows;         // runs of a pixel: the image is read as rows of a run
  int rows_shared;  // consecutive rows with the same samples, those of an offset group
  int samples;      // of a step: 1, 2 or 4
  int lane_bits;    // 1 << lane_bits lanes of a quad share one
  int step_bytes;   // channels of a step
  int chunks;       // steps to get through a run
  int slots;        // steps with samples of their own: 4 >> lane_bits samples each
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

// The first step of the chunk after the one that a step is in.
__device__ __forceinline__ Step next_chunk(const Layout& l, const Step& at) {
  if (at.chunk + 1 < l.chunks) return {at.first_slot, at.slots, 0, at.chunk + 1};
  const int slot = at.first_slot + at.slots;
  return {slot, min(l.planned, l.slots - slot), 0, 0};
}

// A sample of a group of weights: a tap of a run.
struct alignas(16) SampleId {
  int row;          // of the pixel's runs; OUTSIDE: none, a slot has room left
  int dy, dx;       // of the tap, in pixels
  int offset_group_and_tap;
};

// ---- weights (O, C / groups, kh, kw) -> packed (groups, tiles, steps, [high, low], TILE_N, 64 bytes),
// one more step of zeros, which is fetched though never used, and a list of the samples (groups,
// slots, 4 >> lane_bits)
extern "C" __global__ void __launch_bounds__(256)
    pack_weights(const T* __restrict__ weight, Unit* __restrict__ packed,
                 SampleId* __restrict__ samples, const Strides strides, const ConvGeometry g,
                 const Layout l, const int64 units) {
  const int64 i = static_cast<int64>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int samples_of_group = l.slots * l.samples;
  if (i < g.groups * samples_of_group) {
    const int group = i / samples_of_group, sample = i - group * samples_of_group;
    const int run = sample / g.taps(), tap = sample - run * g.taps(), row = group * l.runs + run;
    samples[i] = {run < l.runs ? row : OUTSIDE, tap / g.kernel_w * g.dilation_h,
                  tap % g.kernel_w * g.dilation_w, row / l.rows_shared * g.taps() + tap};
  }
  if (i >= units) return;

  const int in_stage = i % STAGE, lane = in_stage % 32, j = in_stage / 32 % N8, t = lane % 4;
  const int part = in_stage / (32 * N8);  // 0: all or the high parts, 1: the low parts
  const int64 stage = i / STAGE;
  const int tile = stage / l.steps, group = tile / l.tiles;
  const int out = (tile - group * l.tiles) * TILE_N + out_channel(j, lane / 4);
  const Step at = step_at(l, stage - static_cast<int64>(tile) * l.steps);
  const int sample = (at.first_slot + at.slot) * l.samples + (t >> l.lane_bits);
  const int run = sample / g.taps(), tap = sample - run * g.taps();

  float value[UNIT];
#pragma unroll
  for (int e = 0; e < UNIT; ++e) {
    const int channel = ((at.chunk << l.lane_bits) + (t & ((1 << l.lane_bits) - 1))) * UNIT + e;
    const bool exists = group < g.groups && out < l.outs && run < l.runs && channel < l.run;
    const float w = exists ? static_cast<float>(weight[strides(
                                 group * l.outs + out, run * l.run + channel, tap / g.kernel_w,
                                 tap % g.kernel_w)])
                           : 0;
    const float low = isinf(w) ? 0 : w - high_part(w);
    value[e] = TERMS == 1 ? w : part == 0 ? high_part(w) : low;
  }
  Math<T>::round(packed[i], value);
}

// ---- the product

// The plan in shared memory: (samples, rows or weights, positions).
union Cell {
  Pixels rows;  // of `run` channels, to be exact
  Weights weights;
};
constexpr int SAMPLE = (CORNERS == 1 ? 1 : 2) * TILE_M;  // cells

// Plans samples for the thread's own output position; only its warp reads that. Returns a bit for each
// slot: all corners of all 32 positions of the warp lie inside.
__device__ __forceinline__ u32 plan_slots(const ConvGeometry& g, const Layout& l,
                                          const Places& places, const OutputPixel& out,
                                          const SampleId* samples, int slots, Cell* own) {
  u32 inside = static_cast<u32>((1ull << slots) - 1);
  __syncwarp();  // the last plan has been read
  for (int n = 0; n < slots * l.samples; ++n) {
    const SampleId sample = samples[n];
    Pixels rows;
    Weights weights = {};
    if (sample.row >= 0) {
      plan_sample(g, places, out, sample.dy, sample.dx, sample.offset_group_and_tap, rows, weights);
    }
    bool all = true;
#pragma unroll
    for (int corner = 0; corner < CORNERS; ++corner) {
      const int pixel = sample.row >= 0 ? rows.corner[corner] : OUTSIDE;
      all &= pixel >= 0;
      rows.corner[corner] = pixel < 0 ? OUTSIDE : pixel * l.rows + sample.row;
    }
    own[n * SAMPLE].rows = rows;
    if (CORNERS == 4) own[n * SAMPLE + TILE_M].weights = weights;
    if (!__all_sync(0xffffffffu, all)) inside &= ~(1u << (n << l.lane_bits) / 4);
  }
  __syncwarp();
  return inside;
}

// The lane's units of the corners of its rows; a row of `image` is a run of channels.
template <bool CHECKED>
__device__ __forceinline__ void gather(Unit (&seen)[ROWS][CORNERS], const char* image,
                                       int run_bytes, const Cell* plan, int left) {
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const Pixels at = plan[8 * r].rows;
#pragma unroll
    for (int corner = 0; corner < CORNERS; ++corner) {
      const int row = at.corner[corner];
      seen[r][corner] = load_unit<VEC, CHECKED>(advance(image, row, run_bytes), row >= 0, left);
    }
  }
}

typedef float Sums[N8][2][4];  // of an n8 tile with 16 rows, twice

// The tile's sums leave for y (positions, O), only infinite ones unless `all`. Returns if one is NaN.
__device__ __forceinline__ bool store(OUT* __restrict__ y, const T* __restrict__ bias,
                                      const Sums& sums, int position, int positions, int channels,
                                      int first, int last, bool all) {
  constexpr int PART = sizeof(Unit) / sizeof(OUT);
  struct alignas(Unit) Part {
    OUT value[PART];
  };
  const bool whole = all && (channels | first) % PART == 0;  // PART is a power of two
  bool nan = false;
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    if (position + 8 * r >= positions) break;
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
          const float sum = sums[j + (i + k) / 2][r / 2][r % 2 * 2 + (i + k) % 2];
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

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    fused_conv(const T* __restrict__ image, const OFFSET* __restrict__ offset,
               const MASK* __restrict__ mask, const Unit* __restrict__ packed,
               const SampleId* __restrict__ samples, const T* __restrict__ bias,
               OUT* __restrict__ y, const ConvGeometry g, const Layout l,
               const Strides offset_strides, const Strides mask_strides) {
  __shared__ OutputPixel outputs[TILE_M];
  DYN_SHARED(Unit, ring);  // the weights of two steps, totals, the plan
  Quad* const totals = reinterpret_cast<Quad*>(ring + 2 * STAGE);
  Cell* const plan = reinterpret_cast<Cell*>(totals + TOTALS);
  const Places places = {offset, mask, offset_strides, mask_strides};

  // a grid of tiles of positions, tiles of the output channels of every group, parts of the product
  const int positions = g.batch * g.positions(), first_position = blockIdx.x * TILE_M;
  const int group = blockIdx.y / l.tiles, tile = blockIdx.y - group * l.tiles;
  const int begin = blockIdx.z * l.split, first_step = blockIdx.y * l.steps + begin;
  const int steps = min(l.split, l.steps - begin), outs = l.outs - tile * TILE_N;

  const int lane = threadIdx.x, warp = threadIdx.y, t = lane % 4;
  const int thread = 32 * warp + lane, row = 32 * warp + lane / 4;
  const int own_bytes = (t & ((1 << l.lane_bits) - 1)) * 16;
  const Cell* const first_sample = plan + (t >> l.lane_bits) * SAMPLE + row;

  // a thread plans one position (and multiplies four, of its own warp); those behind the end repeat
  // the last one, for nothing
  outputs[thread] = output_pixel(g, min(first_position + thread, positions - 1));

  for (bool corrected = true;; corrected = false) {
    // a warp copies a piece of its own of the weights: the addresses of a lane differ by constants
    const int piece = warp * (STAGE / WARPS);
    const Unit* weights = packed + static_cast<int64>(first_step) * STAGE + piece + lane;
    const auto fetch = [&](int stage) {
#pragma unroll
      for (int i = 0; i < STAGE / WARPS; i += 32) cp_async<16>(ring + stage + piece + i, weights + i);
      cp_async_commit();
      weights += STAGE;
    };

    Step at = step_at(l, begin);     // the first one of the next chunk
    int planned_slot = -1;           // the first one of the plan
    int slots = 0;                   // that are left of the chunk
    u32 planned, inside;             // a bit for each slot of the plan, of the chunk: nothing to check
    const Cell* sample;              // of the lane in this step
    const char* channels;            // of the lane in this chunk
    int channels_left;
    Unit seen[ROWS][CORNERS];
    const auto gather_next = [&]() {
      if (slots == 0) {
        if (at.first_slot != planned_slot) {
          planned_slot = at.first_slot;
          planned = plan_slots(g, l, places, outputs[thread],
                               samples + (group * l.slots + at.first_slot) * l.samples, at.slots,
                               plan + thread);
        }
        const int first_byte = at.chunk * l.step_bytes + own_bytes;
        channels = reinterpret_cast<const char*>(image) + first_byte;
        channels_left = (l.run_bytes - first_byte) / static_cast<int>(sizeof(T));
        inside = (at.chunk + 1) * l.step_bytes <= l.run_bytes ? planned >> at.slot : 0;
        sample = first_sample + at.slot * l.samples * SAMPLE;
        slots = at.slots - at.slot;
        at = next_chunk(l, at);
      }
      if (inside & 1) {
        gather<false>(seen, channels, l.run_bytes, sample, UNIT);
      } else {
        gather<true>(seen, channels, l.run_bytes, sample, channels_left);
      }
    };

    for (int i = thread; i < TOTALS; i += THREADS) totals[i] = {};
    Sums sums = {};
    int stage = lane;  // of the ring: a lane's first unit of the weights of this step
    fetch(stage);
    gather_next();
    for (int left = steps; left > 0; --left) {
      Unit a[ROWS];
#pragma unroll
      for (int r = 0; r < ROWS; ++r) blend(a[r], seen[r], sample[TILE_M + 8 * r].weights);
      sample += l.samples * SAMPLE;
      inside >>= 1;
      --slots;
      gather_next();

      cp_async_wait<0>();
      __syncthreads();
      fetch(stage ^ STAGE);
      if (corrected) {
        multiply_step<true>(sums, a, ring + stage, outs);
      } else {
        multiply_step<false>(sums, a, ring + stage, outs);
      }
      if (TERMS == 3 && left % CHAIN == 0) promote<false, THREADS>(sums, totals + thread);
      stage ^= STAGE;
    }

    if (TERMS == 3) promote<true, THREADS>(sums, totals + thread);
    cp_async_wait<0>();
    const int first = group * l.outs + tile * TILE_N;
    const bool nan = store(y + static_cast<int64>(blockIdx.z) * positions * g.out_channels, bias,
                           sums, first_position + row, positions, g.out_channels,
                           first + t * UNIT, (group + 1) * l.outs, corrected);
    if (TERMS != 3 || !corrected || !any_of_block(nan)) break;
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
