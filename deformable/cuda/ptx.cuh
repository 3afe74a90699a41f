// The one place for what has no form in CUDA C++: instructions in PTX, each behind a function, and
// dynamic shared memory. Where SIMT_CPU is defined the kernels are compiled for the CPU by the tests
// (tests/simt), which bring functions of the same names and meaning.
//
// Fragments of mma are the PTX manual's: with g = lane / 4 and t = lane % 4, register pairs of
//   A (16 x K, row major)     hold rows g, g + 8 and, from the third register on, the columns' second half,
//   B (K x 8, column major)   hold column g, rows from t (or 2t) on, then the rows' second half,
//   C, D (16 x 8)             hold row g: columns 2t, 2t + 1, then row g + 8.
#pragma once

typedef unsigned int u32;

#ifndef SIMT_CPU
#include <cuda_bf16.h>
#include <cuda_fp16.h>

// The block's dynamic shared memory as an array of T.
#define DYN_SHARED(T, name)                                        \
  extern __shared__ __align__(16) unsigned char dynamic_shared_[]; \
  T* name = reinterpret_cast<T*>(dynamic_shared_)

// d += a b of a warp on tensor cores, sums in float32. From sm_80 on; a trap before.
#if __CUDA_ARCH__ >= 800
#define MMA_SYNC(SHAPE, TYPE)                                                                   \
  asm volatile("mma.sync.aligned." SHAPE ".row.col.f32." TYPE "." TYPE ".f32 "                  \
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                 \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
#else
#define MMA_SYNC(SHAPE, TYPE) __trap()
#endif
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const u32 (&a)[4],
                                                 const u32 (&b)[2]) {
  MMA_SYNC("m16n8k8", "tf32");
}
__device__ __forceinline__ void mma_m16n8k16_f16(float (&d)[4], const u32 (&a)[4],
                                                 const u32 (&b)[2]) {
  MMA_SYNC("m16n8k16", "f16");
}
__device__ __forceinline__ void mma_m16n8k16_bf16(float (&d)[4], const u32 (&a)[4],
                                                  const u32 (&b)[2]) {
  MMA_SYNC("m16n8k16", "bf16");
}
#undef MMA_SYNC

// x rounded to the 10 bits of tf32, to nearest, ties away from zero.
__device__ __forceinline__ u32 to_tf32(float x) {
#if __CUDA_ARCH__ >= 800
  u32 rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(x));
  return rounded;
#else
  return __float_as_uint(x);
#endif
}

// x as the sum of two numbers of tf32: its upper 10 bits of mantissa, and the rest, of whose 13 bits
// tensor cores ignore the last. Volatile: computed here and now, not once more at every use.
__device__ __forceinline__ void split_tf32(u32 x, u32& high, u32& low) {
  asm volatile(
      "and.b32 %0, %2, 0xffffe000;\n\t"
      "sub.ftz.f32 %1, %2, %0;"
      : "=&r"(high), "=r"(low)
      : "r"(x));
}

// x in a register of its own. mma wants its operands in neighbouring registers, and so does a load of
// 16 bytes: without this the assembler moves them around before every mma.
__device__ __forceinline__ u32 moved(u32 x) {
  u32 y;
  asm volatile("mov.b32 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// 8 x 8 matrices of 16-bit elements from shared memory: lane 8m + i gives the address of row i of
// matrix m, 16 bytes aligned to 16; register m of lane l receives row l / 4, elements 2 (l % 4) and
// the next. `_trans` gives the transposed matrices.
#define LDMATRIX_X2(MODIFIER)                                                                \
  asm volatile("ldmatrix.sync.aligned.m8n8.x2" MODIFIER ".shared.b16 {%0, %1}, [%2];"        \
               : "=r"(r[0]), "=r"(r[1])                                                      \
               : "r"((u32)__cvta_generic_to_shared(row))                                     \
               : "memory")
#define LDMATRIX_X4(MODIFIER)                                                                \
  asm volatile("ldmatrix.sync.aligned.m8n8.x4" MODIFIER ".shared.b16 {%0, %1, %2, %3}, [%4];" \
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])                              \
               : "r"((u32)__cvta_generic_to_shared(row))                                     \
               : "memory")
__device__ __forceinline__ void ldmatrix_x2(u32 (&r)[2], const void* row) { LDMATRIX_X2(""); }
__device__ __forceinline__ void ldmatrix_x2_trans(u32 (&r)[2], const void* row) {
  LDMATRIX_X2(".trans");
}
__device__ __forceinline__ void ldmatrix_x4(u32 (&r)[4], const void* row) { LDMATRIX_X4(""); }
__device__ __forceinline__ void ldmatrix_x4_trans(u32 (&r)[4], const void* row) {
  LDMATRIX_X4(".trans");
}
#undef LDMATRIX_X2
#undef LDMATRIX_X4

// base + count * stride, the product in 64 bits: one instruction, but for the compiler only if it is
// written as two with a carry.
__device__ __forceinline__ const char* advance(const char* base, u32 count, u32 stride) {
  const char* to;
  asm("{\n\t"
      ".reg .u32 low, high;\n\t"
      "mov.b64 {low, high}, %3;\n\t"
      "mad.lo.cc.u32 low, %1, %2, low;\n\t"
      "madc.hi.u32 high, %1, %2, high;\n\t"
      "mov.b64 %0, {low, high};\n\t"
      "}"
      : "=l"(to)
      : "r"(count), "r"(stride), "l"(base));
  return to;
}

// Copies BYTES (4, 8 or 16, both addresses aligned to it) from global to shared memory behind the
// thread's back, zeros where `read` is false. cp_async_commit closes a group of copies,
// cp_async_wait<N> waits for all but the last N groups of this thread. Immediate before sm_80.
template <int BYTES>
__device__ __forceinline__ void cp_async(void* shared, const void* global, bool read = true) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "cp.async copies 4, 8 or 16 bytes");
#if __CUDA_ARCH__ >= 800
  const u32 to = (u32)__cvta_generic_to_shared(shared);
  if constexpr (BYTES == 16)  // .cg passes by L1 and exists for 16 bytes only
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global),
                 "r"(read ? 16 : 0)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(global),
                 "n"(BYTES), "r"(read ? BYTES : 0)
                 : "memory");
#else
#pragma unroll
  for (int i = 0; i < BYTES / 4; ++i)
    static_cast<u32*>(shared)[i] = read ? static_cast<const u32*>(global)[i] : 0u;
#endif
}
__device__ __forceinline__ void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int N>
__device__ __forceinline__ void cp_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// Adds to global memory without an answer: one instruction for 2 or 4 floats from sm_90 on (aligned to
// all of them), each float atomic by itself.
__device__ __forceinline__ void red_add(float* address, float value) { atomicAdd(address, value); }
__device__ __forceinline__ void red_add(float* address, float2 value) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(address)),
               "f"(value.x), "f"(value.y)
               : "memory");
#else
  atomicAdd(address, value.x);
  atomicAdd(address + 1, value.y);
#endif
}
__device__ __forceinline__ void red_add(float* address, float4 value) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(
                   __cvta_generic_to_global(address)),
               "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w)
               : "memory");
#else
  atomicAdd(address, value.x);
  atomicAdd(address + 1, value.y);
  atomicAdd(address + 2, value.z);
  atomicAdd(address + 3, value.w);
#endif
}
#endif  // SIMT_CPU
