// kvarn-attn-tile.cuh - what a warp does with one tile: scores, softmax, sums of values; from codes and from f16 rows.
//
// SPDX-License-Identifier: MIT

#pragma once

#include "kvarn-cuda.h"
#include "kvarn-load.cuh"

#define KVARN_COLUMNS 8

// where in shared memory
struct kvarn_attn_layout {
    int n_mask;    // mask rows that 8 columns see
    int barriers, masks, tiles, factors;
    int mask_size, tile_size;
    int total;
};

static __host__ __device__ __forceinline__ kvarn_attn_layout kvarn_attn_lay_out(int D, int bits_k, int bits_v, int n_gqa, int n_q,
                                                                                 int n_warps, int n_stages) {
    kvarn_attn_layout l;
    const int columns = n_q < KVARN_COLUMNS ? n_q : KVARN_COLUMNS;
    l.n_mask    = n_gqa % KVARN_COLUMNS == 0 ? 1 : (columns - 1)/n_gqa + 1 + (n_gqa < n_q && KVARN_COLUMNS % n_gqa != 0);
    l.barriers  = D/16*256;
    l.masks     = l.barriers + n_warps*n_stages*16;
    l.mask_size = 16 + l.n_mask*KVARN_G*2;
    l.tiles     = (l.masks + n_warps*n_stages*l.mask_size + 127)/128*128;
    l.tile_size = (bits_k ? kvarn_tile_size(D, bits_k) : 0) + (bits_v ? kvarn_tile_size(D, bits_v) : 0);
    const int merge = n_warps*KVARN_COLUMNS*(D + 2)*4;
    const int tiles = n_warps*n_stages*l.tile_size;
    l.factors   = l.tiles + (merge > tiles ? merge : tiles);
    l.total     = l.factors + KVARN_COLUMNS*4;
    return l;
}

static __device__ __forceinline__ float kvarn_slope(float max_bias, int head, int n_head) {
    if (max_bias <= 0.0f) {
        return 1.0f;
    }
    const int n = 1 << (31 - __clz(n_head)); // heads beyond a power of two lie between the others
    return head < n ? exp2f(-max_bias*(head + 1)/n) : exp2f(-max_bias/2*(2*(head - n) + 1)/n);
}

// The online softmax of two columns and what it has summed up: n half tiles of channels.
template <int N>
struct kvarn_sums {
    float max[2], sum[2];
    float out[N][2];

    __device__ __forceinline__ void clear() {
        max[0] = max[1] = -1e30f;
        sum[0] = sum[1] = 0.0f;
#pragma unroll
        for (int n = 0; n < N; ++n) {
            out[n][0] = out[n][1] = 0.0f;
        }
    }

    // makes room for a tile with these maxima: what is summed so far is scaled down; weight is what the tile's sums are
    // multiplied with
    __device__ __forceinline__ void raise(const float (&tile_max)[2], float (&weight)[2]) {
        float shrink[2];
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            const float now = fmaxf(max[c], tile_max[c]);
            shrink[c] = kvarn_exp2(max[c] - now);
            weight[c] = kvarn_exp2(tile_max[c] - now);
            max[c]    = now;
            sum[c]   *= shrink[c];
        }
        if (__any_sync(0xffffffff, shrink[0] != 1.0f || shrink[1] != 1.0f)) {
#pragma unroll
            for (int n = 0; n < N; ++n) {
                out[n][0] *= shrink[0];
                out[n][1] *= shrink[1];
            }
        }
    }
};

// what a lane knows about its two columns
struct kvarn_columns {
    float factor[2]; // power of two that was taken out of q
    float slope [2]; // of the mask, in units of log2
    float softcap;   // 0: none; times log2(e)
    int   mask_row[2];
};

// softcap, in units of log2
template <int N>
static __device__ __forceinline__ void kvarn_cap_scores(float (&s)[N][2], const kvarn_columns & col) {
    if (col.softcap > 0.0f) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
            s[n][0] = col.softcap*tanhf(s[n][0]);
            s[n][1] = col.softcap*tanhf(s[n][1]);
        }
    }
}

// mask values of N half tiles, for column c
template <int N>
static __device__ __forceinline__ void kvarn_mask_scores(float (&s)[N][2], const half * mask, int c, const kvarn_columns & col,
        int g) {
#pragma unroll
    for (int n = 0; n < N; n += 2) {
        const float2 m = kvarn_unpack(*(const uint32_t *) (mask + 8*n + 2*g));
        s[n    ][c] = fmaf(col.slope[c], m.x, s[n    ][c]);
        s[n + 1][c] = fmaf(col.slope[c], m.y, s[n + 1][c]);
    }
}

// Softmax of N half tiles of scores: p in place of s, the tile's maxima and this lane's share of the sums.
template <int N>
static __device__ __forceinline__ void kvarn_soften(float (&s)[N][2], float (&tile_max)[2], float (&sum)[2]) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
        float m = s[0][c];
#pragma unroll
        for (int n = 1; n < N; ++n) {
            m = fmaxf(m, s[n][c]);
        }
        m = fmaxf(m, __shfl_xor_sync(0xffffffff, m, 4));
        m = fmaxf(m, __shfl_xor_sync(0xffffffff, m, 8));
        m = fmaxf(m, __shfl_xor_sync(0xffffffff, m, 16));
        tile_max[c] = fmaxf(m, -1e30f);
        sum[c] = 0.0f;
#pragma unroll
        for (int n = 0; n < N; ++n) {
            s[n][c] = kvarn_exp2(s[n][c] - tile_max[c]);
            sum[c] += s[n][c];
        }
    }
}

// --- f16 rows ---

// scores of the 16*NB tokens from token on: s[2*b + j] is half tile j of the 16 tokens b
template <int D, int NB>
static __device__ __forceinline__ void kvarn_score_rows(float (&s)[2*NB][2], const half * rows, int64_t stride, const uint2 * qf,
        int lane) {
    const int g = lane/4, i = lane%4;
    static_assert(NB % 2 == 0, "an operand holds two half tiles");
#pragma unroll 4
    for (int ks = 0; ks < D/16; ++ks) {
        const uint2 q = qf[ks*32 + lane];
#pragma unroll
        for (int b = 0; b < NB; b += 2) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const half * p = rows + (16*b + 2*g + j)*stride + 16*ks + 4*i;
                const uint2 x = kvarn_even_odd(*(const uint2 *) p);
                const uint2 y = kvarn_even_odd(*(const uint2 *) (p + 16*stride));
                float (&l)[2] = s[2*b + j], (&h)[2] = s[2*b + 2 + j];
                kvarn_mma(l[0], l[1], h[0], h[1], x.x, y.x, x.y, y.y, q.x, q.y);
            }
        }
    }
}

// out += weight * (p of 16 tokens) x rows. A lane loads channels of token g; transposed, these are operands with channels as
// rows.
//   bits  of the layout of half tiles
template <int bits, int D>
static __device__ __forceinline__ void kvarn_add_rows(float (&out)[D/8][2], const float (&weight)[2], const half * rows,
        int64_t stride,
                                                      uint32_t b0, uint32_t b1, int lane) {
    using C = kvarn_codes<bits, D>;
    const int g = lane/4, i = lane%4;
    // row m of the first matrix is token 4*(m/2) + 2*(m%2), of the second the next one: the order of b0 and b1
    const half * p = rows + (4*(g/2) + 2*(g%2))*stride;
#pragma unroll
    for (int n = 0; n < D/8; n += 2) {
        if (n % 8 == 0 && n > 0) {
            KVARN_KEEP_ORDER(); // sixteen loads in flight, not all: registers are short
        }
        uint32_t a[4]; // half tile n, then n + 1: matrix 0, 1
        if (C::wide) {
            const uint2 x = kvarn_even_odd(*(const uint2 *) (p + 8*n + 4*i));
            const uint2 y = kvarn_even_odd(*(const uint2 *) (p + stride + 8*n + 4*i));
            a[0] = x.x; a[1] = x.y; a[2] = y.x; a[3] = y.y;
        } else {
            a[0] = *(const uint32_t *) (p + 8*n + 2*i);
            a[1] = *(const uint32_t *) (p + 8*n + 8 + 2*i);
            a[2] = *(const uint32_t *) (p + stride + 8*n + 2*i);
            a[3] = *(const uint32_t *) (p + stride + 8*n + 8 + 2*i);
        }
        float c0 = 0.0f, c1 = 0.0f, c2 = 0.0f, c3 = 0.0f;
        kvarn_mma(c0, c1, c2, c3, kvarn_transpose(a[0]), kvarn_transpose(a[1]), kvarn_transpose(a[2]), kvarn_transpose(a[3]), b0,
                b1);
        out[n    ][0] = fmaf(weight[0], c0, out[n    ][0]);
        out[n    ][1] = fmaf(weight[1], c1, out[n    ][1]);
        out[n + 1][0] = fmaf(weight[0], c2, out[n + 1][0]);
        out[n + 1][1] = fmaf(weight[1], c3, out[n + 1][1]);
    }
}

// --- tiles ---

// scores of one tile of keys in shared memory, token scales included
template <int bits, int D>
static __device__ __forceinline__ void kvarn_score_tile(float (&s)[16][2], const uint8_t * tile, const uint2 * qf,
        const kvarn_columns & col,
                                                        int lane) {
    using C = kvarn_codes<bits, KVARN_G>;
    static_assert(C::wide, "128 tokens");
    const int g = lane/4, i = lane%4;
    float z[4] = { 0.0f, 0.0f, 0.0f, 0.0f };
#pragma unroll
    for (int n = 0; n < 16; ++n) {
        s[n][0] = s[n][1] = 0.0f;
    }
#pragma unroll 2
    for (int ks = 0; ks < D/16; ++ks) {
        const uint2 q     = qf[ks*32 + lane];
        const uint2 scale = kvarn_even_odd(*(const uint2 *) (tile + kvarn_scale_off(D, bits) + 2*(16*ks + 4*i)));
        const uint2 zero  = kvarn_even_odd(*(const uint2 *) (tile + kvarn_zero_off (D, bits) + 2*(16*ks + 4*i)));
        kvarn_mma(z[0], z[1], z[2], z[3], zero.x, zero.x, zero.y, zero.y, q.x, q.y);
        const uint32_t b0 = kvarn_mul2(q.x, scale.x);
        const uint32_t b1 = kvarn_mul2(q.y, scale.y);
#pragma unroll
        for (int u = 0; u < C::n_u; ++u) {
            kvarn_mma_codes<bits, KVARN_G>(s, u, 0, tile, ks, b0, b1, g, i);
        }
    }
#pragma unroll
    for (int c = 0; c < 2; ++c) {
        z[c] *= col.factor[c];
    }
#pragma unroll
    for (int n = 0; n < 16; n += 2) {
        const float2 token = kvarn_unpack(*(const uint32_t *) (tile + kvarn_token_off(D, bits) + 2*(8*n + 2*g)));
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            s[n    ][c] = fmaf(s[n    ][c], C::unit(n)*col.factor[c], z[c])*token.x;
            s[n + 1][c] = fmaf(s[n + 1][c], C::unit(n)*col.factor[c], z[c])*token.y;
        }
    }
}

// p (relative to the tile's maximum, token scales included) as the B operands of 8 k-steps
static __device__ __forceinline__ void kvarn_pack_p(const float (&p)[16][2], uint32_t (&b)[16]) {
#pragma unroll
    for (int n = 0; n < 16; ++n) {
        b[n] = kvarn_transpose(kvarn_pack(p[n][0], p[n][1]));
    }
}

// out += weight * p x one tile of values in shared memory
template <int bits, int D>
static __device__ __forceinline__ void kvarn_add_tile(float (&out)[D/8][2], const float (&weight)[2], const uint8_t * tile,
                                                      const uint32_t (&b)[16], int lane) {
    using C = kvarn_codes<bits, D>;
    constexpr int n_half = C::slots*C::step;                       // half tiles of one u
    constexpr int n_u    = n_half < 8 && C::n_u % 2 == 0 ? 2 : 1;  // word groups at once: independent sums hide the latency
    const int g = lane/4, i = lane%4;

    float ps[4] = { 0.0f, 0.0f, 0.0f, 0.0f };
#pragma unroll
    for (int ks = 0; ks < 8; ++ks) {
        kvarn_mma(ps[0], ps[1], ps[2], ps[3], 0x3c003c00, 0x3c003c00, 0x3c003c00, 0x3c003c00, b[2*ks], b[2*ks + 1]);
    }
    const float pz[2] = { weight[0]*ps[0], weight[1]*ps[1] };

#pragma unroll
    for (int u = 0; u < C::n_u; u += n_u) {
        float acc[C::n_half][2]; // only the half tiles of these u are used
#pragma unroll
        for (int n = 0; n < C::n_half; ++n) {
            acc[n][0] = acc[n][1] = 0.0f;
        }
#pragma unroll
        for (int ks = 0; ks < 8; ++ks) {
#pragma unroll
            for (int v = 0; v < n_u; ++v) {
                kvarn_mma_codes<bits, D>(acc, u + v, 0, tile, ks, b[2*ks], b[2*ks + 1], g, i);
            }
        }
#pragma unroll
        for (int v = 0; v < n_u; ++v) {
#pragma unroll
            for (int s = 0; s < C::slots; ++s) {
                const int     n  = C::half_tile(u + v, s, 0);
                const uint8_t * at = tile + 2*C::index(n, g);
                float2 scale, zero;
                if (C::wide) {
                    scale = kvarn_unpack(*(const uint32_t *) (at + kvarn_scale_off(D, bits)));
                    zero  = kvarn_unpack(*(const uint32_t *) (at + kvarn_zero_off (D, bits)));
                } else {
                    scale = make_float2(__half2float(*(const half *) (at + kvarn_scale_off(D, bits))), 0.0f);
                    zero  = make_float2(__half2float(*(const half *) (at + kvarn_zero_off (D, bits))), 0.0f);
                }
#pragma unroll
                for (int j = 0; j < C::step; ++j) {
                    const float sc = j ? scale.y : scale.x, zr = j ? zero.y : zero.x;
#pragma unroll
                    for (int c = 0; c < 2; ++c) {
                        out[n + j][c] = fmaf(sc*(weight[c]*C::unit(n)), acc[n + j][c], fmaf(zr, pz[c], out[n + j][c]));
                    }
                }
            }
        }
    }
}
