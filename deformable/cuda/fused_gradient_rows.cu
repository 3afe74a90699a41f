// _fused_backward.py: the gradient of the result as the fused kernels read it, in units of 16 bytes.
//
// A thread writes a unit of (N·Ho·Wo, groups, units of the output channels of a group). The last one
// ends with zeros. Where one TF32 product stands for a float32 one they are rounded here, once.
//
// Macros: DTYPE, INDEX, VEC (elements of a unit), TERMS.
#include "ptx.cuh"
#include "vector.cuh"

extern "C" __global__ void __launch_bounds__(256)
    pack_rows(const T* __restrict__ grad_y, T* __restrict__ packed, const int64 outs,
              const int64 out_units, const int64 units) {
  const int64 i = static_cast<int64>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= units) return;

  const int64 row = i / out_units, first = (i - row * out_units) * VEC;
  Pack<T> unit = {};
#pragma unroll
  for (int e = 0; e < VEC; ++e) {
    if (first + e >= outs) continue;
    unit.value[e] = grad_y[row * outs + first + e];
    if constexpr (sizeof(T) == 4 && TERMS == 1) {
      unit.value[e] = __uint_as_float(to_tf32(unit.value[e]));
    }
  }
  *reinterpret_cast<Pack<T>*>(packed + i * VEC) = unit;
}
