// kvarn-reduce.cu - REDUCE: the partial results of one query vector become its attention output. No ggml.
//
// SPDX-License-Identifier: MIT
//
//   block  one query vector: 8 warps, each every eighth partial result, all of them asked for before the first is used
//   lane   channels 2*lane + 64*n and the next one
// Bound by latency, not by bytes: one load, a merge in shared memory, one store.

#if !defined(GGML_USE_HIP) && !defined(GGML_USE_MUSA)

#include "kvarn-block.cuh"
#include "kvarn-cuda.h"
#include "kvarn-mma.cuh"

#define N_WARPS 8
#define N_PARTS 8 // of a warp, in registers at once

// N: channels/64, rounded up
template <int N>
static __global__ void __launch_bounds__(32*N_WARPS) kvarn_reduce_kernel(const float * part, const float * sinks, float * out,
        int D, int n_head, int cap, int n_split, int n_rot) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x/32;
    const float * p = part + (int64_t) blockIdx.x*cap*(D + 2);

    kvarn_wait_for_kernel_before();
    kvarn_let_kernel_behind_start();
    float  max = -1e30f, sum = 0.0f;
    float2 acc[N];
#pragma unroll
    for (int n = 0; n < N; ++n) {
        acc[n] = make_float2(0.0f, 0.0f);
    }
    for (int first = warp; first < n_split; first += N_WARPS*N_PARTS) {
        float2 head[N_PARTS], v[N_PARTS][N];
#pragma unroll
        for (int k = 0; k < N_PARTS; ++k) {
            const int c = first + k*N_WARPS;
            const float * pc = p + (int64_t) c*(D + 2);
            head[k] = c < n_split ? *(const float2 *) pc : make_float2(-1e30f, 0.0f);
#pragma unroll
            for (int n = 0; n < N; ++n) {
                const int d = 2*lane + 64*n;
                v[k][n] = c < n_split && d < D ? *(const float2 *) (pc + 2 + d) : make_float2(0.0f, 0.0f);
            }
        }
        float now = max;
#pragma unroll
        for (int k = 0; k < N_PARTS; ++k) {
            now = fmaxf(now, head[k].x);
        }
        const float shrink = kvarn_exp2(max - now);
        max  = now;
        sum *= shrink;
#pragma unroll
        for (int n = 0; n < N; ++n) {
            acc[n].x *= shrink;
            acc[n].y *= shrink;
        }
#pragma unroll
        for (int k = 0; k < N_PARTS; ++k) {
            const float f = kvarn_exp2(head[k].x - max);
            sum = fmaf(f, head[k].y, sum);
#pragma unroll
            for (int n = 0; n < N; ++n) {
                acc[n].x = fmaf(f, v[k][n].x, acc[n].x);
                acc[n].y = fmaf(f, v[k][n].y, acc[n].y);
            }
        }
    }

    __shared__ float2 heads[N_WARPS];
    __shared__ float2 sums [N_WARPS][32*N];
    __shared__ __align__(8) float rotated[64*N];
    if (lane == 0) {
        heads[warp] = make_float2(max, sum);
    }
#pragma unroll
    for (int n = 0; n < N; ++n) {
        sums[warp][lane + 32*n] = acc[n];
    }
    __syncthreads();

    // a sink is a token without a value
    const float sink = sinks ? sinks[blockIdx.x % n_head]*1.44269504f : -1e30f;
    max = sink;
#pragma unroll
    for (int w = 0; w < N_WARPS; ++w) {
        max = fmaxf(max, heads[w].x);
    }
    float f[N_WARPS];
    sum = sinks ? kvarn_exp2(sink - max) : 0.0f;
#pragma unroll
    for (int w = 0; w < N_WARPS; ++w) {
        f[w] = kvarn_exp2(heads[w].x - max);
        sum  = fmaf(f[w], heads[w].y, sum);
    }
    const float r = sum > 0.0f ? 1.0f/sum : 0.0f;
    for (int at = threadIdx.x; 2*at < D; at += 32*N_WARPS) {
        float2 o = make_float2(0.0f, 0.0f);
#pragma unroll
        for (int w = 0; w < N_WARPS; ++w) {
            o.x = fmaf(f[w], sums[w][at].x, o.x);
            o.y = fmaf(f[w], sums[w][at].y, o.y);
        }
        o = make_float2(o.x*r, o.y*r);
        if (!n_rot) {
            *(float2 *) (out + (int64_t) blockIdx.x*D + 2*at) = o;
        } else {
            *(float2 *) (rotated + 2*at) = o;
        }
    }
    if (!n_rot) {
        return;
    }
    __syncthreads();
    if (warp > 0) {
        return;
    }
    float x[2*N];
#pragma unroll
    for (int n = 0; n < 2*N; ++n) {
        x[n] = rotated[32*n + lane]; // beyond D nothing is used
    }
    kvarn_hadamard_lanes<2*N>(x, n_rot, lane);
#pragma unroll
    for (int n = 0; n < 2*N; ++n) {
        if (32*n + lane < D) {
            out[(int64_t) blockIdx.x*D + 32*n + lane] = x[n];
        }
    }
}

template <int N>
static cudaError_t kvarn_reduce_start(const float * part, const float * sinks, float * out, int D, int n, int n_head, int cap,
        int n_split, cudaStream_t stream, int n_rot, bool is_behind) {
    if (is_behind) {
        return kvarn_launch_behind(kvarn_reduce_kernel<N>, dim3(n), 32*N_WARPS, 0, stream, part, sinks, out, D, n_head, cap,
                n_split, n_rot);
    }
    KVARN_LAUNCH(kvarn_reduce_kernel<N>, n, 32*N_WARPS, 0, stream, part, sinks, out, D, n_head, cap, n_split, n_rot);
    return cudaGetLastError();
}

cudaError_t kvarn_reduce(const float * part, const float * sinks, float * out, int D, int n, int n_head, int cap, int n_split,
                         cudaStream_t stream, int n_rot, bool is_behind) {
    const auto start = D <= 64 ? kvarn_reduce_start<1> : D <= 128 ? kvarn_reduce_start<2> : D <= 256 ? kvarn_reduce_start<4> :
            kvarn_reduce_start<8>;
    return start(part, sinks, out, D, n, n_head, cap, n_split, stream, n_rot, is_behind);
}

#endif
