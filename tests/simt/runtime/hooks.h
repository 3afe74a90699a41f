// The calls that -fsanitize=thread, =undefined and -fsanitize-coverage=trace-pc put into kernels.
// Included by runtime.cpp, inside extern "C".

#define SIMT_ACCESS_HOOKS(SIZE)                                                      \
  void __tsan_read##SIZE(void* p) { check_access(p, SIZE, READ, CALLER); }           \
  void __tsan_write##SIZE(void* p) { check_access(p, SIZE, WRITE, CALLER); }         \
  void __tsan_unaligned_read##SIZE(void* p) { check_access(p, SIZE, READ, CALLER); } \
  void __tsan_unaligned_write##SIZE(void* p) { check_access(p, SIZE, WRITE, CALLER); }
SIMT_ACCESS_HOOKS(1)
SIMT_ACCESS_HOOKS(2)
SIMT_ACCESS_HOOKS(4)
SIMT_ACCESS_HOOKS(8)
SIMT_ACCESS_HOOKS(16)
void __tsan_read_range(void* p, size_t size) { check_range(p, size, READ, CALLER); }
void __tsan_write_range(void* p, size_t size) { check_range(p, size, WRITE, CALLER); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

// Once per basic block: an endless loop is found even if it touches no memory.
void __sanitizer_cov_trace_pc() {
  if (m.running) spend(1, CALLER);
}

#define SIMT_UNDEFINED_HOOK(NAME, TEXT) \
  void __ubsan_handle_##NAME(...) { fail(CALLER, TEXT); }
SIMT_UNDEFINED_HOOK(add_overflow, "signed integer overflow in +")
SIMT_UNDEFINED_HOOK(sub_overflow, "signed integer overflow in -")
SIMT_UNDEFINED_HOOK(mul_overflow, "signed integer overflow in *")
SIMT_UNDEFINED_HOOK(negate_overflow, "signed integer overflow in negation")
SIMT_UNDEFINED_HOOK(divrem_overflow, "integer division by zero, or its overflow")
SIMT_UNDEFINED_HOOK(shift_out_of_bounds, "shift by more than the width, or of a negative number")
SIMT_UNDEFINED_HOOK(out_of_bounds, "index outside the array")
SIMT_UNDEFINED_HOOK(pointer_overflow, "pointer arithmetic overflow")
SIMT_UNDEFINED_HOOK(missing_return, "function without its return value")
SIMT_UNDEFINED_HOOK(load_invalid_value, "bool or enum with an impossible value")
SIMT_UNDEFINED_HOOK(float_cast_overflow, "NaN or a float outside the integer's range cast to it")
struct TypeMismatch {
  const char* file;
  uint32_t line, column;
  const void* type;
  unsigned char log_alignment;
};
void __ubsan_handle_type_mismatch_v1(const TypeMismatch* mismatch, const void* p) {
  const int alignment = 1 << mismatch->log_alignment;
  if (!p) fail(CALLER, "null pointer used");
  if (reinterpret_cast<uintptr_t>(p) % alignment)
    fail(CALLER, "misaligned: pointer %p to a type aligned to %d bytes", p, alignment);
  fail(CALLER, "out of bounds: pointer %p past the end of the variable that it points to", p);
}
