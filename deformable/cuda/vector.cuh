// The numbers of a kernel: T (storage, -DDTYPE), A (positions, weights, sums), and VEC values of T
// that lie side by side and move as one load or store of up to 16 bytes.
#pragma once
#ifndef SIMT_CPU
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

typedef long long int64;
typedef INDEX index_t;  // counts pixels, rows, positions; offsets into arrays are always int64
typedef DTYPE T;

template <typename S> struct Accumulator { typedef float type; };
template <> struct Accumulator<double> { typedef double type; };
typedef Accumulator<T>::type A;

template <typename S> struct alignas(VEC * sizeof(S)) Pack { S value[VEC]; };

struct Vector {  // VEC channels, as numbers to compute with
  A value[VEC];
};

__device__ __forceinline__ Vector zero() {
  Vector v;
#pragma unroll
  for (int i = 0; i < VEC; ++i) v.value[i] = 0;
  return v;
}

template <typename S> __device__ __forceinline__ Vector load(const S* from) {
  const Pack<S> pack = *reinterpret_cast<const Pack<S>*>(from);
  Vector v;
#pragma unroll
  for (int i = 0; i < VEC; ++i) v.value[i] = static_cast<A>(pack.value[i]);
  return v;
}

// Values that lie `step` apart.
template <typename S> __device__ __forceinline__ Vector gather(const S* from, int step) {
  Vector v;
#pragma unroll
  for (int i = 0; i < VEC; ++i) v.value[i] = static_cast<A>(from[static_cast<int64>(i) * step]);
  return v;
}

template <typename S> __device__ __forceinline__ void store(S* to, const Vector& v) {
  Pack<S> pack;
#pragma unroll
  for (int i = 0; i < VEC; ++i) pack.value[i] = static_cast<S>(v.value[i]);
  *reinterpret_cast<Pack<S>*>(to) = pack;
}

__device__ __forceinline__ void add(Vector& sum, A weight, const Vector& v) {
#pragma unroll
  for (int i = 0; i < VEC; ++i) sum.value[i] += weight * v.value[i];
}

__device__ __forceinline__ void add(Vector& sum, const Vector& a, const Vector& b) {
#pragma unroll
  for (int i = 0; i < VEC; ++i) sum.value[i] += a.value[i] * b.value[i];
}

__device__ __forceinline__ A dot(const Vector& a, const Vector& b) {
  A sum = 0;
#pragma unroll
  for (int i = 0; i < VEC; ++i) sum += a.value[i] * b.value[i];
  return sum;
}
