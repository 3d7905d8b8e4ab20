// kvarn-x86-avx512.c - attention kernels for AVX-512 with VNNI: what kvarn-x86.c does, 64 bytes at a time.
// Compiled for these instructions by attribute, chosen at run time: works in a build for any x86-64.
//
// SPDX-License-Identifier: MIT
//
// The head of kvarn-x86.c has the formulas. A unit of work is four fields of words: four sets of 16 codes per contracted index.
//
//   2 bits   one row of 16 words            fields 1..0, 3..2, 5..4, 7..6
//   3 bits   16 words of planes A and B     fields 2..0, 5..3 of each             first pass
//            16 words of plane C, and T     fields 2..0, 5..3; 7..5, 4..2 of T    second pass: T is slots 6 and 7, see load_rest
//   4 bits   two rows of 16 words           fields 3..0, 7..4 of each
//
// 16 bits: a field stays where it lies in bytes 0 and 2 of its word, or comes there from bytes 1 and 3, and is multiplied as a
// 16-bit number. 8 bits (the fast mode): bytes are multiplied as they are, codes unsigned for keys; for values, whose p is
// unsigned, the code is the signed operand and a field must not reach bit 7.

#include "kvarn-cpu.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>
#include <string.h>

#define G     KVARN_G
#define D_MAX KVARN_D_MAX
#define NV    4 // vectors multiplied at a time

#define NEAREST (_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
#define NF    4 // fields of a unit

// Largest v. 16 bits: a code in place is at most 240, and 240*16383*512 and 240*32767*128 fit in 32 bits.
enum { KEY_MAX = 16383, VALUE_MAX = 32767, KEY_MAX_FAST = 127, VALUE_MAX_FAST = 255 };

#define ISA           "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c"
#define AVX512        __attribute__((target(ISA)))
#define AVX512_INLINE static inline __attribute__((always_inline, target(ISA)))

AVX512_INLINE __m512 load_f16(const void * p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) p)); }

// --- vectors of integers ---

// x[0..n) rounded to multiples of *step, the largest of which is v_max; returns the sum of the multiples.
// Bytes in order, or 16-bit numbers with each four in the order 0 2 1 3.
AVX512_INLINE int round_vector(const int fast, int n, float v_max, const float * x, float max, int32_t * vec, float * step) {
    const __m256i order = _mm256_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15,
                                           0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
    const __m512 inv = _mm512_set1_ps(max > 0.0f ? v_max/max : 0.0f);
    __m512i sum = _mm512_setzero_si512();
    for (int i = 0; i < n; i += 16) {
        const __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + i), inv));
        sum = _mm512_add_epi32(sum, v);
        if (fast) {
            _mm_storeu_si128((__m128i *) (vec + i/4), _mm512_cvtepi32_epi8(v));
        } else {
            _mm256_storeu_si256((__m256i *) (vec + i/2), _mm256_shuffle_epi8(_mm512_cvtepi32_epi16(v), order));
        }
    }
    *step = max/v_max;
    return _mm512_reduce_add_epi32(sum);
}

// --- codes times vectors ---

// What one vector's sum of products is turned into: see the head of kvarn-x86.c.
struct fold {
    float step, base;
    float sum; // values: sum_t p[t]*token[t]
};

// Lowest bit of field i of a unit.
AVX512_INLINE int field_bit(const int bits, const int pass, const int i) {
    if (bits == 2) { return 2*i; }
    if (bits == 4) { return 4*(i % 2); }
    return pass == 1 && i >= 2 ? (i == 2 ? 5 : 2) : 3*(i % 2);
}

// First free index of field i: slot*X + x.
AVX512_INLINE int field_free(const int bits, const int pass, const int i, int X, int x) {
    if (bits == 2) { return i*X + x; }
    if (bits == 4) { return i % 2*X + x + 16*(i/2); }
    return (4*pass + i)*X + x;
}

// What the planes of 3 bits leave over: bits 7..5 = A7 A6 B7 (slot 6), bits 4..2 = B6 C7 C6 (slot 7).
AVX512_INLINE __m512i load_rest(const uint8_t * row, int X, __mmask16 live) {
    const __m512i a = _mm512_maskz_loadu_epi32(live, row);
    const __m512i b = _mm512_maskz_loadu_epi32(live, row + 4*X);
    const __m512i c = _mm512_maskz_loadu_epi32(live, row + 8*X);
    return _mm512_or_si512(_mm512_and_si512(a, _mm512_set1_epi8((char) 0xc0)),
           _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi32(b, 2), _mm512_set1_epi8(0x30)),
                           _mm512_and_si512(_mm512_srli_epi32(c, 4), _mm512_set1_epi8(0x0c))));
}

// The two rows of words a unit needs; with 2 bits they are the same one.
AVX512_INLINE void load_words(const int bits, const int pass, const uint8_t * row, int X, __mmask16 live[2], __m512i z[2]) {
    if (bits == 2) {
        z[0] = z[1] = _mm512_maskz_loadu_epi32(live[0], row);
    } else if (bits == 4) {
        z[0] = _mm512_maskz_loadu_epi32(live[0], row);
        z[1] = _mm512_maskz_loadu_epi32(live[1], row + 64);
    } else if (pass == 0) {
        z[0] = _mm512_maskz_loadu_epi32(live[0], row);
        z[1] = _mm512_maskz_loadu_epi32(live[0], row + 4*X);
    } else {
        z[0] = _mm512_maskz_loadu_epi32(live[0], row + 8*X);
        z[1] = load_rest(row, X, live[0]);
    }
}

// sum += a*b, in assembly so that it stays in its register: with intrinsics compilers copy every second sum around.
#define ADD_PRODUCTS(instruction, sum, a, b) __asm__(instruction " %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b))

// acc[v][field] = sums of products of nv vectors with the codes of a unit
AVX512_INLINE void dot_codes(const int side, const int fast, const int bits, const int pass, const int nv, int n_r,
                             const uint8_t * at, int row_size, int X, __mmask16 live[2], const uint8_t * ahead,
                             const int32_t * vec, __m512i acc[NV][NF]) {
    __m512i sum[NV][NF];
    for (int v = 0; v < nv; ++v) {
        for (int i = 0; i < NF; ++i) {
            sum[v][i] = _mm512_setzero_si512();
        }
    }
    const int width = (1 << bits) - 1;
    for (int R = 0; R < n_r/4; ++R) {
        __m512i z[2];
        load_words(bits, pass, at + R*row_size, X, live, z);
        _mm_prefetch((const char *) ahead + R*row_size, _MM_HINT_T1);
        if (bits != 2 && pass == 0) { // a second line
            _mm_prefetch((const char *) ahead + R*row_size + (bits == 4 ? 64 : 4*X), _MM_HINT_T1);
        }
        if (fast) {
            for (int i = 0; i < NF; ++i) {
                const int at_bit = field_bit(bits, pass, i);
                const int down   = side == KVARN_VALUE && at_bit + bits > 7 ? at_bit + bits - 7 : 0;
                const __m512i w = down ? _mm512_srli_epi16(z[bits == 2 ? 0 : i/2], down) : z[bits == 2 ? 0 : i/2];
                const __m512i c = _mm512_and_si512(w, _mm512_set1_epi8((char) (width << (at_bit - down))));
                for (int v = 0; v < nv; ++v) {
                    const __m512i b = _mm512_set1_epi32(vec[v*n_r/4 + R]);
                    ADD_PRODUCTS("vpdpbusd", sum[v][i], side == KVARN_KEY ? c : b, side == KVARN_KEY ? b : c);
                }
            }
            continue;
        }
        for (int odd = 0; odd < 2; ++odd) {
            __m512i c[NF];
            for (int i = 0; i < NF; ++i) {
                const __m512i w = odd ? _mm512_srli_epi16(z[bits == 2 ? 0 : i/2], 8) : z[bits == 2 ? 0 : i/2];
                c[i] = _mm512_and_si512(w, _mm512_set1_epi16((short) (width << field_bit(bits, pass, i))));
            }
            for (int v = 0; v < nv; ++v) {
                const __m512i b = _mm512_set1_epi32(vec[v*n_r/2 + 2*R + odd]);
                for (int i = 0; i < NF; ++i) {
                    ADD_PRODUCTS("vpdpwssd", sum[v][i], c[i], b);
                }
            }
        }
    }
    for (int v = 0; v < nv; ++v) {
        for (int i = 0; i < NF; ++i) {
            acc[v][i] = sum[v][i];
        }
    }
}

// Keys: out f32 [nv][G] is written. Values: out f32 [nv][D] is added to. One unit at a time.
AVX512_INLINE void fold_tile(const int side, const int fast, const int bits, const int nv, int D, const uint8_t * tile,
                             const uint8_t * next, const int32_t * vec, const struct fold * fold, float * out) {
    const int F        = side == KVARN_KEY ? G : D;
    const int n_r      = side == KVARN_KEY ? D : G;
    const int X        = bits == 3 ? F/8 : F*bits/8;
    const int row_size = bits == 3 ? 12*X : 4*X;
    const int n_words  = bits == 4 ? 32 : 16;
    for (int x = 0; x < X; x += n_words) {
        __mmask16 live[2];
        for (int j = 0; j < 2; ++j) {
            const int n = X - x - 16*j;
            live[j] = (__mmask16) (n >= 16 ? 0xffff : n > 0 ? (1 << n) - 1 : 0);
        }
        for (int pass = 0; pass < (bits == 3 ? 2 : 1); ++pass) {
            const uint8_t * ahead = next + 4*x + (pass ? 8*X : 0);
            __m512i acc[NV][NF];
            if (pass == 0) {
                dot_codes(side, fast, bits, 0, nv, n_r, tile + 4*x, row_size, X, live, ahead, vec, acc);
            } else {
                dot_codes(side, fast, bits, 1, nv, n_r, tile + 4*x, row_size, X, live, ahead, vec, acc);
            }
            for (int i = 0; i < NF; ++i) {
                const int f = field_free(bits, pass, i, X, x);
                const __mmask16 is_live = live[bits == 4 ? i/2 : 0];
                if (!is_live) {
                    continue;
                }
                int at_bit = field_bit(bits, pass, i);
                if (fast && side == KVARN_VALUE && at_bit + bits > 7) {
                    at_bit = 7 - bits;
                }
                const float factor = 1.0f/(float) (1 << at_bit);
                const __m512 token = side == KVARN_KEY   ? load_f16(tile + kvarn_token_off(D, bits) + 2*f) : _mm512_setzero_ps();
                const __m512 scale = side == KVARN_VALUE ? load_f16(tile + kvarn_scale_off(D, bits) + 2*f) : _mm512_setzero_ps();
                const __m512 zero  = side == KVARN_VALUE ? load_f16(tile + kvarn_zero_off (D, bits) + 2*f) : _mm512_setzero_ps();
                for (int v = 0; v < nv; ++v) {
                    const __m512 step = _mm512_set1_ps(fold[v].step*factor);
                    const __m512 y = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[v][i]), step, _mm512_set1_ps(fold[v].base));
                    float * o = out + v*F + f;
                    if (side == KVARN_KEY) {
                        _mm512_mask_storeu_ps(o, is_live, _mm512_mul_ps(y, token));
                    } else {
                        __m512 r = _mm512_maskz_loadu_ps(is_live, o);
                        r = _mm512_fmadd_ps(zero, _mm512_set1_ps(fold[v].sum), r);
                        _mm512_mask_storeu_ps(o, is_live, _mm512_fmadd_ps(y, scale, r));
                    }
                }
            }
        }
    }
}

AVX512_INLINE void fold_vectors(const int side, const int fast, const int bits, int nv, int D, const uint8_t * tile,
                                const uint8_t * next, const int32_t * vec, const struct fold * fold, float * out) {
    switch (nv) {
        case 1:  fold_tile(side, fast, bits, 1, D, tile, next, vec, fold, out); break;
        case 2:  fold_tile(side, fast, bits, 2, D, tile, next, vec, fold, out); break;
        case 3:  fold_tile(side, fast, bits, 3, D, tile, next, vec, fold, out); break;
        default: fold_tile(side, fast, bits, 4, D, tile, next, vec, fold, out); break;
    }
}

AVX512_INLINE void fold_any(const int side, const int fast, int bits, int nv, int D, const uint8_t * tile,
                            const uint8_t * next, const int32_t * vec, const struct fold * fold, float * out) {
    switch (bits) {
        case 2:  fold_vectors(side, fast, 2, nv, D, tile, next, vec, fold, out); break;
        case 3:  fold_vectors(side, fast, 3, nv, D, tile, next, vec, fold, out); break;
        default: fold_vectors(side, fast, 4, nv, D, tile, next, vec, fold, out); break;
    }
}

// the lines behind the codes
AVX512_INLINE void prefetch_factors(int bits, int D, const uint8_t * next) {
    for (int i = kvarn_scale_off(D, bits); i < kvarn_tile_size(D, bits); i += 64) {
        _mm_prefetch((const char *) next + i, _MM_HINT_T1);
    }
}

AVX512_INLINE void score_codes(const int fast, int bits, int D, int n_q, const uint8_t * tile, const uint8_t * next,
                               const float * q, float * s) {
    const float v_max = fast ? KEY_MAX_FAST : KEY_MAX;
    float scale[D_MAX], centre[D_MAX], x[D_MAX];
    int32_t vec[NV*D_MAX/2];
    struct fold fold[NV];

    prefetch_factors(bits, D, next);
    const float mid = 0.5f*(float) ((1 << bits) - 1);
    for (int d = 0; d < D; d += 16) {
        const __m512 sc = load_f16(tile + kvarn_scale_off(D, bits) + 2*d);
        _mm512_storeu_ps(scale + d, sc);
        _mm512_storeu_ps(centre + d, _mm512_fmadd_ps(sc, _mm512_set1_ps(mid), load_f16(tile + kvarn_zero_off(D, bits) + 2*d)));
    }
    for (int i = 0; i < n_q; i += NV) {
        const int n = n_q - i < NV ? n_q - i : NV;
        for (int j = 0; j < n; ++j) {
            __m512 m = _mm512_setzero_ps(), sum = _mm512_setzero_ps();
            for (int d = 0; d < D; d += 16) {
                const __m512 qd = _mm512_loadu_ps(q + (i + j)*D + d);
                const __m512 xd = _mm512_mul_ps(qd, _mm512_loadu_ps(scale + d));
                _mm512_storeu_ps(x + d, xd);
                m   = _mm512_max_ps(m, _mm512_abs_ps(xd));
                sum = _mm512_fmadd_ps(qd, _mm512_loadu_ps(centre + d), sum);
            }
            const int sv = round_vector(fast, D, v_max, x, _mm512_reduce_max_ps(m), vec + j*D/(fast ? 4 : 2), &fold[j].step);
            fold[j].base = _mm512_reduce_add_ps(sum) - mid*fold[j].step*(float) sv;
        }
        fold_any(KVARN_KEY, fast, bits, n, D, tile, next, vec, fold, s + i*G);
    }
}

AVX512_INLINE void value_codes(const int fast, int bits, int D, int n_q, const uint8_t * tile, const uint8_t * next,
                               const float * p, float * o) {
    const float v_max = fast ? VALUE_MAX_FAST : VALUE_MAX;
    float token[G], x[G];
    int32_t vec[NV*G/2];
    struct fold fold[NV];

    prefetch_factors(bits, D, next);
    const float mid = 0.5f*(float) ((1 << bits) - 1);
    for (int t = 0; t < G; t += 16) {
        _mm512_storeu_ps(token + t, load_f16(tile + kvarn_token_off(D, bits) + 2*t));
    }
    for (int i = 0; i < n_q; i += NV) {
        const int n = n_q - i < NV ? n_q - i : NV;
        for (int j = 0; j < n; ++j) {
            __m512 m = _mm512_setzero_ps(), sum = _mm512_setzero_ps();
            for (int t = 0; t < G; t += 16) {
                const __m512 xt = _mm512_mul_ps(_mm512_loadu_ps(p + (i + j)*G + t), _mm512_loadu_ps(token + t));
                _mm512_storeu_ps(x + t, xt);
                m   = _mm512_max_ps(m, xt);
                sum = _mm512_add_ps(sum, xt);
            }
            const int sv = round_vector(fast, G, v_max, x, _mm512_reduce_max_ps(m), vec + j*G/(fast ? 4 : 2), &fold[j].step);
            fold[j].sum  = _mm512_reduce_add_ps(sum);
            fold[j].base = mid*(fold[j].sum - fold[j].step*(float) sv);
        }
        fold_any(KVARN_VALUE, fast, bits, n, D, tile, next, vec, fold, o + i*D);
    }
}

#define TILE_FUNCTIONS(suffix, fast)                                                                        \
    AVX512 static void score_tile##suffix(int bits, int D, int n_q, const uint8_t * tile, const uint8_t * next,  \
                                          const float * q, float * s, float * scratch) {                         \
        (void) scratch;                                                                                          \
        score_codes(fast, bits, D, n_q, tile, next, q, s);                                                       \
    }                                                                                                            \
    AVX512 static void value_tile##suffix(int bits, int D, int n_q, const uint8_t * tile, const uint8_t * next,  \
                                          const float * p, float * o, float * scratch) {                         \
        (void) scratch;                                                                                          \
        value_codes(fast, bits, D, n_q, tile, next, p, o);                                                       \
    }
TILE_FUNCTIONS(, 0)
TILE_FUNCTIONS(_fast, 1)

// --- rows of f16 ---

AVX512_INLINE void rows_f32(int D, int n, const uint16_t * rows, int64_t stride, float * x) {
    for (int t = 0; t < n; ++t) {
        for (int d = 0; d < D; d += 16) {
            _mm512_storeu_ps(x + t*D + d, load_f16(rows + t*stride + d));
        }
    }
}

AVX512_INLINE __m256 halves_of(__m512 v) {
    return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
}

// n query vectors against four tokens at a time
AVX512_INLINE void score_four(const int n, int D, const float * x, const float * q, float * s) {
    __m512 sum[NV][4];
    for (int j = 0; j < n; ++j) {
        for (int k = 0; k < 4; ++k) {
            sum[j][k] = _mm512_setzero_ps();
        }
    }
    for (int d = 0; d < D; d += 16) {
        __m512 xd[4];
        for (int k = 0; k < 4; ++k) {
            xd[k] = _mm512_loadu_ps(x + k*D + d);
        }
        for (int j = 0; j < n; ++j) {
            const __m512 qd = _mm512_loadu_ps(q + j*D + d);
            for (int k = 0; k < 4; ++k) {
                sum[j][k] = _mm512_fmadd_ps(xd[k], qd, sum[j][k]);
            }
        }
    }
    for (int j = 0; j < n; ++j) {
        const __m256 y = _mm256_hadd_ps(_mm256_hadd_ps(halves_of(sum[j][0]), halves_of(sum[j][1])),
                                        _mm256_hadd_ps(halves_of(sum[j][2]), halves_of(sum[j][3])));
        _mm_storeu_ps(s + j*G, _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1)));
    }
}

AVX512 static void score_rows(int D, int n_q, int t0, int t1, const uint16_t * rows, int64_t stride, const float * q, float * s,
                              float * scratch) {
    for (int t = t0/4*4; t < t1; t += 4) { // also tokens beside t0 and t1: they are computed for nothing
        rows_f32(D, 4, rows + t*stride, stride, scratch);
        int i = 0;
        for (; i + NV <= n_q; i += NV) {
            score_four(NV, D, scratch, q + i*D, s + i*G + t);
        }
        for (; i < n_q; ++i) {
            score_four(1, D, scratch, q + i*D, s + i*G + t);
        }
    }
}

// 16*w channels of n outputs stay in registers while all rows pass
AVX512_INLINE void value_strip(const int n, const int w, int D, int t0, int t1, const float * x, const float * p, float * o) {
    __m512 r[NV][2];
    for (int j = 0; j < n; ++j) {
        for (int k = 0; k < w; ++k) {
            r[j][k] = _mm512_loadu_ps(o + j*D + 16*k);
        }
    }
    for (int t = t0; t < t1; ++t) {
        for (int j = 0; j < n; ++j) {
            const __m512 pt = _mm512_set1_ps(p[j*G + t]);
            for (int k = 0; k < w; ++k) {
                r[j][k] = _mm512_fmadd_ps(pt, _mm512_loadu_ps(x + t*D + 16*k), r[j][k]);
            }
        }
    }
    for (int j = 0; j < n; ++j) {
        for (int k = 0; k < w; ++k) {
            _mm512_storeu_ps(o + j*D + 16*k, r[j][k]);
        }
    }
}

AVX512_INLINE void value_vectors(const int n, int D, int t0, int t1, const float * x, const float * p, float * o) {
    int d = 0;
    for (; d + 32 <= D; d += 32) {
        value_strip(n, 2, D, t0, t1, x + d, p, o + d);
    }
    if (d < D) {
        value_strip(n, 1, D, t0, t1, x + d, p, o + d);
    }
}

AVX512 static void value_rows(int D, int n_q, int t0, int t1, const uint16_t * rows, int64_t stride, const float * p, float * o,
                              float * scratch) {
    rows_f32(D, t1 - t0, rows + t0*stride, stride, scratch + t0*D);
    int i = 0;
    for (; i + NV <= n_q; i += NV) {
        value_vectors(NV, D, t0, t1, scratch, p + i*G, o + i*D);
    }
    for (; i < n_q; ++i) {
        value_vectors(1, D, t0, t1, scratch, p + i*G, o + i*D);
    }
}

// --- softmax ---

AVX512 static void read_mask(const uint16_t * m, float * f32, int * t0, int * t1) {
    uint64_t seen[2] = { 0, 0 };
    for (int t = 0; t < G; t += 16) {
        const __m512 x = load_f16(m + t);
        _mm512_storeu_ps(f32 + t, x);
        seen[t/64] |= (uint64_t) _mm512_cmp_ps_mask(x, _mm512_set1_ps(-__builtin_inff()), _CMP_NEQ_UQ) << t % 64;
    }
    if (!seen[0] && !seen[1]) {
        return;
    }
    const int first = seen[0] ? __builtin_ctzll(seen[0])      : 64 + __builtin_ctzll(seen[1]);
    const int last  = seen[1] ? 127 - __builtin_clzll(seen[1]) : 63 - __builtin_clzll(seen[0]);
    *t0 = first < *t0 ? first : *t0;
    *t1 = last >= *t1 ? last + 1 : *t1;
}

AVX512 static float mask(float slope, const float * m, float * s) {
    const __m512 v = _mm512_set1_ps(slope);
    __m512 max = _mm512_set1_ps(-__builtin_inff());
    for (int t = 0; t < G; t += 16) {
        const __m512 x = _mm512_fmadd_ps(v, _mm512_loadu_ps(m + t), _mm512_loadu_ps(s + t));
        _mm512_storeu_ps(s + t, x);
        max = _mm512_max_ps(max, x);
    }
    return _mm512_reduce_max_ps(max);
}

// exp(x), x <= 0, relative error below 3e-6; 0 below -87
AVX512 static float soften(float max, float * s) {
    const __m512 m = _mm512_set1_ps(max);
    __m512 sum = _mm512_setzero_ps();
    for (int t = 0; t < G; t += 16) {
        const __m512 d = _mm512_sub_ps(_mm512_loadu_ps(s + t), m);
        const __mmask16 is_seen = _mm512_cmp_ps_mask(d, _mm512_set1_ps(-87.0f), _CMP_GE_OQ);
        const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(d, _mm512_set1_ps(1.44269504f)), NEAREST);
        const __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693147182f), d);
        __m512 y = _mm512_set1_ps(0.0414583981f);
        y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(0.167910308f));
        y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(0.500043690f));
        y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(0.999963343f));
        y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(0.999999285f));
        y = _mm512_maskz_scalef_ps(is_seen, y, n);
        _mm512_storeu_ps(s + t, y);
        sum = _mm512_add_ps(sum, y);
    }
    return _mm512_reduce_add_ps(sum);
}

const struct kvarn_cpu_kernels * kvarn_cpu_avx512(int fast) {
    static const struct kvarn_cpu_kernels kernels[2] = {
        { "avx512",      score_tile,      score_rows, read_mask, mask, soften, value_tile,      value_rows },
        { "avx512-fast", score_tile_fast, score_rows, read_mask, mask, soften, value_tile_fast, value_rows },
    };
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") ? &kernels[fast] : 0;
}

#else

const struct kvarn_cpu_kernels * kvarn_cpu_avx512(int fast) { (void) fast; return 0; }

#endif
