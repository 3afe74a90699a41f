// microbench.py: what the machine does at best, one question per kernel.
// Built after ptx.cuh. WIDTH floats move together: 1, 2 or 4.
typedef long long int64;

template <int N> struct Floats;
template <> struct Floats<1> { typedef float type; };
template <> struct Floats<2> { typedef float2 type; };
template <> struct Floats<4> { typedef float4 type; };
typedef Floats<WIDTH>::type Vector;

// All of a vector counts, or the compiler would load less of it.
__device__ __forceinline__ float total(float v) { return v; }
__device__ __forceinline__ float total(float2 v) { return v.x + v.y; }
__device__ __forceinline__ float total(float4 v) { return (v.x + v.y) + (v.z + v.w); }
__device__ __forceinline__ void fill(float& v, float x) { v = x; }
__device__ __forceinline__ void fill(float2& v, float x) { v.x = v.y = x; }
__device__ __forceinline__ void fill(float4& v, float x) { v.x = v.y = v.z = v.w = x; }

// m3: every thread copies its share, the grid side by side: WIDTH floats read and written.
extern "C" __global__ void __launch_bounds__(256)
    copy(const float* __restrict__ from, float* __restrict__ to, const int64 vectors) {
  const int64 step = static_cast<int64>(gridDim.x) * blockDim.x;
  for (int64 i = static_cast<int64>(blockIdx.x) * blockDim.x + threadIdx.x; i < vectors; i += step)
    reinterpret_cast<Vector*>(to)[i] = reinterpret_cast<const Vector*>(from)[i];
}

// m2: a thread row (threadIdx.y) reads four corners of `channels` floats for each of its samples,
// as the sampling does, and writes one sum: rows[sample] is the upper left pixel.
extern "C" __global__ void __launch_bounds__(256)
    gather(const float* __restrict__ image, const int* __restrict__ rows, float* __restrict__ sums,
           const int64 samples, const int64 width, const int64 channels) {
  const int64 step = static_cast<int64>(gridDim.x) * blockDim.y;
  const int64 start = static_cast<int64>(blockIdx.x) * blockDim.y + threadIdx.y;
  float sum = 0.0f;
  for (int64 sample = start; sample < samples; sample += step) {
    const int64 corner = rows[sample];
    for (int64 c = threadIdx.x * WIDTH; c < channels; c += blockDim.x * WIDTH) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64 pixel = corner + (i >> 1) * width + (i & 1);
        sum += total(*reinterpret_cast<const Vector*>(image + pixel * channels + c));
      }
    }
  }
  sums[start * blockDim.x + threadIdx.x] = sum;
}

// m1: a thread row adds a row of `channels` floats to each of the rows that it is given.
extern "C" __global__ void __launch_bounds__(256)
    scatter(float* __restrict__ image, const int* __restrict__ rows, const int64 samples,
            const int64 channels) {
  const int64 step = static_cast<int64>(gridDim.x) * blockDim.y;
  Vector one;
  fill(one, 1.0f);
  for (int64 sample = static_cast<int64>(blockIdx.x) * blockDim.y + threadIdx.y; sample < samples;
       sample += step) {
    float* row = image + rows[sample] * channels;
    for (int64 c = threadIdx.x * WIDTH; c < channels; c += blockDim.x * WIDTH) red_add(row + c, one);
  }
}

// m6: a warp multiplies a (16, K) by b (8, K) transposed in steps of 8 on tensor cores, each factor
// as the sum of two TF32 numbers; after every `promote` steps the sums move to plain float32 (0:
// never). Layouts of the fragments: ptx.cuh.
extern "C" __global__ void __launch_bounds__(32)
    tf32_product(const float* __restrict__ a, const float* __restrict__ b, float* __restrict__ d,
                 const int64 k, const int64 promote) {
  const int group = threadIdx.x / 4, lane = threadIdx.x % 4;
  float sum[4] = {0, 0, 0, 0}, partial[4] = {0, 0, 0, 0};
  for (int64 start = 0, step = 1; start < k; start += 8, ++step) {
    u32 high_a[4], low_a[4], high_b[2], low_b[2];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float x = a[(group + 8 * (i % 2)) * k + start + lane + 4 * (i / 2)];
      high_a[i] = to_tf32(x);
      low_a[i] = to_tf32(x - __uint_as_float(high_a[i]));
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float x = b[group * k + start + lane + 4 * i];
      high_b[i] = to_tf32(x);
      low_b[i] = to_tf32(x - __uint_as_float(high_b[i]));
    }
    mma_m16n8k8_tf32(partial, low_a, high_b);
    mma_m16n8k8_tf32(partial, high_a, low_b);
    mma_m16n8k8_tf32(partial, high_a, high_b);
    if (promote > 0 && step % promote == 0) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sum[i] += partial[i];
        partial[i] = 0;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    d[(group + 8 * (i / 2)) * 8 + 2 * lane + i % 2] = sum[i] + partial[i];
  }
}

// m7: a launch of nothing.
extern "C" __global__ void __launch_bounds__(32) nothing(float* __restrict__ unused) {}
