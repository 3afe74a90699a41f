// Qualifiers, built-in variables and vector types.
#pragma once
#include <math.h>  // not <cmath>: CUDA has abs(float), floor(float), isnan(float) in the global namespace
#include <stdlib.h>

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#undef NAN  // NVRTC has no math.h
#undef INFINITY

// What follows a SIMT_RAW is the simulator's own work and is not checked.
#define SIMT_RAW __attribute__((no_sanitize("thread", "undefined"), no_sanitize_coverage))
// What calls the runtime becomes part of the kernel: an error's place is the address of that call.
#define SIMT_INLINE inline __attribute__((always_inline))

#define __global__
#define __device__
#define __host__
#define __constant__ const
#define __shared__ \
  static  // one block runs at a time; the .bss of a kernel library is its shared memory
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
};
// const, because a thread sees them so; the runtime sets them each time that it changes threads.
extern const uint3 threadIdx, blockIdx;
extern const dim3 blockDim, gridDim;
constexpr int warpSize = 32;

#define SIMT_VECTORS(T, NAME)                                                        \
  struct alignas(2 * sizeof(T)) NAME##2 { T x, y; };                                 \
  struct NAME##3 { T x, y, z; };                                                     \
  struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) NAME##4 { T x, y, z, w; }; \
  inline NAME##2 make_##NAME##2(T x, T y) { return {x, y}; }                         \
  inline NAME##3 make_##NAME##3(T x, T y, T z) { return {x, y, z}; }                 \
  inline NAME##4 make_##NAME##4(T x, T y, T z, T w) { return {x, y, z, w}; }
#define uint3 simt_uint3  // SIMT_VECTORS(unsigned, uint) would define it a second time
SIMT_VECTORS(float, float)
SIMT_VECTORS(double, double)
SIMT_VECTORS(int, int)
SIMT_VECTORS(unsigned, uint)
SIMT_VECTORS(short, short)
SIMT_VECTORS(unsigned short, ushort)
SIMT_VECTORS(signed char, char)
SIMT_VECTORS(unsigned char, uchar)
SIMT_VECTORS(long long, longlong)
SIMT_VECTORS(unsigned long long, ulonglong)
#undef uint3
