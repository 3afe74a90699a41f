// classic_deform_roi.py: deformable RoI pooling as it has been written since 2017, to compare with.
// A thread computes one output and loops over its samples; backward adds every corner and every
// offset by an atomic operation of its own. Images and results are (N, C, H, W).
struct Shape {
  int channels, height, width, rois, out_channels, pooled, group, part, samples, classes;
  double scale, gamma;
};

struct Bin {
  int roi, channel, ph, pw, image, plane, trans;  // trans: index of dx, that of dy lies part² later
  float x, y, width, height, step_x, step_y;      // first sample, size of the RoI, step
};

__device__ __forceinline__ Bin bin_of(const Shape& s, const float* rois, const float* offset,
                                      long long index) {
  Bin b;
  b.pw = static_cast<int>(index % s.pooled);
  b.ph = static_cast<int>(index / s.pooled % s.pooled);
  b.channel = static_cast<int>(index / s.pooled / s.pooled % s.out_channels);
  b.roi = static_cast<int>(index / s.pooled / s.pooled / s.out_channels);
  const float scale = static_cast<float>(s.scale);
  const float* roi = rois + 5 * b.roi;
  b.image = static_cast<int>(roi[0]);
  const float left = roundf(roi[1]) * scale - 0.5f, top = roundf(roi[2]) * scale - 0.5f;
  const float right = (roundf(roi[3]) + 1.0f) * scale - 0.5f;
  const float bottom = (roundf(roi[4]) + 1.0f) * scale - 0.5f;
  b.width = fmaxf(right - left, 0.1f);
  b.height = fmaxf(bottom - top, 0.1f);
  const float bin_w = b.width / s.pooled, bin_h = b.height / s.pooled;
  b.step_x = bin_w / s.samples;
  b.step_y = bin_h / s.samples;

  const int part_h = b.ph * s.part / s.pooled, part_w = b.pw * s.part / s.pooled;
  const int kind = b.channel / (s.out_channels / s.classes);
  b.trans = ((b.roi * s.classes + kind) * 2 * s.part + part_h) * s.part + part_w;
  const float gamma = static_cast<float>(s.gamma);
  b.x = left + b.pw * bin_w + gamma * offset[b.trans] * b.width;
  b.y = top + b.ph * bin_h + gamma * offset[b.trans + s.part * s.part] * b.height;

  const int gh = min(b.ph * s.group / s.pooled, s.group - 1);
  const int gw = min(b.pw * s.group / s.pooled, s.group - 1);
  b.plane = b.image * s.channels + (b.channel * s.group + gh) * s.group + gw;
  return b;
}

// Corners of a sample that is kept, clamped to the image.
struct Corners {
  int x0, x1, y0, y1;
  float lx, ly;
};

__device__ __forceinline__ bool corners_of(const Shape& s, float x, float y, Corners& c) {
  if (!(x >= -0.5f && x <= s.width - 0.5f && y >= -0.5f && y <= s.height - 0.5f)) return false;
  x = fminf(fmaxf(x, 0.0f), s.width - 1.0f);
  y = fminf(fmaxf(y, 0.0f), s.height - 1.0f);
  c.x0 = static_cast<int>(floorf(x));
  c.x1 = static_cast<int>(ceilf(x));
  c.y0 = static_cast<int>(floorf(y));
  c.y1 = static_cast<int>(ceilf(y));
  c.lx = x - c.x0;
  c.ly = y - c.y0;
  return true;
}

extern "C" __global__ void __launch_bounds__(256)
    classic_forward(const float* __restrict__ image, const float* __restrict__ rois,
                    const float* __restrict__ offset, float* __restrict__ result,
                    float* __restrict__ counts, const Shape s, const long long outputs) {
  const long long index = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= outputs) return;
  const Bin b = bin_of(s, rois, offset, index);
  const float* plane = image + static_cast<long long>(b.plane) * s.height * s.width;
  float sum = 0.0f;
  int kept = 0;
  for (int i = 0; i < s.samples; ++i) {
    for (int j = 0; j < s.samples; ++j) {
      Corners c;
      if (!corners_of(s, b.x + j * b.step_x, b.y + i * b.step_y, c)) continue;
      const float top = plane[c.y0 * s.width + c.x0] * (1 - c.lx) + plane[c.y0 * s.width + c.x1] * c.lx;
      const float low = plane[c.y1 * s.width + c.x0] * (1 - c.lx) + plane[c.y1 * s.width + c.x1] * c.lx;
      sum += top * (1 - c.ly) + low * c.ly;
      ++kept;
    }
  }
  result[index] = kept ? sum / kept : 0.0f;
  counts[index] = static_cast<float>(kept);
}

extern "C" __global__ void __launch_bounds__(256)
    classic_backward(const float* __restrict__ grad, const float* __restrict__ counts,
                     const float* __restrict__ image, const float* __restrict__ rois,
                     const float* __restrict__ offset, float* __restrict__ grad_image,
                     float* __restrict__ grad_offset, const Shape s, const long long outputs) {
  const long long index = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= outputs || counts[index] <= 0.0f) return;
  const Bin b = bin_of(s, rois, offset, index);
  const long long base = static_cast<long long>(b.plane) * s.height * s.width;
  const float share = grad[index] / counts[index];
  const float gamma = static_cast<float>(s.gamma);
  for (int i = 0; i < s.samples; ++i) {
    for (int j = 0; j < s.samples; ++j) {
      Corners c;
      if (!corners_of(s, b.x + j * b.step_x, b.y + i * b.step_y, c)) continue;
      const long long p00 = base + c.y0 * s.width + c.x0, p01 = base + c.y0 * s.width + c.x1;
      const long long p10 = base + c.y1 * s.width + c.x0, p11 = base + c.y1 * s.width + c.x1;
      atomicAdd(grad_image + p00, share * (1 - c.ly) * (1 - c.lx));
      atomicAdd(grad_image + p01, share * (1 - c.ly) * c.lx);
      atomicAdd(grad_image + p10, share * c.ly * (1 - c.lx));
      atomicAdd(grad_image + p11, share * c.ly * c.lx);
      const float u00 = image[p00], u01 = image[p01], u10 = image[p10], u11 = image[p11];
      const float along_x = (u01 - u00) * (1 - c.ly) + (u11 - u10) * c.ly;
      const float along_y = (u10 - u00) * (1 - c.lx) + (u11 - u01) * c.lx;
      atomicAdd(grad_offset + b.trans, along_x * gamma * b.width * share);
      atomicAdd(grad_offset + b.trans + s.part * s.part, along_y * gamma * b.height * share);
    }
  }
}
