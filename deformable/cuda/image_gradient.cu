// deform_conv.py: the gradient of the image, gathered from those of the columns that have seen it.
//
// Gathering needs, for every pixel, the samples that look there, always in the same order. They are
// listed by cell. Cells are (image, offset group, H + 1, W + 1), the upper left corner from -1 on; a
// sample outside belongs to none. Every sample is linked into the chain of its cell, then every chain
// is copied into a list, by atomic operations on integers. Neither the order of a chain nor the place
// of a list is always the same, but a list is, once it is sorted. No float is added atomically.
//
// Samples and columns of the chunk of `count` positions from `first` on: conv.cuh.
//
// Macros: DTYPE, INDEX, VEC (channels per load), OFFSET, MASK, DEPTHWISE (where the gradients of
// columns are).
#include "column_gradient.cuh"
#include "places.cuh"

// An array of two ints per sample holds the links of all chains, and behind them all lists. That of
// a cell is lists[begin] to lists[end - 1]. Before there are lists, `begin` is the number of the last
// sample in the cell's chain, from 1 on: 0 ends a chain. `end` is not used then.
struct alignas(8) Span {
  int begin, end;
};

// Links the samples inside into the chains of their cells, which are empty at first, and writes down
// what their corners weigh.
extern "C" __global__ void __launch_bounds__(256)
    link_samples(const OFFSET* __restrict__ offset, const MASK* __restrict__ mask,
                 Span* __restrict__ cells, int* __restrict__ links, A* __restrict__ weights,
                 const ConvGeometry g, const Strides offset_strides, const Strides mask_strides,
                 const int64 first_image, const int64 first, const int64 count) {
  const int sample = blockIdx.x * blockDim.x + threadIdx.x;
  if (sample >= sample_count(g, count)) return;

  const ChunkSample id = chunk_sample(g, sample);
  const OutputPixel out = output_pixel(g, static_cast<index_t>(first) + id.position);
  const Places places = {offset, mask, offset_strides, mask_strides};
  const Sample s = offset_sample(g, places, out, id);
  if (!s.inside) return;
  const int64 plane = (out.image - first_image) * g.offset_groups + id.group;
  const int64 cell = (plane * (g.height + 1) + s.y + 1) * (g.width + 1) + s.x + 1;
  links[sample] = atomicExch(&cells[cell].begin, sample + 1);
  for (int corner = 0; corner < 4; ++corner) {
    weights[4 * static_cast<int64>(sample) + corner] = corner_weight(s, corner);
  }
}

// A thread copies the chain of one cell into a list and sorts it, by Shell's method: lists are short,
// but offsets may send all samples to one cell. Gaps shrink by 5/11: with halves it would take the
// square of the length to sort the samples of two blocks that were linked by turns. Behind the last
// cell the length of all lists is added up, from 0 on: a block reserves room for its own at once.
extern "C" __global__ void __launch_bounds__(256)
    list_samples(int* __restrict__ links, Span* __restrict__ cells, const int64 samples,
                 const int64 count) {
  __shared__ int total, start;
  const int64 cell = static_cast<int64>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int last = cell < count ? cells[cell].begin : 0;
  int length = 0;
  for (int number = last; number > 0; number = links[number - 1]) ++length;
  if (threadIdx.x == 0) total = 0;
  __syncthreads();
  const int place = atomicAdd(&total, length);
  __syncthreads();
  if (threadIdx.x == 0) start = atomicAdd(&cells[count].begin, total);
  __syncthreads();
  if (cell >= count) return;

  const int begin = start + place;
  int* const list = links + samples + begin;
  for (int number = last, i = 0; number > 0; number = links[number - 1]) list[i++] = number - 1;
  for (int gap = length; gap > 1;) {
    gap = max(1, gap * 5 / 11);
    for (int i = gap; i < length; ++i) {
      const int sample = list[i];
      int to = i;
      for (; to >= gap && list[to - gap] > sample; to -= gap) list[to] = list[to - gap];
      list[to] = sample;
    }
  }
  cells[cell] = {begin, begin + length};
}

// A thread row gathers the gradient of one pixel of grad_image (N, H, W, C) from the samples of the
// four cells around it. It adds to what an earlier chunk has made of the same image.
extern "C" __global__ void __launch_bounds__(256, 3)
    image_gradient(const T* __restrict__ grad_rows, const T* __restrict__ by_tap,
                   const Span* __restrict__ cells, const int* __restrict__ links,
                   const A* __restrict__ weights, A* __restrict__ grad_image, const ConvGeometry g,
                   const int64 images, const int64 first_image, const int64 first,
                   const int64 count) {
  const index_t row = static_cast<index_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const index_t line = row / g.width;
  const int x = static_cast<int>(row - line * g.width);
  const index_t image = line / g.height;
  const int y = static_cast<int>(line - image * g.height);
  if (image >= images) return;

  const ColumnGradient gradient = {grad_rows, by_tap, first, count};
  const int depth = g.channels / g.offset_groups;
  const int* const lists = links + sample_count(g, count);
  const bool begun = (first_image + image) * g.positions() < first;
  A* const pixel = grad_image + (first_image * g.height * g.width + row) * g.channels;
  for (int c = threadIdx.x * VEC; c < g.channels; c += blockDim.x * VEC) {
    Vector sum = begun ? load(pixel + c) : zero();
    const int64 plane = static_cast<int64>(image) * g.offset_groups + c / depth;
#pragma unroll 1  // four lists of unknown length: unrolling them would only spill registers
    for (int corner = 0; corner < 4; ++corner) {
      // the cell of which this pixel is that corner
      const int64 cell = (plane * (g.height + 1) + y + 1 - (corner >> 1)) * (g.width + 1) + x + 1 -
                         (corner & 1);
      const Span list = cells[cell];
      for (int entry = list.begin; entry < list.end; ++entry) {
        const int sample = lists[entry];
        const ChunkSample id = chunk_sample(g, sample);
        add(sum, weights[4 * static_cast<int64>(sample) + corner],
            gradient(g, id.position, id.tap, c));
      }
    }
    store(pixel + c, sum);
  }
}
