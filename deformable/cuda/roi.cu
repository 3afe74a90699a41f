// _roi.py: where all bins look, and which RoIs an image has.
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
      if (!isinf(shift)) shift = __dmul_rn(shift, __dmul_rn(g.gamma, length));
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

// A block lists the RoIs of one image, in their order: order (K,), and behind it where in it those of
// each image begin (N + 1,); the last block finds the end. It reads the images of all RoIs twice.
extern "C" __global__ void __launch_bounds__(256)
    sort_by_image(const int* __restrict__ images, int* __restrict__ order, const RoIGeometry g) {
  __shared__ List<int> list;
  const int image = blockIdx.x;
  int to = 0;
  for (int first = 0; first < g.rois; first += blockDim.x) {
    const int roi = first + threadIdx.x;
    to += gather_hits(roi < g.rois && images[roi] < image, roi, list);
  }
  if (threadIdx.x == 0) order[g.rois + image] = to;
  for (int first = 0; first < g.rois; first += blockDim.x) {
    const int roi = first + threadIdx.x;
    const int found = gather_hits(roi < g.rois && images[roi] == image, roi, list);
    if (threadIdx.x < found) order[to + threadIdx.x] = list.item[threadIdx.x];
    to += found;
  }
}
