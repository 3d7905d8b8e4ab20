// kvarn_codes.h - where the Metal kernels read the codes of a tile: words of a unit, and their numbers as halves.
// Included by kvarn.metal and kvarn_tiles.metal after metal_stdlib and kvarn-format.h.
//
// SPDX-License-Identifier: MIT
//
// A unit is what one lane contracts: 4 free indices f, with 4 contracted indices r at a time, 16 codes. F/4 units make a row.
// For every width the codes of a unit and four r are the bytes of one or two words a and b (3 bits: gathered from the planes):
//
//   bits   a, b                            f of s = 0 .. 3                                     bit of s in a byte
//   2      word u                          u, u + F/4, u + F/2, u + 3F/4                       a: 0 2 4 6
//   3      planes A, B of x  (u <  F/8)    x, x + F/8, .. 3F/8        x = u % (F/8)            a: 0 3     b: 0 3
//          plane C, slots 6 7 (u >= F/8)   x + 4F/8, .. 7F/8                                   the same
//   4      words 2u, 2u+1                  2u, 2u+1, 2u + F/2, 2u+1 + F/2                      a: 0 4     b: 0 4 (s = 0 2, 1 3)
//
// Byte k of a word belongs to r = 4R+k. Bytes 0 and 2 of a masked word are the mantissas of two f16 numbers: no table, no
// conversion. There are two ways, chosen by a function constant:
//
//   tiny 0   exponent 25 or-ed in, 1024 taken off: (code << bit)      AND, OR, and a subtraction per code; right everywhere
//   tiny 1   exponent 0, a subnormal: (code << bit)*2^-24             AND; right where f16 subnormals are not flushed to zero
//
// The factors 2^bit and 2^-24 are taken out of the sums, once per tile.

#ifndef KVARN_CODES_H
#define KVARN_CODES_H

// f of place s of unit u; bits 0: of f16 rows
static inline int kvarn_free(int bits, int F, int u, int s) {
    if (bits == 2) {
        return u + F/4*s;
    }
    if (bits == 3) {
        const int X = F/8;
        return u % X + X*(u/X*4 + s);
    }
    if (bits == 4) {
        return 2*u + s % 2 + F/2*(s/2);
    }
    return 4*u + s;
}

static inline float4 kvarn_weight(int bits, bool tiny) {
    const float one = tiny ? 16777216.0f : 1.0f;
    if (bits == 2) {
        return one*float4(1.0f, 0.25f, 0.0625f, 0.015625f);
    }
    return one*(bits == 3 ? float4(1.0f, 0.125f, 1.0f, 0.125f) : float4(1.0f, 1.0f, 0.0625f, 0.0625f));
}

static inline uint2 kvarn_words(int bits, int F, int u, int R, device const uint * codes) {
    if (bits == 2) {
        return uint2(codes[R*(F/4) + u], 0u);
    }
    if (bits == 4) {
        device const uint * row = codes + R*(F/2) + 2*u;
        return uint2(row[0], row[1]);
    }
    const int X = F/8;
    device const uint * plane = codes + R*(3*X) + u % X;
    const uint a = plane[0];
    const uint b = plane[X];
    const uint c = plane[2*X];
    const uint rest = (a >> 5 & 0x06060606u) | (b >> 7 & 0x01010101u) | (b >> 1 & 0x20202020u) | (c >> 3 & 0x18181818u);
    return u < X ? uint2(a, b) : uint2(c, rest);
}

static inline half2 kvarn_pair(bool tiny, uint w, uint mask) {
    if (tiny) {
        return as_type<half2>(w & mask);
    }
    return as_type<half2>((w & mask) | 0x64006400u) - half2(half(1024.0f));
}

// codes << bit of one unit and r = 4R .. 4R+3, over kvarn_weight(): code[k] holds the four f of r = 4R+k
static inline void kvarn_unpack(int bits, bool tiny, uint2 w, thread half4 * code) {
    const uint2 y = uint2(w.x >> 8, w.y >> 8);
    half2 even[4], odd[4];
    if (bits == 2) {
        even[0] = kvarn_pair(tiny, w.x, 0x00030003u); odd[0] = kvarn_pair(tiny, y.x, 0x00030003u);
        even[1] = kvarn_pair(tiny, w.x, 0x000c000cu); odd[1] = kvarn_pair(tiny, y.x, 0x000c000cu);
        even[2] = kvarn_pair(tiny, w.x, 0x00300030u); odd[2] = kvarn_pair(tiny, y.x, 0x00300030u);
        even[3] = kvarn_pair(tiny, w.x, 0x00c000c0u); odd[3] = kvarn_pair(tiny, y.x, 0x00c000c0u);
    } else if (bits == 3) {
        even[0] = kvarn_pair(tiny, w.x, 0x00070007u); odd[0] = kvarn_pair(tiny, y.x, 0x00070007u);
        even[1] = kvarn_pair(tiny, w.x, 0x00380038u); odd[1] = kvarn_pair(tiny, y.x, 0x00380038u);
        even[2] = kvarn_pair(tiny, w.y, 0x00070007u); odd[2] = kvarn_pair(tiny, y.y, 0x00070007u);
        even[3] = kvarn_pair(tiny, w.y, 0x00380038u); odd[3] = kvarn_pair(tiny, y.y, 0x00380038u);
    } else {
        even[0] = kvarn_pair(tiny, w.x, 0x000f000fu); odd[0] = kvarn_pair(tiny, y.x, 0x000f000fu);
        even[1] = kvarn_pair(tiny, w.y, 0x000f000fu); odd[1] = kvarn_pair(tiny, y.y, 0x000f000fu);
        even[2] = kvarn_pair(tiny, w.x, 0x00f000f0u); odd[2] = kvarn_pair(tiny, y.x, 0x00f000f0u);
        even[3] = kvarn_pair(tiny, w.y, 0x00f000f0u); odd[3] = kvarn_pair(tiny, y.y, 0x00f000f0u);
    }
    code[0] = half4(even[0].x, even[1].x, even[2].x, even[3].x);
    code[1] = half4(odd [0].x, odd [1].x, odd [2].x, odd [3].x);
    code[2] = half4(even[0].y, even[1].y, even[2].y, even[3].y);
    code[3] = half4(odd [0].y, odd [1].y, odd [2].y, odd [3].y);
}

#endif
