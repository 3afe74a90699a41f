// conv.py: columns of a plain convolution and their adjoint.
// image (N, H, W, C), columns as in conv.cuh for `count` positions from `first` on.
//
// Macros: DTYPE, INDEX, VEC, DEPTHWISE (where the gradients of columns are).
#include "column_gradient.cuh"

// A thread row copies one tap of one position: C values read and written, nothing computed.
extern "C" __global__ void __launch_bounds__(256)
    im2col(const T* __restrict__ image, T* __restrict__ columns, const ConvGeometry g,
           const int64 first, const int64 count) {
  const index_t row = static_cast<index_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const index_t position = row / g.taps();
  const int tap = static_cast<int>(row - position * g.taps());
  if (position >= count) return;

  const Tap at = regular_tap(g, static_cast<index_t>(first) + position, tap);
  const bool inside = at.y >= 0 && at.y < g.height && at.x >= 0 && at.x < g.width;
  const T* pixel =
      image + ((static_cast<int64>(at.image) * g.height + at.y) * g.width + at.x) * g.channels;
  for (int c = threadIdx.x * VEC; c < g.channels; c += blockDim.x * VEC) {
    store(columns + column_offset(g, count, position, tap, c),
          inside ? load(pixel + c) : zero());
  }
}

// A thread row gathers the gradient of one pixel of grad_image (N, H, W, C) from the taps that saw it,
// always in the order of the taps: taps · C values read per pixel, none of them by two pixels. It adds
// to what an earlier chunk has made of the same image. The first pixel is that of `first_image`.
extern "C" __global__ void __launch_bounds__(256, 4)
    col2im(const T* __restrict__ grad_rows, const T* __restrict__ by_tap,
           A* __restrict__ grad_image, const ConvGeometry g, const int64 images,
           const int64 first_image, const int64 first, const int64 count) {
  const ColumnGradient gradient = {grad_rows, by_tap, first, count};
  const index_t row = static_cast<index_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const index_t line = row / g.width;
  const int x = static_cast<int>(row - line * g.width);
  const index_t image = line / g.height;
  const int y = static_cast<int>(line - image * g.height);
  if (image >= images) return;

  const int64 start = (first_image + image) * g.positions() - first;
  A* const pixel = grad_image + (first_image * g.height * g.width + row) * g.channels;
  for (int c = threadIdx.x * VEC; c < g.channels; c += blockDim.x * VEC) {
    Vector sum = start < 0 ? load(pixel + c) : zero();
    for (int tap = 0; tap < g.taps(); ++tap) {
      const int i = tap / g.kernel_w, j = tap - i * g.kernel_w;
      const int from_y = y + g.pad_h - i * g.dilation_h, from_x = x + g.pad_w - j * g.dilation_w;
      const int out_y = from_y / g.stride_h, out_x = from_x / g.stride_w;
      const bool seen = from_y >= 0 && out_y * g.stride_h == from_y && out_y < g.out_height &&
                        from_x >= 0 && out_x * g.stride_w == from_x && out_x < g.out_width;
      const int64 position = start + static_cast<int64>(out_y) * g.out_width + out_x;
      if (!seen || position < 0 || position >= count) continue;
      add(sum, 1, gradient(g, position, tap, c));
    }
    store(pixel + c, sum);
  }
}
