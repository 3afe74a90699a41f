// What a kernel library calls in the runtime. The runtime knows where in the kernel it was called
// from by the return address, so these must stay calls into another library.
#pragma once
#include <cstddef>

extern "C" {
enum SimtAccess { SIMT_READ, SIMT_WRITE, SIMT_ATOMIC };
// Checks an access that the compiler does not announce by itself.
void simt_access(const void* address, size_t size, SimtAccess kind);
void simt_require_aligned(const void* address, size_t size, const char* what);

int simt_barrier(int line, bool vote);

// A collective of the lanes in `mask`: run(in, out, lanes) is called once, when all have come.
typedef void (*SimtCollective)(const void* const* in, void* const* out, unsigned lanes);
void simt_warp(const char* what, int line, unsigned mask, const void* in, void* out,
               SimtCollective run);

void simt_copy_async(void* shared, const void* global, size_t size, bool read);
void simt_commit_copies();
void simt_wait_for_copies(int groups_left);

[[noreturn]] void simt_trap(const char* why);

extern unsigned char* simt_dynamic_shared;
}

// GCC does not announce what memcpy and memset touch.
SIMT_INLINE void* simt_memcpy(void* to, const void* from, size_t size) {
  for (size_t i = 0; i < size; ++i) simt_access(static_cast<const char*>(from) + i, 1, SIMT_READ);
  for (size_t i = 0; i < size; ++i) simt_access(static_cast<char*>(to) + i, 1, SIMT_WRITE);
  return __builtin_memcpy(to, from, size);
}
SIMT_INLINE void* simt_memset(void* to, int value, size_t size) {
  for (size_t i = 0; i < size; ++i) simt_access(static_cast<char*>(to) + i, 1, SIMT_WRITE);
  return __builtin_memset(to, value, size);
}

// A block's dynamic shared memory as an array of T, see cuda/ptx.cuh.
#define DYN_SHARED(T, name) T* name = reinterpret_cast<T*>(simt_dynamic_shared)
