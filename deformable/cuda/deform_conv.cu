// deform_conv.py: deformable columns, and the gradients of their offsets and masks.
//
// Samples and columns of the chunk of `count` positions from `first` on: conv.cuh. The image lies as
// (N, H, W, C). What is computed once per sample, its corners and weights, is shared by its C / G
// channels.
//
// Macros: DTYPE, INDEX, VEC, OFFSET, MASK, SAMPLES, DEPTHWISE (where the gradients of columns are).
#include "column_gradient.cuh"
#include "places.cuh"

// What im2col needs of a sample: where each corner's pixel begins in `image`, or OUTSIDE.
struct Plan {
  int64 pixel[4];
  A weight[4];
};

// A block plans SAMPLES samples in shared memory, then its thread rows blend the channels of one
// sample after the other. Per channel 4 values are read (from L1, mostly) and one is written.
extern "C" __global__ void __launch_bounds__(256, 4)
    im2col(const T* __restrict__ image, const OFFSET* __restrict__ offset,
           const MASK* __restrict__ mask, T* __restrict__ columns, const ConvGeometry g,
           const Strides offset_strides, const Strides mask_strides, const int64 first,
           const int64 count) {
  __shared__ Plan plans[SAMPLES];
  const Places places = {offset, mask, offset_strides, mask_strides};
  const int start = blockIdx.x * SAMPLES;
  const int planned = min(SAMPLES, sample_count(g, count) - start);

  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  for (int i = thread; i < planned; i += blockDim.x * blockDim.y) {
    const ChunkSample id = chunk_sample(g, start + i);
    const OutputPixel out = output_pixel(g, static_cast<index_t>(first) + id.position);
    const Sample s = offset_sample(g, places, out, id);
    for (int corner = 0; corner < 4; ++corner) {
      const index_t pixel = corner_pixel(s, corner, g.height, g.width);
      const int64 base = static_cast<int64>(out.image) * g.height * g.width;
      plans[i].pixel[corner] = pixel < 0 ? OUTSIDE : (base + pixel) * g.channels;
      plans[i].weight[corner] = corner_weight(s, corner);
    }
  }
  __syncthreads();

  const int depth = g.channels / g.offset_groups;
  for (int i = threadIdx.y; i < planned; i += blockDim.y) {
    const ChunkSample id = chunk_sample(g, start + i);
    const Plan& plan = plans[i];
    for (int c = id.group * depth + threadIdx.x * VEC; c < (id.group + 1) * depth;
         c += blockDim.x * VEC) {
      Vector sum = zero();
      for (int corner = 0; corner < 4; ++corner) {
        const int64 pixel = plan.pixel[corner];
        add(sum, plan.weight[corner], pixel < 0 ? zero() : load(image + pixel + c));
      }
      store(columns + column_offset(g, count, id.position, id.tap, c), sum);
    }
  }
}

// A thread row computes the four products <corner pixel, gradient of the sample> of one sample,
// its lanes reduced in a fixed order, and from these the gradients of its offset and mask:
//   grad_offset (N·Ho·Wo, G, taps, 2)   grad_mask (N·Ho·Wo, G, taps)
extern "C" __global__ void __launch_bounds__(256, 3)
    offset_gradient(const T* __restrict__ image, const OFFSET* __restrict__ offset,
                    const MASK* __restrict__ mask, const T* __restrict__ grad_rows,
                    const T* __restrict__ by_tap, OFFSET* __restrict__ grad_offset,
                    MASK* __restrict__ grad_mask, const ConvGeometry g,
                    const Strides offset_strides, const Strides mask_strides, const int64 first,
                    const int64 count) {
  const Places places = {offset, mask, offset_strides, mask_strides};
  const ColumnGradient gradient = {grad_rows, by_tap, first, count};
  const int samples = sample_count(g, count);
  const int sample = blockIdx.x * blockDim.y + threadIdx.y;
  // every lane of a warp stays for the shuffles; a thread row past the end only adds zeros
  const ChunkSample id = chunk_sample(g, min(sample, samples - 1));
  const OutputPixel out = output_pixel(g, static_cast<index_t>(first) + id.position);
  const Sample s = offset_sample(g, places, out, id);

  const int depth = g.channels / g.offset_groups;
  const T* pixels = image + static_cast<int64>(out.image) * g.height * g.width * g.channels;
  A dots[4] = {0, 0, 0, 0};
  for (int c = id.group * depth + threadIdx.x * VEC; c < (id.group + 1) * depth;
       c += blockDim.x * VEC) {
    const Vector grad = gradient(g, id.position, id.tap, c);
    for (int corner = 0; corner < 4; ++corner) {
      const index_t pixel = corner_pixel(s, corner, g.height, g.width);
      const int64 at = static_cast<int64>(pixel) * g.channels + c;
      dots[corner] += dot(pixel < 0 ? zero() : load(pixels + at), grad);
    }
  }
  for (int corner = 0; corner < 4; ++corner) {
    for (int lanes = blockDim.x / 2; lanes > 0; lanes /= 2) {
      dots[corner] += __shfl_xor_sync(0xffffffffu, dots[corner], lanes);
    }
  }
  if (threadIdx.x == 0 && sample < samples) {
    const SampleGradient grad = sample_gradient(s, dots);
    const int64 at = first * g.offset_groups * g.taps() + sample;
    if (grad_offset) {
      grad_offset[2 * at] = static_cast<OFFSET>(grad.y);
      grad_offset[2 * at + 1] = static_cast<OFFSET>(grad.x);
    }
    if (grad_mask) grad_mask[at] = static_cast<MASK>(grad.mask);
  }
}
