// What the fused kernels multiply: units of 16 bytes of channels, the same in registers, in memory
// and in packed weights, as operands of tensor cores (fused_conv.cu has a drawing).
//
// Macros: DTYPE, TERMS (3: float32 by three TF32 products), CORNERS.
#pragma once
#include "fused_plan.cuh"
#include "ptx.cuh"

constexpr int UNIT = sizeof(uint4) / sizeof(T);  // channels that a lane holds of a row
constexpr int ROWS = 4;                          // of a lane: q, q + 8, q + 16, q + 24
constexpr int SPAN = UNIT / 2;                   // n8 tiles over which its consecutive sums lie

// Column c of n8 tile j is this output channel of the tile.
__device__ __forceinline__ int out_channel(int j, int c) {
  return j / SPAN * 8 * SPAN + c / 2 * 2 * SPAN + j % SPAN * 2 + c % 2;
}

__device__ __forceinline__ float high_part(float x) {  // the bits that TF32 has
  return __uint_as_float(__float_as_uint(x) & 0xffffe000u);
}

// What a lane holds of a row: 16 bytes of channels, which are registers of a fragment.
struct alignas(16) Unit {
  u32 reg[4];
};

// A unit as floats, rounding to one, and d += a b on tensor cores.
template <typename S> struct Math;
template <> struct Math<__half> {
  static __device__ __forceinline__ void unpack(float (&v)[8], const Unit& u) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = __half22float2(reinterpret_cast<const __half2&>(u.reg[i]));
      v[2 * i] = pair.x, v[2 * i + 1] = pair.y;
    }
  }
  static __device__ __forceinline__ void round(Unit& u, const float (&v)[8]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const __half2 pair = __floats2half2_rn(v[2 * i], v[2 * i + 1]);
      u.reg[i] = reinterpret_cast<const u32&>(pair);
    }
  }
  static __device__ __forceinline__ void mma(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    mma_m16n8k16_f16(d, a, b);
  }
};
template <> struct Math<__nv_bfloat16> {
  static __device__ __forceinline__ void unpack(float (&v)[8], const Unit& u) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      v[2 * i] = __uint_as_float(u.reg[i] << 16);
      v[2 * i + 1] = __uint_as_float(u.reg[i] & 0xffff0000u);
    }
  }
  static __device__ __forceinline__ void round(Unit& u, const float (&v)[8]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(v[2 * i], v[2 * i + 1]);
      u.reg[i] = reinterpret_cast<const u32&>(pair);
    }
  }
  static __device__ __forceinline__ void mma(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    mma_m16n8k16_bf16(d, a, b);
  }
};
template <> struct Math<float> {
  static __device__ __forceinline__ void unpack(float (&v)[4], const Unit& u) {
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = __uint_as_float(u.reg[i]);
  }
  static __device__ __forceinline__ void round(Unit& u, const float (&v)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) u.reg[i] = TERMS == 3 ? __float_as_uint(v[i]) : to_tf32(v[i]);
  }
  static __device__ __forceinline__ void mma(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    mma_m16n8k8_tf32(d, a, b);
  }
};

// A unit that was loaded, in registers of its own: see ptx.cuh.
__device__ __forceinline__ Unit moved(Unit u) {
#pragma unroll
  for (u32& reg : u.reg) reg = moved(reg);
  return u;
}

// A unit by loads of WIDTH channels. CHECKED: zeros if it does not `exist`, and from channel `left` on.
template <int WIDTH, bool CHECKED>
__device__ __forceinline__ Unit load_unit(const char* from, bool exists, int left) {
  Unit u = {};
#pragma unroll
  for (int v = 0; v < UNIT; v += WIDTH) {
    if (CHECKED && !(exists && v < left)) continue;
    const char* at = from + v * sizeof(T);
    if constexpr (WIDTH * sizeof(T) == 16) {
      const uint4 r = __ldg(reinterpret_cast<const uint4*>(at));
      u = {r.x, r.y, r.z, r.w};
    } else if constexpr (WIDTH * sizeof(T) == 8) {
      const uint2 r = __ldg(reinterpret_cast<const uint2*>(at));
      u.reg[v / WIDTH * 2] = r.x, u.reg[v / WIDTH * 2 + 1] = r.y;
    } else if constexpr (WIDTH * sizeof(T) == 4) {
      u.reg[v / WIDTH] = __ldg(reinterpret_cast<const u32*>(at));
    } else {
      u.reg[v / 2] |= __ldg(reinterpret_cast<const unsigned short*>(at)) << v % 2 * 16;
    }
  }
  return u;
}

// The weighted sum of a sample's corners.
__device__ __forceinline__ void blend(Unit& a, const Unit (&seen)[CORNERS], const Weights& weights) {
  if constexpr (CORNERS == 1 && sizeof(T) == 2) {
    a = seen[0];
  } else {
    float sum[UNIT];
    if constexpr (CORNERS == 1) {
      Math<T>::unpack(sum, seen[0]);
    } else {
#pragma unroll
      for (int e = 0; e < UNIT; ++e) sum[e] = 0;
#pragma unroll
      for (int corner = 0; corner < CORNERS; ++corner) {
        float value[UNIT];
        Math<T>::unpack(value, seen[corner]);
#pragma unroll
        for (int e = 0; e < UNIT; ++e) sum[e] += weights.corner[corner] * value[e];
      }
    }
    Math<T>::round(a, sum);
  }
}

// Adds the products of two mma's for each of these n8 tiles and either half of the rows. Neighbours in
// the order of the instructions do not wait for each other.
template <int TILES>
__device__ __forceinline__ void multiply(float (*sums)[2][4], const Unit (&a)[ROWS],
                                         const Unit (&b)[TILES]) {
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
#pragma unroll
    for (int j = 0; j < TILES; ++j) {
      const u32 weights[2] = {b[j].reg[i], b[j].reg[i + 1]};
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const Unit &upper = a[2 * m], &lower = a[2 * m + 1];
        const u32 rows[4] = {upper.reg[i], lower.reg[i], upper.reg[i + 1], lower.reg[i + 1]};
        Math<T>::mma(sums[j][m], rows, weights);
      }
    }
  }
}

// Adds the products of a step, with the first `outs` output channels of the tile. Three TF32 products
// stand for one of float32: with x = high + low, a b = low high' + high low' + high high' but for
// 2^-21 of it. Not `corrected`: high high' alone. Tensor cores add with truncation, which is for the
// caller to keep in bounds: see `promote`.
template <bool CORRECTED, int N8>
__device__ __forceinline__ void multiply_step(float (&sums)[N8][2][4], const Unit (&a)[ROWS],
                                              const Unit* stage, int outs) {
  constexpr int TILES = TERMS == 1 ? 4 : 2;
  Unit high[ROWS], low[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    high[r] = a[r];
#pragma unroll
    for (int i = 0; i < 4 && TERMS == 3; ++i) split_tf32(a[r].reg[i], high[r].reg[i], low[r].reg[i]);
  }
#pragma unroll
  for (int first = 0; first < N8; first += TILES) {
    // as a branch, it also keeps the loads of too many weights apart
    if (first > 0 && 8 * first >= outs) continue;
    Unit b[TILES], b_low[TILES];
#pragma unroll
    for (int j = 0; j < TILES; ++j) b[j] = stage[32 * (first + j)];
    if constexpr (TERMS == 3 && CORRECTED) {
#pragma unroll
      for (int j = 0; j < TILES; ++j) b_low[j] = stage[32 * (N8 + first + j)];
      multiply(sums + first, low, b);
      multiply(sums + first, high, b_low);
    }
    multiply(sums + first, high, b);
  }
}

struct alignas(16) Quad {
  float value[4];
};

// Adds sums, which tensor cores have truncated in every step, to the thread's totals in shared memory.
// The sums begin again at zero; the LAST time they become the totals.
template <bool LAST, int THREADS, int N8>
__device__ __forceinline__ void promote(float (&sums)[N8][2][4], Quad* totals) {
#pragma unroll
  for (int j = 0; j < 2 * N8; ++j) {
    Quad total = totals[THREADS * j];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float& sum = sums[j / 2][j % 2][i];
      total.value[i] += sum;
      sum = LAST ? total.value[i] : 0;
    }
    if (!LAST) totals[THREADS * j] = total;
  }
}

// Whether any thread of the block says so. The vote of the warp tells the compiler that its lanes stay
// together, which takes 3 % of the instructions out of the loop around a product of three terms.
__device__ __forceinline__ bool any_of_block(bool mine) {
  return __syncthreads_or(__any_sync(0xffffffffu, mine));
}
