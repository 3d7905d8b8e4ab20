// kvarn-attn-tile.cuh - what a warp does with one tile: scores, softmax, sums of values; from codes and from f16 rows.
//
// SPDX-License-Identifier: MIT
//
// A lane has NC query vectors: one (up to 4 in all), or two (up to 8). Codes are multiplied as int8; an operand of 16 bits takes
// two columns of a matrix instruction, its high and its low part, which meet in one lane: columns 2i and 2i + 1 of block c are
// vector NC*i + c. Rows of f16 take a column per vector, or two equal ones where there are only 4.

#pragma once

#include "kvarn-load.cuh"

#define KVARN_LOG2E 1.44269504f

// The online softmax of a lane's columns and what it has summed up: N half tiles of channels.
template <int N, int NC>
struct kvarn_sums {
    float max[NC], sum[NC];
    float out[N][NC];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int c = 0; c < NC; ++c) {
            max[c] = -1e30f;
            sum[c] = 0.0f;
#pragma unroll
            for (int n = 0; n < N; ++n) {
                out[n][c] = 0.0f;
            }
        }
    }

    // makes room for a tile with these maxima: what is summed so far is scaled down; weight is what the tile's sums are
    // multiplied with
    __device__ __forceinline__ void raise(const float (&tile_max)[NC], const float (&tile_sum)[NC], float (&weight)[NC]) {
        float shrink[NC];
        bool  is_raised = false;
#pragma unroll
        for (int c = 0; c < NC; ++c) {
            const float now = fmaxf(max[c], tile_max[c]);
            shrink[c] = kvarn_exp2(max[c] - now);
            weight[c] = kvarn_exp2(tile_max[c] - now);
            is_raised |= now != max[c];
            max[c]    = now;
            sum[c]    = fmaf(sum[c], shrink[c], weight[c]*tile_sum[c]);
        }
        if (__any_sync(0xffffffff, is_raised)) {
#pragma unroll
            for (int n = 0; n < N; ++n) {
#pragma unroll
                for (int c = 0; c < NC; ++c) {
                    out[n][c] *= shrink[c];
                }
            }
        }
    }
};

// what a lane knows about its columns
template <int NC>
struct kvarn_columns {
    float factor[NC]; // power of two that was taken out of q
    float slope [NC]; // of the mask, in units of log2
    int   mask_row[NC];
    float softcap;    // 0: none; times log2(e)
};

// softcap, in units of log2
template <int N, int NC>
static __device__ __forceinline__ void kvarn_cap_scores(float (&s)[N][NC], const kvarn_columns<NC> & col) {
    if (col.softcap > 0.0f) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll
            for (int c = 0; c < NC; ++c) {
                s[n][c] = col.softcap*tanhf(s[n][c]);
            }
        }
    }
}

// adds mask values of N half tiles. mask: of the first token; row: from one mask row to the next
template <int N, int NC>
static __device__ __forceinline__ void kvarn_mask_scores(float (&s)[N][NC], const half * mask, int64_t row,
        const kvarn_columns<NC> & col, int g) {
#pragma unroll
    for (int c = 0; c < NC; ++c) {
        const half * at = mask + col.mask_row[c]*row;
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            const float2 m = kvarn_unpack(*(const uint32_t *) (at + 8*n + 2*g));
            s[n    ][c] = fmaf(col.slope[c], m.x, s[n    ][c]);
            s[n + 1][c] = fmaf(col.slope[c], m.y, s[n + 1][c]);
        }
    }
}

// Softmax of N half tiles of scores: p in place of s, relative to twice the largest, so that no p is above 1/2.
template <int N, int NC>
static __device__ __forceinline__ void kvarn_soften(float (&s)[N][NC], float (&tile_max)[NC], float (&sum)[NC]) {
#pragma unroll
    for (int c = 0; c < NC; ++c) {
        float m = s[0][c];
#pragma unroll
        for (int n = 1; n < N; ++n) {
            m = fmaxf(m, s[n][c]);
        }
        m = fmaxf(m, __shfl_xor_sync(0xffffffff, m, 4));
        m = fmaxf(m, __shfl_xor_sync(0xffffffff, m, 8));
        m = fmaxf(m, __shfl_xor_sync(0xffffffff, m, 16));
        tile_max[c] = fmaxf(m, -1e30f) + 1.0f;
        float even = 0.0f, odd = 0.0f;
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            s[n    ][c] = kvarn_exp2(s[n    ][c] - tile_max[c]);
            s[n + 1][c] = kvarn_exp2(s[n + 1][c] - tile_max[c]);
            even += s[n    ][c];
            odd  += s[n + 1][c];
        }
        sum[c] = even + odd;
    }
}

// --- f16 rows ---

// channels 8*j .. of lane i's share of a query vector: quarters where keys are tiles, so that codes lie in different banks;
// neighbours where they are rows
template <int D, bool is_tile>
static __device__ __forceinline__ constexpr int kvarn_channel(int j, int i) { return is_tile ? i*(D/4) + 8*j : 32*j + 8*i; }

// scores of the 16*NB tokens from token on: s[2*b + j] is half tile j of the 16 tokens b
//   is_tile  as kvarn_channel has it
template <int D, int NB, int NC, bool is_tile>
static __device__ __forceinline__ void kvarn_score_rows(float (&s)[2*NB][NC], const half * rows, int64_t stride, const uint4 * qf,
        const kvarn_columns<NC> & col, int lane) {
    const int g = lane/4, i = lane%4;
    static_assert(NB % 2 == 0, "an operand holds two half tiles");
    float acc[2*NB][2];
#pragma unroll
    for (int n = 0; n < 2*NB; ++n) {
        acc[n][0] = acc[n][1] = 0.0f;
    }
#pragma unroll 2
    for (int j = 0; j < D/32; ++j) {
        const uint4 q = qf[j*4*4*NC + (NC == 1 ? g/2 : g)*4 + i];
#pragma unroll
        for (int b = 0; b < NB; b += 2) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const half * p = rows + (16*b + 2*g + e)*stride + kvarn_channel<D, is_tile>(j, i);
                const uint4 x = *(const uint4 *) p;
                const uint4 y = *(const uint4 *) (p + 16*stride);
                float (&l)[2] = acc[2*b + e], (&h)[2] = acc[2*b + 2 + e];
                kvarn_mma(l[0], l[1], h[0], h[1], x.x, y.x, x.y, y.y, q.x, q.y);
                kvarn_mma(l[0], l[1], h[0], h[1], x.z, y.z, x.w, y.w, q.z, q.w);
            }
        }
    }
#pragma unroll
    for (int n = 0; n < 2*NB; ++n) {
#pragma unroll
        for (int c = 0; c < NC; ++c) {
            s[n][c] = acc[n][c]*col.factor[c];
        }
    }
}

// p of half tiles n and n + 1 as the operand pair of 16 tokens
template <int N, int NC>
static __device__ __forceinline__ uint2 kvarn_pack_p(const float (&p)[N][NC], int n) {
    return make_uint2(kvarn_transpose(kvarn_pack(p[n    ][0], p[n    ][NC - 1])),
                      kvarn_transpose(kvarn_pack(p[n + 1][0], p[n + 1][NC - 1])));
}

// out += weight * (p of 16 tokens) x rows. A lane loads channels of token g; transposed, these are operands with channels as
// rows.
//   bits  of the layout of half tiles
template <int bits, int D, int NC>
static __device__ __forceinline__ void kvarn_add_rows(float (&out)[D/8][NC], const float (&weight)[NC], const half * rows,
        int64_t stride, uint2 b, int lane) {
    using C = kvarn_values<bits, D, NC>;
    const int g = lane/4, i = lane%4;
    // row m of the first matrix is token 4*(m/2) + 2*(m%2), of the second the next one: the order of b
    const half * p = rows + (4*(g/2) + 2*(g%2))*stride;
#pragma unroll
    for (int n = 0; n < D/8; n += 2) {
        if (D*NC > 128 && n % 8 == 0 && n > 0) {
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
        float l[2] = { 0.0f, 0.0f }, h[2] = { 0.0f, 0.0f };
        kvarn_mma(l[0], l[1], h[0], h[1], kvarn_transpose(a[0]), kvarn_transpose(a[1]), kvarn_transpose(a[2]),
                kvarn_transpose(a[3]), b.x, b.y);
#pragma unroll
        for (int c = 0; c < NC; ++c) {
            out[n    ][c] = fmaf(weight[c], l[c], out[n    ][c]);
            out[n + 1][c] = fmaf(weight[c], h[c], out[n + 1][c]);
        }
    }
}

// --- tiles ---

// Scores of one tile of keys in shared memory, token scales included.
//   q' = q*scale = (high + low/128)/inv      both parts are integers, exact in f16
template <int bits, int D, int NC>
static __device__ __forceinline__ void kvarn_score_tile(float (&s)[16][NC], const uint8_t * tile, const uint4 * qf,
        const kvarn_columns<NC> & col, int lane) {
    using C = kvarn_codes<bits, KVARN_G>;
    static_assert(C::wide, "128 tokens");
    const int quarter = kvarn_codes_size(D, bits)/4 + KVARN_PAD;
    const int g = lane/4, i = lane%4;
    const uint8_t * scales = tile + 3*KVARN_PAD + kvarn_scale_off(D, bits) + 2*kvarn_channel<D, true>(0, i);

    float    z0[4] = { 0.0f, 0.0f, 0.0f, 0.0f }, z1[4] = { 0.0f, 0.0f, 0.0f, 0.0f };
    uint32_t b[NC][D/16];
    float    unit[NC];
#pragma unroll
    for (int c = 0; c < NC; ++c) {
        uint32_t x[D/8], max = 0;
#pragma unroll
        for (int j = 0; j < D/32; ++j) {
            const uint4 q     = qf[j*16*NC + (NC*(g/2) + c)*4 + i];
            const uint4 scale = *(const uint4 *) (scales + 16*j);
            if (c == 0) {
                const uint4 zero = *(const uint4 *) (scales + 16*j + 2*D);
                const uint4 r    = NC == 1 ? q : qf[j*16*NC + lane];
                // the first half of the rows takes two of the four registers, the second half the others: as they were loaded
                kvarn_mma(z0[0], z0[1], z0[2], z0[3], zero.x, zero.y, zero.z, zero.w, r.x, r.z);
                kvarn_mma(z1[0], z1[1], z1[2], z1[3], zero.x, zero.y, zero.z, zero.w, r.y, r.w);
            }
            x[4*j    ] = kvarn_mul2(q.x, scale.x);
            x[4*j + 1] = kvarn_mul2(q.y, scale.y);
            x[4*j + 2] = kvarn_mul2(q.z, scale.z);
            x[4*j + 3] = kvarn_mul2(q.w, scale.w);
            max = kvarn_max_abs2(kvarn_max_abs2(max, x[4*j]),     x[4*j + 1]);
            max = kvarn_max_abs2(kvarn_max_abs2(max, x[4*j + 2]), x[4*j + 3]);
        }
        max = kvarn_max_abs2(max, __shfl_xor_sync(0xffffffff, max, 1));
        max = kvarn_max_abs2(max, __shfl_xor_sync(0xffffffff, max, 2));
        const float2   two  = kvarn_unpack(max);
        const float    most = 126.0f/fmaxf(fmaxf(two.x, two.y), 126.0f/32768.0f);
        const uint32_t inv  = kvarn_pack(most, most);
        // this lane prepares vector NC*(g/2) + c, its scores will be those of NC*i + c
        unit[c] = col.factor[c]/(128.0f*kvarn_unpack(__shfl_sync(0xffffffff, inv, 8*i)).x);

        // lanes of high parts keep h, those of low parts take what is left, 128 times; the same instructions for both
        const uint32_t one = g % 2 ? inv ^ 0x80008000 : inv, left = g % 2 ? inv : 0, times = g % 2 ? 0x58005800 : 0x3c003c00;
#pragma unroll
        for (int n = 0; n < D/8; n += 2) {
            uint32_t y[2];
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const uint32_t h = kvarn_add2(kvarn_fma2(x[n + e], one, 0x66006600), 0xe600e600); // 1536, -1536: an integer
                y[e] = kvarn_fma2(kvarn_fma2(x[n + e], left, h), times, 0x66006600);
            }
            b[c][n/2] = __byte_perm(y[0], y[1], 0x6420);
        }
    }

    int acc[NC][16][2];
#pragma unroll
    for (int c = 0; c < NC; ++c) {
#pragma unroll
        for (int n = 0; n < 16; ++n) {
            acc[c][n][0] = acc[c][n][1] = 0;
        }
    }
    const uint8_t * row = tile + i*quarter;
#pragma unroll
    for (int k = 0; k < D/16; k += 2) {
        uint32_t bk[NC][2];
#pragma unroll
        for (int c = 0; c < NC; ++c) {
            bk[c][0] = b[c][k];
            bk[c][1] = b[c][k + 1];
        }
#pragma unroll
        for (int u = 0; u < C::n_u; ++u) {
            kvarn_mma_codes<true, C>(acc, u, row + k*C::row, bk, g);
        }
    }
    const uint8_t * tokens = tile + 3*KVARN_PAD + kvarn_token_off(D, bits) + 4*g;
#pragma unroll
    for (int n = 0; n < 16; n += 2) {
        const float2 token = kvarn_unpack(*(const uint32_t *) (tokens + 16*n));
#pragma unroll
        for (int c = 0; c < NC; ++c) {
            const float zero = (z0[NC == 1 ? 0 : c] + z1[NC == 1 ? 2 : 2 + c])*col.factor[c];
            s[n    ][c] = fmaf((float) (acc[c][n    ][0]*128 + acc[c][n    ][1]), C::unit(n)*unit[c], zero)*token.x;
            s[n + 1][c] = fmaf((float) (acc[c][n + 1][0]*128 + acc[c][n + 1][1]), C::unit(n)*unit[c], zero)*token.y;
        }
    }
}

// out += weight * p x one tile of values in shared memory. p times the token scales is an integer in units of 2^-16, its bytes
// are two columns.
//   p_words  room of this warp for p on its way between lanes
template <int bits, int D, int NC>
static __device__ __forceinline__ void kvarn_add_tile(float (&out)[D/8][NC], const float (&weight)[NC], const uint8_t * tile,
        float (&p)[16][NC], uint32_t * p_words, int lane) {
    using C = kvarn_values<bits, D, NC>;
    const int quarter = kvarn_codes_size(D, bits)/4 + KVARN_PAD;
    constexpr int n_half  = C::slots*C::step;                       // half tiles of one u
    constexpr int n_u     = n_half < 8 && C::n_u % 2 == 0 ? 2 : 1;  // word groups at once: independent sums hide the latency
    const int g = lane/4, i = lane%4;
    const uint8_t * meta   = tile + 3*KVARN_PAD;
    const uint8_t * tokens = meta + kvarn_token_off(D, bits);

    // p is at most 1/2, and token scales are at most 1 in all but tiles of very large values
    float up = 1.0f/65536.0f;
    const uint2 some = *(const uint2 *) (tokens + 8*lane);
    if (__any_sync(0xffffffff, ((some.x + 0x03ff03ff) | (some.y + 0x03ff03ff)) & 0x40004000)) {
        uint32_t max = kvarn_max_abs2(some.x, some.y);
        for (int o = 16; o > 0; o /= 2) {
            max = kvarn_max_abs2(max, __shfl_xor_sync(0xffffffff, max, o));
        }
        const float2 two  = kvarn_unpack(max);
        const float  most = __uint_as_float((__float_as_uint(fmaxf(two.x, two.y)) & 0x7f800000) + 0x00800000);
        up *= most;
#pragma unroll
        for (int n = 0; n < 16; ++n) {
#pragma unroll
            for (int c = 0; c < NC; ++c) {
                p[n][c] *= 1.0f/most;
            }
        }
    }

    // integers to bytes, bytes of four tokens to one lane, tokens of a quarter to one lane
    uint32_t pairs[8];
#pragma unroll
    for (int n = 0; n < 8; ++n) {
        pairs[n] = *(const uint32_t *) (tokens + 32*n + 4*g);
    }
#pragma unroll
    for (int n = 0; n < 16; n += 2) {
        const float2 token = kvarn_unpack(pairs[n/2]);
#pragma unroll
        for (int c = 0; c < NC; ++c) {
            const uint32_t x = __float_as_uint(fmaf(p[n    ][c], token.x, 128.0f)); // the last 16 bits are the integer
            const uint32_t y = __float_as_uint(fmaf(p[n + 1][c], token.y, 128.0f));
            p_words[(c*8 + g)*KVARN_P_WORDS + 2*n + i] = kvarn_transpose(__byte_perm(x, y, 0x4051));
        }
    }
    __syncwarp();
    uint32_t b[NC][8];
#pragma unroll
    for (int c = 0; c < NC; ++c) {
#pragma unroll
        for (int n = 0; n < 8; n += 4) {
            const uint4 v = *(const uint4 *) (p_words + (c*8 + g)*KVARN_P_WORDS + 8*i + n);
            b[c][n] = v.x; b[c][n + 1] = v.y; b[c][n + 2] = v.z; b[c][n + 3] = v.w;
        }
    }

    float unit[NC], pz[NC];
#pragma unroll
    for (int c = 0; c < NC; ++c) {
        int l[2] = { 0, 0 }, h[2] = { 0, 0 };
#pragma unroll
        for (int k = 0; k < 8; k += 2) {
            kvarn_mma_u8(l[0], l[1], h[0], h[1], 0x01010101, 0x01010101, 0x01010101, 0x01010101, b[c][k], b[c][k + 1]);
        }
        unit[c] = weight[c]*up;
        pz  [c] = unit[c]*(float) (l[0]*256 + l[1]);
    }

    const uint8_t * row = tile + i*quarter;
#pragma unroll
    for (int u = 0; u < C::n_u; u += n_u) {
        int acc[NC][C::n_half][2]; // only the half tiles of these u are used
#pragma unroll
        for (int c = 0; c < NC; ++c) {
#pragma unroll
            for (int n = 0; n < C::n_half; ++n) {
                acc[c][n][0] = acc[c][n][1] = 0;
            }
        }
#pragma unroll
        for (int k = 0; k < 8; k += 2) {
            uint32_t bk[NC][2];
#pragma unroll
            for (int c = 0; c < NC; ++c) {
                bk[c][0] = b[c][k];
                bk[c][1] = b[c][k + 1];
            }
#pragma unroll
            for (int v = 0; v < n_u; ++v) {
                kvarn_mma_codes<false, C>(acc, u + v, row + k*C::row, bk, g);
            }
        }
#pragma unroll
        for (int v = 0; v < n_u; ++v) {
#pragma unroll
            for (int s = 0; s < C::slots; ++s) {
                const int n = C::half_tile(u + v, s, 0);
                const uint8_t * at = meta + 2*C::index(n, g);
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
                    for (int c = 0; c < NC; ++c) {
                        const float sum = (float) (acc[c][n + j][0]*256 + acc[c][n + j][1]);
                        out[n + j][c] = fmaf(sc*(unit[c]*C::unit(n)), sum, fmaf(zr, pz[c], out[n + j][c]));
                    }
                }
            }
        }
    }
}
