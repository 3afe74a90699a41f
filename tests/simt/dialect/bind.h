// Describes a kernel's signature to Python and calls it with an array of pointers to its arguments,
// as a CUDA driver does.
#pragma once

struct SimtMember {
  const char* name;  // null ends a list
  int offset;
  const char* dtype;
};
struct SimtParameter {
  const char*
      dtype;  // NumPy's letter and size ("f4"), "bf2" for bfloat16, "V" for a struct, "" for void
  int size;   // of the value, or of what a pointer points to
  char pointer;               // 0: a value; 'r': pointer to const; 'w': pointer
  const SimtMember* members;  // of a struct that is passed by value
};
struct SimtKernel {
  const char* name;
  int max_threads;  // per block
  int count;
  const SimtParameter* parameters;
  void (*call)(void** arguments);
};

template <class T>
constexpr const char* simt_dtype() {
  constexpr const char* SIGNED[] = {"", "i1", "i2", "", "i4", "", "", "", "i8"};
  constexpr const char* UNSIGNED[] = {"", "u1", "u2", "", "u4", "", "", "", "u8"};
  if constexpr (std::is_void_v<T>) return "";
  else if constexpr (std::is_same_v<T, bool>) return "b1";
  else if constexpr (std::is_same_v<T, float>) return "f4";
  else if constexpr (std::is_same_v<T, double>) return "f8";
  else if constexpr (std::is_integral_v<T>)
    return (std::is_signed_v<T> ? SIGNED : UNSIGNED)[sizeof(T)];
  else if constexpr (std::is_same_v<T, __half> || std::is_same_v<T, __half2>) return "f2";
  else if constexpr (std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __nv_bfloat162>)
    return "bf2";
  else if constexpr (std::is_same_v<T, float2> || std::is_same_v<T, float4>) return "f4";
  else if constexpr (std::is_same_v<T, double2>) return "f8";
  else if constexpr (std::is_same_v<T, int2> || std::is_same_v<T, int4>) return "i4";
  else if constexpr (std::is_same_v<T, uint2> || std::is_same_v<T, uint4>) return "u4";
  else return "V";
}
template <class T>
constexpr int simt_size() {
  if constexpr (std::is_void_v<T>) return 1;
  else return sizeof(T);
}
template <class T>
struct SimtMembers {  // specialised by SIMT_STRUCT, which module.py writes
  static constexpr const SimtMember* list = nullptr;
};
#define SIMT_MEMBER(STRUCT, NAME) \
  {#NAME, offsetof(STRUCT, NAME), simt_dtype<decltype(STRUCT::NAME)>()}
#define SIMT_STRUCT(STRUCT, ...)                            \
  template <>                                               \
  struct SimtMembers<STRUCT> {                              \
    static constexpr SimtMember list[] = {__VA_ARGS__, {}}; \
  };

template <class T>
constexpr SimtParameter simt_parameter() {
  if constexpr (std::is_pointer_v<T>) {
    typedef std::remove_pointer_t<T> Target;
    typedef std::remove_cv_t<Target> Plain;
    return {simt_dtype<Plain>(), simt_size<Plain>(), std::is_const_v<Target> ? 'r' : 'w', nullptr};
  } else {
    return {simt_dtype<T>(), sizeof(T), 0, SimtMembers<T>::list};
  }
}

template <auto KERNEL>
struct SimtBinding;
template <class... A, void (*KERNEL)(A...)>
struct SimtBinding<KERNEL> {
  static constexpr SimtParameter PARAMETERS[] = {simt_parameter<A>()..., {}};
  template <size_t... I>
  SIMT_RAW static void call_with(void** arguments, std::index_sequence<I...>) {
    KERNEL(*static_cast<A*>(arguments[I])...);
  }
  SIMT_RAW static void call(void** arguments) {
    call_with(arguments, std::index_sequence_for<A...>{});
  }
  // with what stands in the parentheses of its __launch_bounds__
  static constexpr SimtKernel describe(const char* name, int max_threads, int = 0) {
    return {name, max_threads, sizeof...(A), PARAMETERS, call};
  }
};
