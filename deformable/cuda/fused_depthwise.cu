// _fused.py: a convolution with one channel per group, as one kernel without a matrix product.
//
// A block computes TILE_M output positions for the channels of one offset group (blockIdx.z) and one
// of the output channels that each of them has (blockIdx.y). It plans the samples of its positions in
// shared memory; then its thread rows go through the positions and their lanes through the channels, VEC
// at a time: blend the corners, multiply with the tap's weight, add. Per channel and sample the corners'
// values are read once, from L1 mostly, and the output is written once; there is no other traffic.
//   image (N, H, W, C)   weight (out channels of a channel, taps, C)   y (N·Ho·Wo, O)
//
// Macros: DTYPE, CORNERS, VEC, OFFSET, MASK, TILE_M.
#include "fused_plan.cuh"
#include "ptx.cuh"

constexpr int THREADS = 256;

struct SamplePlan {
  Pixels pixels;
  Weights weights;
};

extern "C" __global__ void __launch_bounds__(THREADS, 4)
    depthwise(const T* __restrict__ image, const OFFSET* __restrict__ offset,
              const MASK* __restrict__ mask, const T* __restrict__ weight,
              const T* __restrict__ bias, T* __restrict__ y, const ConvGeometry g,
              const Strides offset_strides, const Strides mask_strides) {
  DYN_SHARED(SamplePlan, plan);  // (positions, taps)
  const Places places = {offset, mask, offset_strides, mask_strides};
  const int first = blockIdx.x * TILE_M, count = min(TILE_M, g.batch * g.positions() - first);
  const int taps = g.taps(), depth = g.channels / g.offset_groups;
  const int outs = g.out_channels / g.channels, out = blockIdx.y, group = blockIdx.z;

  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  for (int i = thread; i < count * taps; i += THREADS) {
    const int position = i / taps, tap = i - position * taps;
    plan_sample(g, places, output_pixel(g, first + position), tap / g.kernel_w * g.dilation_h,
                tap % g.kernel_w * g.dilation_w, group * taps + tap, plan[i].pixels,
                plan[i].weights);
  }
  __syncthreads();

  for (int row = threadIdx.y; row < count; row += blockDim.y) {
    for (int c = group * depth + threadIdx.x * VEC; c < (group + 1) * depth;
         c += blockDim.x * VEC) {
      Vector sum = zero();
      for (int tap = 0; tap < taps; ++tap) {
        const SamplePlan& sample = plan[row * taps + tap];
        Vector value = zero();
#pragma unroll
        for (int corner = 0; corner < CORNERS; ++corner) {
          const int pixel = sample.pixels.corner[corner];
          const T* from = image + static_cast<int64>(pixel) * g.channels + c;
          add(value, sample.weights.corner[corner], pixel < 0 ? zero() : load(from));
        }
        const Vector w = load(weight + (static_cast<int64>(out) * taps + tap) * g.channels + c);
#pragma unroll
        for (int i = 0; i < VEC; ++i) sum.value[i] += w.value[i] * value.value[i];
      }

      T* const line = y + static_cast<int64>(first + row) * g.out_channels;
#pragma unroll
      for (int i = 0; i < VEC && bias; ++i) sum.value[i] += static_cast<A>(bias[(c + i) * outs + out]);
      if (outs == 1) {
        store(line + c, sum);
      } else {
#pragma unroll
        for (int i = 0; i < VEC; ++i) line[(c + i) * outs + out] = static_cast<T>(sum.value[i]);
      }
    }
  }
}
