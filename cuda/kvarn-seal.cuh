// kvarn-seal.cuh - how a block seals one head: 128 tail rows become a tile, with the bytes of kvarn-ref.c, step by step.
//
// SPDX-License-Identifier: MIT
//
//   channel  passes over tokens: a thread sums up a channel, t = 0, 1, .. 127; half of the threads take one pair of a fit's sums,
//            half the other
//   row      passes over channels: 16 threads sum up four tokens at a time, lane j adds d = j, j + 16, ..; then lanes j and
//            j + 8, + 4, + 2, + 1
//
// Values and codes lie in shared memory, a word each: (x, code - h), both exact in f16. Rows are D + 1 words long, and the two
// rows of a warp 16 apart, so that rows, channels and the final transpose all read without bank conflicts. Where that does not
// fit, the rows stay f16 in global memory and codes are computed again. Bound by the latency of the sums, whose order is part of
// the format: 128 additions one after the other, a dozen times.

#pragma once

#include "kvarn-block.cuh"
#include "kvarn-cuda.h"
#include "kvarn-format.h"
#include "kvarn-mma.cuh"

#define G         KVARN_G
#define THREADS   512
#define LANES     16
#define ROWS      4       // of a thread
#define STEP      (THREADS/LANES)
#define ROUNDS    4

#define X_MAX     65504.0f
#define RMS_MIN   0x1p-40f
#define STD_MIN   0x1p-10f
#define TINY      0x1p-60f
#define FIT_MIN   1e-5f
#define AGREE     2.0f
#define ROUND_INT 12582912.0f

#define EXACT_BITS 16
#define EXACT_XOR  0x5a5a // exact tiles are f16 rows, xor-ed: kvarn-graph.c

// One rounding each, whatever the compiler was told about fast math: no contraction, no flush to zero, exact division and root.
#if defined(KVARN_ON_CPU)
static float add(float a, float b) { return a + b; }
static float sub(float a, float b) { return a - b; }
static float mul(float a, float b) { return a*b; }
static float div(float a, float b) { return a/b; }
static float root(float a)         { return sqrtf(a); }
#else
#define OP(name, op) static __device__ __forceinline__ float name(float a, float b) { \
    float r; asm(op ".rn.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b)); return r; }
OP(add, "add")
OP(sub, "sub")
OP(mul, "mul")
OP(div, "div")
static __device__ __forceinline__ float root(float a) { float r; asm("sqrt.rn.f32 %0, %1;" : "=f"(r) : "f"(a)); return r; }
#endif

static __device__ __forceinline__ float max_f32(float a, float b) { return a > b ? a : b; }
static __device__ __forceinline__ float min_f32(float a, float b) { return a < b ? a : b; }
static __device__ __forceinline__ float reciprocal(float v)       { return v > TINY ? div(1.0f, v) : 0.0f; }

static __device__ __forceinline__ float variance(float sum, float sum2, float n) {
    return max_f32(div(sub(sum2, mul(sum, div(sum, n))), n - 1.0f), 0.0f);
}

// nearest f16, ties to even; too large becomes the largest finite one
static __device__ __forceinline__ half to_f16(float v) {
    const uint32_t u = __float_as_uint(v);
    return (u & 0x7fffffff) >= 0x477ff000 ? __ushort_as_half((unsigned short) (u >> 16 & 0x8000 | 0x7bff)) : __float2half_rn(v);
}

// value of a row: NaN counts as 0, everything else is finite
static __device__ __forceinline__ float clean(half x) {
    const float v = __half2float(x);
    uint32_t u = __float_as_uint(v) & 0x7fffffffu;
    u = u > 0x7f800000u ? 0 : u;
    u = u > 0x477fe000u ? 0x477fe000u : u;
    return __uint_as_float((__float_as_uint(v) & 0x80000000u) | u);
}

// what the passes share. in_shared: values and codes lie in shared memory
template <bool in_shared>
struct kvarn_seal_state {
    const half * rows;    // of the slot and head
    int64_t stride;
    half2 * cells;        // [G][D + 1], or NULL
    int     D;
    float   r;            // 1/rms
    float   L, h;         // largest code, half of it
    float * tok;          // [G]
    float * rt;           // [G], 1/tok before the last walk
    float * inv, * off, * scale, * mid;
    float * cc, * cw, * cy, * wy; // fit
    float * ww;

    __device__ __forceinline__ float x(int t, int d) const {
        return in_shared ? __low2float(cells[t*(D + 1) + d]) : clean(rows[t*stride + d]);
    }
    __device__ __forceinline__ float y(int t, int d) const { return mul(x(t, d), r); }

    __device__ __forceinline__ float code(float y, float rt, float inv, float off) const {
        float v = add(mul(mul(y, rt), inv), off);
        v = v > 0.0f ? v : 0.0f;
        v = v < L ? v : L;
        return sub(add(v, ROUND_INT), ROUND_INT);
    }
    // keeps a code, minus h
    __device__ __forceinline__ void keep(int t, int d, float c) {
        if (in_shared) {
            ((half *) (cells + t*(D + 1) + d))[1] = __float2half_rn(c);
        }
    }
    __device__ __forceinline__ float kept(int t, int d) const {
        return in_shared ? __high2float(cells[t*(D + 1) + d]) : sub(code(y(t, d), rt[t], inv[d], off[d]), h);
    }

    __device__ __forceinline__ float fit_scale(int d) const {
        const float m   = div(cw[d], *ww);
        const float cov = sub(cy[d], mul(m, wy[d]));
        const float var = sub(cc[d], mul(m, cw[d]));
        return cov > 0.0f && var > mul(FIT_MIN, cc[d]) ? div(cov, var) : 0.0f;
    }
    __device__ __forceinline__ float fit_mid(int d, float s) const { return div(sub(wy[d], mul(s, cw[d])), *ww); }

    __device__ __forceinline__ void code_line(int d) {
        inv[d] = reciprocal(scale[d]);
        off[d] = inv[d] > 0.0f ? sub(h, mul(mid[d], inv[d])) : 0.0f;
    }
};

// sum of the 16 lanes of a row
static __device__ __forceinline__ float lanes_sum(float v) {
#pragma unroll
    for (int n = LANES/2; n > 0; n /= 2) {
        v = add(v, __shfl_down_sync(0xffffffff, v, n, LANES));
    }
    return __shfl_sync(0xffffffff, v, 0, LANES);
}

// this thread's first row: the halves of a warp are 16 rows apart, the next rows STEP
static __device__ __forceinline__ int first_row() { return threadIdx.x/32 + threadIdx.x % 32/LANES*(STEP/2); }

// standard deviations of the rows of y, or of y*rc
template <bool in_shared>
static __device__ void row_stds(const kvarn_seal_state<in_shared> & s, const float * rc) {
    const int j = threadIdx.x % LANES, t0 = first_row();
    float sum[ROWS] = {}, sum2[ROWS] = {};
#pragma unroll 2
    for (int d = j; d < s.D; d += LANES) {
        const float f = rc ? rc[d] : 1.0f;
#pragma unroll
        for (int k = 0; k < ROWS; ++k) {
            const float v = rc ? mul(s.y(t0 + k*STEP, d), f) : s.y(t0 + k*STEP, d);
            sum [k] = add(sum [k], v);
            sum2[k] = add(sum2[k], mul(v, v));
        }
    }
#pragma unroll
    for (int k = 0; k < ROWS; ++k) {
        const float a = lanes_sum(sum[k]), b = lanes_sum(sum2[k]);
        if (j == 0) {
            s.tok[t0 + k*STEP] = max_f32(root(variance(a, b, (float) s.D)), STD_MIN);
        }
    }
    __syncthreads();
}

// Step 3: codes for scale and mid, the tokens' scales for these, the sums of the next fit
template <bool in_shared>
static __device__ void seal_walk(kvarn_seal_state<in_shared> & s) {
    const int x = threadIdx.x, j = x % LANES, t0 = first_row();
    for (int d = x; d < s.D; d += THREADS) {
        s.code_line(d);
    }
    if (x < G) {
        s.rt[x] = reciprocal(s.tok[x]);
    }
    __syncthreads();
    float yv[ROWS] = {}, vv[ROWS] = {}, rt[ROWS];
#pragma unroll
    for (int k = 0; k < ROWS; ++k) {
        rt[k] = s.rt[t0 + k*STEP];
    }
#pragma unroll 2
    for (int d = j; d < s.D; d += LANES) {
        const float inv = s.inv[d], off = s.off[d], scale = s.scale[d], mid = s.mid[d];
#pragma unroll
        for (int k = 0; k < ROWS; ++k) {
            const float y = s.y(t0 + k*STEP, d);
            const float c = sub(s.code(y, rt[k], inv, off), s.h);
            s.keep(t0 + k*STEP, d, c);
            const float v = add(mul(c, scale), mid);
            yv[k] = add(yv[k], mul(v, y));
            vv[k] = add(vv[k], mul(v, v));
        }
    }
#pragma unroll
    for (int k = 0; k < ROWS; ++k) {
        const float a = lanes_sum(yv[k]), b = lanes_sum(vv[k]);
        if (j == 0) {
            s.tok[t0 + k*STEP] = a > 0.0f && b > 0.0f ? min_f32(div(a, b), X_MAX) : 0.0f;
        }
    }
    __syncthreads();
    for (int at = x; at <= 2*s.D; at += THREADS) {
        if (at < s.D) {
            float cc = 0.0f, cw = 0.0f;
#pragma unroll 8
            for (int t = 0; t < G; ++t) {
                const float w = s.tok[t], c = mul(s.kept(t, at), w);
                cc = add(cc, mul(c, c));
                cw = add(cw, mul(c, w));
            }
            s.cc[at] = cc; s.cw[at] = cw;
        } else if (at < 2*s.D) {
            const int d = at - s.D;
            float cy = 0.0f, wy = 0.0f;
#pragma unroll 8
            for (int t = 0; t < G; ++t) {
                const float w = s.tok[t], c = mul(s.kept(t, d), w), y = s.y(t, d);
                cy = add(cy, mul(c, y));
                wy = add(wy, mul(w, y));
            }
            s.cy[d] = cy; s.wy[d] = wy;
        } else {
            float ww = 0.0f;
#pragma unroll 8
            for (int t = 0; t < G; ++t) {
                ww = add(ww, mul(s.tok[t], s.tok[t]));
            }
            *s.ww = ww > 0.0f ? ww : 1.0f;
        }
    }
    __syncthreads();
}

// the codes of word x of a row of four r, slot f, one per byte: r0 is the row's first contracted index
template <bool in_shared>
static __device__ __forceinline__ uint32_t codes_of(const kvarn_seal_state<in_shared> & s, int side, int r0, int f) {
    uint32_t w = 0;
    for (int k = 0; k < 4; ++k) {
        const int t = side == KVARN_KEY ? f : r0 + k, d = side == KVARN_KEY ? r0 + k : f;
        w |= (uint32_t) add(s.kept(t, d), s.h) << 8*k;
    }
    return w;
}

// shared memory: floats per channel, and the cells
#define N_VECTORS 9

static inline int kvarn_seal_shared(int D, bool in_shared) {
    return N_VECTORS*D*(int) sizeof(float) + (in_shared ? G*(D + 1)*(int) sizeof(half2) : 0);
}

// whether values and codes of both sides fit, beside what a kernel has of its own
static inline cudaError_t kvarn_seal_fits(int D, int own, bool * in_shared) {
    int device, most;
    cudaError_t error;
    if ((error = cudaGetDevice(&device)) == cudaSuccess &&
        (error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)) == cudaSuccess) {
        *in_shared = kvarn_seal_shared(D, true) + own <= most;
    }
    return error;
}

// Seals slot of the tail as the tile of this index, head h. shared: kvarn_seal_shared() bytes
template <bool in_shared>
static __device__ void kvarn_seal_head(int side, int bits, int D, int H, int h, const half * tail, int64_t slot, int64_t index,
        uint8_t * tiles, uint8_t * shared) {
    __shared__ float tok[G], rt[G], scratch[THREADS/32], shared_rms, shared_ww;

    const int x = threadIdx.x;
    float * vectors = (float *) shared;
    kvarn_seal_state<in_shared> s;
    s.stride = (int64_t) D*H;
    s.rows   = tail + slot*G*s.stride + h*D;
    uint8_t * tile = tiles + (index*H + h)*kvarn_tile_size(D, bits);

    if (bits == EXACT_BITS) {
        for (int at = x; at < G*D; at += THREADS) {
            ((uint16_t *) tile)[at] = __half_as_ushort(s.rows[at/D*s.stride + at%D]) ^ EXACT_XOR;
        }
        return;
    }
    s.D     = D;
    s.L     = (float) ((1 << bits) - 1);
    s.h     = 0.5f*s.L;
    s.tok   = tok;           s.rt  = rt;            s.ww    = &shared_ww;
    s.inv   = vectors;       s.off = vectors + D;   s.scale = vectors + 2*D; s.mid = vectors + 3*D;
    s.cc    = vectors + 4*D; s.cw  = vectors + 5*D; s.cy    = vectors + 6*D; s.wy  = vectors + 7*D;
    float * stored = vectors + 8*D;
    s.cells = in_shared ? (half2 *) (vectors + N_VECTORS*D) : nullptr;
    if (in_shared) {
        // four channels at a time, D % 16 == 0; all loads of a thread on their way before the first is used
        const int t0 = x/LANES, j = x % LANES;
        for (int d = 4*j; d < D; d += 4*LANES) {
            uint2 v[G/STEP];
#pragma unroll
            for (int k = 0; k < G/STEP; ++k) {
                v[k] = *(const uint2 *) (s.rows + (t0 + k*STEP)*s.stride + d);
            }
#pragma unroll
            for (int k = 0; k < G/STEP; ++k) {
                half2 * cell = s.cells + (t0 + k*STEP)*(D + 1) + d;
                const uint32_t w[2] = { v[k].x, v[k].y };
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    cell[e] = __floats2half2_rn(clean(__ushort_as_half((unsigned short) (w[e/2] >> 16*(e%2)))), 0.0f);
                }
            }
        }
        __syncthreads();
    }

    // step 1: rms
    for (int d = x; d < D; d += THREADS) {
        float sum2 = 0.0f;
#pragma unroll 8
        for (int t = 0; t < G; ++t) {
            const float v = s.x(t, d);
            sum2 = add(sum2, mul(v, v));
        }
        s.cc[d] = sum2;
    }
    __syncthreads();
    if (x < 32) {
        float all = 0.0f;
        for (int d = x % LANES; d < D; d += LANES) {
            all = add(all, s.cc[d]);
        }
        all = lanes_sum(all);
        if (x == 0) {
            shared_rms = root(div(all, (float) (G*D)));
        }
    }
    __syncthreads();
    const float rms = shared_rms;
    if (!(rms >= RMS_MIN)) {
        for (int at = x; at < kvarn_tile_size(D, bits)/4; at += THREADS) {
            ((uint32_t *) tile)[at] = 0;
        }
        return;
    }
    s.r = div(1.0f, rms);

    // step 2: token scales, channel scales for these, token scales for those
    row_stds(s, nullptr);
    if (x < G) {
        rt[x] = div(1.0f, tok[x]);
    }
    __syncthreads();
    for (int d = x; d < D; d += THREADS) {
        float ref = 0.0f, sum = 0.0f, sum2 = 0.0f;
#pragma unroll 8
        for (int t = 0; t < G; ++t) {
            ref = add(ref, mul(s.y(t, d), 1.0f/G));
        }
#pragma unroll 8
        for (int t = 0; t < G; ++t) {
            const float c = sub(mul(s.y(t, d), rt[t]), ref);
            sum  = add(sum, c);
            sum2 = add(sum2, mul(c, c));
        }
        s.inv[d] = div(1.0f, max_f32(root(variance(sum, sum2, (float) G)), STD_MIN));
    }
    __syncthreads();
    row_stds(s, s.inv);

    // step 4: a range to begin with, then rounds
    if (x < G) {
        rt[x] = reciprocal(tok[x]);
    }
    __syncthreads();
    const float share = div(bits == 2 ? 0.64f : bits == 3 ? 0.80f : 0.92f, s.L);
    for (int d = x; d < D; d += THREADS) {
        float lo = INFINITY, hi = -INFINITY;
#pragma unroll 8
        for (int t = 0; t < G; ++t) {
            const float v = mul(s.y(t, d), rt[t]);
            lo = min_f32(lo, v);
            hi = max_f32(hi, v);
        }
        s.scale[d] = mul(sub(hi, lo), share);
        s.mid  [d] = mul(add(hi, lo), 0.5f);
    }
    __syncthreads();
    for (int k = 0; k < ROUNDS; ++k) {
        seal_walk(s);
        for (int d = x; d < D; d += THREADS) {
            s.scale[d] = s.fit_scale(d);
            s.mid  [d] = s.fit_mid(d, s.scale[d]);
        }
        __syncthreads();
    }
    seal_walk(s);

    // step 5: what least squares took is given back
    float c_max = 0.0f;
    for (int d = x; d < D; d += THREADS) {
        float spread = 0.0f;
#pragma unroll 8
        for (int t = 0; t < G; ++t) {
            const float u = sub(s.y(t, d), mul(tok[t], s.mid[d]));
            spread = add(spread, mul(u, u));
        }
        const float m   = div(s.cw[d], *s.ww);
        const float cov = sub(s.cy[d], mul(m, s.wy[d]));
        const float var = sub(s.cc[d], mul(m, s.cw[d]));
        const float b   = sub(s.wy[d], mul(s.mid[d], *s.ww));
        const float own = sub(spread, mul(b, div(b, *s.ww)));
        float st = s.fit_scale(d);
        if (st > 0.0f && mul(mul(AGREE, cov), cov) >= mul(own, var)) {
            st = side == KVARN_KEY ? div(own, cov) : root(div(own, var));
        }
        stored[d] = st;
        c_max = max_f32(c_max, max_f32(st, fabsf(sub(s.fit_mid(d, st), mul(s.h, st)))));
    }
    c_max = kvarn_block_max<THREADS/32>(c_max, scratch);
    float t_max = kvarn_block_max<THREADS/32>(x < G ? tok[x] : 0.0f, scratch);

    // step 6: f16, codes, token scales for exactly these
    int e;
    (void) frexpf(t_max, &e);
    float f = ldexpf(1.0f, e);
    while (mul(mul(c_max, rms), f) > X_MAX) {
        f = mul(f, 0.5f);
    }
    const float unit = mul(rms, f);
    float * zero = s.cc; // a channel's sums end where its zero begins
    c_max = 0.0f;
    for (int d = x; d < D; d += THREADS) {
        stored[d] = __half2float(to_f16(mul(stored[d], unit)));
        zero  [d] = __half2float(to_f16(sub(mul(s.fit_mid(d, div(stored[d], unit)), unit), mul(s.h, stored[d]))));
        c_max     = max_f32(c_max, max_f32(stored[d], fabsf(zero[d])));
        s.code_line(d);
    }
    c_max = kvarn_block_max<THREADS/32>(c_max, scratch);
    if (x < G) {
        rt[x] = reciprocal(tok[x]);
    }
    __syncthreads();
    const int j = x % LANES, t0 = first_row();
    float yc[ROWS] = {}, cc[ROWS] = {}, yy[ROWS] = {};
#pragma unroll 2
    for (int d = j; d < D; d += LANES) {
#pragma unroll
        for (int k = 0; k < ROWS; ++k) {
            const int   t = t0 + k*STEP;
            const float y = s.y(t, d), q = s.code(y, rt[t], s.inv[d], s.off[d]);
            const float v = add(mul(q, stored[d]), zero[d]);
            s.keep(t, d, sub(q, s.h));
            yc[k] = add(yc[k], mul(v, y));
            cc[k] = add(cc[k], mul(v, v));
            yy[k] = add(yy[k], mul(y, y));
        }
    }
#pragma unroll
    for (int k = 0; k < ROWS; ++k) {
        const float a = lanes_sum(yc[k]), b = lanes_sum(cc[k]), c = lanes_sum(yy[k]);
        float r = a > 0.0f && b > 0.0f ? div(a, b) : 0.0f;
        if (r > 0.0f && mul(mul(AGREE, a), a) >= mul(c, b)) {
            r = side == KVARN_KEY ? div(c, a) : root(div(c, b));
        }
        if (j == 0) {
            tok[t0 + k*STEP] = mul(r, rms);
        }
    }
    __syncthreads();
    t_max = kvarn_block_max<THREADS/32>(x < G ? tok[x] : 0.0f, scratch);
    f = 1.0f;
    while (t_max > f && mul(mul(2.0f, f), c_max) <= X_MAX) {
        f = mul(f, 2.0f);
    }
    for (int d = x; d < D; d += THREADS) {
        ((half *) (tile + kvarn_scale_off(D, bits)))[d] = to_f16(mul(stored[d], f));
        ((half *) (tile + kvarn_zero_off (D, bits)))[d] = to_f16(mul(zero  [d], f));
    }
    if (x < G) {
        ((half *) (tile + kvarn_token_off(D, bits)))[x] = to_f16(div(tok[x], f));
    }

    // codes to bytes: a word of each plane per thread
    const int F = side == KVARN_KEY ? G : D, rows = (side == KVARN_KEY ? D : G)/4;
    const int X = bits == 3 ? F/8 : F*bits/8;
    for (int at = x; at < rows*X; at += THREADS) {
        const int R = at/X, w = at % X;
        uint32_t * out = (uint32_t *) (tile + R*(F*bits/2)) + w;
        if (bits != 3) {
            uint32_t v = 0;
            for (int n = 0; n < 8/bits; ++n) {
                v |= codes_of(s, side, 4*R, w + X*n) << n*bits;
            }
            out[0] = v;
        } else {
            const uint32_t c6 = codes_of(s, side, 4*R, w + 6*X), c7 = codes_of(s, side, 4*R, w + 7*X);
            uint32_t v[3];
            for (int plane = 0; plane < 3; ++plane) {
                v[plane] = codes_of(s, side, 4*R, w + 2*plane*X) | codes_of(s, side, 4*R, w + (2*plane + 1)*X) << 3;
            }
            out[0]   = v[0] | (c6 & 0x06060606) << 5;
            out[X]   = v[1] | (c6 & 0x01010101) << 7 | (c7 & 0x04040404) << 4;
            out[2*X] = v[2] | (c7 & 0x03030303) << 6;
        }
    }
}
