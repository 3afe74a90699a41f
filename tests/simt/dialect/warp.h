// Barriers, shuffles and votes. `line` is the caller's: threads that meet must stand on one line.
// There is no __activemask: what it answers depends on the schedule.
#pragma once

SIMT_INLINE void __syncthreads(int line = __builtin_LINE()) { simt_barrier(line, false); }
SIMT_INLINE int __syncthreads_or(int predicate, int line = __builtin_LINE()) {
  return simt_barrier(line, predicate);
}
inline void __threadfence() {}
inline void __threadfence_block() {}
SIMT_INLINE void __syncwarp(unsigned mask = ~0u, int line = __builtin_LINE()) {
  simt_warp("__syncwarp", line, mask, nullptr, nullptr, nullptr);
}
SIMT_RAW inline int simt_lane() {
  return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % warpSize;
}

enum class SimtShuffle { INDEX, UP, DOWN, XOR };

template <class T>
struct SimtShuffled {
  T value;
  int argument, width;
};

// The lane that `lane` reads from; its own where the source lies outside its segment of `width`
// lanes.
SIMT_RAW constexpr int simt_source_lane(SimtShuffle how, int lane, int argument, int width) {
  int first = lane & ~(width - 1), last = first + width - 1, source = lane;
  switch (how) {
    case SimtShuffle::INDEX: return first + (argument & (width - 1));
    case SimtShuffle::UP: source = lane - argument; return source < first ? lane : source;
    case SimtShuffle::DOWN: source = lane + argument; return source > last ? lane : source;
    case SimtShuffle::XOR: source = lane ^ argument; return source > last ? lane : source;
  }
  return lane;
}

template <class T, SimtShuffle HOW>
SIMT_RAW void simt_shuffle(const void* const* in, void* const* out, unsigned lanes) {
  for (int lane = 0; lane < 32; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    auto& mine = *static_cast<const SimtShuffled<T>*>(in[lane]);
    int source = simt_source_lane(HOW, lane, mine.argument, mine.width);
    if (lanes >> source & 1)
      std::memcpy(out[lane], &static_cast<const SimtShuffled<T>*>(in[source])->value, sizeof(T));
    else std::memset(out[lane], 0xff, sizeof(T));  // undefined in CUDA: poison
  }
}

// What CUDA shuffles: numbers of 32 and 64 bits; half and bfloat16, and pairs of them, see half.h.
template <class T>
constexpr bool simt_is_shuffled = std::is_arithmetic_v<T> && sizeof(T) >= 4 && sizeof(T) <= 8;

#define SIMT_DEFINE_SHUFFLE(NAME, HOW, ARGUMENT)                                \
  template <class T>                                                            \
  SIMT_INLINE T NAME(unsigned mask, T value, ARGUMENT argument, int width = 32, \
                     int line = __builtin_LINE()) {                             \
    static_assert(simt_is_shuffled<T>, #NAME " does not take this type");       \
    SimtShuffled<T> in{value, static_cast<int>(argument), width};               \
    T out;                                                                      \
    simt_warp(#NAME, line, mask, &in, &out, simt_shuffle<T, SimtShuffle::HOW>); \
    return out;                                                                 \
  }
SIMT_DEFINE_SHUFFLE(__shfl_sync, INDEX, int)
SIMT_DEFINE_SHUFFLE(__shfl_up_sync, UP, unsigned)
SIMT_DEFINE_SHUFFLE(__shfl_down_sync, DOWN, unsigned)
SIMT_DEFINE_SHUFFLE(__shfl_xor_sync, XOR, int)

// Collectives in which every lane gives a T and receives the same R, computed by `combine`.
template <class T, class R, R (*combine)(const void* const* in, unsigned lanes)>
SIMT_RAW void simt_share_result(const void* const* in, void* const* out, unsigned lanes) {
  R result = combine(in, lanes);
  for (int lane = 0; lane < 32; ++lane)
    if (lanes >> lane & 1) *static_cast<R*>(out[lane]) = result;
}

template <class R, class T, R (*combine)(const void* const* in, unsigned lanes)>
SIMT_INLINE R simt_vote(const char* what, int line, unsigned mask, T value) {
  R out = 0;
  simt_warp(what, line, mask, &value, &out, simt_share_result<T, R, combine>);
  return out;
}

SIMT_RAW inline unsigned simt_ballot(const void* const* in, unsigned lanes) {
  unsigned ballot = 0;
  for (int lane = 0; lane < 32; ++lane)
    if ((lanes >> lane & 1) && *static_cast<const int*>(in[lane])) ballot |= 1u << lane;
  return ballot;
}
SIMT_RAW inline int simt_any(const void* const* in, unsigned lanes) {
  return simt_ballot(in, lanes) != 0;
}
SIMT_RAW inline int simt_all(const void* const* in, unsigned lanes) {
  return simt_ballot(in, lanes) == lanes;
}

SIMT_INLINE unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return simt_vote<unsigned, int, simt_ballot>("__ballot_sync", line, mask, predicate);
}
SIMT_INLINE int __any_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return simt_vote<int, int, simt_any>("__any_sync", line, mask, predicate);
}
SIMT_INLINE int __all_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return simt_vote<int, int, simt_all>("__all_sync", line, mask, predicate);
}

// __reduce_*_sync (sm_80) of integers, and __match_any_sync.
template <class T, class F>
SIMT_RAW T simt_fold(const void* const* in, unsigned lanes, F f) {
  T result = *static_cast<const T*>(in[__builtin_ctz(lanes)]);
  for (unsigned rest = lanes & (lanes - 1); rest; rest &= rest - 1)
    result = f(result, *static_cast<const T*>(in[__builtin_ctz(rest)]));
  return result;
}
#define SIMT_DEFINE_REDUCE(NAME, EXPRESSION)                                                  \
  template <class T>                                                                          \
  SIMT_RAW T simt_##NAME(const void* const* in, unsigned lanes) {                             \
    return simt_fold<T>(in, lanes, [](T a, T b) SIMT_RAW { return T(EXPRESSION); });          \
  }                                                                                           \
  template <class T>                                                                          \
  SIMT_INLINE T __reduce_##NAME##_sync(unsigned mask, T value, int line = __builtin_LINE()) { \
    static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned>);                     \
    return simt_vote<T, T, simt_##NAME<T>>("__reduce_" #NAME "_sync", line, mask, value);     \
  }
SIMT_DEFINE_REDUCE(add, unsigned(a) + unsigned(b))
SIMT_DEFINE_REDUCE(min, a < b ? a : b)
SIMT_DEFINE_REDUCE(max, a < b ? b : a)
SIMT_DEFINE_REDUCE(and, a& b)
SIMT_DEFINE_REDUCE(or, a | b)
SIMT_DEFINE_REDUCE(xor, a ^ b)

template <class T>
SIMT_RAW void simt_match(const void* const* in, void* const* out, unsigned lanes) {
  for (int lane = 0; lane < 32; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    unsigned equal = 0;
    for (int other = 0; other < 32; ++other)
      if ((lanes >> other & 1) && !std::memcmp(in[lane], in[other], sizeof(T)))
        equal |= 1u << other;
    *static_cast<unsigned*>(out[lane]) = equal;
  }
}
template <class T>
SIMT_INLINE unsigned __match_any_sync(unsigned mask, T value, int line = __builtin_LINE()) {
  unsigned out = 0;
  simt_warp("__match_any_sync", line, mask, &value, &out, simt_match<T>);
  return out;
}
