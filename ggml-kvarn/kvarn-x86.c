// kvarn-x86.c - attention kernels and seal for AVX2, FMA, F16C: codes are multiplied as integers, once for all query vectors of a
// KV head. Compiled for these instructions by attribute, chosen at run time: works in a build for any x86-64.
//
// SPDX-License-Identifier: MIT
//
// v of kvarn-x86-attend.h has 16 bits; in the fast mode 8, at half the multiplications and 100 times the rounding error.

#include "kvarn-x86.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include <cpuid.h>

// Largest v. 16 bits: a code in place (see masks_of) is at most 240, and 240*16383*512 and 240*32767*128 fit in 32 bits.
enum { W = 8, KEY_MAX = 16383, VALUE_MAX = 32767, KEY_MAX_FAST = 127, VALUE_MAX_FAST = 255 };

#define V_TARGET __attribute__((target("avx2,fma,f16c")))
#define V_FN     static inline __attribute__((always_inline, target("avx2,fma,f16c")))

typedef __m256 vec;

V_FN vec  v_load(const float * p)     { return _mm256_loadu_ps(p); }
V_FN void v_store(float * p, vec v)   { _mm256_storeu_ps(p, v); }
V_FN vec  v_set(float x)              { return _mm256_set1_ps(x); }
V_FN vec  v_max(vec a, vec b)         { return _mm256_max_ps(a, b); }
V_FN vec  v_min(vec a, vec b)         { return _mm256_min_ps(a, b); }
V_FN vec  v_sqrt(vec a)               { return _mm256_sqrt_ps(a); }
V_FN vec  v_abs(vec a)                { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }

// x where a > b, else 0
V_FN vec v_above(vec a, vec b, vec x) { return _mm256_and_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ), x); }

V_FN vec  v_fma(vec a, vec b, vec c)  { return _mm256_fmadd_ps(a, b, c); }
V_FN vec  v_load_f16(const void * p)  { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) p)); }

// the first n floats, n < W
V_FN vec v_load_first(int n, const float * p) {
    float all[W] = { 0 };
    memcpy(all, p, (size_t) n*sizeof(float));
    return v_load(all);
}

V_FN void v_store_first(int n, float * p, vec v) {
    float all[W];
    v_store(all, v);
    memcpy(p, all, (size_t) n*sizeof(float));
}

// one bit per lane
V_FN unsigned v_differs(vec a, vec b) { return (unsigned) _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NEQ_UQ)); }

// exp(x), x <= 0, relative error below 3e-6; 0 below -87
V_FN vec v_exp(vec x) {
    const vec round = v_set(12582912.0f); // 1.5*2^23: what is added to it becomes an integer, in the lowest bits
    const vec place = v_fma(x, v_set(1.44269504f), round);
    const vec r     = v_fma(place - round, v_set(-0.693147182f), x);
    vec y = v_fma(v_set(0.0414583981f), r, v_set(0.167910308f));
    y = v_fma(y, r, v_set(0.500043690f));
    y = v_fma(y, r, v_set(0.999963343f));
    y = v_fma(y, r, v_set(0.999999285f));
    const __m256i n = _mm256_slli_epi32(_mm256_castps_si256(place), 23); // y*2^n
    return v_above(x, v_set(-87.0f), _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(y), n)));
}

// sums and maxima of four vectors
#define OF_FOUR(name, op)                                                                                       \
    V_FN __m128 name(const vec v[4]) {                                                                          \
        const vec a = op(_mm256_permute2f128_ps(v[0], v[1], 0x20), _mm256_permute2f128_ps(v[0], v[1], 0x31));   \
        const vec b = op(_mm256_permute2f128_ps(v[2], v[3], 0x20), _mm256_permute2f128_ps(v[2], v[3], 0x31));   \
        const vec x = op(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));                                   \
        const vec y = op(x, _mm256_permute_ps(x, 0x4e));                                                        \
        return _mm_unpacklo_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));                         \
    }
OF_FOUR(v_sum4, _mm256_add_ps)
OF_FOUR(v_max4, _mm256_max_ps)

// --- vectors of integers ---

// x[0..n)*inverse to integers; returns their sum, spread over lanes. Bytes in order, or 16-bit numbers with each four in the
// order 0 2 1 3, as dot_words wants them.
V_FN vec round_vector(const int fast, int n, const float * x, float inverse, int32_t * vectors) {
    const __m256i order = _mm256_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15,
                                           0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
    __m256i sum = _mm256_setzero_si256();
    for (int i = 0; i < n; i += 16) {
        const __m256i a = _mm256_cvtps_epi32(v_load(x + i)*v_set(inverse));
        const __m256i b = _mm256_cvtps_epi32(v_load(x + i + 8)*v_set(inverse));
        const __m256i c = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
        sum = _mm256_add_epi32(sum, _mm256_add_epi32(a, b));
        if (fast) { // values are in -127..255: the low bytes
            const __m256i low = _mm256_and_si256(c, _mm256_set1_epi16(0xff));
            _mm_storeu_si128((__m128i *) (vectors + i/4),
                             _mm_packus_epi16(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1)));
        } else {
            _mm256_storeu_si256((__m256i *) (vectors + i/2), _mm256_shuffle_epi8(c, order));
        }
    }
    return _mm256_cvtepi32_ps(sum);
}

// --- codes times vectors ---

// Slots 2*pass and 2*pass + 1 stay where they lie in the bytes of a word: mask[j] finds them, factor[j] undoes the place.
V_FN void masks_of(const int bits, const int pass, int mask[2], float factor[2]) {
    int place[2];
    places_of(bits, pass, place);
    EACH(j, 2) {
        mask  [j] = ((1 << bits) - 1) << place[j];
        factor[j] = 1.0f/(float) (1 << place[j]);
    }
}

// Eight words of the last pass of 3 bits: what the planes leave over,
//   bits 7..5 = A7 A6 B7 (slot 6), bits 4..2 = B6 C7 C6 (slot 7)
V_FN __m256i load_rest(const uint8_t * row, int X) {
    const __m256i a = _mm256_loadu_si256((const __m256i *) row);
    const __m256i b = _mm256_loadu_si256((const __m256i *) (row + 4*X));
    const __m256i c = _mm256_loadu_si256((const __m256i *) (row + 8*X));
    return _mm256_or_si256(_mm256_and_si256(a, _mm256_set1_epi8((char) 0xc0)),
           _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi32(b, 2), _mm256_set1_epi8(0x30)),
                           _mm256_and_si256(_mm256_srli_epi32(c, 4), _mm256_set1_epi8(0x0c))));
}

// c = the words at p, masked. In assembly: a load of its own would be one more instruction for the vector units, which take four
// per cycle and have nothing else to wait for.
#define MASK_WORDS(c, p, mask) __asm__("vpand %2, %1, %0" : "=x"(c) : "x"(mask), "m"(*(const __m256i_u *) (p)))

// a0 += c0*v and a1 += c1*v for one dword v of a vector. In assembly, because the loops around it need all 16 registers:
// compilers load ahead and give sums new registers until half of the accumulators live in memory.
//   multiply, add   vpmaddwd and vpaddd, or vpmaddubsw (its unsigned operand is the second of three in this syntax) and vpaddw
#define ADD_PRODUCTS(multiply, add, a0, a1, c0, c1, v)                                                              \
    do {                                                                                                            \
        __m256i b_, t_;                                                                                             \
        __asm__("vpbroadcastd %6, %2\n\t" multiply(%2, %4, %3) multiply(%2, %5, %2) add " %3, %0, %0\n\t"           \
                add " %2, %1, %1" : "+x"(a0), "+x"(a1), "=&x"(b_), "=&x"(t_) : "x"(c0), "x"(c1), "m"(v));           \
    } while (0)
#define WORDS(v, c, to)         "vpmaddwd "   #v ", " #c ", " #to "\n\t"
#define BYTES_KEYS(v, c, to)    "vpmaddubsw " #v ", " #c ", " #to "\n\t"
#define BYTES_VALUES(v, c, to)  "vpmaddubsw " #c ", " #v ", " #to "\n\t"

// Sums of products of nv vectors with the codes of eight words and two slots: acc[v][slot]. One word holds four contracted
// indices of one free one. 16 bits: bytes 0 and 2, then bytes 1 and 3 are multiplied as 16-bit numbers and added in pairs.
V_FN void dot_words(const int bits, const int pass, const int nv, int n_r, const uint8_t * at, int row_size, int X,
                    const uint8_t * ahead, const int32_t * vectors, __m256i acc[NV][2]) {
    const int is_rest = bits == 3 && pass == 3;
    int mask[2];
    float factor[2];
    masks_of(bits, pass, mask, factor);
    const __m256i m0 = _mm256_set1_epi16((short) mask[0]);
    const __m256i m1 = _mm256_set1_epi16((short) mask[1]);
    __m256i sum[NV][2]; // not acc itself: it would be stored in every round
    EACH(v, nv) {
        sum[v][0] = sum[v][1] = _mm256_setzero_si256();
    }
    for (int R = 0; R < n_r/4; ++R) {
        const uint8_t * row = at + R*row_size;
        __m256i c0, c1;
        fetch(N_FETCH(bits), R, ahead);
        const __m256i rest = is_rest ? load_rest(row, X) : m0;
        EACH(odd, 2) {
            if (is_rest) {
                const __m256i z = odd ? _mm256_srli_epi16(rest, 8) : rest;
                c0 = _mm256_and_si256(z, m0);
                c1 = _mm256_and_si256(z, m1);
            } else { // the odd bytes lie where the even ones are, seen from the next byte
                MASK_WORDS(c0, row + odd, m0);
                MASK_WORDS(c1, row + odd, m1);
            }
            EACH(v, nv) {
                ADD_PRODUCTS(WORDS, "vpaddd", sum[v][0], sum[v][1], c0, c1, vectors[v*n_r/2 + 2*R + odd]);
            }
        }
    }
    EACH(v, nv) {
        acc[v][0] = sum[v][0];
        acc[v][1] = sum[v][1];
    }
}

// The same for vectors of bytes: signed ones for keys, unsigned ones for values. Codes are moved down to bit 0, and sums of 16
// bits are widened before they can overflow: run groups of four r add up to 2*run*(largest code)*(largest byte) < 32768.
V_FN void dot_bytes(const int side, const int bits, const int pass, const int nv, int n_r, const uint8_t * at, int row_size,
                    int X, const uint8_t * ahead, const int32_t * vectors, __m256i acc[NV][2]) {
    const int run = (bits == 2 ? 32 : bits == 3 ? 16 : 8) >> (side == KVARN_VALUE);
    int place[2];
    places_of(bits, pass, place);
    const __m256i m = _mm256_set1_epi8((char) ((1 << bits) - 1));
    EACH(v, nv) {
        acc[v][0] = acc[v][1] = _mm256_setzero_si256();
    }
    for (int R0 = 0; R0 < n_r/4; R0 += run) {
        const int R1 = R0 + run < n_r/4 ? R0 + run : n_r/4;
        __m256i part[NV][2];
        EACH(v, nv) {
            part[v][0] = part[v][1] = _mm256_setzero_si256();
        }
        for (int R = R0; R < R1; ++R) {
            const uint8_t * row = at + R*row_size;
            fetch(N_FETCH(bits), R, ahead);
            const __m256i z  = bits == 3 && pass == 3 ? load_rest(row, X) : _mm256_loadu_si256((const __m256i *) row);
            const __m256i c0 = _mm256_and_si256(place[0] ? _mm256_srli_epi16(z, place[0]) : z, m);
            const __m256i c1 = _mm256_and_si256(_mm256_srli_epi16(z, place[1]), m);
            EACH(v, nv) {
                if (side == KVARN_KEY) {
                    ADD_PRODUCTS(BYTES_KEYS,   "vpaddw", part[v][0], part[v][1], c0, c1, vectors[v*n_r/4 + R]);
                } else {
                    ADD_PRODUCTS(BYTES_VALUES, "vpaddw", part[v][0], part[v][1], c0, c1, vectors[v*n_r/4 + R]);
                }
            }
        }
        EACH(v, nv) {
            acc[v][0] = _mm256_add_epi32(acc[v][0], _mm256_madd_epi16(part[v][0], _mm256_set1_epi16(1)));
            acc[v][1] = _mm256_add_epi32(acc[v][1], _mm256_madd_epi16(part[v][1], _mm256_set1_epi16(1)));
        }
    }
}

// what a pass leaves for the next one: nothing here
struct slots {
    int none;
};

// acc[v][slot]*factor[slot] = sums of products of nv vectors with the codes of W words and the two slots of a pass
V_FN void dot_codes(const int side, const int fast, const int bits, const int pass, const int nv, int n_r, const uint8_t * at,
                    int row_size, int X, const uint8_t * ahead, const int32_t * vectors, struct slots * others, vec acc[NV][2],
                    float factor[2]) {
    (void) others;
    int mask[2];
    __m256i sum[NV][2];
    masks_of(bits, pass, mask, factor);
    if (fast) {
        factor[0] = factor[1] = 1.0f;
        dot_bytes(side, bits, pass, nv, n_r, at, row_size, X, ahead, vectors, sum);
    } else {
        dot_words(bits, pass, nv, n_r, at, row_size, X, ahead, vectors, sum);
    }
    EACH(v, nv) {
        acc[v][0] = _mm256_cvtepi32_ps(sum[v][0]);
        acc[v][1] = _mm256_cvtepi32_ps(sum[v][1]);
    }
}

// --- for kvarn-x86-seal.h ---

// x where a >= b, else y
V_FN vec v_at_least(vec a, vec b, vec x, vec y) { return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_GE_OQ)); }

// NaN as 0, the rest clamped to what f16 holds
V_FN vec v_sanitized(vec v) {
    const __m256i bits = _mm256_castps_si256(v), sign = _mm256_set1_epi32(INT32_MIN);
    const __m256i u    = _mm256_andnot_si256(sign, bits);
    const __m256i a    = _mm256_andnot_si256(_mm256_cmpgt_epi32(u, _mm256_set1_epi32(0x7f800000)), u);
    return _mm256_castsi256_ps(_mm256_or_si256(_mm256_and_si256(bits, sign), _mm256_min_epi32(a, _mm256_set1_epi32(0x477fe000))));
}

// nearest f16; too large becomes the largest finite one
V_FN __m128i f16_of(vec v) {
    const vec max = _mm256_set1_ps(65504.0f);
    return _mm256_cvtps_ph(v_max(v_min(v, max), -max), _MM_FROUND_TO_NEAREST_INT);
}
V_FN vec  v_f16(vec v)                     { return _mm256_cvtph_ps(f16_of(v)); }
V_FN void v_store_f16(uint8_t * p, vec v)  { _mm_storeu_si128((__m128i *) p, f16_of(v)); }

struct coder {
    vec L, h;
};
V_FN struct coder v_coder(float L) { return (struct coder) { v_set(L), v_set(0.5f*L) }; }

// round(v), in 0 .. L, minus half of L
V_FN vec v_code(struct coder coder, vec v) {
    const vec round = v_set(12582912.0f); // 1.5*2^23
    return v_min(v_max(v, v_set(0.0f)), coder.L) + round - round - coder.h;
}

// sixteen codes to bytes
V_FN void v_bytes(const vec q[2], uint8_t * p) {
    const __m256i w = _mm256_packs_epi32(_mm256_cvttps_epi32(q[0]), _mm256_cvttps_epi32(q[1]));
    const __m256i o = _mm256_permute4x64_epi64(w, 0xd8);
    _mm_storeu_si128((__m128i *) p, _mm_packus_epi16(_mm256_castsi256_si128(o), _mm256_extracti128_si256(o, 1)));
}

// Sums of the sixteen lanes of four rows, twice: lanes j and j + 8, j and j + 4, j and j + 2, 0 and 1.
V_FN void v_sums(vec dots[2][4][2], __m128 * a, __m128 * b) {
    __m128 pair[2];
    EACH(m, 2) {
        vec four[2]; // lanes j + j + 4 of two rows
        EACH(i, 2) {
            const vec x = dots[i][2*m][0] + dots[i][2*m][1], y = dots[i][2*m + 1][0] + dots[i][2*m + 1][1];
            four[i] = _mm256_permute2f128_ps(x, y, 0x20) + _mm256_permute2f128_ps(x, y, 0x31);
        }
        const vec two = _mm256_unpacklo_ps(four[0], four[1]) + _mm256_unpackhi_ps(four[0], four[1]);
        const vec one = two + _mm256_permute_ps(two, 0x4e);
        pair[m] = _mm_unpacklo_ps(_mm256_castps256_ps128(one), _mm256_extractf128_ps(one, 1));
    }
    *a = _mm_movelh_ps(pair[0], pair[1]);
    *b = _mm_movehl_ps(pair[1], pair[0]);
}

#include "kvarn-x86-attend.h"
#include "kvarn-x86-seal.h"

// Not every compiler's __builtin_cpu_supports() knows this name. Asked once: inside a virtual machine CPUID takes microseconds.
static int has_f16c(void) {
    enum { UNKNOWN, NO, YES };
    static _Atomic int known = UNKNOWN;
    if (known == UNKNOWN) {
        unsigned a, b, c, d;
        known = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C) ? YES : NO;
    }
    return known == YES;
}

const struct kvarn_cpu_kernels * kvarn_cpu_avx2(int fast) {
    static const struct kvarn_cpu_kernels kernels[2] = {
        { "avx2",      score_tile,      score_rows, read_mask, mask, soften, value_tile,      value_rows, seal },
        { "avx2-fast", score_tile_fast, score_rows, read_mask, mask, soften, value_tile_fast, value_rows, seal },
    };
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c() ? &kernels[fast] : NULL;
}

#else

const struct kvarn_cpu_kernels * kvarn_cpu_avx2(int fast) { (void) fast; return 0; }

#endif
