// The largest of the values that a bin offers, for VEC channels, and where it lies: counted from the
// first pixel on that the bin sees, so that a fraction keeps all its bits.
#pragma once
#include "roi.cuh"

constexpr float NOWHERE = -1e30f;  // no pixel is near

struct Winner {
  Vector value = zero(), y = filled(NOWHERE), x = filled(NOWHERE);
  bool any = false;

  // The first of equal values wins; NaN, the first of them, against any number.
  __device__ void offer(const Vector& other, A at_y, A at_x) {
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
      const A mine = value.value[i], its = other.value[i];
      if (any && (mine != mine || its <= mine)) continue;
      value.value[i] = its;
      y.value[i] = at_y;
      x.value[i] = at_x;
    }
    any = true;
  }

  // Either `values` or both of the places may be null.
  __device__ void store_to(int64 at, bool lost, T* values, A* winner_y, A* winner_x) const {
    if (values) store(values + at, lost ? filled(nan("")) : value);
    if (!winner_y) return;
    store(winner_y + at, y);
    store(winner_x + at, x);
  }
};
