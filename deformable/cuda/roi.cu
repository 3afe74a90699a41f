// _roi.py: where all bins look.
#include "roi.cuh"

static_assert(sizeof(Run) == 10 * sizeof(double), "RUN in _roi.py");

// A thread makes the i-th run along y, the i-th along x and what there is of the i-th RoI: the image
// it lies in, and a key that sorts RoIs by their images; those that are none come last.
// rois (K, 5), offset (K, 2 classes, part_h, part_w); runs as in roi.cuh.
extern "C" __global__ void __launch_bounds__(256)
    plan(const double* __restrict__ rois, const double* __restrict__ offset,
         Run* __restrict__ runs_y, Run* __restrict__ runs_x, int* __restrict__ images,
         int64* __restrict__ keys, const RoIGeometry g, const Rule rule) {
  const index_t i = static_cast<index_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < g.rois) {
    const int image = box_of(g, rule, rois, static_cast<int>(i)).image;
    images[i] = max(image, 0);
    keys[i] = static_cast<int64>(image < 0 ? g.batch : image) * g.rois + i;
  }
  for (int axis = 0; axis < 2; ++axis) {
    const int pooled = axis ? g.pooled_w : g.pooled_h;
    if (i >= (g.shifted() ? g.rows() : static_cast<index_t>(g.rois) * pooled)) continue;
    Bin bin = g.shifted() ? bin_of(g, i) : Bin{static_cast<int>(i / pooled)};
    if (!g.shifted()) (axis ? bin.x : bin.y) = static_cast<int>(i % pooled);
    const Box box = box_of(g, rule, rois, bin.roi);
    const double length = axis ? box.width : box.height;
    double shift = 0;
    if (g.shifted()) {
      const int64 channel = (static_cast<int64>(bin.roi) * g.classes + bin.offsets) * 2 + !axis;
      const int64 part_y = static_cast<int64>(bin.y) * g.part_h / g.pooled_h;
      const int64 part_x = static_cast<int64>(bin.x) * g.part_w / g.pooled_w;
      shift = offset[(channel * g.part_h + part_y) * g.part_w + part_x];
      // an infinite offset is far outside, also where gamma or the size of the RoI is 0
      if (!isinf(shift)) shift *= g.gamma * length;
    }
    Run* runs = axis ? runs_x : runs_y;
    runs[i] = box.image < 0 ? Run{nan("")}
                            : run_of(rule, axis ? box.x : box.y, length, axis ? bin.x : bin.y, pooled,
                                     axis ? g.sampling_w : g.sampling_h, axis ? g.width : g.height,
                                     shift);
  }
}
