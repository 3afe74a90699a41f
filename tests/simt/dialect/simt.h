// A dialect of CUDA C++ for g++: with this header included first, a kernel file of the library
// compiles into an ordinary shared library whose kernels the runtime (../runtime) can run and check.
// SIMT_CPU tells the library's cuda/ptx.cuh to leave its PTX out: ptx.h has the same functions.
#pragma once
#define SIMT_CPU 1

#include "language.h"
#include "runtime.h"
#include "warp.h"
#include "atomic.h"
#include "arithmetic.h"
#include "half.h"
#include "ptx.h"
#include "bind.h"

#define memcpy simt_memcpy
#define memset simt_memset
