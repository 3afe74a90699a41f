// _roi.py: where all bins look, which RoIs an image has, and channels that are seen together.
#include "roi_gather.cuh"

static_assert(sizeof(Run) == 11 * sizeof(double), "RUN in _roi.py");
static_assert(sizeof(Reach) == 4 * sizeof(int), "REACH in _roi.py");

// A block makes the runs of a RoI, a thread one after the other, and finds how far the RoI reaches.
// Then it fills the table, a thread by one pixel after the other. A run is 88 bytes and TILE weights.
// rois (K, 5), offset (K, 2 classes, part_h, part_w); runs as in roi.cuh.
extern "C" __global__ void __launch_bounds__(256, 1)
    plan(const double* __restrict__ rois, const double* __restrict__ offset,
         Run* __restrict__ runs, A* __restrict__ table, int* __restrict__ images,
         Reach* __restrict__ reaches, const RoIGeometry g, const Rule rule) {
  __shared__ Reach reach;
  const int roi = blockIdx.x;
  const Box box = box_of(g, rule, rois, roi);
  const index_t count_y = g.shifted() ? g.bins() : g.pooled_h;
  const index_t count_x = g.shifted() ? g.bins() : g.pooled_w;
  const auto number = [&](index_t i) {  // of the i-th run of this RoI
    return i < count_y ? roi * count_y + i : g.rois * count_y + roi * count_x + i - count_y;
  };
  if (threadIdx.x == 0) reach = {g.height, 0, g.width, 0};
  __syncthreads();
  for (index_t i = threadIdx.x; i < count_y + count_x; i += blockDim.x) {
    const bool axis = i >= count_y;
    const index_t place = axis ? i - count_y : i;
    Bin bin = {roi, static_cast<int>(place), static_cast<int>(place), 0};
    double shift = 0;
    const double length = axis ? box.width : box.height;
    if (g.shifted()) {
      bin = bin_of(g, roi * g.bins() + place);
      const int64 channel = (static_cast<int64>(roi) * g.classes + bin.offsets) * 2 + !axis;
      const int64 part_y = static_cast<int64>(bin.y) * g.part_h / g.pooled_h;
      const int64 part_x = static_cast<int64>(bin.x) * g.part_w / g.pooled_w;
      shift = offset[(channel * g.part_h + part_y) * g.part_w + part_x];
      // an infinite offset is far outside, also where gamma or the size of the RoI is 0
      if (!isinf(shift)) shift *= g.gamma * length;
    }
    Run run = {nan("")};
    if (box.image >= 0) {
      run = axis ? run_of(rule, box.x, length, bin.x, g.pooled_w, g.sampling_w, g.width, shift)
                 : run_of(rule, box.y, length, bin.y, g.pooled_h, g.sampling_h, g.height, shift);
    }
    runs[number(i)] = run;
    if (run.pixels == 0) continue;
    atomicMin(axis ? &reach.x : &reach.y, run.pixel);
    atomicMax(axis ? &reach.end_x : &reach.end_y, run.pixel + run.pixels);
  }
  __syncthreads();
  if (table) {
    for (index_t i = threadIdx.x / TILE; i < count_y + count_x; i += blockDim.x / TILE) {
      const int step = threadIdx.x % TILE, size = i < count_y ? g.height : g.width;
      table[static_cast<int64>(number(i)) * TILE + step] =
          weight_of(runs, nullptr, number(i), step, size);
    }
  }
  if (threadIdx.x > 0) return;
  images[roi] = max(box.image, 0);
  reaches[roi] = reach;
}

// A block lists the RoIs of one image, in their order: order (K,), and where in it those of each
// image begin, starts (N + 1,); the last block finds the end. It reads the images of all RoIs twice.
extern "C" __global__ void __launch_bounds__(256)
    sort_by_image(const int* __restrict__ images, int* __restrict__ order,
                  int* __restrict__ starts, const RoIGeometry g) {
  __shared__ List<int> list;
  const int image = blockIdx.x;
  int to = 0;
  for (int first = 0; first < g.rois; first += blockDim.x) {
    const int roi = first + threadIdx.x;
    to += gather_hits(roi < g.rois && images[roi] < image, roi, list);
  }
  if (threadIdx.x == 0) starts[image] = to;
  for (int first = 0; first < g.rois; first += blockDim.x) {
    const int roi = first + threadIdx.x;
    const int found = gather_hits(roi < g.rois && images[roi] == image, roi, list);
    if (threadIdx.x < found) order[to + threadIdx.x] = list.item[threadIdx.x];
    to += found;
  }
}

// (N, C, H, W) arrays as rows (N, H, W, groups, classes, pitch): the depth channels of a group and
// class lie together, and zeros behind them.
struct Layout {
  int images, channels, height, width, groups, depth, pitch;
};

constexpr int SIDE = 32;

// A block copies SIDE pixels x SIDE channels of one group: it reads along the pixels and writes along
// the channels, each element once in whole sectors of memory, and turns them in shared memory.
extern "C" __global__ void __launch_bounds__(256)
    arrange(const T* __restrict__ from, T* __restrict__ to, const Layout l) {
  __shared__ T tile[SIDE][SIDE + 1];
  const int64 pixels = static_cast<int64>(l.height) * l.width;
  const int channels = l.channels / l.groups, row = channels / l.depth * l.pitch;
  const int tiles = quotient_up(row, SIDE);
  const int64 strips = quotient_up<int64>(pixels, SIDE), block = blockIdx.x / tiles;
  const int first = blockIdx.x % tiles * SIDE, group = static_cast<int>(block % l.groups);
  const int64 strip = block / l.groups, image = strip / strips, pixel = strip % strips * SIDE;
  for (int i = threadIdx.y; i < SIDE; i += blockDim.y) {
    const int place = first + i, in_class = place % l.pitch;
    if (place >= row || pixel + threadIdx.x >= pixels) break;
    const int of_group = place / l.pitch * l.depth + in_class;
    const int64 plane = image * l.channels + static_cast<int64>(of_group) * l.groups + group;
    const bool padding = in_class >= l.depth;
    tile[i][threadIdx.x] = padding ? T(0.f) : from[plane * pixels + pixel + threadIdx.x];
  }
  __syncthreads();
  for (int i = threadIdx.y; i < SIDE; i += blockDim.y) {
    if (first + threadIdx.x >= row || pixel + i >= pixels) break;
    const int64 at = (image * pixels + pixel + i) * l.groups + group;
    to[at * row + first + threadIdx.x] = tile[threadIdx.x][i];
  }
}
