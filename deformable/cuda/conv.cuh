// Geometry of a convolution and the layout of its columns: twin of ConvGeometry in _conv.py.
#pragma once
#include "vector.cuh"

struct ConvGeometry {
  int batch, channels, height, width;
  int out_channels, out_height, out_width;
  int kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int groups, offset_groups;

  __device__ int taps() const { return kernel_h * kernel_w; }
  __device__ index_t positions() const { return static_cast<index_t>(out_height) * out_width; }
};

// An output position: its image, row and column.
struct OutputPixel {
  index_t image;
  int y, x;
};

__device__ __forceinline__ OutputPixel output_pixel(const ConvGeometry& g, index_t position) {
  const index_t image = position / g.positions();
  const index_t rest = position - image * g.positions();
  const int y = static_cast<int>(rest / g.out_width);
  return {image, y, static_cast<int>(rest - static_cast<index_t>(y) * g.out_width)};
}

// Where a tap of the regular grid lies, in pixels of its image.
struct Tap {
  index_t image;
  int y, x;
};

__device__ __forceinline__ Tap regular_tap(const ConvGeometry& g, const OutputPixel& out, int i,
                                           int j) {
  return {out.image, out.y * g.stride_h - g.pad_h + i * g.dilation_h,
          out.x * g.stride_w - g.pad_w + j * g.dilation_w};
}

__device__ __forceinline__ Tap regular_tap(const ConvGeometry& g, index_t position, int tap) {
  const int i = tap / g.kernel_w, j = tap - i * g.kernel_w;
  return regular_tap(g, output_pixel(g, position), i, j);
}

// A sample of a chunk of positions. Samples are counted in this order, by int: a chunk is small.
struct ChunkSample {
  int position, group, tap;  // position within the chunk, offset group
};

__device__ __forceinline__ ChunkSample chunk_sample(const ConvGeometry& g, int sample) {
  const int taps = g.taps(), line = sample / taps;
  return {line / g.offset_groups, line % g.offset_groups, sample - line * taps};
}

__device__ __forceinline__ int sample_count(const ConvGeometry& g, int64 count) {
  return static_cast<int>(count) * g.offset_groups * g.taps();
}

// Columns of a chunk lie as (groups, count, taps, channels / groups): a matrix per group of weights.
__device__ __forceinline__ int64 column_offset(const ConvGeometry& g, int64 count, int64 position,
                                               int tap, int channel) {
  const int depth = g.channels / g.groups;
  const int group = g.groups == 1 ? 0 : channel / depth;
  const int64 row = (group * count + position) * g.taps() + tap;
  return row * depth + (channel - group * depth);
}
