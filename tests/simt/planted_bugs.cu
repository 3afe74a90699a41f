// Bugs that the simulator must find, each beside its repair: PICK(bug, repair).
//
// A section is the body of the kernel
//   k(const float* x, float* y, int* i, const __half* h, int n)
// with int t = threadIdx.x, b = blockIdx.x, for arrays of n = 64 elements. Its head is the bug's name,
// a pattern of the message and how it is launched where that is not grid=2 block=64. The message must
// name one of the lines marked `// here`.

// ======== memory

//// global read past the end
// message: out of bounds: read of 4 bytes, 4 bytes past the end of x
// launch: grid=1
if (t == 5) y[0] = x[PICK(n, n - 1)];  // here

//// global write past the end
// message: out of bounds: write of 4 bytes, 8 bytes past the end of y
// launch: grid=1
if (t == 5) y[n + PICK(1, -1)] = 1;  // here

//// global read before the start
// message: out of bounds: read of 4 bytes, 4 bytes before the start of x
// launch: grid=1
if (t == 5) y[0] = x[PICK(-1, 0)];  // here

//// half read past the end
// message: out of bounds: read of 2 bytes, 2 bytes past the end of h
// launch: grid=1
if (t == 5) y[0] = static_cast<float>(h[PICK(n, n - 1)]);  // here

//// atomic past the end
// message: out of bounds: atomic of 4 bytes, 4 bytes past the end of y
// launch: grid=1
if (t == 5) atomicAdd(y + PICK(n, n - 1), 1.f);  // here

//// vector load over the end
// message: out of bounds: read of 4 bytes, 4 bytes past the end of x
// launch: grid=1 block=16
const float4 v = reinterpret_cast<const float4*>(x)[t + PICK(1, 0)];  // here
y[t] = v.x + v.w;

//// index that wrapped around
// message: out of bounds: read of 4 bytes
// launch: grid=1
const unsigned at = t - PICK(1u, 0u);
if (t == 0) y[0] = x[at];  // here

//// memcpy over the end
// message: out of bounds: read of 1 bytes, 1 bytes past the end of x
// launch: grid=1
float v[8];
if (t == 0) memcpy(v, x + n - PICK(7, 8), sizeof v);  // here
if (t == 0) y[0] = v[0];

//// cp.async over the end
// message: out of bounds: read of 4 bytes, 4 bytes past the end of x
__shared__ __align__(16) float s[16];
if (t < 4) cp_async<8>(s + 2 * t, x + n - 2 * PICK(3, 4) + 2 * t);  // here
cp_async_commit();
cp_async_wait<0>();

//// pointer that wrapped around
// message: pointer arithmetic overflow
if (t == 0) y[b] = x[PICK(~0ull - (1ull << 63) / 64, 0ull)];  // here

//// null pointer
// message: null pointer used
// launch: grid=1
const float* from = PICK(nullptr, x);
if (t == 0) y[0] = *from;  // here

//// write to a const argument
// message: write to x, which is read only
// launch: grid=1
if (t == 0) *const_cast<float*>(PICK(x, y)) = 1;  // here

//// shared memory past its end
// message: out of bounds: pointer .* past the end of the variable that it points to
__shared__ float s[64];
float* to = s;
to[t + PICK(1, 0)] = 1;  // here

//// dynamic shared memory past its end
// message: out of bounds: write of 4 bytes, 4 bytes past the end of dynamic shared memory
// launch: shared=256
DYN_SHARED(float, s);
s[t + PICK(1, 0)] = 1;  // here

//// row of a shared array
// message: index outside the array
__shared__ float s[4][8];
if (t < 8) s[n / PICK(16, 17)][t] = 1;  // here
if (t < 8 && b == 0) y[t] = s[3][t];

//// local array
// message: index outside the array
float v[4] = {1, 2, 3, 4};
if (t == 0) y[b] = v[n / PICK(16, 17)];  // here

//// array at the end of a struct, with another one behind it
// message: index outside the array
struct Row { float v[4]; };
__shared__ Row s[2];
Row& row = s[0];
if (t == 0) row.v[n / PICK(16, 17)] = 1;  // here
if (t == 0) y[b] = row.v[3];

// ======== alignment

//// vector load misaligned
// message: misaligned
const float4 v = *reinterpret_cast<const float4*>(x + PICK(1, 4));  // here
if (t == 0) y[b] = v.x;

//// half2 misaligned
// message: misaligned
const half2 v = *reinterpret_cast<const half2*>(h + PICK(1, 2));  // here
if (t == 0) y[b] = v.x;

//// cp.async misaligned
// message: misaligned: cp.async needs addresses aligned to 16 bytes
__shared__ __align__(16) float s[8];
if (t == 0) cp_async<16>(s, x + PICK(1, 4));  // here
cp_async_commit();
cp_async_wait<0>();

//// ldmatrix misaligned
// message: misaligned: ldmatrix_x4 needs an address aligned to 16 bytes
// launch: block=32
__shared__ __align__(16) __half s[16 * 17];
for (int j = t; j < 16 * 17; j += 32) s[j] = 0;
__syncwarp();
u32 r[4];
ldmatrix_x4(r, s + t % 16 * PICK(17, 16));  // here

//// atomic misaligned
// message: misaligned: atomic of 4 bytes at byte 1 of i
if (t == 0) atomicAdd(reinterpret_cast<int*>(reinterpret_cast<char*>(i) + PICK(1, 4)), 1);  // here

//// vector reduction misaligned
// message: misaligned: red_add of float4 needs an address aligned to 16 bytes
red_add(y + PICK(2, 4), make_float4(1, 1, 1, 1));  // here

// ======== races

//// no barrier after filling shared memory
// message: race on static shared memory
__shared__ float s[64];
s[t] = x[t];  // here
PICK(, __syncthreads());
const float v = s[63 - t];  // here
if (b == 0) y[t] = v;

//// no barrier before filling it again
// message: race on static shared memory
__shared__ float s[64];
float sum = 0;
for (int j = 0; j < 2; ++j) {
  s[t] = x[t] + j;  // here
  __syncthreads();
  sum += s[63 - t];  // here
  PICK(, __syncthreads());
}
if (b == 0) y[t] = sum;

//// sum without atomics in a block
// message: race on i at byte 0
if (b == 0) PICK(*i += 1, atomicAdd(i, 1));  // here

//// sum without atomics across blocks
// message: race on i at byte 0: (read|write) here, (read|written) by thread 0 of block 0
if (t == 0) PICK(*i += 1, atomicAdd(i, 1));  // here

//// atomic and plain access
// message: race on i at byte 0: read here, atomic by thread 0
// launch: grid=1
if (t == 0) atomicAdd(i, 1);
PICK(, __syncthreads());
if (b == 0 && t == 1) y[0] = *i;  // here

//// plain access behind which its thread has an atomic
// message: race on static shared memory at byte \d+: atomic here, written by thread 0
// launch: grid=1
__shared__ int sum;
if (t == 0) sum = 0;
PICK(, __syncthreads());
atomicAdd(&sum, 1);  // here
__syncthreads();
if (t == 0) y[0] = sum;

//// two blocks write one element
// message: race on y at byte 0: write here, written by thread 0 of block 0
if (t == 0) y[b * PICK(0, 1)] = 1;  // here

//// block reads what another wrote
// message: race on y at byte 0: read here, written by thread 0 of block 0
if (t == 0) y[b] = 1;
if (b == 1 && t == 1) y[2] = y[PICK(0, 3)];  // here

//// lanes without __syncwarp
// message: race on static shared memory
// launch: block=32
__shared__ float s[32];
s[t] = x[t];  // here
PICK(, __syncwarp());
y[b * 32 + t] = s[31 - t];  // here

//// shuffle in place of __syncwarp
// message: race on static shared memory
// launch: block=32
__shared__ float s[32];
s[t] = x[t];  // here
PICK(__shfl_sync(~0u, t, 0), __syncwarp());
y[b * 32 + t] = s[31 - t];  // here

//// __syncwarp between two warps
// message: race on static shared memory
__shared__ float s[64];
s[t] = x[t];  // here
PICK(__syncwarp(), __syncthreads());
const float v = s[63 - t];  // here
if (b == 0) y[t] = v;

//// copies not waited for before the barrier
// message: race on static shared memory
__shared__ __align__(16) float s[64];
if (t < 16) cp_async<16>(s + 4 * t, x + 4 * t);
cp_async_commit();
PICK(__syncthreads(), cp_async_wait<0>());
PICK(cp_async_wait<0>(), __syncthreads());  // here
const float v = s[63 - t];  // here
if (b == 0) y[t] = v;

//// copies never committed
// message: a cp_async was never waited for
__shared__ __align__(16) float s[64];
if (t < 16) cp_async<16>(s + 4 * t, x + 4 * t);  // here
PICK(, cp_async_commit());
cp_async_wait<0>();

//// copies never waited for
// message: a cp_async was never waited for
__shared__ __align__(16) float s[64];
if (t < 16) cp_async<16>(s + 4 * t, x + 4 * t);  // here
cp_async_commit();
PICK(, cp_async_wait<0>());

// ======== barriers and warps

//// barrier in a branch
// message: barrier divergence: this thread has returned while 32 others wait
if (t < 32 || PICK(false, true)) __syncthreads();  // here

//// return before a barrier
// message: barrier divergence: __syncthreads of line \d+ after 44 threads have returned
// launch: order=reversed
if (PICK(t >= 20, false)) return;
__syncthreads();  // here

//// two barriers
// message: barrier divergence: thread 0 is at the __syncthreads of line \d+, thread 63 at
if (PICK(t < 32, true))
  __syncthreads();  // here
else
  __syncthreads();

//// barrier in a loop of different lengths
// message: barrier divergence
for (int j = 0; j < PICK(1 + t / 32, 2); ++j)
  __syncthreads();  // here

//// lanes at different shuffles
// message: warp divergence: lane 0 is at __shfl_xor_sync\(mask ffffffff\) of line \d+, lane 16 at
int v = t;
if (PICK(t % 32 < 16, true))
  v = __shfl_xor_sync(~0u, v, 1);
else
  v = __shfl_xor_sync(~0u, v, 2);  // here
if (b == 0) y[t] = v;

//// lanes at a shuffle and at a barrier
// message: deadlock: thread 0 waits at __shfl_sync of line \d+, thread 16 at __syncthreads of line
if (PICK(t % 32 < 16, true)) __shfl_sync(~0u, t, 0);  // here
__syncthreads();

//// mask without the caller
// message: __shfl_sync of line \d+: the mask 0000ffff does not name the calling lane 16
__shfl_sync(PICK(0xffffu, ~0u), t, 0);  // here

// ======== loops that do not end

//// endless loop
// message: this launch seems to run for ever
int j = t;
while (j != PICK(-1, 0)) j = max(j - 1, 0);  // here
if (b == 0) y[t] = j;

//// spinning on a flag
// message: this launch seems to run for ever
if (t == 0 && b == 0) while (atomicAdd(i, 0) != PICK(1, 0)) {}  // here

//// trap
// message: trap: __trap
if (n == PICK(64, 65)) __trap();  // here

// ======== undefined behaviour of numbers

//// int overflow in a product
// message: signed integer overflow in \*
if (t == 0 && b == 0) *i = n * n * n * n * PICK(n * n, 1);  // here

//// int overflow in a sum
// message: signed integer overflow in \+
if (t == 0 && b == 0) *i = (n << 24) + PICK((n << 24), 1);  // here

//// int overflow in a difference
// message: signed integer overflow in -
if (t == 0 && b == 0) *i = -n * (1 << 25) - PICK(n, 0);  // here

//// negation of INT_MIN
// message: signed integer overflow in negation
const int low = -2147483647 - PICK(n / 64, 0);
if (t == 0 && b == 0) *i = -low;  // here

//// division by zero
// message: integer division by zero
if (t == 0 && b == 0) *i = 1 / (n - PICK(64, 63));  // here

//// shift too far
// message: shift by more than the width
if (t == 0 && b == 0) *i = 1 << (n - PICK(32, 63));  // here

//// NaN to int
// message: NaN or a float outside the integer's range
if (t == 0 && b == 0) *i = static_cast<int>(PICK(x[0] / x[0], x[1]));  // here

//// 1e30 to int
// message: NaN or a float outside the integer's range
if (t == 0 && b == 0) *i = static_cast<int>(floorf(x[1] * PICK(1e30f, 1.f)));  // here

//// impossible bool
// message: bool or enum with an impossible value
// launch: block=1
__shared__ bool s[64];
if (PICK(false, true)) s[t] = true;
if (s[t]) y[b] = 1;  // here

//// no return value
// message: function without its return value
const auto f = [](int n) -> float { if (n != 64) return 1; PICK(, return 2;) };  // here
if (t == 0) y[b] = f(n);
