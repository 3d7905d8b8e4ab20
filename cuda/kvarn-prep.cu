// kvarn-prep.cu - PREP: what a decoded token needs before attention, in one launch. No ggml.
//
// SPDX-License-Identifier: MIT
//
//   warp   one head of a token's keys, values or queries: turned by its position, in shared memory, since pairs may be apart;
//          a Hadamard transform of n_rot channels, in registers; then to the tail or to where ATTN reads queries
// Bound by the latency of one launch, which is why it is one: turning, rotating and storing apart are seven. Positions and rows
// are inputs, asked for before the kernel before has ended; angles are worked out while the vector is on its way.

#if !defined(GGML_USE_HIP) && !defined(GGML_USE_MUSA)

#include "kvarn-block.cuh"
#include "kvarn-cuda.h"
#include "kvarn-format.h"
#include "kvarn-mma.cuh"

#define N_WARPS 4

// cosine and sine for pair `at` of a token, both times the factor for attention
static __device__ __forceinline__ float2 kvarn_turn(const kvarn_rope & r, int at, float pos) {
    const float far = pos*powf(r.theta_scale, (float) at)/(r.factors ? r.factors[at] : 1.0f), near = r.freq_scale*far;
    float theta = near, scale = r.attn_factor;
    if (r.ext_factor != 0.0f) { // fast pairs keep their angle, slow ones are interpolated
        const float ramp = fminf(1.0f, fmaxf(0.0f, (at - r.low)/fmaxf(0.001f, r.high - r.low)));
        const float mix  = (1.0f - ramp)*r.ext_factor;
        theta  = near*(1.0f - mix) + far*mix;
        scale *= 1.0f + 0.1f*logf(1.0f/r.freq_scale);
    }
    return make_float2(cosf(theta)*scale, sinf(theta)*scale);
}

// R: channels per lane, at most
template <int R>
static __global__ void __launch_bounds__(32*N_WARPS) kvarn_prep_kernel(const kvarn_prep_args a) {
    __shared__ float vectors[N_WARPS][32*R];

    const int warp = threadIdx.x/32, lane = threadIdx.x % 32;
    float * y = vectors[warp];

    int n = 0, vector = blockIdx.x*N_WARPS + warp;
    while (n < 3 && vector >= a.n_tokens*a.part[n].H) {
        vector -= a.n_tokens*a.part[n++].H;
    }
    const kvarn_prep_part & p = a.part[n < 3 ? n : 0];
    const bool is_here = n < 3;
    const int  token = is_here ? vector/p.H : 0, h = is_here ? vector - token*p.H : 0;
    const int  n_turned = is_here && p.is_turned ? a.rope.n_dims/2 : 0; // pairs
    const int64_t row = is_here && p.tail ? p.rows[token] : token;
    const float   pos = n_turned > 0 ? (float) a.rope.pos[token] : 0.0f;
    kvarn_wait_for_kernel_before();
    kvarn_let_kernel_behind_start(); // it knows what is written here, and waits for that
    if (!is_here) {
        return;
    }

    const float * x = p.x + token*p.x_token + h*p.x_head;
    const auto first  = [&](int at) { return a.rope.is_neox && at < n_turned ? at : 2*at; };
    const auto second = [&](int at) { return a.rope.is_neox && at < n_turned ? at + n_turned : 2*at + 1; };
    float2 v[R/2];
#pragma unroll
    for (int k = 0; k < R/2; ++k) {
        const int at = lane + 32*k;
        if (at < p.D/2) {
            v[k] = make_float2(x[first(at)], x[second(at)]);
        }
    }
#pragma unroll
    for (int k = 0; k < R/2; ++k) {
        const int at = lane + 32*k;
        if (at < p.D/2) {
            const float2 t = at < n_turned ? kvarn_turn(a.rope, at, pos) : make_float2(1.0f, 0.0f);
            y[first(at)]  = v[k].x*t.x - v[k].y*t.y;
            y[second(at)] = v[k].x*t.y + v[k].y*t.x;
        }
    }
    __syncwarp();
    float z[R];
#pragma unroll
    for (int k = 0; k < R; ++k) {
        z[k] = 32*k + lane < p.D ? y[32*k + lane] : 0.0f;
    }
    kvarn_hadamard_lanes<R>(z, p.n_rot, lane);
    const int64_t at = (row*p.H + h)*p.D + lane;
#pragma unroll
    for (int k = 0; k < R; ++k) {
        if (32*k + lane < p.D) {
            if (p.tail) {
                p.tail[at + 32*k] = __float2half_rn(z[k]);
            } else {
                p.out[at + 32*k] = z[k];
            }
        }
    }
}

template <int R>
static cudaError_t kvarn_prep_start(const kvarn_prep_args & a, int n_blocks, cudaStream_t stream, bool is_behind) {
    if (is_behind) {
        return kvarn_launch_behind(kvarn_prep_kernel<R>, dim3(n_blocks), 32*N_WARPS, 0, stream, a);
    }
    KVARN_LAUNCH(kvarn_prep_kernel<R>, n_blocks, 32*N_WARPS, 0, stream, a);
    return cudaGetLastError();
}

cudaError_t kvarn_prep(const kvarn_prep_args & a, cudaStream_t stream, bool is_behind) {
    int n_vectors = 0, D = 0;
    for (const kvarn_prep_part & p : a.part) {
        n_vectors += a.n_tokens*p.H;
        D = p.H > 0 && p.D > D ? p.D : D;
    }
    const auto start = D <= 128 ? kvarn_prep_start<4> : D <= 256 ? kvarn_prep_start<8> : kvarn_prep_start<KVARN_D_MAX/32>;
    return start(a, (n_vectors + N_WARPS - 1)/N_WARPS, stream, is_behind);
}

#endif
