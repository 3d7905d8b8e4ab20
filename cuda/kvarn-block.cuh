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

// the sum and the difference number `at` of those that the step over n of a Hadamard transform makes
static __device__ __forceinline__ void kvarn_butterfly(float * x, int at, int n) {
    const int i = (at & ~(n - 1))*2 | (at & (n - 1));
    const float a = x[i], b = x[i + n];
    x[i]     = a + b;
    x[i + n] = a - b;
}

// Transforms each n_rot of D values in place, x on 16 bytes; one warp. Returns what they have to be multiplied with. n_rot 0:
// leaves them alone. The usual 128 go through registers with the same sums and differences: four in a row per lane, then between
// lanes.
static __device__ __forceinline__ float kvarn_hadamard(float * x, int D, int n_rot, int lane) {
    if (D == 128 && n_rot == 128) {
        float4 v = ((const float4 *) x)[lane];
        v = make_float4(v.x + v.y, v.x - v.y, v.z + v.w, v.z - v.w);
        v = make_float4(v.x + v.z, v.y + v.w, v.x - v.z, v.y - v.w);
        for (int n = 1; n < 32; n *= 2) {
            const float sign = lane & n ? -1.0f : 1.0f;
            v.x = __shfl_xor_sync(0xffffffff, v.x, n) + sign*v.x;
            v.y = __shfl_xor_sync(0xffffffff, v.y, n) + sign*v.y;
            v.z = __shfl_xor_sync(0xffffffff, v.z, n) + sign*v.z;
            v.w = __shfl_xor_sync(0xffffffff, v.w, n) + sign*v.w;
        }
        ((float4 *) x)[lane] = v;
        __syncwarp();
        return 1.0f/sqrtf(128.0f);
    }
    for (int n = 1; n < n_rot; n *= 2) {
        for (int at = lane; at < D/2; at += 32) {
            kvarn_butterfly(x, at, n);
        }
        __syncwarp();
    }
    return n_rot ? 1.0f/sqrtf((float) n_rot) : 1.0f;
}

// The same in registers of one warp, finished: lane l has values l, l + 32, .. of D, R of them or fewer
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
