// The gradients of the columns of a chunk, for the kernels that send them on.
//
// Macros: DEPTHWISE (0 or 1).
#pragma once
#include "conv.cuh"

// They lie as in conv.cuh. With one channel per group (DEPTHWISE) they lie nowhere: as
//   Σ_out weight[out, tap, c] · grad_y[position, c · outs + out]
// they are made where they are needed. `rows` are then those of grad_y (N·Ho·Wo, O), and `by_tap` are the
// weights (outs, taps, C), outs being O / C.
struct ColumnGradient {
  const T *rows, *by_tap;
  int64 first, count;

  __device__ __forceinline__ Vector operator()(const ConvGeometry& g, int64 position, int tap,
                                               int c) const {
    if constexpr (!DEPTHWISE) return load(rows + column_offset(g, count, position, tap, c));
    const int outs = g.out_channels / g.channels;
    const T* const row = rows + (first + position) * g.out_channels + static_cast<int64>(c) * outs;
    Vector sum = zero();
#pragma unroll 1  // there is one of them, mostly
    for (int out = 0; out < outs; ++out) {
      const int64 line = static_cast<int64>(out) * g.taps() + tap;
      add(sum, load(by_tap + line * g.channels + c), outs == 1 ? load(row) : gather(row + out, outs));
    }
    return sum;
  }
};
