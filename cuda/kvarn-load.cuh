// kvarn-load.cuh - codes of a tile as operands of a matrix instruction.
// Payload bytes are read only here and in the kernels for odd shapes (kvarn-attn-any.cu, kvarn-get.cu).
//
// SPDX-License-Identifier: MIT
//
// A word holds 4 consecutive r of F*bits/32 fields, one field per byte. A field is cut out by one AND: 4 unsigned bytes, an
// operand as it is. It is used where it lies, that is times 4, 16, ..; the factor belongs to the row of the operand and is undone
// with the row's scale.
//
// Rows come in half tiles of 8, one row for each g = lane/4; half tile n has one or two accumulators per lane.
//   wide    f = 16*(n/2) + 2*g + n%2     X % 16 == 0: a lane takes 8 bytes, words 16*u + 2*g and the next one
//   narrow  f = 8*n + g                  X % 8 == 0: a lane takes 4 bytes, word 8*u + g (fewer sums at once, see kvarn_values)
//
// Lane i of the four that share a row contracts the i-th quarter of r. In shared memory each quarter of a tile's codes is
// followed by 32 unused bytes, so that the four quarters lie in different banks:
//
//   | codes of r < R/4 | 32 | R/4 .. | 32 | R/2 .. | 32 | 3*R/4 .. | scale | zero | token |     R = D for keys, 128 for values

#pragma once

#include "kvarn-attn-plan.h"
#include "kvarn-mma.cuh"

template <int bits, int F, bool is_wide = true>
struct kvarn_codes {
    static constexpr int X       = bits == 3 ? F/8 : F*bits/8;  // words per row (and plane)
    static constexpr int slots   = F/X;
    static constexpr int n_half  = F/8;
    static constexpr bool wide   = is_wide && X % 16 == 0;
    static constexpr int n_u     = wide ? X/16 : X/8;
    static constexpr int step    = wide ? 2 : 1;                // half tiles of one u and slot
    static constexpr int row     = F*bits/2;                    // bytes of four r
    static constexpr int planes  = bits == 3 ? 3 : 1;

    static_assert(X % 8 == 0, "rows of four r must be whole half tiles");

    // half tile of word group u, slot s, word j of a lane's pair
    static __device__ __forceinline__ constexpr int half_tile(int u, int s, int j) { return (u + n_u*s)*step + j; }

    // free index of half tile n
    static __device__ __forceinline__ constexpr int index(int n, int g) { return wide ? 16*(n/2) + 2*g + n%2 : 8*n + g; }

    // what the sum over the codes of half tile n is multiplied with
    static __device__ __forceinline__ constexpr float unit(int n) {
        const int s = n/step/n_u;
        return 1.0f/(bits != 3 ? (float) (1 << s*bits) : s < 6 ? (float) (1 << s%2*3) : 32.0f);
    }

    uint32_t word[planes][2];

    // row: four r in shared memory
    __device__ __forceinline__ void load(const uint8_t * row, int u, int g) {
        const uint8_t * p = row + (wide ? 64*u + 8*g : 32*u + 4*g);
#pragma unroll
        for (int plane = 0; plane < planes; ++plane) {
            if (wide) {
                const uint2 v = *(const uint2 *) (p + plane*4*X);
                word[plane][0] = v.x;
                word[plane][1] = v.y;
            } else {
                word[plane][0] = *(const uint32_t *) (p + plane*4*X);
            }
        }
    }

    // field s of word j, the other bits 0; of 3 bits the last two slots are collected from all planes
    __device__ __forceinline__ uint32_t field(int s, int j) const {
        if (bits != 3) {
            return word[0][j] & (bits == 2 ? 0x03030303u : 0x0f0f0f0fu) << s*bits;
        }
        const uint32_t A = word[0][j], B = word[bits == 3 ? 1 : 0][j], D = word[bits == 3 ? 2 : 0][j];
        if (s < 6) {
            return (s < 2 ? A : s < 4 ? B : D) & 0x07070707u << s%2*3;
        }
        return s == 6 ? (A & 0xc0c0c0c0) | (B >> 2 & 0x20202020) : (B << 1 & 0x80808080) | (D >> 1 & 0x60606060);
    }
};

// Values: 16 half tiles of 3 bits at once take more registers than there are where other sums are many.
template <int bits, int D, int NC>
using kvarn_values = kvarn_codes<bits, D, bits != 3 || (NC == 1 && D <= 128)>;

// acc[block of columns][half tile][column] += codes of the four r of two rows times b[..][0] and b[..][1], for word group u
//   is_signed  b is
template <bool is_signed, typename C, int N, int NB>
static __device__ __forceinline__ void kvarn_mma_codes(int (&acc)[NB][N][2], const int u, const uint8_t * row,
        const uint32_t (&b)[NB][2], int g) {
    C v, w;
    v.load(row, u, g);
    w.load(row + C::row, u, g);
#pragma unroll
    for (int j = 0; j < C::step; ++j) {
#pragma unroll
        for (int s = 0; s < C::slots; s += 2) {
            const uint32_t a0 = v.field(s, j), a1 = v.field(s + 1, j), a2 = w.field(s, j), a3 = w.field(s + 1, j);
#pragma unroll
            for (int n = 0; n < NB; ++n) {
                int (&l)[2] = acc[n][C::half_tile(u, s,     j)];
                int (&h)[2] = acc[n][C::half_tile(u, s + 1, j)];
                if (is_signed) {
                    kvarn_mma_s8(l[0], l[1], h[0], h[1], a0, a1, a2, a3, b[n][0], b[n][1]);
                } else {
                    kvarn_mma_u8(l[0], l[1], h[0], h[1], a0, a1, a2, a3, b[n][0], b[n][1]);
                }
            }
        }
    }
}
