// Atomics. One thread runs at a time, so a plain update does; the runtime is told that it is
// atomic.
#pragma once

template <class T>
struct SimtIdentity {  // keeps T from being deduced from the second argument
  typedef T type;
};

template <class T, class Update>
SIMT_RAW inline T simt_update(T* address, Update update) {
  const T old = *address;
  *address = update(old);
  return old;
}

#define SIMT_DEFINE_ATOMIC(NAME, EXPRESSION)                                        \
  template <class T>                                                                \
  SIMT_INLINE T NAME(T* address, typename SimtIdentity<T>::type value) {            \
    simt_access(address, sizeof(T), SIMT_ATOMIC);                                   \
    return simt_update(address, [value](T old) SIMT_RAW { return T(EXPRESSION); }); \
  }
SIMT_DEFINE_ATOMIC(atomicAdd, old + value)
SIMT_DEFINE_ATOMIC(atomicSub, old - value)
SIMT_DEFINE_ATOMIC(atomicExch, value)
SIMT_DEFINE_ATOMIC(atomicMin, value < old ? value : old)
SIMT_DEFINE_ATOMIC(atomicMax, old < value ? value : old)
SIMT_DEFINE_ATOMIC(atomicAnd, old& value)
SIMT_DEFINE_ATOMIC(atomicOr, old | value)
SIMT_DEFINE_ATOMIC(atomicXor, old ^ value)
SIMT_DEFINE_ATOMIC(atomicInc, old >= value ? 0 : old + 1)
SIMT_DEFINE_ATOMIC(atomicDec, old == 0 || old > value ? value : old - 1)

template <class T>
SIMT_INLINE T atomicCAS(T* address, typename SimtIdentity<T>::type expected,
                        typename SimtIdentity<T>::type desired) {
  simt_access(address, sizeof(T), SIMT_ATOMIC);
  return simt_update(address, [=](T old) SIMT_RAW {
    return std::memcmp(&old, &expected, sizeof(T)) ? old : desired;
  });
}
