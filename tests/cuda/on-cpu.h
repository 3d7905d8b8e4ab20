// on-cpu.h - runs the CUDA kernels on the CPU: every thread of a block is a fiber, blocks one after the other.
// Included before everything else by -include. The CUDA toolkit's headers give the types; what they leave to the device is here.
//
// SPDX-License-Identifier: MIT
//
// A fiber runs until it waits for its warp or its block. Matrix instructions and the transpose leave their operands in the warp's
// exchange, wait, and read what the other lanes left. Nothing is said about speed, races or registers: that takes a device.

#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>

#define KVARN_ON_CPU

#define KVARN_LAUNCH(kernel, grid, block, shared, stream, ...) kvarn_run(grid, block, shared, [&] { kernel(__VA_ARGS__); })
#define KVARN_DYNAMIC_SHARED(name) uint8_t * name = kvarn_dynamic_shared
#define KVARN_KEEP_ORDER()

#undef  __shared__
#define __shared__ static // blocks run one after the other
#undef  __launch_bounds__
#define __launch_bounds__(...)
#undef  __global__
#define __global__
#undef  __forceinline__
#define __forceinline__ inline

using std::max;
using std::min;

struct kvarn_fiber_id { unsigned x, y, z; };
extern kvarn_fiber_id threadIdx, blockIdx, blockDim, gridDim; // of the fiber that runs

struct kvarn_exchange {
    uint32_t word[32];
    float    a[32][8], b[32][4]; // operands of a matrix instruction, as f32
    uint32_t codes[32][4], words[32][2]; // or as they are
};
kvarn_exchange & kvarn_warp_exchange();
void kvarn_warp_wait();
void kvarn_block_wait();
bool kvarn_block_or(bool v);
void kvarn_run(dim3 grid, dim3 block, size_t shared, const std::function<void()> & kernel);
extern uint8_t * kvarn_dynamic_shared;

inline int kvarn_lane() { return threadIdx.x % 32; }

// what every lane of the warp has
inline uint32_t kvarn_from_lane(uint32_t v, int lane) {
    kvarn_exchange & e = kvarn_warp_exchange();
    e.word[kvarn_lane()] = v;
    kvarn_warp_wait();
    const uint32_t r = e.word[lane];
    kvarn_warp_wait();
    return r;
}

template <typename T> T kvarn_bits_from_lane(T v, int lane) {
    static_assert(sizeof(T) == 4, "32 bits");
    uint32_t u;
    memcpy(&u, &v, 4);
    u = kvarn_from_lane(u, lane);
    memcpy(&v, &u, 4);
    return v;
}

template <typename T> T __shfl_xor_sync (unsigned, T v, int m)                { return kvarn_bits_from_lane(v,
        kvarn_lane() ^ m); }
template <typename T> T __shfl_sync     (unsigned, T v, int l, int width = 32) { return kvarn_bits_from_lane(v,
        kvarn_lane()/width*width + l%width); }
template <typename T> T __shfl_down_sync(unsigned, T v, int n, int width = 32) {
    const int l = kvarn_lane();
    return kvarn_bits_from_lane(v, l%width + n < width ? l + n : l);
}

inline unsigned __ballot_sync(unsigned, bool v) {
    kvarn_exchange & e = kvarn_warp_exchange();
    e.word[kvarn_lane()] = v;
    kvarn_warp_wait();
    unsigned r = 0;
    for (int l = 0; l < 32; ++l) { r |= e.word[l] << l; }
    kvarn_warp_wait();
    return r;
}

inline bool __any_sync(unsigned m, bool v) { return __ballot_sync(m, v) != 0; }
inline void __syncwarp()                   { kvarn_warp_wait(); }
inline void __syncthreads()                { kvarn_block_wait(); }
inline bool __syncthreads_or(bool v)       { return kvarn_block_or(v); }

inline unsigned __float_as_uint(float v)    { unsigned u; memcpy(&u, &v, 4); return u; }
inline float    __uint_as_float(unsigned u) { float v; memcpy(&v, &u, 4); return v; }
inline int      __clz(int v)                { return v ? __builtin_clz(v) : 32; }
inline int      __ffs(int v)                { return __builtin_ffs(v); }
inline float    __fmul_rn(float a, float b) { return a*b; }
inline float    __fadd_rn(float a, float b) { return a + b; }

inline unsigned __byte_perm(unsigned x, unsigned y, unsigned s) {
    const uint64_t both = (uint64_t) y << 32 | x;
    unsigned r = 0;
    for (int k = 0; k < 4; ++k) { r |= (unsigned) (both >> 8*(s >> 4*k & 7) & 0xff) << 8*k; }
    return r;
}

// --- what kvarn-mma.cuh is on a device ---

inline float2 kvarn_unpack(uint32_t v) {
    half2 h;
    memcpy(&h, &v, 4);
    return __half22float2(h);
}

inline uint32_t kvarn_pack(float lo, float hi) {
    const half2 h = __floats2half2_rn(lo, hi);
    uint32_t u;
    memcpy(&u, &h, 4);
    return u;
}

inline uint32_t kvarn_mul2(uint32_t a, uint32_t b) {
    const float2 x = kvarn_unpack(a), y = kvarn_unpack(b);
    return kvarn_pack(x.x*y.x, x.y*y.y);
}

inline float kvarn_exp2(float v) { return exp2f(v); }

inline void kvarn_mma(float & c0, float & c1, float & c2, float & c3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                      uint32_t b0, uint32_t b1) {
    kvarn_exchange & e = kvarn_warp_exchange();
    const int lane = kvarn_lane(), g = lane/4, i = lane%4;
    const uint32_t a[4] = { a0, a1, a2, a3 }, b[2] = { b0, b1 };
    for (int n = 0; n < 4; ++n) {
        const float2 v = kvarn_unpack(a[n]);
        e.a[lane][2*n] = v.x;
        e.a[lane][2*n + 1] = v.y;
    }
    for (int n = 0; n < 2; ++n) {
        const float2 v = kvarn_unpack(b[n]);
        e.b[lane][2*n] = v.x;
        e.b[lane][2*n + 1] = v.y;
    }
    kvarn_warp_wait();
    float * c[4] = { &c0, &c1, &c2, &c3 };
    for (int n = 0; n < 4; ++n) {
        const int column = 2*i + n%2;
        float sum = 0.0f;
        for (int q = 0; q < 4; ++q) { // k = 2q, 2q + 1 and the same + 8
            const float * x = e.a[4*g + q], * y = e.b[4*column + q];
            sum += x[n/2*2]*y[0] + x[n/2*2 + 1]*y[1] + x[4 + n/2*2]*y[2] + x[4 + n/2*2 + 1]*y[3];
        }
        *c[n] += sum;
    }
    kvarn_warp_wait();
}

inline uint32_t kvarn_transpose(uint32_t v) {
    kvarn_exchange & e = kvarn_warp_exchange();
    const int lane = kvarn_lane(), g = lane/4, i = lane%4;
    e.word[lane] = v;
    kvarn_warp_wait();
    uint32_t r = 0;
    for (int k = 0; k < 2; ++k) { // row 2i + k, column g
        r |= (e.word[4*(2*i + k) + g/2] >> 16*(g%2) & 0xffff) << 16*k;
    }
    kvarn_warp_wait();
    return r;
}

// integer operands as they are, four per word; signs of b as the instruction has them
template <bool is_signed>
inline void kvarn_mma_int(int & c0, int & c1, int & c2, int & c3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                          uint32_t b1) {
    kvarn_exchange & e = kvarn_warp_exchange();
    const int lane = kvarn_lane(), g = lane/4, i = lane%4;
    const uint32_t a[4] = { a0, a1, a2, a3 }, b[2] = { b0, b1 };
    memcpy(e.codes[lane], a, sizeof(a));
    memcpy(e.words[lane], b, sizeof(b));
    kvarn_warp_wait();
    int * c[4] = { &c0, &c1, &c2, &c3 };
    for (int n = 0; n < 4; ++n) {
        int sum = 0;
        for (int q = 0; q < 4; ++q) { // k = 4q .. 4q + 3 and the same + 16
            for (int k = 0; k < 8; ++k) {
                const int x = e.codes[4*g + q][k/4*2 + n/2] >> k%4*8 & 0xff;
                const int y = e.words[4*(2*i + n%2) + q][k/4] >> k%4*8 & 0xff;
                sum += x*(is_signed ? (int8_t) y : y);
            }
        }
        *c[n] += sum;
    }
    kvarn_warp_wait();
}

inline void kvarn_mma_s8(int & c0, int & c1, int & c2, int & c3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                         uint32_t b1) {
    kvarn_mma_int<true>(c0, c1, c2, c3, a0, a1, a2, a3, b0, b1);
}

inline void kvarn_mma_u8(int & c0, int & c1, int & c2, int & c3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                         uint32_t b1) {
    kvarn_mma_int<false>(c0, c1, c2, c3, a0, a1, a2, a3, b0, b1);
}

inline uint32_t kvarn_fma2(uint32_t a, uint32_t b, uint32_t c) {
    const float2 x = kvarn_unpack(a), y = kvarn_unpack(b), z = kvarn_unpack(c);
    return kvarn_pack(fmaf(x.x, y.x, z.x), fmaf(x.y, y.y, z.y));
}

inline uint32_t kvarn_add2(uint32_t a, uint32_t b) {
    const float2 x = kvarn_unpack(a), y = kvarn_unpack(b);
    return kvarn_pack(x.x + y.x, x.y + y.y);
}

inline uint32_t kvarn_max_abs2(uint32_t m, uint32_t v) {
    const float2 x = kvarn_unpack(m), y = kvarn_unpack(v);
    return kvarn_pack(fmaxf(x.x, fabsf(y.x)), fmaxf(x.y, fabsf(y.y)));
}

inline void kvarn_wait_for_kernel_before() {}
inline void kvarn_let_kernel_behind_start() {}
template <int bytes> void kvarn_ask_for(const void *) {}
inline void kvarn_bring(const half *) {}

template <typename... P, typename... A>
cudaError_t kvarn_launch_behind(void (*kernel)(P...), dim3 grid, int block, int shared, cudaStream_t, const A &... args) {
    kvarn_run(grid, dim3(block), shared, [&] { kernel(P(args)...); });
    return cudaSuccess;
}

inline void kvarn_barrier_init(uint64_t * barrier) { *barrier = 0; }

// A copy is done at once; the barrier counts, so that a wait for a copy that nobody started is noticed.
inline void kvarn_copy_tile(uint64_t * barrier, uint8_t * dst, const uint8_t * src, int quarter, int size, int lane) {
    if (lane == 0) {
        ++*barrier;
        for (int n = 0; n < 4; ++n) {
            memcpy(dst + n*(quarter + 32), src + n*quarter, n < 3 ? quarter : size - 3*quarter);
        }
    }
    kvarn_warp_wait();
}

inline void kvarn_copy_commit() {}

inline void kvarn_copy_wait(uint64_t * barrier, int phase) {
    if ((*barrier & 1) == (uint64_t) phase) {
        fprintf(stderr, "a warp waits for a copy that was not started\n");
        abort();
    }
    kvarn_warp_wait();
}
