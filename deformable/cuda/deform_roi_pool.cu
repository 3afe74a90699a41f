// deform_roi_pool.py: gradients of offsets and masks; means and gradients of images: roi_align.cu.
// Layouts, all contiguous:
//   image (N, H, W, planes, depth)   grad_y (rows, depth)   along (rows, 3)   mask (K, PH, PW)
#include "roi.cuh"

// A thread row computes three products of one bin's gradient: with what it sees, and with the slopes
// of that along y and along x, its lanes reduced in a fixed order. Every pixel of the list is read
// once and takes two multiply-adds per channel; a bin writes three numbers. along: y, x, mask.
extern "C" __global__ void __launch_bounds__(256, 2)
    offset_gradient(const T* __restrict__ image, const T* __restrict__ grad_y,
                    const Run* __restrict__ runs, const int* __restrict__ images,
                    const double* __restrict__ mask, A* __restrict__ along, const RoIGeometry g,
                    const Rule rule) {
  __shared__ Weights tables[ROWS];
  const index_t row = static_cast<index_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= g.rows()) return;  // only the lanes of a thread row ever wait for each other

  const Bin bin = bin_of(g, row);
  const Run& along_y = runs[run_y(g, row, bin)];
  const Run& along_x = runs[run_x(g, row, bin)];
  const A mean = mean_of(rule, along_y, along_x);
  const index_t corner = pixel_offset(g, images[bin.roi], along_y.pixel, along_x.pixel,
                                      plane_of(g, bin));
  const int depth = g.depth();
  Weights& weights = tables[threadIdx.y];
  A products[3] = {};
  for (int ty = 0; ty < along_y.pixels; ty += TILE) {
    for (int tx = 0; tx < along_x.pixels; tx += TILE) {
      list_weights(weights, [&](int axis, int place) -> Weight {
        const Run& run = axis ? along_x : along_y;
        const int step = (axis ? tx : ty) + place;
        if (step >= run.pixels) return {};
        const Tap tap = tap_of(run, run.pixel + step, axis ? g.width : g.height);
        const A factor = axis ? 1 : mean;
        return {static_cast<A>(tap.weight) * factor, step * step_of(g, axis),
                static_cast<A>(tap.slope) * factor};
      });
      for (int c = threadIdx.x * VEC; c < depth; c += blockDim.x * VEC) {
        const Vector grad = load(grad_y + static_cast<int64>(row) * depth + c);
        for (int i = 0; i < weights.count[0]; ++i) {
          const Weight& at_y = weights.along[0][i];
          const index_t line = corner + c + at_y.offset;
          Vector sum = zero(), slope = zero();
#pragma unroll 4  // so many loads on their way
          for (int j = 0; j < weights.count[1]; ++j) {
            const Weight& at_x = weights.along[1][j];
            const Vector value = load(image + (line + at_x.offset));
            if (at_x.weight != 0) add(sum, at_x.weight, value);
            if (at_x.slope != 0) add(slope, at_x.slope, value);
          }
          const A product = dot(sum, grad);
          if (at_y.slope != 0) products[0] += at_y.slope * product;
          if (at_y.weight != 0) products[1] += at_y.weight * dot(slope, grad);
          if (at_y.weight != 0) products[2] += at_y.weight * product;
        }
      }
    }
  }
  for (int i = 0; i < 3; ++i) {
    for (int lanes = blockDim.x / 2; lanes > 0; lanes /= 2) {
      products[i] += __shfl_xor_sync(row_lanes(), products[i], lanes);
    }
  }
  if (threadIdx.x > 0) return;
  const bool lost = isnan(along_y.start) || isnan(along_x.start);
  const A factor = static_cast<A>(mask_of(g, mask, row));
  for (int i = 0; i < 3; ++i) {
    A product = products[i];
    if (i < 2) product = factor == 0 ? 0 : product * factor;  // what it is times may be infinite
    along[3 * static_cast<int64>(row) + i] = lost ? static_cast<A>(nan("")) : product;
  }
}

// A thread sums up the gradients of the bins that one part of the offsets moves, as dx and dy.
extern "C" __global__ void __launch_bounds__(256, 2)
    sum_over_parts(const A* __restrict__ along, const double* __restrict__ rois,
                   A* __restrict__ grad_offset, const RoIGeometry g, const Rule rule) {
  const index_t parts = static_cast<index_t>(g.rois) * g.classes * g.part_h * g.part_w;
  const index_t i = static_cast<index_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (i >= parts) return;
  const int part_x = static_cast<int>(i % g.part_w);
  const int part_y = static_cast<int>(i / g.part_w % g.part_h);
  const index_t field = i / g.part_w / g.part_h;  // (RoI, class)
  const int roi = static_cast<int>(field / g.classes), offsets = static_cast<int>(field % g.classes);
  const int end_y = first_of_part(part_y + 1, g.part_h, g.pooled_h);
  const int end_x = first_of_part(part_x + 1, g.part_w, g.pooled_w);
  A sum_y = 0, sum_x = 0;
  for (int y = first_of_part(part_y, g.part_h, g.pooled_h); y < end_y; ++y) {
    for (int x = first_of_part(part_x, g.part_w, g.pooled_w); x < end_x; ++x) {
      const A* bin = along + 3 * static_cast<int64>(row_of(g, {roi, y, x, offsets}));
      sum_y += bin[0];
      sum_x += bin[1];
    }
  }
  const Box box = box_of(g, rule, rois, roi);
  A* to = grad_offset + ((2 * static_cast<int64>(field)) * g.part_h + part_y) * g.part_w + part_x;
  to[0] = static_cast<A>(sum_x * g.gamma * box.width);
  to[static_cast<int64>(g.part_h) * g.part_w] = static_cast<A>(sum_y * g.gamma * box.height);
}

// A thread sums up the gradients of the bins, one per class, that one element of the mask multiplies.
extern "C" __global__ void __launch_bounds__(256, 2)
    sum_over_classes(const A* __restrict__ along, A* __restrict__ grad_mask, const RoIGeometry g) {
  const index_t i = static_cast<index_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (i >= g.rows() / g.classes) return;
  const A* bin = along + 3 * static_cast<int64>(i) * g.classes;
  A sum = 0;
  for (int c = 0; c < g.classes; ++c) sum += bin[3 * c + 2];
  grad_mask[i] = sum;
}
