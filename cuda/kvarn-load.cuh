// kvarn-load.cuh - codes of a tile as operands of a matrix instruction.
// Payload bytes are read only here and in the kernels for odd shapes (kvarn-attn-any.cu, kvarn-get.cu).
//
// SPDX-License-Identifier: MIT
//
// A word holds 4 consecutive r of F*bits/32 fields. Two bytes of it, masked, are two f16 whose exponent is 0, subnormals: the
// code
// times 2^-24, and times 4, 16, .. where the field lies higher. mma takes them exactly; the factor belongs to the row and is
// undone
// with the row's scale. One AND gives half an operand:
//
//   word      byte 3 | byte 2 | byte 1 | byte 0        & 00ff00ff-like mask    -> (r+0, r+2)
//             r+3    | r+2    | r+1    | r+0           >> 8, & the same mask   -> (r+1, r+3)
//
// Rows come in half tiles of 8, one row for each g = lane/4; half tile n has two accumulators per lane.
//   wide    f = 16*(n/2) + 2*g + n%2     X % 16 == 0: a lane takes 8 bytes, words 16*u + 2*g and the next one
//   narrow  f = 8*n + g                  X % 8 == 0: a lane takes 4 bytes, word 8*u + g (heads of 64 channels, values of 3 bits)

#pragma once

#include "kvarn-format.h"
#include "kvarn-mma.cuh"

template <int bits, int F>
struct kvarn_codes {
    static constexpr int X       = bits == 3 ? F/8 : F*bits/8;  // words per row (and plane)
    static constexpr int slots   = F/X;
    static constexpr int n_half  = F/8;
    static constexpr bool wide   = X % 16 == 0;
    static constexpr int n_u     = wide ? X/16 : X/8;
    static constexpr int step    = wide ? 2 : 1;                // half tiles of one u and slot
    static constexpr int row     = F*bits/2;                    // bytes of four r

    static_assert(X % 8 == 0, "rows of four r must be whole half tiles");

    // half tile of word group u, slot s, word j of a lane's pair
    static __device__ __forceinline__ constexpr int half_tile(int u, int s, int j) { return (u + n_u*s)*step + j; }

    // free index of half tile n
    static __device__ __forceinline__ constexpr int index(int n, int g) { return wide ? 16*(n/2) + 2*g + n%2 : 8*n + g; }

    // what a code of half tile n is multiplied with, times 2^24
    static __device__ __forceinline__ constexpr float unit(int n) {
        const int s = n/step/n_u;
        return 16777216.0f/(bits != 3 ? (float) (1 << s*bits) : s < 6 ? (float) (1 << s%2*3) : 32.0f);
    }
};

// acc[half tile][column] += codes of r = 16*ks .. 16*ks + 15 (k-step ks) times b, for word group u. codes: the tile's first byte.
template <int bits, int F, int N>
static __device__ __forceinline__ void kvarn_mma_codes(float (&acc)[N][2], const int u, const int first, const uint8_t * codes,
                                                       int ks, uint32_t b0, uint32_t b1, int g, int i) {
    using C = kvarn_codes<bits, F>;
    const uint8_t * p = codes + (4*ks + i)*C::row + (C::wide ? 64*u + 8*g : 32*u + 4*g);

    uint32_t w[bits == 3 ? 3 : 1][2];
#pragma unroll
    for (int plane = 0; plane < (bits == 3 ? 3 : 1); ++plane) {
        if (C::wide) {
            const uint2 v = *(const uint2 *) (p + plane*4*C::X);
            w[plane][0] = v.x;
            w[plane][1] = v.y;
        } else {
            w[plane][0] = *(const uint32_t *) (p + plane*4*C::X);
        }
    }
#pragma unroll
    for (int j = 0; j < C::step; ++j) {
        if (bits == 3) {
#pragma unroll
            for (int s = 0; s < 6; s += 2) {
                const uint32_t x = w[s/2 % (bits == 3 ? 3 : 1)][j], y = x >> 8;
                float (&l)[2] = acc[C::half_tile(u, s,     j) - first];
                float (&h)[2] = acc[C::half_tile(u, s + 1, j) - first];
                kvarn_mma(l[0], l[1], h[0], h[1], x & 0x00070007, x & 0x00380038, y & 0x00070007, y & 0x00380038, b0, b1);
            }
            const uint32_t A = w[0][j], B = w[bits == 3 ? 1 : 0][j], D = w[bits == 3 ? 2 : 0][j];
            const uint32_t x6 = (A & 0xc0c0c0c0) | (B >> 2 & 0x20202020);
            const uint32_t x7 = (B << 1 & 0x80808080) | (D >> 1 & 0x60606060);
            float (&l)[2] = acc[C::half_tile(u, 6, j) - first];
            float (&h)[2] = acc[C::half_tile(u, 7, j) - first];
            kvarn_mma(l[0], l[1], h[0], h[1], x6 & 0x00ff00ff, x7 & 0x00ff00ff, x6 >> 8 & 0x00ff00ff, x7 >> 8 & 0x00ff00ff, b0,
                    b1);
        } else {
            const uint32_t x = w[0][j], y = x >> 8, m = bits == 2 ? 0x00030003 : 0x000f000f;
#pragma unroll
            for (int s = 0; s < C::slots; s += 2) {
                float (&l)[2] = acc[C::half_tile(u, s,     j) - first];
                float (&h)[2] = acc[C::half_tile(u, s + 1, j) - first];
                kvarn_mma(l[0], l[1], h[0], h[1], x & m << s*bits, x & m << (s + 1)*bits, y & m << s*bits, y & m << (s + 1)*bits,
                        b0, b1);
            }
        }
    }
}
