// Where a RoI lies, where its bins look and what a pixel weighs there: twin of _roi.py, which tells
// why. Positions are double, whatever the arrays hold: how many samples a bin has, and which of
// them are inside, jumps.
#pragma once
#include "vector.cuh"

struct RoIGeometry {
  int batch, channels, height, width, rois, pooled_h, pooled_w;
  int group_h, group_w, sampling_h, sampling_w, classes, part_h, part_w;
  double spatial_scale, gamma;

  __device__ int planes() const { return group_h * group_w * classes; }
  __device__ int depth() const { return channels / planes(); }
  __device__ index_t bins() const { return static_cast<index_t>(pooled_h) * pooled_w * classes; }
  __device__ index_t rows() const { return rois * bins(); }
  __device__ bool shifted() const { return part_h > 0; }
};

template <class Integer>
__device__ __forceinline__ Integer quotient_up(Integer a, Integer b) { return (a + b - 1) / b; }

enum Rounding { NONE, IMAGE, MAP };

struct Rule {
  int rounding;
  double shift, least;
  int whole;
  double phase, margin;
  int kept;
};

// ---- a RoI

struct Box {
  int image;  // -1 where the RoI is none: an index outside of the batch, a number that is not finite
  double y, x, height, width;
};

__device__ __forceinline__ Box box_of(const RoIGeometry& g, const Rule& rule, const double* rois,
                                      int k) {
  const double* roi = rois + 5 * static_cast<int64>(k);
  double corners[4];  // x1, y1, x2, y2
  bool valid = trunc(roi[0]) >= 0 && trunc(roi[0]) < g.batch;
  for (int i = 0; i < 4; ++i) {
    const int inclusive = i < 2 ? 0 : 1;
    double at = roi[1 + i];
    valid = valid && isfinite(at);
    if (rule.rounding == IMAGE) at = round(at) + inclusive;
    at = __dmul_rn(at, g.spatial_scale);
    if (rule.rounding == MAP) at = round(at) + inclusive;
    corners[i] = at - rule.shift;
  }
  return {valid ? static_cast<int>(roi[0]) : -1, corners[1], corners[0],
          fmax(corners[3] - corners[1], rule.least), fmax(corners[2] - corners[0], rule.least)};
}

// ---- the samples of a bin along one axis

// Sample i lies at start + (phase +- i) * extent / total, in the order of the axis: minus where the
// extent is negative. Those in [first, end) count; of these the ones in [inner, outer) lie between
// two pixels, the others are clamped to an outermost one.
struct Run {
  double start, extent, total, phase, rate;  // of sample 0, in steps; samples per pixel
  double first, inner, outer, end;
  int pixel, pixels;  // the first one that it sees, and how many at most
  int backwards;      // sample 0 is the last one by the definition

  // No fused multiply-add: the positions that the definition computes, as NumPy does
  __device__ double position(double i) const {
    return start + __dmul_rn(phase + (backwards ? -i : i), extent) / total;
  }

  // How many samples lie before q: the product is off by some rounding errors, and where that may
  // matter the position of the sample next to q decides.
  __device__ double before(double q) const {
    const double steps = __dmul_rn(q - start, rate) - phase;
    const double guess = backwards ? -steps : steps, nearest = rint(guess);
    const double error = 1e-12 * ((fabs(q) + fabs(start)) * fabs(rate) + phase + 1);
    if (fabs(guess - nearest) > error) return fmin(fmax(ceil(guess), 0.), total);
    const double i = fmin(fmax(nearest, 0.), total);  // 0 where all samples are at q: that is NaN
    return fmin(position(i) < q ? i + 1 : i, total);
  }
};

// A run of which the samples in [-margin, size - 1 + margin] count.
__device__ __forceinline__ Run make_run(double start, double extent, double total, double phase,
                                        double margin, int size) {
  // samples of a RoI that ends before it begins are counted from the other end, but lie where the
  // definition computes them
  const bool backwards = extent < 0;
  Run run = {start, extent, total, backwards ? phase + (total - 1) : phase, total / extent};
  run.backwards = backwards;
  run.first = run.before(-margin);
  run.end = run.before(nextafter(size - 1 + margin, size + margin));
  run.inner = fmin(fmax(run.before(0), run.first), run.end);
  run.outer = fmin(fmax(run.before(size - 1), run.inner), run.end);
  const double first = fmin(fmax(floor(run.position(run.first)), 0.), size - 1.);
  const double last = fmin(fmax(floor(run.position(run.end - 1)) + 1, 0.), size - 1.);
  run.pixel = static_cast<int>(first);
  run.pixels = run.end > run.first ? static_cast<int>(last - first) + 1 : 0;
  return run;
}

// The run of bin `p` along an axis, moved by `shift`.
__device__ __forceinline__ Run run_of(const Rule& rule, double origin, double length, int p,
                                      int pooled, int sampling, int size, double shift) {
  const double step = length / pooled;
  if (rule.whole) {
    const double base = rule.rounding == MAP ? origin : 0;
    double first = floor(__dmul_rn(p, step) + (origin - base)) + base;
    double last = ceil(__dmul_rn(p + 1, step) + (origin - base)) + base;
    first = fmin(fmax(first, 0.), size);
    last = fmin(fmax(last, 0.), size);
    const double total = fmax(last - first, 0.);
    return make_run(first, total, total, rule.phase, rule.margin, size);
  }
  const double total = sampling < 1 ? fmax(ceil(step), 0.) : sampling;
  return make_run(origin + __dmul_rn(p, step) + shift, step, total, rule.phase, rule.margin, size);
}

// What a pixel weighs in a run, a sum of hats, and the sum of the slopes of these.
struct Tap {
  double weight, slope;
};

__device__ __forceinline__ Tap tap_of(const Run& run, int pixel, int size) {
  const auto before = [&](int q) { return fmin(fmax(run.before(q), run.inner), run.outer); };
  Tap tap = {0, 0};
  double low = before(pixel - 1);
#pragma unroll 1  // side by side the two cells would take twice the registers
  for (int side = 0; side < 2; ++side) {
    const double high = before(pixel + side), samples = high - low;
    const double fraction = run.position((low + high - 1) / 2) - (pixel - 1 + side);
    const double right = __dmul_rn(samples, fraction);
    tap.weight += side ? samples - right : right;
    tap.slope += side ? -samples : samples;
    low = high;
  }
  if (pixel == 0) tap.weight += run.inner - run.first;
  if (pixel == size - 1) tap.weight += run.end - run.outer;
  return tap;
}

// What the pixel so many steps after the first one weighs in the run of this number. Where bins share
// runs a table has what the first TILE pixels of each run weigh, else it is null.
__device__ __forceinline__ A weight_of(const Run* runs, const A* table, index_t number, int step,
                                       int size) {
  if (table && step < TILE) return table[static_cast<int64>(number) * TILE + step];
  const Run& run = runs[number];
  return step < run.pixels ? static_cast<A>(tap_of(run, run.pixel + step, size).weight) : 0;
}

// ---- rows: the bins of all RoIs, in the order (RoI, bin's row, bin's column, class)

struct Bin {
  int roi, y, x, offsets;  // `offsets`: its class
};

__device__ __forceinline__ Bin bin_of(const RoIGeometry& g, index_t row) {
  const int roi = static_cast<int>(row / g.bins());
  const index_t place = row - roi * g.bins(), bin = place / g.classes;
  return {roi, static_cast<int>(bin / g.pooled_w), static_cast<int>(bin % g.pooled_w),
          static_cast<int>(place % g.classes)};
}

__device__ __forceinline__ index_t row_of(const RoIGeometry& g, const Bin& bin) {
  const index_t place = (static_cast<index_t>(bin.roi) * g.pooled_h + bin.y) * g.pooled_w + bin.x;
  return place * g.classes + bin.offsets;
}

// Runs along y, then those along x. Shifted bins have runs of their own, others share those of their
// row and of their column.
__device__ __forceinline__ index_t run_y(const RoIGeometry& g, index_t row, const Bin& bin) {
  return g.shifted() ? row : static_cast<index_t>(bin.roi) * g.pooled_h + bin.y;
}
__device__ __forceinline__ index_t run_x(const RoIGeometry& g, index_t row, const Bin& bin) {
  if (g.shifted()) return g.rows() + row;
  return static_cast<index_t>(g.rois) * g.pooled_h + static_cast<index_t>(bin.roi) * g.pooled_w +
         bin.x;
}

// The first of some bins that belongs to a part of them: that with bin * parts / bins >= part.
__device__ __forceinline__ int first_of_part(int64 part, int parts, int bins) {
  return static_cast<int>(quotient_up<int64>(part * bins, parts));
}

// The group of channels that a bin sees.
__device__ __forceinline__ int plane_of(const RoIGeometry& g, const Bin& bin) {
  if (g.planes() == 1) return 0;
  const int group_y = static_cast<int>(static_cast<int64>(bin.y) * g.group_h / g.pooled_h);
  const int group_x = static_cast<int>(static_cast<int64>(bin.x) * g.group_w / g.pooled_w);
  return (group_y * g.group_w + group_x) * g.classes + bin.offsets;
}

// The factor that makes the sum of a bin's samples their mean.
__device__ __forceinline__ A mean_of(const Rule& rule, const Run& y, const Run& x) {
  const double along_y = rule.kept ? y.end - y.first : y.total;
  const double along_x = rule.kept ? x.end - x.first : x.total;
  return 1 / static_cast<A>(fmax(along_y * along_x, 1.));
}

// The factor of a bin in `mask` (K, PH, PW), if there is one.
__device__ __forceinline__ A mask_of(const RoIGeometry& g, const double* mask, index_t row) {
  return mask ? static_cast<A>(mask[row / g.classes]) : 1;
}

// Images are arranged as (N, H, W, planes, depth): what a bin sees of a pixel lies together. Here
// index_t counts their elements too: with 64 bits every load would take several instructions more.
__device__ __forceinline__ index_t pixel_offset(const RoIGeometry& g, int image, int y, int x,
                                                int plane) {
  const index_t pixel = (static_cast<index_t>(image) * g.height + y) * g.width + x;
  return (pixel * g.planes() + plane) * g.depth();
}

// From a row or a column of pixels to the next one.
__device__ __forceinline__ index_t step_of(const RoIGeometry& g, int axis) {
  return axis ? g.channels : static_cast<index_t>(g.width) * g.channels;
}

// ---- one thread row per bin

// The lanes of this thread row, within its warp.
__device__ __forceinline__ unsigned row_lanes() {
  return blockDim.x == 32 ? ~0u : ((1u << blockDim.x) - 1) << (threadIdx.y * blockDim.x) % 32;
}

// What a row or a column of pixels weighs in a bin, and its distance from the first one in memory.
struct alignas(4 * sizeof(A)) Weight {
  A weight;
  index_t offset;
  A slope;
};

// What a bin sees of TILE x TILE pixels, along y and along x; what weighs nothing is left out.
struct Weights {
  Weight along[2][TILE];
  int count[2];
};

// The lanes together list what a bin sees of a tile, half of a warp at most along each axis:
// weigh(axis, place) returns for a pixel.
template <class Weigh>
__device__ __forceinline__ void list_weights(Weights& weights, Weigh weigh) {
  const unsigned half = (1u << TILE) - 1, lane = (threadIdx.y * blockDim.x + threadIdx.x) % 32;
  const unsigned lanes = row_lanes() & half << (lane & TILE), before = (1u << lane) - 1;
  int count = 0;
  __syncwarp(row_lanes());  // all have read what was there
  for (int i = threadIdx.x; i < 2 * TILE; i += blockDim.x) {
    const int axis = i / TILE, place = i % TILE;
    const Weight own = weigh(axis, place);
    const bool counts = own.weight != 0 || own.slope != 0;
    const unsigned seen = __ballot_sync(row_lanes(), counts) & lanes;
    if (place < blockDim.x) count = 0;  // an axis begins
    if (counts) weights.along[axis][count + __popc(seen & before)] = own;
    count += __popc(seen);
    if (threadIdx.x % TILE == 0) weights.count[axis] = count;
  }
  __syncwarp(row_lanes());
}

__device__ __forceinline__ Vector filled(A value) {
  Vector v;
#pragma unroll
  for (int i = 0; i < VEC; ++i) v.value[i] = value;
  return v;
}
