// Intrinsics on numbers and bits.
#pragma once

template <class To, class From>
SIMT_RAW inline To simt_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline float __uint_as_float(unsigned u) { return simt_bits<float>(u); }
inline float __int_as_float(int i) { return simt_bits<float>(i); }
inline unsigned __float_as_uint(float f) { return simt_bits<unsigned>(f); }
inline int __float_as_int(float f) { return simt_bits<int>(f); }
inline double __longlong_as_double(long long i) { return simt_bits<double>(i); }
inline long long __double_as_longlong(double d) { return simt_bits<long long>(d); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(x) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
SIMT_RAW inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int bit = 0; bit < 32; ++bit) reversed |= (x >> bit & 1) << (31 - bit);
  return reversed;
}
inline int __mulhi(int a, int b) { return int((long long)a * b >> 32); }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return unsigned((unsigned long long)a * b >> 32);
}
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return (unsigned long long)((unsigned __int128)a * b >> 64);
}
inline long long __mul64hi(long long a, long long b) { return (long long)((__int128)a * b >> 64); }

// Conversions that are defined for every float: out of range saturates, NaN gives 0.
template <class To>
SIMT_RAW inline To simt_saturate(double x) {
  const double low = double(std::is_signed_v<To> ? To(1) << (sizeof(To) * 8 - 1) : To(0));
  const double bound = ldexp(1.0, sizeof(To) * 8 - std::is_signed_v<To>);
  if (x != x) return 0;
  if (x < low) return To(low);
  return x >= bound ? To(~(std::is_signed_v<To> ? To(1) << (sizeof(To) * 8 - 1) : To(0))) : To(x);
}
inline int __float2int_rd(float x) { return simt_saturate<int>(floor(double(x))); }
inline int __float2int_ru(float x) { return simt_saturate<int>(ceil(double(x))); }
inline int __float2int_rn(float x) { return simt_saturate<int>(nearbyint(double(x))); }
inline int __float2int_rz(float x) { return simt_saturate<int>(trunc(double(x))); }
inline unsigned __float2uint_rd(float x) { return simt_saturate<unsigned>(floor(double(x))); }
inline unsigned __float2uint_rn(float x) { return simt_saturate<unsigned>(nearbyint(double(x))); }
inline int __double2int_rd(double x) { return simt_saturate<int>(floor(x)); }
inline int __double2int_rn(double x) { return simt_saturate<int>(nearbyint(x)); }
inline int __double2int_rz(double x) { return simt_saturate<int>(trunc(x)); }
inline long long __float2ll_rd(float x) { return simt_saturate<long long>(floor(double(x))); }
inline long long __double2ll_rd(double x) { return simt_saturate<long long>(floor(x)); }
inline float __int2float_rn(int x) { return float(x); }

inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __saturatef(float x) { return x > 0.f ? (x < 1.f ? x : 1.f) : 0.f; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }

// As in CUDA, fmin and fmax know float, and min and max of mixed types follow the arithmetic rules.
template <class A, class B>
inline auto min(A a, B b) -> std::common_type_t<A, B> {
  typedef std::common_type_t<A, B> T;
  if constexpr (std::is_floating_point_v<T>) return fmin(T(a), T(b));
  else return T(b) < T(a) ? T(b) : T(a);
}
template <class A, class B>
inline auto max(A a, B b) -> std::common_type_t<A, B> {
  typedef std::common_type_t<A, B> T;
  if constexpr (std::is_floating_point_v<T>) return fmax(T(a), T(b));
  else return T(a) < T(b) ? T(b) : T(a);
}

template <class T>
inline T __ldg(const T* address) {
  return *address;
}
template <class T>
inline T __ldcs(const T* address) {
  return *address;
}
template <class T>
inline T __ldcg(const T* address) {
  return *address;
}
template <class T>
inline T __ldlu(const T* address) {
  return *address;
}
template <class T>
inline void __stcs(T* address, T value) {
  *address = value;
}
template <class T>
inline void __stcg(T* address, T value) {
  *address = value;
}
