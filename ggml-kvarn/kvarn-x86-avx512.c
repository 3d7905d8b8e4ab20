// kvarn-x86-avx512.c - attention kernels and seal for AVX-512 with VNNI: what kvarn-x86.c does, 64 bytes at a time.
// Compiled for these instructions by attribute, chosen at run time: works in a build for any x86-64.
//
// SPDX-License-Identifier: MIT
//
// v of kvarn-x86-attend.h has 16 bits, multiplied as two digits of 8: v = 256*high + low, both signed. A word of a tile is four
// unsigned bytes as it lies there, after one AND per slot; of the fast mode, too, which has one digit.

#include "kvarn-x86.h"

#if defined(__x86_64__) && defined(__GNUC__)

// Largest v. Two digits: high is -127 .. 127. One digit: signed for keys, unsigned for values.
// Sums fit in 32 bits: a code in place is at most 240.
enum { W = 16, KEY_MAX = 32639, VALUE_MAX = 32639, KEY_MAX_FAST = 127, VALUE_MAX_FAST = 255 };

#define ISA      "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c"
#define V_TARGET __attribute__((target(ISA)))
#define V_FN     static inline __attribute__((always_inline, target(ISA)))

typedef __m512 vec;

V_FN vec  v_load(const float * p)     { return _mm512_loadu_ps(p); }
V_FN void v_store(float * p, vec v)   { _mm512_storeu_ps(p, v); }
V_FN vec  v_set(float x)              { return _mm512_set1_ps(x); }
V_FN vec  v_max(vec a, vec b)         { return _mm512_max_ps(a, b); }
V_FN vec  v_min(vec a, vec b)         { return _mm512_min_ps(a, b); }
V_FN vec  v_sqrt(vec a)               { return _mm512_sqrt_ps(a); }
V_FN vec  v_abs(vec a)                { return _mm512_abs_ps(a); }

// x where a > b, else 0
V_FN vec v_above(vec a, vec b, vec x) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), x); }

V_FN vec  v_fma(vec a, vec b, vec c)  { return _mm512_fmadd_ps(a, b, c); }
V_FN vec  v_load_f16(const void * p)  { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) p)); }

// the first n floats, n < W
V_FN vec  v_load_first(int n, const float * p)        { return _mm512_maskz_loadu_ps((__mmask16) ((1 << n) - 1), p); }
V_FN void v_store_first(int n, float * p, vec v)      { _mm512_mask_storeu_ps(p, (__mmask16) ((1 << n) - 1), v); }

// one bit per lane
V_FN unsigned v_differs(vec a, vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_NEQ_UQ); }

// exp(x), x <= 0, relative error below 3e-6; 0 below -87. With t = x/log(2): 2^(t - floor(t)), a polynomial, times 2^floor(t)
V_FN vec v_exp(vec x) {
    const vec t = x*v_set(1.44269504f), r = _mm512_reduce_ps(t, 9); // 9: t - floor(t)
    vec y = v_fma(v_set(0.0135341678f), r, v_set(0.0520114601f));
    y = v_fma(y, r, v_set(0.241442755f));
    y = v_fma(y, r, v_set(0.693003833f));
    y = v_fma(y, r, v_set(1.00000262f));
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, v_set(-87.0f), _CMP_GT_OQ), y, t);
}

// sums and maxima of four vectors
#define OF_FOUR(name, op)                                                                                              \
    V_FN __m128 name(const vec v[4]) {                                                                                 \
        const vec a = op(_mm512_shuffle_f32x4(v[0], v[1], 0x44), _mm512_shuffle_f32x4(v[0], v[1], 0xee));              \
        const vec b = op(_mm512_shuffle_f32x4(v[2], v[3], 0x44), _mm512_shuffle_f32x4(v[2], v[3], 0xee));              \
        const vec x = op(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));                          \
        const vec y = op(x, _mm512_permute_ps(x, 0x4e));                                                               \
        const vec z = op(y, _mm512_permute_ps(y, 0xb1));                                                               \
        const __m512i first = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);                      \
        return _mm512_castps512_ps128(_mm512_permutexvar_ps(first, z));                                                \
    }
OF_FOUR(v_sum4, _mm512_add_ps)
OF_FOUR(v_max4, _mm512_max_ps)

// --- vectors of integers ---

// x[0..n)*inverse to integers v; returns their sum, spread over lanes. One digit: bytes in order. Two: n bytes of v's low digits,
// n of its high ones. v + 128 has the high digit as its high byte, and the low digit, plus 128, as its low byte.
V_FN vec round_vector(const int fast, int n, const float * x, float inverse, int32_t * vectors) {
    const vec scale = v_set(inverse), half = v_set(128.0f);
    __m512i sum = _mm512_setzero_si512();
    if (fast) {
        for (int i = 0; i < n; i += 16) {
            const __m512i v = _mm512_cvtps_epi32(v_load(x + i)*scale);
            sum = _mm512_add_epi32(sum, v);
            _mm_storeu_si128((__m128i *) (vectors + i/4), _mm512_cvtepi32_epi8(v));
        }
        return _mm512_cvtepi32_ps(sum);
    }
    // of 32 numbers, packed: 16 bytes hold numbers 4k .. 4k + 3 and 16 + 4k .. 16 + 4k + 3
    const __m512i bytes = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i flip  = _mm512_broadcast_i32x4(_mm_setr_epi32((int) 0x80808080, (int) 0x80808080, 0, 0));
    uint8_t * low = (uint8_t *) vectors, * high = low + n;
    for (int i = 0; i < n; i += 32) {
        const int is_whole = i + 32 <= n;
        const __m512i a = _mm512_cvtps_epi32(v_fma(v_load(x + i), scale, half));
        const __m512i b = is_whole ? _mm512_cvtps_epi32(v_fma(v_load(x + i + 16), scale, half)) : _mm512_setzero_si512();
        sum = _mm512_add_epi32(sum, _mm512_add_epi32(a, b));
        const __m512i c = _mm512_xor_si512(_mm512_shuffle_epi8(_mm512_packs_epi32(a, b), bytes), flip);
        const __m512i d = _mm512_permutexvar_epi32(order, c);
        if (is_whole) {
            _mm256_storeu_si256((__m256i *) (low  + i), _mm512_castsi512_si256(d));
            _mm256_storeu_si256((__m256i *) (high + i), _mm512_extracti64x4_epi64(d, 1));
        } else {
            _mm_storeu_si128((__m128i *) (low  + i), _mm512_castsi512_si128(d));
            _mm_storeu_si128((__m128i *) (high + i), _mm512_extracti32x4_epi32(d, 2));
        }
    }
    return _mm512_cvtepi32_ps(sum) - v_set(128.0f*(float) n/W);
}

// --- codes times vectors ---

// Sixteen words with the two slots of a pass: those of the tile, or with 3 bits in the last pass what the planes leave over:
//   bits 7..5 = A7 A6 B7 (slot 6), bits 4..2 = B6 C7 C6 (slot 7)
V_FN __m512i load_words(const int bits, const int pass, const uint8_t * row, int X) {
    const __m512i a = _mm512_loadu_si512(row);
    if (bits != 3 || pass < 3) {
        return a;
    }
    const __m512i b = _mm512_loadu_si512(row + 4*X);
    const __m512i c = _mm512_loadu_si512(row + 8*X);
    return _mm512_or_si512(_mm512_and_si512(a, _mm512_set1_epi8((char) 0xc0)),
           _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi32(b, 2), _mm512_set1_epi8(0x30)),
                           _mm512_and_si512(_mm512_srli_epi32(c, 4), _mm512_set1_epi8(0x0c))));
}

// sum += a*b, in assembly so that it stays in its register: with intrinsics compilers copy every second sum around.
#define ADD_PRODUCTS(sum, a, b) __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b))

// what a pass leaves for the next one: the sums of its slots, in place
struct slots {
    __m512i sum[NV][2];
};

// acc[v][slot]*factor[slot] = sums of products of nv vectors with the codes of W words and the two slots of a pass
V_FN void dot_codes(const int side, const int fast, const int bits, const int pass, const int nv, int n_r, const uint8_t * at,
                    int row_size, int X, const uint8_t * ahead, const int32_t * vectors, struct slots * others, vec acc[NV][2],
                    float factor[2]) {
    const int n_digits   = fast ? 1 : 2;
    const int is_swapped = fast && side == KVARN_VALUE; // the vector is the unsigned operand, a code must not reach bit 7
    // The last slot of a word needs no mask: the whole word's sum minus the sums of its other slots. Where a word has four slots,
    // the first pass leaves its sums for the second.
    const int is_left = !fast && bits != 3 && pass == 4/bits - 1;
    int place[2], down[2];
    __m512i mask[2];
    places_of(bits, pass, place);
    EACH(j, 2) {
        down  [j] = is_swapped && place[j] + bits > 7 ? place[j] + bits - 7 : 0;
        mask  [j] = _mm512_set1_epi8((char) (((1 << bits) - 1) << (place[j] - down[j])));
        factor[j] = 1.0f/(float) (1 << (place[j] - down[j]));
    }
    __m512i sum[NV][2][2];
    EACH(v, nv) {
        EACH(i, n_digits) {
            sum[v][i][0] = sum[v][i][1] = _mm512_setzero_si512();
        }
    }
    for (int R4 = 0; R4 < n_r/4; R4 += 4) {
        fetch(N_FETCH(bits), R4, ahead);
        EACH(u, 4) {
            const int R = R4 + u;
            const __m512i z  = load_words(bits, pass, at + R*row_size, X);
            const __m512i c0 = _mm512_and_si512(down[0] ? _mm512_srli_epi16(z, (unsigned) down[0]) : z, mask[0]);
            const __m512i c1 = is_left ? z : _mm512_and_si512(down[1] ? _mm512_srli_epi16(z, (unsigned) down[1]) : z, mask[1]);
            EACH(v, nv) {
                EACH(i, n_digits) {
                    const __m512i b = _mm512_set1_epi32(vectors[(v*n_digits + i)*(n_r/4) + R]);
                    if (is_swapped) {
                        ADD_PRODUCTS(sum[v][i][0], b, c0);
                        ADD_PRODUCTS(sum[v][i][1], b, c1);
                    } else {
                        ADD_PRODUCTS(sum[v][i][0], c0, b);
                        ADD_PRODUCTS(sum[v][i][1], c1, b);
                    }
                }
            }
        }
    }
    EACH(v, nv) {
        EACH(i, n_digits) {
            if (is_left) {
                sum[v][i][1] = _mm512_sub_epi32(sum[v][i][1], sum[v][i][0]);
                if (pass > 0) {
                    sum[v][i][1] = _mm512_sub_epi32(sum[v][i][1], others->sum[v][i]);
                }
            } else {
                others->sum[v][i] = _mm512_add_epi32(sum[v][i][0], sum[v][i][1]);
            }
        }
        EACH(j, 2) {
            acc[v][j] = _mm512_cvtepi32_ps(sum[v][0][j]);
            if (!fast) {
                acc[v][j] = v_fma(_mm512_cvtepi32_ps(sum[v][1][j]), v_set(256.0f), acc[v][j]);
            }
        }
    }
}

// --- for kvarn-x86-seal.h ---

// x where a >= b, else y
V_FN vec v_at_least(vec a, vec b, vec x, vec y) { return _mm512_mask_mov_ps(y, _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ), x); }

// NaN as 0, the rest clamped to what f16 holds
V_FN vec v_sanitized(vec v) {
    const __m512i bits = _mm512_castps_si512(v), size = _mm512_set1_epi32(INT32_MAX);
    const __m512i u    = _mm512_and_si512(bits, size);
    const __mmask16 is_number = _mm512_cmple_epi32_mask(u, _mm512_set1_epi32(0x7f800000));
    const __m512i a    = _mm512_maskz_min_epi32(is_number, u, _mm512_set1_epi32(0x477fe000));
    return _mm512_castsi512_ps(_mm512_or_si512(_mm512_andnot_si512(size, bits), a));
}

// nearest f16; too large becomes the largest finite one
V_FN __m256i f16_of(vec v) {
    const vec max = _mm512_set1_ps(65504.0f);
    return _mm512_cvtps_ph(v_max(v_min(v, max), -max), _MM_FROUND_TO_NEAREST_INT);
}
V_FN vec  v_f16(vec v)                     { return _mm512_cvtph_ps(f16_of(v)); }
V_FN void v_store_f16(uint8_t * p, vec v)  { _mm256_storeu_si256((__m256i *) p, f16_of(v)); }

struct coder {
    vec low, high;
};

// What round(v) & 31 stands for, from 0 to 15 and from -16 to -1: the nearest code minus half of L.
V_FN struct coder v_coder(float L) {
    const vec i = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return (struct coder) { v_min(i, v_set(L)) - v_set(0.5f*L), v_set(-0.5f*L) };
}

// round(v), in 0 .. L, minus half of L. Clamped to -15 .. 15, then the lowest bits of v + 1.5*2^23 are round(v).
V_FN vec v_code(struct coder coder, vec v) {
    const vec small = _mm512_range_ps(v, v_set(15.0f), 2); // the smaller magnitude, with the sign of v
    return _mm512_permutex2var_ps(coder.low, _mm512_castps_si512(small + v_set(12582912.0f)), coder.high);
}

// sixteen codes to bytes
V_FN void v_bytes(const vec q[1], uint8_t * p) {
    _mm_storeu_si128((__m128i *) p, _mm512_cvtepi32_epi8(_mm512_cvttps_epi32(q[0])));
}

// Sums of the sixteen lanes of four rows, twice: lanes j and j + 8, j and j + 4, j and j + 2, 0 and 1.
V_FN void v_sums(vec dots[2][4][1], __m128 * a, __m128 * b) {
    vec four[2]; // lanes j + j + 4 of four rows
    EACH(i, 2) {
        vec eight[2];
        EACH(m, 2) {
            const vec x = dots[i][2*m][0], y = dots[i][2*m + 1][0];
            eight[m] = _mm512_shuffle_f32x4(x, y, 0x44) + _mm512_shuffle_f32x4(x, y, 0xee);
        }
        four[i] = _mm512_shuffle_f32x4(eight[0], eight[1], 0x88) + _mm512_shuffle_f32x4(eight[0], eight[1], 0xdd);
    }
    const vec two = _mm512_unpacklo_ps(four[0], four[1]) + _mm512_unpackhi_ps(four[0], four[1]);
    const vec one = two + _mm512_permute_ps(two, 0x4e);
    const vec all = _mm512_permutexvar_ps(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 0, 0, 0, 0, 0, 0, 0, 0), one);
    *a = _mm512_castps512_ps128(all);
    *b = _mm512_extractf32x4_ps(all, 1);
}

#include "kvarn-x86-attend.h"
#include "kvarn-x86-seal.h"

const struct kvarn_cpu_kernels * kvarn_cpu_avx512(int fast) {
    static const struct kvarn_cpu_kernels kernels[2] = {
        { "avx512",      score_tile,      score_rows, read_mask, mask, soften, value_tile,      value_rows, seal },
        { "avx512-fast", score_tile_fast, score_rows, read_mask, mask, soften, value_tile_fast, value_rows, seal },
    };
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") ? &kernels[fast] : 0;
}

#else

const struct kvarn_cpu_kernels * kvarn_cpu_avx512(int fast) { (void) fast; return 0; }

#endif
