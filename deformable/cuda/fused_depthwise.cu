// _fused.py: convolutions with one channel per group, without a matrix product, and the gradient of
// their weights.
//   image (N, H, W, C)   weight (outs, taps, C)   y, grad_y (N·Ho·Wo, O)   outs = O / C
//
// A block plans the samples of some positions in shared memory; then its thread rows go through the
// positions and their lanes through the channels, VEC at a time. Per channel and sample the corners'
// values are read once, from L1 mostly.
//
// Macros: DTYPE, CORNERS, VEC, OFFSET, MASK.
#include "fused_plan.cuh"
#include "ptx.cuh"

constexpr int THREADS = 256;

struct SamplePlan {
  Pixels pixels;
  Weights weights;
};

__device__ __forceinline__ void plan_tap(const ConvGeometry& g, const Places& places, int position,
                                         int group, int tap, SamplePlan& plan) {
  plan_sample(g, places, output_pixel(g, position), tap / g.kernel_w * g.dilation_h,
              tap % g.kernel_w * g.dilation_w, group * g.taps() + tap, plan.pixels, plan.weights);
}

// The value of a sample in the channels from c on.
__device__ __forceinline__ Vector blend(const T* image, const SamplePlan& plan, int channels, int c) {
  Vector value = zero();
#pragma unroll
  for (int corner = 0; corner < CORNERS; ++corner) {
    const int pixel = plan.pixels.corner[corner];
    const T* from = image + static_cast<int64>(pixel) * channels + c;
    add(value, plan.weights.corner[corner], pixel < 0 ? zero() : load(from));
  }
  return value;
}

// A block computes `tile` positions for the channels of one offset group (blockIdx.z) and one of the
// output channels that each of them has (blockIdx.y).
extern "C" __global__ void __launch_bounds__(THREADS, 4)
    depthwise(const T* __restrict__ image, const OFFSET* __restrict__ offset,
              const MASK* __restrict__ mask, const T* __restrict__ weight,
              const T* __restrict__ bias, T* __restrict__ y, const ConvGeometry g,
              const Strides offset_strides, const Strides mask_strides, const int64 tile) {
  DYN_SHARED(SamplePlan, plan);  // (positions, taps)
  const Places places = {offset, mask, offset_strides, mask_strides};
  const int first = blockIdx.x * static_cast<int>(tile);
  const int count = min(static_cast<int>(tile), g.batch * g.positions() - first);
  const int taps = g.taps(), depth = g.channels / g.offset_groups;
  const int outs = g.out_channels / g.channels, out = blockIdx.y, group = blockIdx.z;

  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  for (int i = thread; i < count * taps; i += THREADS) {
    const int position = i / taps;
    plan_tap(g, places, first + position, group, i - position * taps, plan[i]);
  }
  __syncthreads();

  for (int row = threadIdx.y; row < count; row += blockDim.y) {
    for (int c = group * depth + threadIdx.x * VEC; c < (group + 1) * depth;
         c += blockDim.x * VEC) {
      Vector sum = zero();
      for (int tap = 0; tap < taps; ++tap) {
        const Vector value = blend(image, plan[row * taps + tap], g.channels, c);
        const int64 line = static_cast<int64>(out) * taps + tap;
        add(sum, value, load(weight + line * g.channels + c));
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

// A block (blockIdx.x) adds up the gradient of one tap, for one output channel of each of the channels
// that its lanes take at once, over `split` positions (blockIdx.y). Its thread rows take turns and are
// added up pairwise, so always in the same order. parts (blockIdx.y, O, taps).
extern "C" __global__ void __launch_bounds__(THREADS, 4)
    depthwise_weight_gradient(const T* __restrict__ grad_y, const T* __restrict__ image,
                              const OFFSET* __restrict__ offset, const MASK* __restrict__ mask,
                              A* __restrict__ parts, const ConvGeometry g,
                              const Strides offset_strides, const Strides mask_strides,
                              const int64 split) {
  __shared__ SamplePlan plan[THREADS];
  __shared__ Vector sums[THREADS];
  const Places places = {offset, mask, offset_strides, mask_strides};
  const int taps = g.taps(), depth = g.channels / g.offset_groups;
  const int outs = g.out_channels / g.channels, lanes = blockDim.x;
  const int slabs = (depth + lanes * VEC - 1) / (lanes * VEC);  // of channels of an offset group
  const int tap = blockIdx.x % taps, out = blockIdx.x / taps % outs;
  const int slab = blockIdx.x / (taps * outs) % slabs, group = blockIdx.x / (taps * outs * slabs);
  const int c = group * depth + (slab * lanes + threadIdx.x) * VEC;
  const bool exists = c < (group + 1) * depth;
  const int64 first = blockIdx.y * split;
  const int64 end = min(first + split, static_cast<int64>(g.batch) * g.positions());

  const int thread = threadIdx.y * lanes + threadIdx.x;
  Vector sum = zero();
  for (int64 start = first; start < end; start += THREADS) {
    const int count = static_cast<int>(min(end - start, static_cast<int64>(THREADS)));
    __syncthreads();
    if (thread < count) {
      plan_tap(g, places, static_cast<int>(start) + thread, group, tap, plan[thread]);
    }
    __syncthreads();
    for (int row = threadIdx.y; row < count && exists; row += blockDim.y) {
      const T* const line = grad_y + (start + row) * g.out_channels;
      const Vector value = blend(image, plan[row], g.channels, c);
      add(sum, value, outs == 1 ? load(line + c) : gather(line + c * outs + out, outs));
    }
  }

  sums[thread] = sum;
  for (int rows = blockDim.y / 2; rows > 0; rows /= 2) {
    __syncthreads();
    if (threadIdx.y < rows) add(sums[thread], 1, sums[thread + rows * lanes]);
  }
  if (threadIdx.y > 0 || !exists) return;
  for (int i = 0; i < VEC; ++i) {
    const int64 channel = static_cast<int64>(c + i) * outs + out;
    parts[(blockIdx.y * static_cast<int64>(g.out_channels) + channel) * taps + tap] =
        sums[thread].value[i];
  }
}
