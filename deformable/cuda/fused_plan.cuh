// Plans of the fused kernels: where the samples of an output position look and what they weigh,
// worked out once and shared by all channels. CORNERS is 4 for positions between the pixels and 1
// for the regular grid of a plain convolution, which has no offsets and no masks.
#pragma once
#include "bilinear.cuh"
#include "conv.cuh"

struct Strides {  // of an array of four axes, in elements
  int64 axis0, axis1, axis2, axis3;

  __device__ __forceinline__ int64 operator()(int64 i, int64 j, int64 k, int64 l) const {
    return i * axis0 + j * axis1 + k * axis2 + l * axis3;
  }
};

// The corners' pixels, counted through the batch, or OUTSIDE: the corner is zero.
struct alignas(CORNERS * sizeof(int)) Pixels {
  int corner[CORNERS];
};
struct alignas(CORNERS == 1 ? sizeof(A) : 16) Weights {
  A corner[CORNERS];
};

// Offsets (N, 2·G·taps, Ho, Wo) and masks (N, G·taps, Ho, Wo) as the caller has them, of their own
// dtypes and with their own strides.
struct Places {
  const OFFSET* offset;
  const MASK* mask;
  Strides offset_strides, mask_strides;
};

// The sample of the tap that lies (dy, dx) from the first one: its offset is the `sample`th of the
// position.
__device__ __forceinline__ Sample offset_sample(const ConvGeometry& g, const Places& places,
                                                const OutputPixel& out, int dy, int dx, int sample) {
  const Tap first = regular_tap(g, out, 0, 0);
  const Strides &offset = places.offset_strides, &mask = places.mask_strides;
  const A offset_y = places.offset[offset(out.image, 2 * sample, out.y, out.x)];
  const A offset_x = places.offset[offset(out.image, 2 * sample + 1, out.y, out.x)];
  A scale = 1;
  if (places.mask) scale = places.mask[mask(out.image, sample, out.y, out.x)];
  return locate(first.y + dy + offset_y, first.x + dx + offset_x, g.height, g.width, scale);
}

// The same sample, or without offsets that of the regular grid, as pixels and weights.
__device__ __forceinline__ void plan_sample(const ConvGeometry& g, const Places& places,
                                            const OutputPixel& out, int dy, int dx, int sample,
                                            Pixels& pixels, Weights& weights) {
  const int image = out.image * g.height * g.width;
  if constexpr (CORNERS == 1) {
    const Tap first = regular_tap(g, out, 0, 0);
    const int y = first.y + dy, x = first.x + dx;
    const bool inside = y >= 0 && y < g.height && x >= 0 && x < g.width;
    pixels.corner[0] = inside ? image + y * g.width + x : OUTSIDE;
    weights.corner[0] = 1;
  } else {
    const Sample s = offset_sample(g, places, out, dy, dx, sample);
#pragma unroll
    for (int corner = 0; corner < CORNERS; ++corner) {
      const index_t pixel = corner_pixel(s, corner, g.height, g.width);
      pixels.corner[corner] = pixel < 0 ? OUTSIDE : image + pixel;
      weights.corner[corner] = corner_weight(s, corner);
    }
  }
}
