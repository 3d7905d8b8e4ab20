// kvarn-x86.c - attention kernels for AVX2 + FMA + F16C: codes are multiplied as bytes, once for all query vectors of a KV head.
// Compiled for these instructions by attribute, chosen at run time: works in a build for any x86-64.
//
// SPDX-License-Identifier: MIT
//
// Keys.    q[d]*scale[d] becomes 16 bits, two bytes hi and lo (v = 128*hi + lo), so that one multiplication of bytes serves:
//              s[t] = token[t]*(step*sum_d v[d]*code(t,d) + base)
// Values.  p[t]*token[t] becomes 8 bits:
//              o[d] += scale[d]*(step*sum_t v[t]*code(t,d) + base) + zero[d]*sum_t p[t]*token[t]
// The rounding of v would be multiplied by the mean code; base takes that part from the exact sums instead:
//              base = mid*(sum exact - step*sum v) [+ sum_d q[d]*zero[d]],   mid = half of the largest code

#include "kvarn-cpu.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include <cpuid.h>
#include <immintrin.h>
#include <string.h>

#define G     KVARN_G
#define D_MAX KVARN_D_MAX
#define NV    4 // byte vectors multiplied at a time

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

// eight i32 in -128..255 -> their low bytes
AVX2_INLINE void store_bytes(uint8_t * p, __m256i v) {
    const __m256i pick = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
                                          0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
    v = _mm256_shuffle_epi8(v, pick);
    const __m128i x = _mm_unpacklo_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    _mm_storel_epi64((__m128i *) p, x);
}

AVX2_INLINE void load_factors(int bits, int D, const uint8_t * tile, float * scale, float * zero, float * token) {
    for (int d = 0; d < D; d += 8) {
        _mm256_storeu_ps(scale + d, load_f16(tile + kvarn_scale_off(D, bits) + 2*d));
        _mm256_storeu_ps(zero  + d, load_f16(tile + kvarn_zero_off (D, bits) + 2*d));
    }
    for (int t = 0; t < G; t += 8) {
        _mm256_storeu_ps(token + t, load_f16(tile + kvarn_token_off(D, bits) + 2*t));
    }
}

// --- codes times bytes ---

// Slots 2*pass and 2*pass + 1 of eight words: the codes of 8 free indices and 4 contracted ones, one per byte.
//   row     the words of one group of four contracted indices; with 3 bits plane A, B and C are X words apart
AVX2_INLINE void slot_pair(const int bits, const int pass, const uint8_t * row, int X, __m256i * c0, __m256i * c1) {
    if (bits != 3) {
        const __m256i mask = _mm256_set1_epi8(bits == 2 ? 0x03 : 0x0f);
        const __m256i z    = _mm256_loadu_si256((const __m256i *) row);
        *c0 = _mm256_and_si256(_mm256_srli_epi32(z, 2*pass*bits), mask);
        *c1 = _mm256_and_si256(_mm256_srli_epi32(z, (2*pass + 1)*bits), mask);
        return;
    }
    if (pass < 3) {
        const __m256i mask = _mm256_set1_epi8(0x07);
        const __m256i z    = _mm256_loadu_si256((const __m256i *) (row + 4*pass*X));
        *c0 = _mm256_and_si256(z, mask);
        *c1 = _mm256_and_si256(_mm256_srli_epi32(z, 3), mask);
        return;
    }
    const __m256i a = _mm256_loadu_si256((const __m256i *) row);
    const __m256i b = _mm256_loadu_si256((const __m256i *) (row + 4*X));
    const __m256i c = _mm256_loadu_si256((const __m256i *) (row + 8*X));
    *c0 = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi32(a, 5), _mm256_set1_epi8(6)),
                          _mm256_and_si256(_mm256_srli_epi32(b, 7), _mm256_set1_epi8(1)));
    *c1 = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi32(b, 4), _mm256_set1_epi8(4)),
                          _mm256_and_si256(_mm256_srli_epi32(c, 6), _mm256_set1_epi8(3)));
}

// acc[v][f] = sum_r vec[v][r]*code(r, f) for nv byte vectors: signed ones for keys, unsigned ones for values.
// A strip of 8 words and 2 slots at a time: 2*nv accumulators of 16 bits, widened before they can overflow:
//   run groups of four r add up to 2*run*(largest code)*(largest byte) <= 2*32*3*127, 2*16*3*255, .. < 32768
// The last strip may read past its row: what it reads there is still inside the tile, and is not stored.
AVX2_INLINE void dot_codes(const int bits, const int is_unsigned, const int nv, int F, int n_r, const uint8_t * codes,
                           const uint8_t * const * vec, int32_t (* acc)[D_MAX]) {
    const int X        = bits == 3 ? F/8 : F*bits/8;
    const int row_size = bits == 3 ? 12*X : 4*X;
    const int n_pass   = bits == 3 ? 4 : 4/bits;
    const int run      = (bits == 2 ? 32 : bits == 3 ? 16 : 8) >> is_unsigned;
    const int n_row    = n_r/4;
    const __m256i ones = _mm256_set1_epi16(1);

    for (int pass = 0; pass < n_pass; ++pass) {
        for (int x = 0; x < X; x += 8) {
            __m256i sum[NV][2];
            for (int v = 0; v < nv; ++v) {
                sum[v][0] = sum[v][1] = _mm256_setzero_si256();
            }
            for (int R0 = 0; R0 < n_row; R0 += run) {
                const int R1 = R0 + run < n_row ? R0 + run : n_row;
                __m256i part[NV][2];
                for (int v = 0; v < nv; ++v) {
                    part[v][0] = part[v][1] = _mm256_setzero_si256();
                }
                for (int R = R0; R < R1; ++R) {
                    __m256i c0, c1;
                    slot_pair(bits, pass, codes + R*row_size + 4*x, X, &c0, &c1);
                    for (int v = 0; v < nv; ++v) {
                        int32_t four;
                        memcpy(&four, vec[v] + 4*R, 4);
                        const __m256i b = _mm256_set1_epi32(four);
                        part[v][0] = _mm256_add_epi16(part[v][0], is_unsigned ? _mm256_maddubs_epi16(b, c0) : _mm256_maddubs_epi16(c0, b));
                        part[v][1] = _mm256_add_epi16(part[v][1], is_unsigned ? _mm256_maddubs_epi16(b, c1) : _mm256_maddubs_epi16(c1, b));
                    }
                }
                for (int v = 0; v < nv; ++v) {
                    sum[v][0] = _mm256_add_epi32(sum[v][0], _mm256_madd_epi16(part[v][0], ones));
                    sum[v][1] = _mm256_add_epi32(sum[v][1], _mm256_madd_epi16(part[v][1], ones));
                }
            }
            for (int v = 0; v < nv; ++v) {
                for (int j = 0; j < 2; ++j) {
                    int32_t * out = acc[v] + (2*pass + j)*X + x;
                    if (x + 8 <= X) {
                        _mm256_storeu_si256((__m256i *) out, sum[v][j]);
                    } else {
                        int32_t all[8];
                        _mm256_storeu_si256((__m256i *) all, sum[v][j]);
                        memcpy(out, all, (size_t) (X - x)*sizeof(int32_t));
                    }
                }
            }
        }
    }
}

AVX2_INLINE void dot_codes_bits(const int bits, const int is_unsigned, int nv, int F, int n_r, const uint8_t * codes,
                                const uint8_t * const * vec, int32_t (* acc)[D_MAX]) {
    switch (nv) {
        case 1:  dot_codes(bits, is_unsigned, 1, F, n_r, codes, vec, acc); break;
        case 2:  dot_codes(bits, is_unsigned, 2, F, n_r, codes, vec, acc); break;
        case 3:  dot_codes(bits, is_unsigned, 3, F, n_r, codes, vec, acc); break;
        default: dot_codes(bits, is_unsigned, 4, F, n_r, codes, vec, acc); break;
    }
}

AVX2 static void dot_keys(int bits, int nv, int D, const uint8_t * tile, const uint8_t * const * vec, int32_t (* acc)[D_MAX]) {
    switch (bits) {
        case 2:  dot_codes_bits(2, 0, nv, G, D, tile, vec, acc); break;
        case 3:  dot_codes_bits(3, 0, nv, G, D, tile, vec, acc); break;
        default: dot_codes_bits(4, 0, nv, G, D, tile, vec, acc); break;
    }
}

AVX2 static void dot_values(int bits, int nv, int D, const uint8_t * tile, const uint8_t * const * vec, int32_t (* acc)[D_MAX]) {
    switch (bits) {
        case 2:  dot_codes_bits(2, 1, nv, D, G, tile, vec, acc); break;
        case 3:  dot_codes_bits(3, 1, nv, D, G, tile, vec, acc); break;
        default: dot_codes_bits(4, 1, nv, D, G, tile, vec, acc); break;
    }
}

// --- keys ---

// The bytes of q[d]*scale[d]; *step and *base as in the head of this file.
AVX2_INLINE void split_query(int D, float mid, const float * q, const float * scale, const float * zero,
                             uint8_t * hi, uint8_t * lo, float * step, float * base) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    __m256 m = _mm256_setzero_ps(), sz = _mm256_setzero_ps(), sx = _mm256_setzero_ps();
    for (int d = 0; d < D; d += 8) {
        const __m256 qd = _mm256_loadu_ps(q + d);
        const __m256 x  = _mm256_mul_ps(qd, _mm256_loadu_ps(scale + d));
        m  = _mm256_max_ps(m, _mm256_andnot_ps(sign, x));
        sx = _mm256_add_ps(sx, x);
        sz = _mm256_fmadd_ps(qd, _mm256_loadu_ps(zero + d), sz);
    }
    const float max = max_of(m);
    const __m256 inv = _mm256_set1_ps(max > 0.0f ? 16256.0f/max : 0.0f);
    __m256i sv = _mm256_setzero_si256();
    for (int d = 0; d < D; d += 8) {
        const __m256  x = _mm256_mul_ps(_mm256_loadu_ps(q + d), _mm256_loadu_ps(scale + d));
        const __m256i v = _mm256_cvtps_epi32(_mm256_mul_ps(x, inv));
        const __m256i h = _mm256_srai_epi32(_mm256_add_epi32(v, _mm256_set1_epi32(64)), 7);
        store_bytes(hi + d, h);
        store_bytes(lo + d, _mm256_sub_epi32(v, _mm256_slli_epi32(h, 7)));
        sv = _mm256_add_epi32(sv, v);
    }
    *step = max/16256.0f;
    *base = sum_of(sz) + mid*(sum_of(sx) - *step*(float) sum_of_int(sv));
}

AVX2 static void score_tile(int bits, int D, int n_q, const uint8_t * tile, const uint8_t * next, const float * q, float * s, float * scratch) {
    (void) next;
    (void) scratch;
    float scale[D_MAX], zero[D_MAX], token[G];
    uint8_t bytes[NV][D_MAX];
    int32_t acc[NV][D_MAX];
    const uint8_t * vec[NV] = { bytes[0], bytes[1], bytes[2], bytes[3] };

    load_factors(bits, D, tile, scale, zero, token);
    const float mid = 0.5f*(float) ((1 << bits) - 1);

    for (int i = 0; i < n_q; i += NV/2) {
        const int n = n_q - i < NV/2 ? n_q - i : NV/2;
        float step[NV/2], base[NV/2];
        for (int j = 0; j < n; ++j) {
            split_query(D, mid, q + (i + j)*D, scale, zero, bytes[2*j], bytes[2*j + 1], &step[j], &base[j]);
        }
        dot_keys(bits, 2*n, D, tile, vec, acc);
        for (int j = 0; j < n; ++j) {
            const __m256 vs = _mm256_set1_ps(step[j]), vb = _mm256_set1_ps(base[j]);
            for (int t = 0; t < G; t += 8) {
                const __m256i hi = _mm256_loadu_si256((const __m256i *) (acc[2*j    ] + t));
                const __m256i lo = _mm256_loadu_si256((const __m256i *) (acc[2*j + 1] + t));
                const __m256  a  = _mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_slli_epi32(hi, 7), lo));
                _mm256_storeu_ps(s + (i + j)*G + t, _mm256_mul_ps(_mm256_fmadd_ps(a, vs, vb), _mm256_loadu_ps(token + t)));
            }
        }
    }
}

// --- values ---

AVX2 static void value_tile(int bits, int D, int n_q, const uint8_t * tile, const uint8_t * next, const float * p, float * o, float * scratch) {
    (void) next;
    (void) scratch;
    float scale[D_MAX], zero[D_MAX], token[G];
    uint8_t bytes[NV][G];
    int32_t acc[NV][D_MAX];
    const uint8_t * vec[NV] = { bytes[0], bytes[1], bytes[2], bytes[3] };

    load_factors(bits, D, tile, scale, zero, token);
    const float mid = 0.5f*(float) ((1 << bits) - 1);

    for (int i = 0; i < n_q; i += NV) {
        const int n = n_q - i < NV ? n_q - i : NV;
        float step[NV], base[NV], sum[NV];
        for (int j = 0; j < n; ++j) {
            const float * pj = p + (i + j)*G;
            __m256 m = _mm256_setzero_ps(), sp = _mm256_setzero_ps();
            for (int t = 0; t < G; t += 8) {
                const __m256 x = _mm256_mul_ps(_mm256_loadu_ps(pj + t), _mm256_loadu_ps(token + t));
                m  = _mm256_max_ps(m, x);
                sp = _mm256_add_ps(sp, x);
            }
            const float max = max_of(m);
            const __m256 inv = _mm256_set1_ps(max > 0.0f ? 255.0f/max : 0.0f);
            __m256i sv = _mm256_setzero_si256();
            for (int t = 0; t < G; t += 8) {
                const __m256 x = _mm256_mul_ps(_mm256_loadu_ps(pj + t), _mm256_loadu_ps(token + t));
                const __m256i v = _mm256_cvtps_epi32(_mm256_mul_ps(x, inv));
                store_bytes(bytes[j] + t, v);
                sv = _mm256_add_epi32(sv, v);
            }
            step[j] = max/255.0f;
            sum [j] = sum_of(sp);
            base[j] = mid*(sum[j] - step[j]*(float) sum_of_int(sv));
        }
        dot_values(bits, n, D, tile, vec, acc);
        for (int j = 0; j < n; ++j) {
            const __m256 vs = _mm256_set1_ps(step[j]), vb = _mm256_set1_ps(base[j]), vp = _mm256_set1_ps(sum[j]);
            float * oj = o + (i + j)*D;
            for (int d = 0; d < D; d += 8) {
                const __m256 a = _mm256_cvtepi32_ps(_mm256_loadu_si256((const __m256i *) (acc[j] + d)));
                __m256 r = _mm256_loadu_ps(oj + d);
                r = _mm256_fmadd_ps(_mm256_loadu_ps(scale + d), _mm256_fmadd_ps(a, vs, vb), r);
                r = _mm256_fmadd_ps(_mm256_loadu_ps(zero + d), vp, r);
                _mm256_storeu_ps(oj + d, r);
            }
        }
    }
}

// --- rows of f16 ---

// four query vectors against one row at a time: the row is converted once
AVX2_INLINE void score_rows_n(const int n, int D, int t0, int t1, const uint16_t * rows, int64_t stride, const float * q, float * s) {
    for (int t = t0; t < t1; ++t) {
        const uint16_t * row = rows + t*stride;
        __m256 sum[NV];
        for (int j = 0; j < n; ++j) {
            sum[j] = _mm256_setzero_ps();
        }
        for (int d = 0; d < D; d += 8) {
            const __m256 x = load_f16(row + d);
            for (int j = 0; j < n; ++j) {
                sum[j] = _mm256_fmadd_ps(x, _mm256_loadu_ps(q + j*D + d), sum[j]);
            }
        }
        for (int j = 0; j < n; ++j) {
            s[j*G + t] = sum_of(sum[j]);
        }
    }
}

AVX2 static void score_rows(int D, int n_q, int t0, int t1, const uint16_t * rows, int64_t stride, const float * q, float * s, float * scratch) {
    (void) scratch;
    int i = 0;
    for (; i + NV <= n_q; i += NV) {
        score_rows_n(NV, D, t0, t1, rows, stride, q + i*D, s + i*G);
    }
    for (; i < n_q; ++i) {
        score_rows_n(1, D, t0, t1, rows, stride, q + i*D, s + i*G);
    }
}

// sixteen channels of n outputs stay in registers while all rows pass
AVX2_INLINE void value_rows_n(const int n, int D, int t0, int t1, const uint16_t * rows, int64_t stride, const float * p, float * o) {
    for (int d = 0; d < D; d += 16) {
        __m256 r[NV][2];
        for (int j = 0; j < n; ++j) {
            r[j][0] = _mm256_loadu_ps(o + j*D + d);
            r[j][1] = _mm256_loadu_ps(o + j*D + d + 8);
        }
        for (int t = t0; t < t1; ++t) {
            const __m256 x0 = load_f16(rows + t*stride + d);
            const __m256 x1 = load_f16(rows + t*stride + d + 8);
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

AVX2 static void value_rows(int D, int n_q, int t0, int t1, const uint16_t * rows, int64_t stride, const float * p, float * o, float * scratch) {
    (void) scratch;
    int i = 0;
    for (; i + NV <= n_q; i += NV) {
        value_rows_n(NV, D, t0, t1, rows, stride, p + i*G, o + i*D);
    }
    for (; i < n_q; ++i) {
        value_rows_n(1, D, t0, t1, rows, stride, p + i*G, o + i*D);
    }
}

// --- softmax ---

// exp(x), x <= 0, relative error below 2e-7; 0 below -87
AVX2_INLINE __m256 exp_of(__m256 x) {
    const __m256 low = _mm256_cmp_ps(x, _mm256_set1_ps(-87.0f), _CMP_LT_OQ);
    const __m256 n   = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    // x - n*ln 2, in two parts
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
    __m256 y = _mm256_set1_ps(1.0f/720);
    y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(1.0f/120));
    y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(1.0f/24));
    y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(1.0f/6));
    y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(0.5f));
    y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(1.0f));
    y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(1.0f));
    const __m256i e = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
    y = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(y), e));
    return _mm256_andnot_ps(low, y);
}

AVX2 static void read_mask(const uint16_t * m, float * f32, int * t0, int * t1) {
    for (int t = 0; t < G; t += 8) {
        const __m256 x = load_f16(m + t);
        _mm256_storeu_ps(f32 + t, x);
        const int seen = _mm256_movemask_ps(_mm256_cmp_ps(x, _mm256_set1_ps(-__builtin_inff()), _CMP_NEQ_UQ));
        if (seen) {
            const int first = t + __builtin_ctz(seen), last = t + 31 - __builtin_clz(seen);
            *t0 = first < *t0 ? first : *t0;
            *t1 = last >= *t1 ? last + 1 : *t1;
        }
    }
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
    static const struct kvarn_cpu_kernels kernels = { "avx2", score_tile, score_rows, read_mask, mask, soften, value_tile, value_rows };
    return !fast && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c() ? &kernels : NULL;
}

#else

const struct kvarn_cpu_kernels * kvarn_cpu_avx2(int fast) { (void) fast; return NULL; }

#endif
