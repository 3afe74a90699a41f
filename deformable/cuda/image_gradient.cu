// deform_conv.py: the gradient of the image, gathered from those of the columns that have seen it.
//
// Gathering needs, for every pixel, the samples that look there, always in the same order. They are
// listed by cell. Cells are (image, offset group, H + 1, W + 1), the upper left corner from -1 on; a
// sample outside belongs to none. The samples of each cell are counted, the counts added up, and the
// samples put in their lists, all by atomic operations on integers; sorted, a list is always the same.
// No float is added atomically.
//
// A sample is one (position, offset group, tap) of the chunk of `count` positions from `first` on;
// samples are counted in that order, by int: a chunk is small. Columns: conv.cuh.
//
// Macros: DTYPE, INDEX, VEC (channels per load), OFFSET, MASK, CORNERS (4).
#include "fused_plan.cuh"

struct ChunkSample {
  int position, group, tap;  // position within the chunk
};

__device__ __forceinline__ ChunkSample chunk_sample(const ConvGeometry& g, int sample) {
  const int line = sample / g.taps();
  return {line / g.offset_groups, line % g.offset_groups, sample - line * g.taps()};
}

__device__ __forceinline__ int sample_count(const ConvGeometry& g, int64 count) {
  return static_cast<int>(count) * g.offset_groups * g.taps();
}

// The thread's sample, and the cell it lies in if it is inside; images are counted from the first one.
__device__ __forceinline__ Sample find_sample(const ConvGeometry& g, const Places& places,
                                              int sample, int64 first_image, int64 first,
                                              int64& cell) {
  const ChunkSample id = chunk_sample(g, sample);
  const OutputPixel out = output_pixel(g, static_cast<index_t>(first) + id.position);
  const Sample s = offset_sample(g, places, out, id.tap / g.kernel_w * g.dilation_h,
                                 id.tap % g.kernel_w * g.dilation_w, id.group * g.taps() + id.tap);
  const int64 plane = (out.image - first_image) * g.offset_groups + id.group;
  cell = (plane * (g.height + 1) + s.y + 1) * (g.width + 1) + s.x + 1;
  return s;
}

// Adds the samples inside to the counts of their cells.
extern "C" __global__ void __launch_bounds__(256)
    count_samples(const OFFSET* __restrict__ offset, int* __restrict__ counts,
                  const ConvGeometry g, const Strides offset_strides, const int64 first_image,
                  const int64 first, const int64 count) {
  const int sample = blockIdx.x * blockDim.x + threadIdx.x;
  if (sample >= sample_count(g, count)) return;

  int64 cell;
  const Places places = {offset, nullptr, offset_strides, {}};
  if (find_sample(g, places, sample, first_image, first, cell).inside) atomicAdd(counts + cell, 1);
}

// Lists the samples inside, and writes down what their corners weigh. The `ends` of the lists become
// the places where they start.
extern "C" __global__ void __launch_bounds__(256)
    list_samples(const OFFSET* __restrict__ offset, const MASK* __restrict__ mask,
                 int* __restrict__ ends, int* __restrict__ lists, A* __restrict__ weights,
                 const ConvGeometry g, const Strides offset_strides, const Strides mask_strides,
                 const int64 first_image, const int64 first, const int64 count) {
  const int sample = blockIdx.x * blockDim.x + threadIdx.x;
  if (sample >= sample_count(g, count)) return;

  int64 cell;
  const Places places = {offset, mask, offset_strides, mask_strides};
  const Sample s = find_sample(g, places, sample, first_image, first, cell);
  if (!s.inside) return;
  lists[atomicSub(ends + cell, 1) - 1] = sample;
  for (int corner = 0; corner < 4; ++corner) {
    weights[4 * static_cast<int64>(sample) + corner] = corner_weight(s, corner);
  }
}

// A thread sorts the list of one cell, by Shell's method: lists are short, but offsets may send all
// samples to one cell.
extern "C" __global__ void __launch_bounds__(256)
    sort_samples(const int* __restrict__ starts, int* __restrict__ lists, const int64 cells) {
  const int64 cell = static_cast<int64>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (cell >= cells) return;

  int* const list = lists + starts[cell];
  const int length = starts[cell + 1] - starts[cell];
  for (int gap = length / 2; gap > 0; gap /= 2) {
    for (int i = gap; i < length; ++i) {
      const int sample = list[i];
      int to = i;
      for (; to >= gap && list[to - gap] > sample; to -= gap) list[to] = list[to - gap];
      list[to] = sample;
    }
  }
}

// A thread row gathers the gradient of one pixel from the samples of the four cells around it and
// adds it to grad_image (images, H, W, C). `starts` says where in `lists` that of a cell begins.
extern "C" __global__ void __launch_bounds__(256, 3)
    image_gradient(const T* __restrict__ grad_columns, const int* __restrict__ lists,
                   const int* __restrict__ starts, const A* __restrict__ weights,
                   A* __restrict__ grad_image, const ConvGeometry g, const int64 images,
                   const int64 count) {
  const index_t row = static_cast<index_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const index_t line = row / g.width;
  const int x = static_cast<int>(row - line * g.width);
  const index_t image = line / g.height;
  const int y = static_cast<int>(line - image * g.height);
  if (image >= images) return;

  const int depth = g.channels / g.offset_groups;
  for (int c = threadIdx.x * VEC; c < g.channels; c += blockDim.x * VEC) {
    A* to = grad_image + static_cast<int64>(row) * g.channels + c;
    Vector sum = load(to);
    const int64 plane = static_cast<int64>(image) * g.offset_groups + c / depth;
#pragma unroll 1  // four lists of unknown length: unrolling them would only spill registers
    for (int corner = 0; corner < 4; ++corner) {
      // the cell of which this pixel is that corner
      const int64 cell = (plane * (g.height + 1) + y + 1 - (corner >> 1)) * (g.width + 1) + x + 1 -
                         (corner & 1);
      for (int entry = starts[cell]; entry < starts[cell + 1]; ++entry) {
        const int sample = lists[entry];
        const ChunkSample id = chunk_sample(g, sample);
        const int64 from = column_offset(g, count, id.position, id.tap, c);
        const A weight = weights[4 * static_cast<int64>(sample) + corner];
        add(sum, weight, load(grad_columns + from));
      }
    }
    store(to, sum);
  }
}
