// kvarn-block.cuh - what several kernels do with a number, a block or a vector: ALiBi's slope, a maximum, Hadamard's step.
//
// SPDX-License-Identifier: MIT

#pragma once

static __device__ __forceinline__ float kvarn_slope(float max_bias, int head, int n_head) {
    if (max_bias <= 0.0f) {
        return 1.0f;
    }
    const int n = 1 << (31 - __clz(n_head)); // heads beyond a power of two lie between the others
    return head < n ? exp2f(-max_bias*(head + 1)/n) : exp2f(-max_bias/2*(2*(head - n) + 1)/n);
}

// the largest v of a block of n_warps warps; scratch: shared memory, a float per warp
template <int n_warps>
static __device__ __forceinline__ float kvarn_block_max(float v, float * scratch) {
    for (int o = 16; o > 0; o /= 2) {
        v = fmaxf(v, __shfl_xor_sync(0xffffffff, v, o));
    }
    if (threadIdx.x % 32 == 0) {
        scratch[threadIdx.x/32] = v;
    }
    __syncthreads();
#pragma unroll
    for (int w = 0; w < n_warps; ++w) {
        v = fmaxf(v, scratch[w]);
    }
    __syncthreads();
    return v;
}

// A Hadamard transform of each n_rot values of one warp, in registers: lane l has values l, l + 32, .., R of them; n_rot 0:
// none. Sums and differences over 1, 2, 4 .. values, then a factor
template <int R>
static __device__ __forceinline__ void kvarn_hadamard_lanes(float (&x)[R], int n_rot, int lane) {
    static_assert((R & (R - 1)) == 0, "steps between registers");
#pragma unroll
    for (int n = 1; n < 32; n *= 2) {
        if (n < n_rot) {
#pragma unroll
            for (int i = 0; i < R; ++i) {
                const float other = __shfl_xor_sync(0xffffffff, x[i], n);
                x[i] = lane & n ? other - x[i] : x[i] + other;
            }
        }
    }
#pragma unroll
    for (int n = 1; n < R; n *= 2) {
        if (32*n < n_rot) {
#pragma unroll
            for (int at = 0; at < R/2; ++at) {
                const int i = (at & ~(n - 1))*2 | (at & (n - 1));
                const float a = x[i], b = x[i + n];
                x[i]     = a + b;
                x[i + n] = a - b;
            }
        }
    }
    const float scale = n_rot ? 1.0f/sqrtf((float) n_rot) : 1.0f;
#pragma unroll
    for (int i = 0; i < R; ++i) {
        x[i] *= scale;
    }
}
