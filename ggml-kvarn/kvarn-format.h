// kvarn-format.h - the KVarN tile, byte by byte. This is the only place the layout is written down.
// Read by C, C++, CUDA and Metal: constants and integer arithmetic only. No #include, no pointers, no loads.
//
// SPDX-License-Identifier: MIT
//
//   D  channels of one head, D % 16 == 0, 16 <= D <= 512         d  channel, 0 .. D-1
//   G  tokens of one tile (a group), always 128                  t  token inside the tile, 0 .. G-1
//   H  KV heads                                                  N  tokens
//
// A tile holds G tokens x D channels of one KV head, keys or values:
//
//   0              C           C+2D         C+4D         C+4D+2G
//   | codes        | scale[D]  | zero[D]    | token[G]   |           C = D*G*bits/8; scale, zero, token are f16
//
//   x[t][d] = (code(t,d)*scale[d] + zero[d])*token[t]                token[t] is finite and >= 0
//
// Codes lie in the order in which attention contracts them. r is the contracted index, f the free one:
//
//   keys    r = d, f = t, F = G         scores = sum over channels, one result per token
//   values  r = t, f = d, F = D         output = sum over tokens, one result per channel
//
// One 32-bit word holds 4 consecutive r of one f, one per byte; the fields inside a byte are different f,
// X words apart. All X words of one group of four r come first, then the next four r. With bits = 2, F = 128, X = 32:
//
//   codes of r = 4R .. 4R+3: 128 bytes              one word x                one byte (r = 4R+k)
//   +-----+-----+-----+-- .. --+------+     +----+----+----+----+     bit  7 6   5 4   3 2   1 0
//   | x=0 | x=1 | x=2 |        | x=31 |     |4R+0|4R+1|4R+2|4R+3|     f   x+96  x+64  x+32  x
//   +-----+-----+-----+-- .. --+------+     +----+----+----+----+
//
// With 3 bits, X = F/8, and four r take three planes A, B, C of X words each. Slot s = f/X:
//
//   slot 0 1   bits 2..0 and 5..3 of A      slot 2 3   the same of B      slot 4 5   the same of C
//   slot 6     A7 A6 B7 (high to low)       slot 7     B6 C7 C6
//
// FORMAT.md draws the same for every width; a test prints those drawings from kvarn_code_bit() below.

#ifndef KVARN_FORMAT_H
#define KVARN_FORMAT_H

#if defined(__CUDACC__)
#define KVARN_FN static __host__ __device__ __forceinline__
#elif defined(__METAL_VERSION__)
#define KVARN_FN static inline
#else
#define KVARN_FN static inline
#endif

#define KVARN_FORMAT_VERSION 1    // bump when any stored byte changes meaning
#define KVARN_G              128  // tokens per tile
#define KVARN_D_MAX          512  // channels per head, at most
#define KVARN_D_STEP         16   // channels per head are a multiple of this
#define KVARN_KEY            0    // side of a tile: keys
#define KVARN_VALUE          1    // side of a tile: values

// 1 if a tile of this shape exists
KVARN_FN int kvarn_is_valid(int D, int bits) {
    return bits >= 2 && bits <= 4 && D >= KVARN_D_STEP && D <= KVARN_D_MAX && D % KVARN_D_STEP == 0;
}

// byte offsets inside a tile, and its size (a multiple of 64)
KVARN_FN int kvarn_codes_size(int D, int bits) { return D*KVARN_G*bits/8; }
KVARN_FN int kvarn_scale_off (int D, int bits) { return kvarn_codes_size(D, bits); }
KVARN_FN int kvarn_zero_off  (int D, int bits) { return kvarn_codes_size(D, bits) + 2*D; }
KVARN_FN int kvarn_token_off (int D, int bits) { return kvarn_codes_size(D, bits) + 4*D; }
KVARN_FN int kvarn_tile_size (int D, int bits) { return kvarn_codes_size(D, bits) + 4*D + 2*KVARN_G; }

// where bit i (0 = lowest) of the code of contracted index r and free index f lies: bit offset from the tile's first byte
//   F  number of free elements: KVARN_G for keys, D for values
KVARN_FN int kvarn_code_bit(int bits, int F, int r, int f, int i) {
    const int X = bits == 3 ? F/8 : F*bits/8;            // words per row of four r (per plane with 3 bits)
    const int x = f % X;
    const int s = f / X;                                 // slot
    const int k = r % 4;                                 // byte inside the word
    if (bits != 3) {
        return ((r/4*X + x)*4 + k)*8 + s*bits + i;
    }
    const int j     = (s - 6)*3 + 2 - i;                 // slots 6, 7: place among A7 A6 B7 B6 C7 C6
    const int plane = s < 6 ? s/2       : j/2;
    const int bit   = s < 6 ? s%2*3 + i : 7 - j%2;
    return (((r/4*3 + plane)*X + x)*4 + k)*8 + bit;
}

#endif
