// kvarn-f16.h - f16 and back in plain C, on the bits: no instruction set, no library, vectorizes.
// Included by the C files of this folder; Metal and CUDA have the type.
//
// SPDX-License-Identifier: MIT

#ifndef KVARN_F16_H
#define KVARN_F16_H

#include <stdint.h>
#include <string.h>

#if defined(__GNUC__)
#define KVARN_INLINE static inline __attribute__((always_inline))
#else
#define KVARN_INLINE static inline
#endif

KVARN_INLINE uint32_t f32_bits(float v)          { uint32_t u; memcpy(&u, &v, sizeof(u)); return u; }
KVARN_INLINE float    bits_f32(uint32_t u)       { float v;    memcpy(&v, &u, sizeof(v)); return v; }

// nearest f16, ties to even; too large becomes the largest finite one
KVARN_INLINE uint32_t f16_bits(float v) {
    const uint32_t sign = f32_bits(v) >> 16 & 0x8000;
    const uint32_t u    = f32_bits(v) & 0x7fffffff;
    if (u >= 0x477ff000) {                                     // rounds to 65520 or more
        return sign | 0x7bff;
    }
    if (u < 0x38800000) {                                      // below 2^-14: adding 0.5 rounds at bit 2^-24
        return sign | (f32_bits(bits_f32(u) + 0.5f) - 0x3f000000);
    }
    return sign | (((u + 0xfff + (u >> 13 & 1)) >> 13) - (112 << 10));
}

// exact for all finite values; infinities and NaN become large finite ones
KVARN_INLINE float f16_value(uint32_t h) {
    const uint32_t sign = (h & 0x8000) << 16;
    const uint32_t tiny = f32_bits((float) (int) (h & 0x03ff)*0x1p-24f);
    return bits_f32(sign | (h & 0x7c00 ? ((h & 0x7fff) << 13) + (112u << 23) : tiny));
}

#endif
