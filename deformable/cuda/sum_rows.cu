// _conv.py: sums of the rows of a matrix, for gradients of biases and of parts of the positions.
//
// Macros: DTYPE, OUT (of the sums), INDEX, VEC, LANES (columns), ROWS (at a time).
#include "vector.cuh"

// A block adds up `split` rows of (count, columns), LANES columns of them, in a fixed order: its
// thread rows take turns. Every element is read once. sums (parts, columns).
extern "C" __global__ void __launch_bounds__(256)
    sum_rows(const T* __restrict__ rows, OUT* __restrict__ sums, const int64 count,
             const int64 columns, const int64 split) {
  __shared__ A totals[ROWS][LANES];
  const int64 column = static_cast<int64>(blockIdx.x) * LANES + threadIdx.x;
  const int64 first = blockIdx.y * split, end = min(first + split, count);
  A sum = 0;
  if (column < columns) {
#pragma unroll 4  // so many loads on their way
    for (int64 row = first + threadIdx.y; row < end; row += ROWS) {
      sum += static_cast<A>(rows[row * columns + column]);
    }
  }
  totals[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || column >= columns) return;
  for (int i = 1; i < ROWS; ++i) sum += totals[i][threadIdx.x];
  sums[blockIdx.y * columns + column] = static_cast<OUT>(sum);
}
