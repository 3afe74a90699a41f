// deform_roi_pool.py: gradients of offsets and masks; means and gradients of images: roi_align.cu.
// Layouts, all contiguous:
//   image (N, H, W, planes, depth)   grad_y (rows, depth)   along (rows, 3)   mask (K, PH, PW)
#include "roi.cuh"

// A thread row computes three products of one bin's gradient: with what it sees, and with the slopes
// of that along y and along x, its lanes reduced in a fixed order. along: y, x, mask.
extern "C" __global__ void __launch_bounds__(256, 2)
    offset_gradient(const T* __restrict__ image, const T* __restrict__ grad_y,
                    const Run* __restrict__ runs_y, const Run* __restrict__ runs_x,
                    const int* __restrict__ images, const double* __restrict__ mask,
                    A* __restrict__ along, const RoIGeometry g, const Rule rule) {
  __shared__ Weights tables[ROWS][2];
  const index_t row = static_cast<index_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= g.rows()) return;  // only the lanes of a thread row ever wait for each other

  const Bin bin = bin_of(g, row);
  const Run& along_y = run_y(g, runs_y, row, bin);
  const Run& along_x = run_x(g, runs_x, row, bin);
  const double mean = mean_of(rule, along_y, along_x);
  const int image_index = images[bin.roi], plane = plane_of(g, bin), depth = g.depth();
  Weights &weights = tables[threadIdx.y][0], &slopes = tables[threadIdx.y][1];
  A products[3] = {0, 0, 0};
  for (int ty = 0; ty < along_y.pixels; ty += TILE) {
    for (int tx = 0; tx < along_x.pixels; tx += TILE) {
      weigh(g, along_y, along_x, ty, tx, mean, weights, &slopes);
      for (int c = threadIdx.x * VEC; c < depth; c += blockDim.x * VEC) {
        const Vector grad = load(grad_y + static_cast<int64>(row) * depth + c);
        for (int i = 0; i < min(TILE, along_y.pixels - ty); ++i) {
          const A weight_y = weights.along[0][i], slope_y = slopes.along[0][i];
          if (weight_y == 0 && slope_y == 0) continue;
          const T* pixel = image + c + pixel_offset(g, image_index, along_y.pixel + ty + i,
                                                    along_x.pixel + tx, plane);
          Vector line = zero(), slope = zero();
          for (int j = 0; j < min(TILE, along_x.pixels - tx); ++j) {
            const A weight_x = weights.along[1][j], slope_x = slopes.along[1][j];
            if (weight_x == 0 && slope_x == 0) continue;
            const Vector value = load(pixel + static_cast<int64>(j) * g.channels);
            if (weight_x != 0) add(line, weight_x, value);
            if (slope_x != 0) add(slope, slope_x, value);
          }
          const A product = dot(line, grad);
          if (slope_y != 0) products[0] += slope_y * product;
          if (weight_y != 0) products[1] += weight_y * dot(slope, grad);
          if (weight_y != 0) products[2] += weight_y * product;
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
  const bool lost = isnan(along_y.start + along_x.start);
  const A factor = static_cast<A>(mask_of(g, mask, bin));
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
  A sum_y = 0, sum_x = 0;
  for (int y = 0; y < g.pooled_h; ++y) {
    if (static_cast<int64>(y) * g.part_h / g.pooled_h != part_y) continue;
    for (int x = 0; x < g.pooled_w; ++x) {
      if (static_cast<int64>(x) * g.part_w / g.pooled_w != part_x) continue;
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
