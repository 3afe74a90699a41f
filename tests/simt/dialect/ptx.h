// The functions of the library's cuda/ptx.cuh, in C++: same names, same meaning, and more checks.
#pragma once

typedef unsigned int u32;

SIMT_INLINE void __trap() { simt_trap("__trap"); }

// ---- tensor cores
// How a 32-bit register of an A or B fragment splits into elements.
struct SimtTf32 {
  static constexpr int PER_REGISTER = 1;
  SIMT_RAW static float element(u32 bits, int) { return simt_bits<float>(bits & 0xffffe000u); }
};
struct SimtF16 {
  static constexpr int PER_REGISTER = 2;
  SIMT_RAW static float element(u32 bits, int i) {
    return simt_half_to_float(uint16_t(bits >> 16 * i));
  }
};
struct SimtBf16 {
  static constexpr int PER_REGISTER = 2;
  SIMT_RAW static float element(u32 bits, int i) {
    return simt_bfloat16_to_float(uint16_t(bits >> 16 * i));
  }
};

// Tensor cores add the products and C as if exactly, and drop what does not fit into a float.
SIMT_RAW inline float simt_truncate(double sum) {
  const float nearest = float(sum);
  const bool rounded_away = fabs(double(nearest)) > fabs(sum) && isfinite(nearest);
  return rounded_away ? simt_bits<float>(simt_bits<u32>(nearest) - 1) : nearest;
}

template <class TYPE, int K>
struct SimtMma {
  struct Fragments {
    u32 a[4], b[2];
    float c[4];
  };
  static constexpr int E = TYPE::PER_REGISTER;

  // Gathers the fragments of all lanes into A (16 x K) and B (K x 8), multiplies, hands D out.
  SIMT_RAW static void multiply(const void* const* in, void* const* out, unsigned) {
    float A[16][K], B[K][8];
    for (int lane = 0; lane < 32; ++lane) {
      auto& mine = *static_cast<const Fragments*>(in[lane]);
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < E; ++i) {
        for (int r = 0; r < 4; ++r)
          A[g + 8 * (r % 2)][t * E + i + r / 2 * 4 * E] = TYPE::element(mine.a[r], i);
        for (int r = 0; r < 2; ++r) B[t * E + i + r * 4 * E][g] = TYPE::element(mine.b[r], i);
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      auto& c = static_cast<const Fragments*>(in[lane])->c;
      for (int r = 0; r < 4; ++r) {
        const int row = lane / 4 + 8 * (r / 2), column = lane % 4 * 2 + r % 2;
        double sum = c[r];
        for (int k = 0; k < K; ++k) sum += double(A[row][k]) * B[k][column];
        static_cast<float*>(out[lane])[r] = simt_truncate(sum);
      }
    }
  }

  static SIMT_INLINE void run(const char* what, int line, float (&d)[4], const u32 (&a)[4],
                              const u32 (&b)[2]) {
    Fragments in;
    float result[4];
    std::memcpy(in.a, a, sizeof a);
    std::memcpy(in.b, b, sizeof b);
    std::memcpy(in.c, d, sizeof d);
    simt_warp(what, line, ~0u, &in, result, multiply);
    std::memcpy(d, result, sizeof d);
  }
};
SIMT_INLINE void mma_m16n8k8_tf32(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2],
                                  int line = __builtin_LINE()) {
  SimtMma<SimtTf32, 8>::run("mma_m16n8k8_tf32", line, d, a, b);
}
SIMT_INLINE void mma_m16n8k16_f16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2],
                                  int line = __builtin_LINE()) {
  SimtMma<SimtF16, 16>::run("mma_m16n8k16_f16", line, d, a, b);
}
SIMT_INLINE void mma_m16n8k16_bf16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2],
                                   int line = __builtin_LINE()) {
  SimtMma<SimtBf16, 16>::run("mma_m16n8k16_bf16", line, d, a, b);
}

SIMT_RAW inline u32 to_tf32(float x) {
  const u32 bits = simt_bits<u32>(x);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  return finite ? (bits + 0x1000u) & 0xffffe000u : bits;
}

SIMT_RAW inline void split_tf32(u32 x, u32& high, u32& low) {
  high = x & 0xffffe000u;
  low = simt_bits<u32>(simt_bits<float>(x) - simt_bits<float>(high));
}

SIMT_RAW inline u32 moved(u32 x) { return x; }

// ---- ldmatrix
template <int MATRICES, bool TRANSPOSED>
SIMT_RAW void simt_ldmatrix(const void* const* in, void* const* out, unsigned) {
  for (int lane = 0; lane < 32; ++lane)
    for (int m = 0; m < MATRICES; ++m)
      for (int i = 0; i < 2; ++i) {
        const int row = lane / 4, column = lane % 4 * 2 + i;
        const void* source = in[8 * m + (TRANSPOSED ? column : row)];
        std::memcpy(static_cast<uint16_t*>(out[lane]) + 2 * m + i,
                    static_cast<const uint16_t*>(source) + (TRANSPOSED ? row : column), 2);
      }
}
template <int MATRICES, bool TRANSPOSED>
SIMT_INLINE void simt_run_ldmatrix(const char* what, int line, u32* r, const void* row) {
  if (simt_lane() < 8 * MATRICES) {  // the other lanes' addresses are not used
    simt_require_aligned(row, 16, what);
    simt_access(row, 16, SIMT_READ);
  }
  simt_warp(what, line, ~0u, row, r, simt_ldmatrix<MATRICES, TRANSPOSED>);
}
#define SIMT_DEFINE_LDMATRIX(NAME, MATRICES, TRANSPOSED)                                   \
  SIMT_INLINE void NAME(u32(&r)[MATRICES], const void* row, int line = __builtin_LINE()) { \
    simt_run_ldmatrix<MATRICES, TRANSPOSED>(#NAME, line, r, row);                          \
  }
SIMT_DEFINE_LDMATRIX(ldmatrix_x2, 2, false)
SIMT_DEFINE_LDMATRIX(ldmatrix_x2_trans, 2, true)
SIMT_DEFINE_LDMATRIX(ldmatrix_x4, 4, false)
SIMT_DEFINE_LDMATRIX(ldmatrix_x4_trans, 4, true)

SIMT_RAW inline const char* advance(const char* base, u32 count, u32 stride) {
  return base + (unsigned long long)count * stride;
}

// ---- asynchronous copies
template <int BYTES>
SIMT_INLINE void cp_async(void* shared, const void* global, bool read = true) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16);
  simt_copy_async(shared, global, BYTES, read);
}
SIMT_INLINE void cp_async_commit() { simt_commit_copies(); }
template <int N>
SIMT_INLINE void cp_async_wait() {
  simt_wait_for_copies(N);
}

// ---- vector reductions
SIMT_INLINE void red_add(float* address, float value) { atomicAdd(address, value); }
SIMT_INLINE void red_add(float* address, float2 value) {
  simt_require_aligned(address, 8, "red_add of float2");
  atomicAdd(address, value.x);
  atomicAdd(address + 1, value.y);
}
SIMT_INLINE void red_add(float* address, float4 value) {
  simt_require_aligned(address, 16, "red_add of float4");
  atomicAdd(address, value.x);
  atomicAdd(address + 1, value.y);
  atomicAdd(address + 2, value.z);
  atomicAdd(address + 3, value.w);
}
