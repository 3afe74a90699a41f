// _arrange.py: channels that are seen together.
//
// Macros: DTYPE, FROM (of the array), INDEX, VEC, SIDE (pixels, and channels, of a block).
#include "vector.cuh"

// (N, C, H, W) arrays as rows (N, H, W, groups, classes, pitch): the depth channels of a group and
// class lie together, and zeros behind them.
struct Layout {
  int images, channels, height, width, groups, depth, pitch;
  int64 step_image, step_channel, step_y, step_x;  // of the array, in elements
};

// A block copies SIDE pixels x SIDE channels of one group: it reads along the pixels and writes along
// the channels, each element once, and turns them in shared memory. What lies as (N, C, H, W) is read
// in whole sectors of memory, as rows are written.
extern "C" __global__ void __launch_bounds__(256)
    arrange(const FROM* __restrict__ from, T* __restrict__ to, const Layout l) {
  __shared__ T tile[SIDE][SIDE + 1];
  const int64 pixels = static_cast<int64>(l.height) * l.width;
  const int channels = l.channels / l.groups, row = channels / l.depth * l.pitch;
  const int tiles = (row + SIDE - 1) / SIDE;
  const int64 strips = (pixels + SIDE - 1) / SIDE, block = blockIdx.x / tiles;
  const int first = blockIdx.x % tiles * SIDE, group = static_cast<int>(block % l.groups);
  const int64 strip = block / l.groups, image = strip / strips, pixel = strip % strips * SIDE;
  const int64 mine = pixel + threadIdx.x, y = mine / l.width, x = mine - y * l.width;
  from += image * l.step_image + y * l.step_y + x * l.step_x;
  for (int i = threadIdx.y; i < SIDE; i += blockDim.y) {
    const int place = first + i, in_class = place % l.pitch;
    if (place >= row || mine >= pixels) break;
    const int of_group = place / l.pitch * l.depth + in_class;
    A value = 0;
    if (in_class < l.depth) {
      const int64 channel = static_cast<int64>(of_group) * l.groups + group;
      value = static_cast<A>(from[channel * l.step_channel]);
    }
    tile[i][threadIdx.x] = static_cast<T>(value);
  }
  __syncthreads();
  for (int i = threadIdx.y; i < SIDE; i += blockDim.y) {
    if (first + threadIdx.x >= row || pixel + i >= pixels) break;
    const int64 at = (image * pixels + pixel + i) * l.groups + group;
    to[at * row + first + threadIdx.x] = tile[threadIdx.x][i];
  }
}
