// kvarn-x86.c - attention kernels for AVX2, FMA, F16C: codes are multiplied as integers, once for all query vectors of a KV head.
// Compiled for these instructions by attribute, chosen at run time: works in a build for any x86-64.
//
// SPDX-License-Identifier: MIT
//
// Keys.    v[d] = q[d]*scale[d] rounded to a multiple of step:
//              s[t] = token[t]*(step*sum_d v[d]*code(t,d) + base)
// Values.  v[t] = p[t]*token[t] rounded likewise:
//              o[d] += scale[d]*(step*sum_t v[t]*code(t,d) + base) + zero[d]*sum_t p[t]*token[t]
// The rounding of v would be multiplied by the mean code; base takes that part from the exact sums instead:
//              base = mid*(sum exact - step*sum v) [+ sum_d q[d]*zero[d]],   mid = half of the largest code
//
// v has 16 bits; in the fast mode 8, at half the multiplications and 100 times the rounding error.

#include "kvarn-cpu.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include <cpuid.h>
#include <immintrin.h>
#include <string.h>

#define G     KVARN_G
#define D_MAX KVARN_D_MAX
#define NV    4 // vectors multiplied at a time

#define NEAREST (_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)

// Largest v. 16 bits: a code in place (see masks_of) is at most 240, and 240*16383*512 and 240*32767*128 fit in 32 bits.
enum { KEY_MAX = 16383, VALUE_MAX = 32767, KEY_MAX_FAST = 127, VALUE_MAX_FAST = 255 };

#define AVX2        __attribute__((target("avx2,fma,f16c")))
#define AVX2_INLINE static inline __attribute__((always_inline, target("avx2,fma,f16c")))

AVX2_INLINE float sum_of(__m256 v) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}

AVX2_INLINE float max_of(__m256 v) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

AVX2_INLINE int sum_of_int(__m256i v) {
    __m128i x = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    x = _mm_add_epi32(x, _mm_shuffle_epi32(x, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(x, _mm_shuffle_epi32(x, 0xb1)));
}

AVX2_INLINE __m256 load_f16(const void * p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) p)); }

// --- vectors of integers ---

// Sixteen i32 to memory: bytes in order, or 16-bit numbers with each four in the order 0 2 1 3, as dot_codes wants them.
AVX2_INLINE void store_vector(const int fast, int32_t * vec, int i, __m256i a, __m256i b) {
    const __m256i c = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
    if (fast) { // values are in -127..255: the low bytes
        const __m256i low = _mm256_and_si256(c, _mm256_set1_epi16(0xff));
        _mm_storeu_si128((__m128i *) ((uint8_t *) vec + i),
                         _mm_packus_epi16(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1)));
    } else {
        const __m256i order = _mm256_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15,
                                               0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
        _mm256_storeu_si256((__m256i *) ((uint8_t *) vec + 2*i), _mm256_shuffle_epi8(c, order));
    }
}

// x[0..n) rounded to multiples of *step, the largest of which is v_max; returns the sum of the multiples
AVX2_INLINE int round_vector(const int fast, int n, float v_max, const float * x, float max, int32_t * vec, float * step) {
    const __m256 inv = _mm256_set1_ps(max > 0.0f ? v_max/max : 0.0f);
    __m256i sum = _mm256_setzero_si256();
    for (int i = 0; i < n; i += 16) {
        const __m256i a = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i),     inv));
        const __m256i b = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i + 8), inv));
        sum = _mm256_add_epi32(sum, _mm256_add_epi32(a, b));
        store_vector(fast, vec, i, a, b);
    }
    *step = max/v_max;
    return sum_of_int(sum);
}

// --- codes times vectors ---

// What one vector's sum of products is turned into: see the head of this file.
struct fold {
    float step, base;
    float sum; // values: sum_t p[t]*token[t]
};

// Slots 2*pass and 2*pass + 1 stay where they lie in the bytes of a word: mask[j] finds them, factor[j] undoes the place.
AVX2_INLINE void masks_of(const int bits, const int pass, int mask[2], float factor[2]) {
    const int at0 = bits == 2 ? 4*pass : bits == 4 ? 0 : pass < 3 ? 0 : 5;
    const int at1 = bits == 2 ? at0 + 2 : bits == 4 ? 4 : pass < 3 ? 3 : 2;
    mask  [0] = ((1 << bits) - 1) << at0;
    mask  [1] = ((1 << bits) - 1) << at1;
    factor[0] = 1.0f/(float) (1 << at0);
    factor[1] = 1.0f/(float) (1 << at1);
}

// Eight words with the two slots of a pass: those of the tile, or with 3 bits in the last pass what the planes leave over:
//   bits 7..5 = A7 A6 B7 (slot 6), bits 4..2 = B6 C7 C6 (slot 7)
AVX2_INLINE __m256i load_words(const int bits, const int pass, const uint8_t * row, int X) {
    const __m256i a = _mm256_loadu_si256((const __m256i *) row);
    if (bits != 3 || pass < 3) {
        return a;
    }
    const __m256i b = _mm256_loadu_si256((const __m256i *) (row + 4*X));
    const __m256i c = _mm256_loadu_si256((const __m256i *) (row + 8*X));
    return _mm256_or_si256(_mm256_and_si256(a, _mm256_set1_epi8((char) 0xc0)),
           _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi32(b, 2), _mm256_set1_epi8(0x30)),
                           _mm256_and_si256(_mm256_srli_epi32(c, 4), _mm256_set1_epi8(0x0c))));
}

// a0 += c0*v and a1 += c1*v for one dword v of a vector. In assembly, because the loops around it need all 16 registers:
// compilers load ahead and give sums new registers until half of the accumulators live in memory.
//   multiply, add   vpmaddwd and vpaddd, or vpmaddubsw (its unsigned operand is the second of three in this syntax) and vpaddw
#define ADD_PRODUCTS(multiply, add, a0, a1, c0, c1, v)                                                              \
    do {                                                                                                            \
        __m256i b_, t_;                                                                                             \
        __asm__("vpbroadcastd %6, %2\n\t" multiply(%2, %4, %3) add " %3, %0, %0\n\t" multiply(%2, %5, %2)           \
                add " %2, %1, %1" : "+x"(a0), "+x"(a1), "=&x"(b_), "=&x"(t_) : "x"(c0), "x"(c1), "m"(v));           \
    } while (0)
#define WORDS(v, c, to)         "vpmaddwd "   #v ", " #c ", " #to "\n\t"
#define BYTES_KEYS(v, c, to)    "vpmaddubsw " #v ", " #c ", " #to "\n\t"
#define BYTES_VALUES(v, c, to)  "vpmaddubsw " #c ", " #v ", " #to "\n\t"

// Sums of products of nv vectors with the codes of eight words and two slots: acc[v][slot]. One word holds four contracted
// indices of one free one. 16 bits: bytes 0 and 2, then bytes 1 and 3 are multiplied as 16-bit numbers and added in pairs.
AVX2_INLINE void dot_codes(const int bits, const int pass, const int nv, int n_r, const uint8_t * at, int row_size, int X,
                           const uint8_t * ahead, const int32_t * vec, __m256i acc[NV][2]) {
    int mask[2];
    float factor[2];
    masks_of(bits, pass, mask, factor);
    const __m256i m0 = _mm256_set1_epi16((short) mask[0]);
    const __m256i m1 = _mm256_set1_epi16((short) mask[1]);
    __m256i sum[NV][2]; // not acc itself: it would be stored in every round
    for (int v = 0; v < nv; ++v) {
        sum[v][0] = sum[v][1] = _mm256_setzero_si256();
    }
    for (int R = 0; R < n_r/4; ++R) {
        _mm_prefetch((const char *) ahead + R*row_size, _MM_HINT_T1);
        const __m256i even = load_words(bits, pass, at + R*row_size, X);
        const __m256i e0 = _mm256_and_si256(even, m0);
        const __m256i e1 = _mm256_and_si256(even, m1);
        for (int v = 0; v < nv; ++v) {
            ADD_PRODUCTS(WORDS, "vpaddd", sum[v][0], sum[v][1], e0, e1, vec[v*n_r/2 + 2*R]);
        }
        const __m256i odd = _mm256_srli_epi16(even, 8);
        const __m256i o0  = _mm256_and_si256(odd, m0);
        const __m256i o1  = _mm256_and_si256(odd, m1);
        for (int v = 0; v < nv; ++v) {
            ADD_PRODUCTS(WORDS, "vpaddd", sum[v][0], sum[v][1], o0, o1, vec[v*n_r/2 + 2*R + 1]);
        }
    }
    for (int v = 0; v < nv; ++v) {
        acc[v][0] = sum[v][0];
        acc[v][1] = sum[v][1];
    }
}

// The same for vectors of bytes: signed ones for keys, unsigned ones for values. Codes are moved down to bit 0, and sums of 16
// bits are widened before they can overflow: run groups of four r add up to 2*run*(largest code)*(largest byte) < 32768.
AVX2_INLINE void dot_codes_fast(const int side, const int bits, const int pass, const int nv, int n_r, const uint8_t * at,
                                int row_size,
                                int X, const uint8_t * ahead, const int32_t * vec, __m256i acc[NV][2]) {
    const int run = (bits == 2 ? 32 : bits == 3 ? 16 : 8) >> (side == KVARN_VALUE);
    const int at0 = bits == 2 ? 4*pass : bits == 4 ? 0 : pass < 3 ? 0 : 5;
    const int at1 = bits == 2 ? at0 + 2 : bits == 4 ? 4 : pass < 3 ? 3 : 2;
    const __m256i m = _mm256_set1_epi8((char) ((1 << bits) - 1));
    for (int v = 0; v < nv; ++v) {
        acc[v][0] = acc[v][1] = _mm256_setzero_si256();
    }
    for (int R0 = 0; R0 < n_r/4; R0 += run) {
        const int R1 = R0 + run < n_r/4 ? R0 + run : n_r/4;
        __m256i part[NV][2];
        for (int v = 0; v < nv; ++v) {
            part[v][0] = part[v][1] = _mm256_setzero_si256();
        }
        for (int R = R0; R < R1; ++R) {
            _mm_prefetch((const char *) ahead + R*row_size, _MM_HINT_T1);
            const __m256i z  = load_words(bits, pass, at + R*row_size, X);
            const __m256i c0 = _mm256_and_si256(at0 ? _mm256_srli_epi16(z, at0) : z, m);
            const __m256i c1 = _mm256_and_si256(_mm256_srli_epi16(z, at1), m);
            for (int v = 0; v < nv; ++v) {
                if (side == KVARN_KEY) {
                    ADD_PRODUCTS(BYTES_KEYS,   "vpaddw", part[v][0], part[v][1], c0, c1, vec[v*n_r/4 + R]);
                } else {
                    ADD_PRODUCTS(BYTES_VALUES, "vpaddw", part[v][0], part[v][1], c0, c1, vec[v*n_r/4 + R]);
                }
            }
        }
        for (int v = 0; v < nv; ++v) {
            acc[v][0] = _mm256_add_epi32(acc[v][0], _mm256_madd_epi16(part[v][0], _mm256_set1_epi16(1)));
            acc[v][1] = _mm256_add_epi32(acc[v][1], _mm256_madd_epi16(part[v][1], _mm256_set1_epi16(1)));
        }
    }
}

// Keys: out f32 [nv][G] is written. Values: out f32 [nv][D] is added to. A strip of eight words and two slots at a time.
// The last strip may read past its row, at most to the tile's end, and past out's row: that is not stored.
AVX2_INLINE void fold_tile(const int side, const int fast, const int bits, const int nv, int D, const uint8_t * tile,
                           const uint8_t * next, const int32_t * vec, const struct fold * fold, float * out) {
    const int F        = side == KVARN_KEY ? G : D;
    const int n_r      = side == KVARN_KEY ? D : G;
    const int X        = bits == 3 ? F/8 : F*bits/8;
    const int row_size = bits == 3 ? 12*X : 4*X;
    for (int pass = 0; pass < (bits == 3 ? 4 : 4/bits); ++pass) {
        float factor[2];
        int   mask  [2];
        masks_of(bits, pass, mask, factor);
        for (int x = 0; x < X; x += 8) {
            const int plane = bits == 3 && pass < 3 ? 4*pass*X : 0;
            const int is_new_line = x % 16 == 0 && (pass == 0 || (bits == 3 && pass < 3));
            const uint8_t * ahead = (is_new_line ? next : tile) + plane + 4*x;
            __m256i acc[NV][2];
            if (fast) {
                dot_codes_fast(side, bits, pass, nv, n_r, tile + plane + 4*x, row_size, X, ahead, vec, acc);
            } else {
                dot_codes(bits, pass, nv, n_r, tile + plane + 4*x, row_size, X, ahead, vec, acc);
            }
            for (int j = 0; j < 2; ++j) {
                const int f = (2*pass + j)*X + x;
                const __m256 token = side == KVARN_KEY   ? load_f16(tile + kvarn_token_off(D, bits) + 2*f) : _mm256_setzero_ps();
                const __m256 scale = side == KVARN_VALUE ? load_f16(tile + kvarn_scale_off(D, bits) + 2*f) : _mm256_setzero_ps();
                const __m256 zero  = side == KVARN_VALUE ? load_f16(tile + kvarn_zero_off (D, bits) + 2*f) : _mm256_setzero_ps();
                for (int v = 0; v < nv; ++v) {
                    const __m256 step = _mm256_set1_ps(fast ? fold[v].step : fold[v].step*factor[j]);
                    const __m256 y = _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc[v][j]), step, _mm256_set1_ps(fold[v].base));
                    float * o = out + v*F + f;
                    if (side == KVARN_KEY) {
                        _mm256_storeu_ps(o, _mm256_mul_ps(y, token));
                        continue;
                    }
                    const __m256 z = _mm256_fmadd_ps(y, scale, _mm256_mul_ps(zero, _mm256_set1_ps(fold[v].sum)));
                    if (x + 8 <= X) {
                        _mm256_storeu_ps(o, _mm256_add_ps(_mm256_loadu_ps(o), z));
                    } else {
                        float all[8];
                        _mm256_storeu_ps(all, z);
                        for (int k = 0; k < X - x; ++k) {
                            o[k] += all[k];
                        }
                    }
                }
            }
        }
    }
}

AVX2_INLINE void fold_vectors(const int side, const int fast, const int bits, int nv, int D, const uint8_t * tile,
                              const uint8_t * next, const int32_t * vec, const struct fold * fold, float * out) {
    switch (nv) {
        case 1:  fold_tile(side, fast, bits, 1, D, tile, next, vec, fold, out); break;
        case 2:  fold_tile(side, fast, bits, 2, D, tile, next, vec, fold, out); break;
        case 3:  fold_tile(side, fast, bits, 3, D, tile, next, vec, fold, out); break;
        default: fold_tile(side, fast, bits, 4, D, tile, next, vec, fold, out); break;
    }
}

AVX2_INLINE void fold_any(const int side, const int fast, int bits, int nv, int D, const uint8_t * tile,
                          const uint8_t * next, const int32_t * vec, const struct fold * fold, float * out) {
    switch (bits) {
        case 2:  fold_vectors(side, fast, 2, nv, D, tile, next, vec, fold, out); break;
        case 3:  fold_vectors(side, fast, 3, nv, D, tile, next, vec, fold, out); break;
        default: fold_vectors(side, fast, 4, nv, D, tile, next, vec, fold, out); break;
    }
}

// the lines behind the codes
AVX2_INLINE void prefetch_factors(int bits, int D, const uint8_t * next) {
    for (int i = kvarn_scale_off(D, bits); i < kvarn_tile_size(D, bits); i += 64) {
        _mm_prefetch((const char *) next + i, _MM_HINT_T1);
    }
}

AVX2_INLINE void score_codes(const int fast, int bits, int D, int n_q, const uint8_t * tile, const uint8_t * next,
                             const float * q, float * s) {
    const float v_max = fast ? KEY_MAX_FAST : KEY_MAX;
    float scale[D_MAX], centre[D_MAX], x[D_MAX];
    int32_t vec[NV*D_MAX/2];
    struct fold fold[NV];

    prefetch_factors(bits, D, next);
    const float mid = 0.5f*(float) ((1 << bits) - 1);
    for (int d = 0; d < D; d += 8) {
        const __m256 sc = load_f16(tile + kvarn_scale_off(D, bits) + 2*d);
        _mm256_storeu_ps(scale + d, sc);
        _mm256_storeu_ps(centre + d, _mm256_fmadd_ps(sc, _mm256_set1_ps(mid), load_f16(tile + kvarn_zero_off(D, bits) + 2*d)));
    }
    const __m256 sign = _mm256_set1_ps(-0.0f);
    for (int i = 0; i < n_q; i += NV) {
        const int n = n_q - i < NV ? n_q - i : NV;
        for (int j = 0; j < n; ++j) {
            __m256 m = _mm256_setzero_ps(), sum = _mm256_setzero_ps();
            for (int d = 0; d < D; d += 8) {
                const __m256 qd = _mm256_loadu_ps(q + (i + j)*D + d);
                const __m256 xd = _mm256_mul_ps(qd, _mm256_loadu_ps(scale + d));
                _mm256_storeu_ps(x + d, xd);
                m   = _mm256_max_ps(m, _mm256_andnot_ps(sign, xd));
                sum = _mm256_fmadd_ps(qd, _mm256_loadu_ps(centre + d), sum);
            }
            const int sv = round_vector(fast, D, v_max, x, max_of(m), vec + j*D/(fast ? 4 : 2), &fold[j].step);
            fold[j].base = sum_of(sum) - mid*fold[j].step*(float) sv;
        }
        fold_any(KVARN_KEY, fast, bits, n, D, tile, next, vec, fold, s + i*G);
    }
}

AVX2_INLINE void value_codes(const int fast, int bits, int D, int n_q, const uint8_t * tile, const uint8_t * next,
                             const float * p, float * o) {
    const float v_max = fast ? VALUE_MAX_FAST : VALUE_MAX;
    float token[G], x[G];
    int32_t vec[NV*G/2];
    struct fold fold[NV];

    prefetch_factors(bits, D, next);
    const float mid = 0.5f*(float) ((1 << bits) - 1);
    for (int t = 0; t < G; t += 8) {
        _mm256_storeu_ps(token + t, load_f16(tile + kvarn_token_off(D, bits) + 2*t));
    }
    for (int i = 0; i < n_q; i += NV) {
        const int n = n_q - i < NV ? n_q - i : NV;
        for (int j = 0; j < n; ++j) {
            __m256 m = _mm256_setzero_ps(), sum = _mm256_setzero_ps();
            for (int t = 0; t < G; t += 8) {
                const __m256 xt = _mm256_mul_ps(_mm256_loadu_ps(p + (i + j)*G + t), _mm256_loadu_ps(token + t));
                _mm256_storeu_ps(x + t, xt);
                m   = _mm256_max_ps(m, xt);
                sum = _mm256_add_ps(sum, xt);
            }
            const int sv = round_vector(fast, G, v_max, x, max_of(m), vec + j*G/(fast ? 4 : 2), &fold[j].step);
            fold[j].sum  = sum_of(sum);
            fold[j].base = mid*(fold[j].sum - fold[j].step*(float) sv);
        }
        fold_any(KVARN_VALUE, fast, bits, n, D, tile, next, vec, fold, o + i*D);
    }
}

AVX2 static void score_tile(int bits, int D, int n_q, const uint8_t * tile, const uint8_t * next, const float * q, float * s,
                            float * scratch) {
    (void) scratch;
    score_codes(0, bits, D, n_q, tile, next, q, s);
}

AVX2 static void value_tile(int bits, int D, int n_q, const uint8_t * tile, const uint8_t * next, const float * p, float * o,
                            float * scratch) {
    (void) scratch;
    value_codes(0, bits, D, n_q, tile, next, p, o);
}

AVX2 static void score_tile_fast(int bits, int D, int n_q, const uint8_t * tile, const uint8_t * next, const float * q,
                                 float * s, float * scratch) {
    (void) scratch;
    score_codes(1, bits, D, n_q, tile, next, q, s);
}

AVX2 static void value_tile_fast(int bits, int D, int n_q, const uint8_t * tile, const uint8_t * next, const float * p,
                                 float * o, float * scratch) {
    (void) scratch;
    value_codes(1, bits, D, n_q, tile, next, p, o);
}

// --- rows of f16 ---

AVX2_INLINE void rows_f32(int D, int n, const uint16_t * rows, int64_t stride, float * x) {
    for (int t = 0; t < n; ++t) {
        for (int d = 0; d < D; d += 8) {
            _mm256_storeu_ps(x + t*D + d, load_f16(rows + t*stride + d));
        }
    }
}

// sums of four vectors
AVX2_INLINE __m128 sums_of(__m256 a, __m256 b, __m256 c, __m256 d) {
    const __m256 x = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    return _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
}

// n query vectors against two tokens at a time
AVX2_INLINE void score_pair(const int n, int D, const float * x, const float * q, float * s) {
    __m256 sum[2*NV];
    for (int j = 0; j < 2*NV; ++j) {
        sum[j] = _mm256_setzero_ps();
    }
    for (int d = 0; d < D; d += 8) {
        const __m256 x0 = _mm256_loadu_ps(x + d);
        const __m256 x1 = _mm256_loadu_ps(x + D + d);
        for (int j = 0; j < n; ++j) {
            const __m256 qd = _mm256_loadu_ps(q + j*D + d);
            sum[2*j    ] = _mm256_fmadd_ps(x0, qd, sum[2*j    ]);
            sum[2*j + 1] = _mm256_fmadd_ps(x1, qd, sum[2*j + 1]);
        }
    }
    for (int j = 0; j < n; j += 2) {
        const __m128 y = sums_of(sum[2*j], sum[2*j + 1], sum[2*j + 2], sum[2*j + 3]);
        _mm_storel_pi((__m64 *) (s + j*G), y);
        if (j + 1 < n) {
            _mm_storeh_pi((__m64 *) (s + (j + 1)*G), y);
        }
    }
}

AVX2 static void score_rows(int D, int n_q, int t0, int t1, const uint16_t * rows, int64_t stride, const float * q,
                            float * s, float * scratch) {
    for (int t = t0; t < t1; t += 2) {
        const int at = t + 2 <= G ? t : G - 2; // also where the last token is alone: its neighbour is computed for nothing
        rows_f32(D, 2, rows + at*stride, stride, scratch);
        int i = 0;
        for (; i + NV <= n_q; i += NV) {
            score_pair(NV, D, scratch, q + i*D, s + i*G + at);
        }
        for (; i < n_q; ++i) {
            score_pair(1, D, scratch, q + i*D, s + i*G + at);
        }
    }
}

// sixteen channels of n outputs stay in registers while all rows pass
AVX2_INLINE void value_strip(const int n, int D, int t0, int t1, const float * x, const float * p, float * o) {
    for (int d = 0; d < D; d += 16) {
        __m256 r[NV][2];
        for (int j = 0; j < n; ++j) {
            r[j][0] = _mm256_loadu_ps(o + j*D + d);
            r[j][1] = _mm256_loadu_ps(o + j*D + d + 8);
        }
        for (int t = t0; t < t1; ++t) {
            const __m256 x0 = _mm256_loadu_ps(x + t*D + d);
            const __m256 x1 = _mm256_loadu_ps(x + t*D + d + 8);
            for (int j = 0; j < n; ++j) {
                const __m256 pt = _mm256_broadcast_ss(p + j*G + t);
                r[j][0] = _mm256_fmadd_ps(pt, x0, r[j][0]);
                r[j][1] = _mm256_fmadd_ps(pt, x1, r[j][1]);
            }
        }
        for (int j = 0; j < n; ++j) {
            _mm256_storeu_ps(o + j*D + d,     r[j][0]);
            _mm256_storeu_ps(o + j*D + d + 8, r[j][1]);
        }
    }
}

AVX2 static void value_rows(int D, int n_q, int t0, int t1, const uint16_t * rows, int64_t stride, const float * p,
                            float * o, float * scratch) {
    rows_f32(D, t1 - t0, rows + t0*stride, stride, scratch + t0*D);
    int i = 0;
    for (; i + NV <= n_q; i += NV) {
        value_strip(NV, D, t0, t1, scratch, p + i*G, o + i*D);
    }
    for (; i < n_q; ++i) {
        value_strip(1, D, t0, t1, scratch, p + i*G, o + i*D);
    }
}

// --- softmax ---

// exp(x), x <= 0, relative error below 3e-6; 0 below -87
AVX2_INLINE __m256 exp_of(__m256 x) {
    const __m256 low = _mm256_cmp_ps(x, _mm256_set1_ps(-87.0f), _CMP_LT_OQ);
    const __m256 n   = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), NEAREST);
    const __m256 r   = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693147182f), x);
    __m256 y = _mm256_set1_ps(0.0414583981f);
    y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(0.167910308f));
    y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(0.500043690f));
    y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(0.999963343f));
    y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(0.999999285f));
    const __m256i e = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
    y = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(y), e));
    return _mm256_andnot_ps(low, y);
}

AVX2 static void read_mask(const uint16_t * m, float * f32, int * t0, int * t1) {
    uint64_t seen[2] = { 0, 0 };
    for (int t = 0; t < G; t += 8) {
        const __m256 x = load_f16(m + t);
        _mm256_storeu_ps(f32 + t, x);
        const __m256 is_seen = _mm256_cmp_ps(x, _mm256_set1_ps(-__builtin_inff()), _CMP_NEQ_UQ);
        seen[t/64] |= (uint64_t) (unsigned) _mm256_movemask_ps(is_seen) << t % 64;
    }
    if (!seen[0] && !seen[1]) {
        return;
    }
    const int first = seen[0] ? __builtin_ctzll(seen[0])      : 64 + __builtin_ctzll(seen[1]);
    const int last  = seen[1] ? 127 - __builtin_clzll(seen[1]) : 63 - __builtin_clzll(seen[0]);
    *t0 = first < *t0 ? first : *t0;
    *t1 = last >= *t1 ? last + 1 : *t1;
}

AVX2 static float mask(float slope, const float * m, float * s) {
    const __m256 v = _mm256_set1_ps(slope);
    __m256 max = _mm256_set1_ps(-__builtin_inff());
    for (int t = 0; t < G; t += 8) {
        const __m256 x = _mm256_fmadd_ps(v, _mm256_loadu_ps(m + t), _mm256_loadu_ps(s + t));
        _mm256_storeu_ps(s + t, x);
        max = _mm256_max_ps(max, x);
    }
    return max_of(max);
}

AVX2 static float soften(float max, float * s) {
    const __m256 m = _mm256_set1_ps(max);
    __m256 sum = _mm256_setzero_ps();
    for (int t = 0; t < G; t += 8) {
        const __m256 p = exp_of(_mm256_sub_ps(_mm256_loadu_ps(s + t), m));
        _mm256_storeu_ps(s + t, p);
        sum = _mm256_add_ps(sum, p);
    }
    return sum_of(sum);
}

// not every compiler's __builtin_cpu_supports() knows this name
static int has_f16c(void) {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

const struct kvarn_cpu_kernels * kvarn_cpu_avx2(int fast) {
    static const struct kvarn_cpu_kernels kernels[2] = {
        { "avx2",      score_tile,      score_rows, read_mask, mask, soften, value_tile,      value_rows },
        { "avx2-fast", score_tile_fast, score_rows, read_mask, mask, soften, value_tile_fast, value_rows },
    };
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c() ? &kernels[fast] : NULL;
}

#else

const struct kvarn_cpu_kernels * kvarn_cpu_avx2(int fast) { (void) fast; return 0; }

#endif
