// Plans of the fused kernels: where the samples of an output position look and what they weigh,
// worked out once and shared by all channels. CORNERS is 4 for positions between the pixels and 1
// for the regular grid of a plain convolution, which has no offsets and no masks.
#pragma once
#include "places.cuh"

// The corners' pixels, counted through the batch, or OUTSIDE: the corner is zero.
struct alignas(CORNERS * sizeof(int)) Pixels {
  int corner[CORNERS];
};
struct alignas(CORNERS == 1 ? sizeof(A) : 16) Weights {
  A corner[CORNERS];
};

// The sample of offset_sample(), or without offsets that of the regular grid, as pixels and weights.
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
