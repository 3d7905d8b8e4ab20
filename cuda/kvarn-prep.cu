// kvarn-prep.cu - PREP: what a decoded token needs before attention, in one launch. No ggml.
//
// SPDX-License-Identifier: MIT
//
//   warp   one head of a token's keys, values or queries: turned by its position, a Hadamard transform of n_rot channels in
//          shared memory, then to the tail or to where ATTN reads queries
// Bound by the latency of one launch, which is why it is one: turning, rotating and storing apart are seven. Positions and rows
// are inputs, asked for before the kernel before has ended; angles are worked out while the vector is on its way.

#if !defined(GGML_USE_HIP) && !defined(GGML_USE_MUSA)

#include "kvarn-block.cuh"
#include "kvarn-cuda.h"
#include "kvarn-format.h"
#include "kvarn-mma.cuh"

#define N_WARPS 4
#define PAIRS   (KVARN_D_MAX/64) // of a lane, at most

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

static __global__ void __launch_bounds__(32*N_WARPS) kvarn_prep_kernel(const kvarn_prep_args a) {
    __shared__ __align__(16) float vectors[N_WARPS][KVARN_D_MAX];

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
    float2 v[PAIRS];
#pragma unroll
    for (int k = 0; k < PAIRS; ++k) {
        const int at = lane + 32*k;
        if (at < p.D/2) {
            v[k] = make_float2(x[first(at)], x[second(at)]);
        }
    }
#pragma unroll
    for (int k = 0; k < PAIRS; ++k) {
        const int at = lane + 32*k;
        if (at < p.D/2) {
            const float2 t = at < n_turned ? kvarn_turn(a.rope, at, pos) : make_float2(1.0f, 0.0f);
            y[first(at)]  = v[k].x*t.x - v[k].y*t.y;
            y[second(at)] = v[k].x*t.y + v[k].y*t.x;
        }
    }
    __syncwarp();
    const float scale = kvarn_hadamard(y, p.D, p.n_rot, lane);
    for (int d = 2*lane; d < p.D; d += 64) {
        const float v = y[d]*scale, w = y[d + 1]*scale;
        const int64_t at = (row*p.H + h)*p.D + d;
        if (p.tail) {
            *(half2 *) (p.tail + at) = __floats2half2_rn(v, w);
        } else {
            *(float2 *) (p.out + at) = make_float2(v, w);
        }
    }
}

cudaError_t kvarn_prep(const kvarn_prep_args & a, cudaStream_t stream, bool is_behind) {
    int n_vectors = 0;
    for (const kvarn_prep_part & p : a.part) {
        n_vectors += a.n_tokens*p.H;
    }
    const int n_blocks = (n_vectors + N_WARPS - 1)/N_WARPS;
    if (is_behind) {
        return kvarn_launch_behind(kvarn_prep_kernel, dim3(n_blocks), 32*N_WARPS, 0, stream, a);
    }
    KVARN_LAUNCH(kvarn_prep_kernel, n_blocks, 32*N_WARPS, 0, stream, a);
    return cudaGetLastError();
}

#endif
