// Where the samples of a deformable convolution look, by offsets and masks as the caller has them.
//
// Macros: OFFSET, MASK.
#pragma once
#include "bilinear.cuh"
#include "conv.cuh"

struct Strides {  // of an array of four axes, in elements
  int64 axis0, axis1, axis2, axis3;

  __device__ __forceinline__ int64 operator()(int64 i, int64 j, int64 k, int64 l) const {
    return i * axis0 + j * axis1 + k * axis2 + l * axis3;
  }
};

// Offsets (N, 2·G·taps, Ho, Wo) and masks (N, G·taps, Ho, Wo), of their own dtypes and with their own
// strides; there may be no masks.
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

// The same of a chunk of positions.
__device__ __forceinline__ Sample offset_sample(const ConvGeometry& g, const Places& places,
                                                const OutputPixel& out, const ChunkSample& id) {
  return offset_sample(g, places, out, id.tap / g.kernel_w * g.dilation_h,
                       id.tap % g.kernel_w * g.dilation_w, id.group * g.taps() + id.tap);
}
