// Where a sampling position looks and what its corners weigh: twin of _bilinear.py.
#pragma once
#include "vector.cuh"

constexpr int OUTSIDE = -1;  // instead of a pixel

struct Sample {
  int y, x;     // the upper left one of four corners
  bool inside;  // of [-1, height) x [-1, width); otherwise no corner is a pixel
  A ly, lx;     // fractions in [0, 1), NaN where the position is
  A scale;      // the mask
};

// The position is tested before any cast: ±inf and 1e30 are outside, NaN gives NaN weights.
__device__ __forceinline__ Sample locate(A y, A x, int height, int width, A mask) {
  if (y >= -1 && y < height && x >= -1 && x < width) {
    const A floor_y = floor(y), floor_x = floor(x);
    return {static_cast<int>(floor_y), static_cast<int>(floor_x), true,
            y - floor_y, x - floor_x, mask};
  }
  const A nan_or_0 = y != y ? y : x != x ? x : 0;
  return {0, 0, false, nan_or_0, nan_or_0, mask};
}

// Corners 0..3 are 00, 01, 10, 11 (row, column).
__device__ __forceinline__ A corner_weight(const Sample& s, int corner) {
  return (corner & 2 ? s.ly : 1 - s.ly) * (corner & 1 ? s.lx : 1 - s.lx) * s.scale;
}

// The corner's pixel within the image, or OUTSIDE, where it counts as zero.
__device__ __forceinline__ index_t corner_pixel(const Sample& s, int corner, int height, int width) {
  const int y = s.y + (corner >> 1), x = s.x + (corner & 1);
  const bool inside = s.inside && y >= 0 && y < height && x >= 0 && x < width;
  return inside ? static_cast<index_t>(y) * width + x : OUTSIDE;
}

// Gradients of the position and of the mask from the products <corner pixel, gradient of sample>.
struct SampleGradient {
  A y, x, mask;
};

__device__ __forceinline__ SampleGradient sample_gradient(const Sample& s, const A (&dots)[4]) {
  const A top = (1 - s.lx) * dots[0] + s.lx * dots[1];
  const A bottom = (1 - s.lx) * dots[2] + s.lx * dots[3];
  const A along_x = (1 - s.ly) * (dots[1] - dots[0]) + s.ly * (dots[3] - dots[2]);
  return {(bottom - top) * s.scale, along_x * s.scale, (1 - s.ly) * top + s.ly * bottom};
}
