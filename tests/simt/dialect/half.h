// half and bfloat16: 16-bit storage that converts to and from float. The member `x` is read and
// written by checked code, only the conversion itself is raw.
#pragma once

SIMT_RAW inline uint16_t simt_float_to_half(float f) { return simt_bits<uint16_t>((_Float16)f); }
SIMT_RAW inline float simt_half_to_float(uint16_t bits) { return (float)simt_bits<_Float16>(bits); }
SIMT_RAW inline uint16_t simt_float_to_bfloat16(float f) {
  if (f != f) return 0x7fff;
  uint32_t u = simt_bits<uint32_t>(f);
  return uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);  // to nearest, ties to even
}
SIMT_RAW inline float simt_bfloat16_to_float(uint16_t bits) {
  return simt_bits<float>(uint32_t(bits) << 16);
}

// Every operation rounds to 16 bits; half with float is ambiguous, as it is to CUDA.
#define SIMT_DEFINE_16BIT_OPERATOR(NAME, OP)                                     \
  inline NAME operator OP(NAME a, NAME b) { return NAME(float(a) OP float(b)); } \
  inline NAME& operator OP##=(NAME& a, NAME b) { return a = a OP b; }
#define SIMT_DEFINE_16BIT_COMPARISON(NAME, OP) \
  inline bool operator OP(NAME a, NAME b) { return float(a) OP float(b); }

#define SIMT_DEFINE_16BIT(NAME, PAIR, FORMAT)                            \
  struct NAME {                                                          \
    uint16_t x;                                                          \
    NAME() = default;                                                    \
    NAME(float f) : x(simt_float_to_##FORMAT(f)) {}                      \
    operator float() const { return simt_##FORMAT##_to_float(x); }       \
  };                                                                     \
  struct alignas(4) PAIR {                                               \
    NAME x, y;                                                           \
  };                                                                     \
  SIMT_DEFINE_16BIT_OPERATOR(NAME, +)                                    \
  SIMT_DEFINE_16BIT_OPERATOR(NAME, -)                                    \
  SIMT_DEFINE_16BIT_OPERATOR(NAME, *)                                    \
  SIMT_DEFINE_16BIT_OPERATOR(NAME, /)                                    \
  SIMT_DEFINE_16BIT_COMPARISON(NAME, ==)                                 \
  SIMT_DEFINE_16BIT_COMPARISON(NAME, !=)                                 \
  SIMT_DEFINE_16BIT_COMPARISON(NAME, <)                                  \
  SIMT_DEFINE_16BIT_COMPARISON(NAME, <=)                                 \
  SIMT_DEFINE_16BIT_COMPARISON(NAME, >)                                  \
  SIMT_DEFINE_16BIT_COMPARISON(NAME, >=)                                 \
  inline NAME operator-(NAME a) { return NAME(-float(a)); }              \
  inline NAME __hadd(NAME a, NAME b) { return a + b; }                   \
  inline NAME __hmul(NAME a, NAME b) { return a * b; }                   \
  inline PAIR __hadd2(PAIR a, PAIR b) { return {a.x + b.x, a.y + b.y}; } \
  inline PAIR __hmul2(PAIR a, PAIR b) { return {a.x * b.x, a.y * b.y}; } \
  inline PAIR __hfma2(PAIR a, PAIR b, PAIR c) {                          \
    return {NAME(fmaf(a.x, b.x, c.x)), NAME(fmaf(a.y, b.y, c.y))};       \
  }                                                                      \
  inline bool __hisnan(NAME a) { return isnan(float(a)); }
SIMT_DEFINE_16BIT(__half, __half2, half)
SIMT_DEFINE_16BIT(__nv_bfloat16, __nv_bfloat162, bfloat16)
#undef SIMT_DEFINE_16BIT
#undef SIMT_DEFINE_16BIT_OPERATOR
#undef SIMT_DEFINE_16BIT_COMPARISON
template <>
constexpr bool simt_is_shuffled<__half> = true;
template <>
constexpr bool simt_is_shuffled<__half2> = true;
template <>
constexpr bool simt_is_shuffled<__nv_bfloat16> = true;
template <>
constexpr bool simt_is_shuffled<__nv_bfloat162> = true;
typedef __half half;
typedef __half2 half2;
typedef __nv_bfloat16 nv_bfloat16;
typedef __nv_bfloat162 nv_bfloat162;

inline float __half2float(__half h) { return h; }
inline __half __float2half(float f) { return f; }
inline __half __float2half_rn(float f) { return f; }
inline __half2 __halves2half2(__half a, __half b) { return {a, b}; }
inline __half __low2half(__half2 h) { return h.x; }
inline __half __high2half(__half2 h) { return h.y; }
inline float __low2float(__half2 h) { return h.x; }
inline float __high2float(__half2 h) { return h.y; }
inline float2 __half22float2(__half2 h) { return {h.x, h.y}; }
inline __half2 __float22half2_rn(float2 f) { return {f.x, f.y}; }
inline __half2 __floats2half2_rn(float a, float b) { return {a, b}; }
inline __half2 __float2half2_rn(float a) { return {a, a}; }

inline float __bfloat162float(__nv_bfloat16 h) { return h; }
inline __nv_bfloat16 __float2bfloat16(float f) { return f; }
inline __nv_bfloat16 __float2bfloat16_rn(float f) { return f; }
inline float __low2float(__nv_bfloat162 h) { return h.x; }
inline float __high2float(__nv_bfloat162 h) { return h.y; }
inline float2 __bfloat1622float2(__nv_bfloat162 h) { return {h.x, h.y}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 f) { return {f.x, f.y}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) { return {a, b}; }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 a, __nv_bfloat16 b) { return {a, b}; }
