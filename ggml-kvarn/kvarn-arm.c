// kvarn-arm.c - attention kernels for 64-bit ARM: codes are multiplied as bytes, once for several query vectors of a KV head.
// SDOT and SMMLA are compiled by attribute and chosen at run time: works in a build for any armv8-a.
//
// SPDX-License-Identifier: MIT
//
// Keys contract x[d] = q[d]*scale[d], values x[t] = p[t]*token[t]. Both become v = round(x/step), two bytes v = 256*hi + lo (fast
// mode: one byte, of which p, never negative, uses 7 bits), so that one multiplication of bytes serves:
//     s[t]  = token[t]*(step*sum_d v[d]*code(t,d) + base + sum_d q[d]*zero[d])
//     o[d] += scale[d]*(step*sum_t v[t]*code(t,d) + base) + zero[d]*sum_t p[t]*token[t]
// The rounding of v would be multiplied by the mean code; base takes that part from the exact sums instead:
//     base = mid*(sum x - step*sum v),   mid = half of the largest code

#include "kvarn-cpu.h"

#if defined(__aarch64__) && (defined(__GNUC__) || defined(__clang__)) && !defined(__AARCH64EB__)

#include <arm_neon.h>
#include <string.h>

#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#define G     KVARN_G
#define D_MAX KVARN_D_MAX

#include "kvarn-arm-dot.h"

// --- bytes of q and p ---

NEON_INLINE float32x4_t low_f32 (float16x8_t h) { return vcvt_f32_f16(vget_low_f16(h)); }
NEON_INLINE float32x4_t high_f32(float16x8_t h) { return vcvt_high_f32_f16(h); }
NEON_INLINE float16x8_t load_f16(const void * p) { return vreinterpretq_f16_u8(vld1q_u8((const uint8_t *) p)); }

struct factors {
    float scale[D_MAX], zero[D_MAX], token[G];
};

static void f16_to_f32(int n, const uint8_t * h, float * x) {
    for (int i = 0; i < n; i += 8) {
        const float16x8_t v = load_f16(h + 2*i);
        vst1q_f32(x + i,     low_f32(v));
        vst1q_f32(x + i + 4, high_f32(v));
    }
}

static void load_factors(int bits, int D, const uint8_t * tile, const uint8_t * next, struct factors * f) {
    f16_to_f32(D, tile + kvarn_scale_off(D, bits), f->scale);
    f16_to_f32(D, tile + kvarn_zero_off (D, bits), f->zero);
    f16_to_f32(G, tile + kvarn_token_off(D, bits), f->token);
    for (int i = kvarn_scale_off(D, bits); i < kvarn_tile_size(D, bits); i += 64) {
        __builtin_prefetch(next + i, 0, 2);
    }
}

struct split {
    float step;
    float sum;  // of x
    float rest; // sum of x - step*v
};

// x[i] = a[i]*b[i] as bytes, every other 8 of out: two of them for each x, in fast mode one
static struct split split(int fast, int n, const float * a, const float * b, int8_t * out) {
    float32x4_t max = vdupq_n_f32(0.0f), sum = vdupq_n_f32(0.0f);
    for (int i = 0; i < n; i += 4) {
        const float32x4_t x = vmulq_f32(vld1q_f32(a + i), vld1q_f32(b + i));
        max = vmaxq_f32(max, vabsq_f32(x));
        sum = vaddq_f32(sum, x);
    }
    const float top   = fast ? 127.0f : 32512.0f; // 256*127
    const float range = vmaxvq_f32(max);
    const float32x4_t inv = vdupq_n_f32(range > 0.0f ? top/range : 0.0f);
    int32x4_t all = vdupq_n_s32(0);
    for (int i = 0; i < n; i += 8) {
        const float32x4_t x0 = vmulq_f32(vld1q_f32(a + i),     vld1q_f32(b + i));
        const float32x4_t x1 = vmulq_f32(vld1q_f32(a + i + 4), vld1q_f32(b + i + 4));
        const int32x4_t v0 = vcvtnq_s32_f32(vmulq_f32(x0, inv)), v1 = vcvtnq_s32_f32(vmulq_f32(x1, inv));
        const int16x8_t v  = vcombine_s16(vmovn_s32(v0), vmovn_s32(v1));
        all = vpadalq_s16(all, v);
        if (fast) {
            vst1_s8(out + 2*i, vmovn_s16(v));
        } else {
            vst1_s8(out + 2*i,     vrshrn_n_s16(v, 8));
            vst1_s8(out + 2*i + 8, vmovn_s16(v));
        }
    }
    struct split res = { .step = range/top, .sum = vaddvq_f32(sum) };
    res.rest = res.sum - res.step*(float) vaddvq_s32(all);
    return res;
}

// how a set of kernels multiplies
struct engine {
    dot_t dot;
    int   pairs; // at a time
    int   fast;
};

// The bytes of up to 2*PAIRS query vectors, multiplied: acc as struct dot has it. Returns how many were taken.
static int multiply(const struct engine * engine, int bits, int n_q, int F, int n_r, const float * x, const float * factor,
                    const uint8_t * tile, const uint8_t * next, struct split * parts, int32_t (* acc)[D_MAX]) {
    int8_t pair[PAIRS][2*D_MAX];
    const int fast = engine->fast;
    const int most = fast ? 2*engine->pairs : engine->pairs;
    const int n    = n_q < most ? n_q : most;
    for (int i = 0; i < n; ++i) {
        parts[i] = split(fast, n_r, x + i*n_r, factor, fast ? pair[i/2] + i%2*8 : pair[i]);
    }
    if (fast && n%2) { // nobody reads the sums of an odd one's neighbour, but they should not depend on what lay there
        for (int r = 0; r < n_r; r += 8) {
            memset(pair[n/2] + 2*r + 8, 0, 8);
        }
    }
    const struct dot dot = { F, n_r, tile, next, (const int8_t (*)[2*D_MAX]) pair, acc };
    engine->dot(bits, fast ? (n + 1)/2 : n, &dot);
    return n;
}

// step*sum_r v[r]*code(r, f) + base, for the four f from f on
NEON_INLINE float32x4_t product(int fast, int i, int f, int32_t (* acc)[D_MAX], float32x4_t step, float32x4_t base) {
    const int32_t * a = acc[fast ? i : 2*i] + f;
    const int32x4_t v = fast ? vld1q_s32(a) : vaddq_s32(vshlq_n_s32(vld1q_s32(a), 8), vld1q_s32(a + D_MAX));
    return vfmaq_f32(base, vcvtq_f32_s32(v), step);
}

// --- keys ---

static float dot_f32(int n, const float * a, const float * b) {
    float32x4_t s0 = vdupq_n_f32(0.0f), s1 = s0;
    for (int i = 0; i < n; i += 8) {
        s0 = vfmaq_f32(s0, vld1q_f32(a + i),     vld1q_f32(b + i));
        s1 = vfmaq_f32(s1, vld1q_f32(a + i + 4), vld1q_f32(b + i + 4));
    }
    return vaddvq_f32(vaddq_f32(s0, s1));
}

static void score_tile(const struct engine * engine, int bits, int D, int n_q, const uint8_t * tile, const uint8_t * next,
                       const float * q, float * s) {
    struct factors fac;
    struct split   parts[2*PAIRS];
    int32_t        acc[2*PAIRS][D_MAX];
    const float mid = 0.5f*(float) ((1 << bits) - 1);

    load_factors(bits, D, tile, next, &fac);
    for (int n, i = 0; i < n_q; i += n, q += n*D, s += n*G) {
        n = multiply(engine, bits, n_q - i, G, D, q, fac.scale, tile, next, parts, acc);
        for (int j = 0; j < n; ++j) {
            const float32x4_t step = vdupq_n_f32(parts[j].step);
            const float32x4_t base = vdupq_n_f32(mid*parts[j].rest + dot_f32(D, q + j*D, fac.zero));
            for (int t = 0; t < G; t += 4) {
                vst1q_f32(s + j*G + t, vmulq_f32(product(engine->fast, j, t, acc, step, base), vld1q_f32(fac.token + t)));
            }
        }
    }
}

// --- values ---

static void value_tile(const struct engine * engine, int bits, int D, int n_q, const uint8_t * tile, const uint8_t * next,
                       const float * p, float * o) {
    struct factors fac;
    struct split   parts[2*PAIRS];
    int32_t        acc[2*PAIRS][D_MAX];
    const float mid = 0.5f*(float) ((1 << bits) - 1);

    load_factors(bits, D, tile, next, &fac);
    for (int n, i = 0; i < n_q; i += n, p += n*G, o += n*D) {
        n = multiply(engine, bits, n_q - i, D, G, p, fac.token, tile, next, parts, acc);
        for (int j = 0; j < n; ++j) {
            const float32x4_t step = vdupq_n_f32(parts[j].step);
            const float32x4_t base = vdupq_n_f32(mid*parts[j].rest);
            const float32x4_t sum  = vdupq_n_f32(parts[j].sum);
            for (int d = 0; d < D; d += 4) {
                float32x4_t r = vld1q_f32(o + j*D + d);
                r = vfmaq_f32(r, vld1q_f32(fac.scale + d), product(engine->fast, j, d, acc, step, base));
                r = vfmaq_f32(r, vld1q_f32(fac.zero  + d), sum);
                vst1q_f32(o + j*D + d, r);
            }
        }
    }
}

// --- rows of f16 ---

#define NV 4 // query vectors at a time: a row is converted once for them

NEON_INLINE void score_rows_n(const int n, int D, int t0, int t1, const uint16_t * rows, int64_t stride, const float * q,
                              float * s) {
    for (int t = t0; t < t1; ++t) {
        float32x4_t sum[NV][4];
        for (int j = 0; j < n; ++j) {
            sum[j][0] = sum[j][1] = sum[j][2] = sum[j][3] = vdupq_n_f32(0.0f);
        }
        for (int d = 0; d < D; d += 16) {
            const float16x8_t h0 = load_f16(rows + t*stride + d), h1 = load_f16(rows + t*stride + d + 8);
            const float32x4_t x0 = low_f32(h0), x1 = high_f32(h0), x2 = low_f32(h1), x3 = high_f32(h1);
            for (int j = 0; j < n; ++j) {
                const float * qj = q + j*D + d;
                sum[j][0] = vfmaq_f32(sum[j][0], x0, vld1q_f32(qj));
                sum[j][1] = vfmaq_f32(sum[j][1], x1, vld1q_f32(qj + 4));
                sum[j][2] = vfmaq_f32(sum[j][2], x2, vld1q_f32(qj + 8));
                sum[j][3] = vfmaq_f32(sum[j][3], x3, vld1q_f32(qj + 12));
            }
        }
        for (int j = 0; j < n; ++j) {
            s[j*G + t] = vaddvq_f32(vaddq_f32(vaddq_f32(sum[j][0], sum[j][1]), vaddq_f32(sum[j][2], sum[j][3])));
        }
    }
}

static void score_rows(int D, int n_q, int t0, int t1, const uint16_t * rows, int64_t stride, const float * q, float * s,
                       float * scratch) {
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
NEON_INLINE void value_rows_n(const int n, int D, int t0, int t1, const uint16_t * rows, int64_t stride, const float * p,
                              float * o) {
    for (int d = 0; d < D; d += 16) {
        float32x4_t r[NV][4];
        for (int j = 0; j < n; ++j) {
            for (int k = 0; k < 4; ++k) {
                r[j][k] = vld1q_f32(o + j*D + d + 4*k);
            }
        }
        for (int t = t0; t < t1; ++t) {
            const float16x8_t h0 = load_f16(rows + t*stride + d), h1 = load_f16(rows + t*stride + d + 8);
            const float32x4_t x[4] = { low_f32(h0), high_f32(h0), low_f32(h1), high_f32(h1) };
            for (int j = 0; j < n; ++j) {
                for (int k = 0; k < 4; ++k) {
                    r[j][k] = vfmaq_n_f32(r[j][k], x[k], p[j*G + t]);
                }
            }
        }
        for (int j = 0; j < n; ++j) {
            for (int k = 0; k < 4; ++k) {
                vst1q_f32(o + j*D + d + 4*k, r[j][k]);
            }
        }
    }
}

static void value_rows(int D, int n_q, int t0, int t1, const uint16_t * rows, int64_t stride, const float * p, float * o,
                       float * scratch) {
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
NEON_INLINE float32x4_t exp_of(float32x4_t x) {
    const uint32x4_t  low = vcltq_f32(x, vdupq_n_f32(-87.0f));
    const float32x4_t n   = vrndnq_f32(vmulq_n_f32(x, 1.44269504f));
    // x - n*ln 2, in two parts
    float32x4_t r = vfmsq_f32(x, n, vdupq_n_f32(0.693359375f));
    r = vfmsq_f32(r, n, vdupq_n_f32(-2.12194440e-4f));
    float32x4_t y = vdupq_n_f32(1.0f/720);
    y = vfmaq_f32(vdupq_n_f32(1.0f/120), y, r);
    y = vfmaq_f32(vdupq_n_f32(1.0f/24), y, r);
    y = vfmaq_f32(vdupq_n_f32(1.0f/6), y, r);
    y = vfmaq_f32(vdupq_n_f32(0.5f), y, r);
    y = vfmaq_f32(vdupq_n_f32(1.0f), y, r);
    y = vfmaq_f32(vdupq_n_f32(1.0f), y, r);
    const int32x4_t e = vshlq_n_s32(vcvtq_s32_f32(n), 23);
    const uint32x4_t v = vreinterpretq_u32_s32(vaddq_s32(vreinterpretq_s32_f32(y), e));
    return vreinterpretq_f32_u32(vbicq_u32(v, low));
}

static void read_mask(const uint16_t * m, float * f32, int * t0, int * t1) {
    f16_to_f32(G, (const uint8_t *) m, f32);
    for (int t = 0; t < G; t += 8) {
        const uint16x8_t hidden = vceqq_u16(vld1q_u16(m + t), vdupq_n_u16(0xfc00));
        const uint64_t   seen   = ~vget_lane_u64(vreinterpret_u64_u8(vmovn_u16(hidden)), 0); // a byte for each row
        if (seen) {
            const int first = t + __builtin_ctzll(seen)/8, last = t + 7 - __builtin_clzll(seen)/8;
            *t0 = first < *t0 ? first : *t0;
            *t1 = last >= *t1 ? last + 1 : *t1;
        }
    }
}

static void mask(int n, const float * slope, const float * m, float * s, float * max) {
    for (int i = 0; i < n; ++i, s += G) {
        float32x4_t most = vdupq_n_f32(-__builtin_inff());
        for (int t = 0; t < G; t += 4) {
            const float32x4_t x = vfmaq_n_f32(vld1q_f32(s + t), vld1q_f32(m + t), slope[i]);
            vst1q_f32(s + t, x);
            most = vmaxq_f32(most, x);
        }
        max[i] = vmaxvq_f32(most);
    }
}

static void soften(int n, const float * max, float * s, float * sum) {
    for (int i = 0; i < n; ++i, s += G) {
        const float32x4_t m = vdupq_n_f32(max[i]);
        float32x4_t all = vdupq_n_f32(0.0f);
        for (int t = 0; t < G; t += 4) {
            const float32x4_t p = exp_of(vsubq_f32(vld1q_f32(s + t), m));
            vst1q_f32(s + t, p);
            all = vaddq_f32(all, p);
        }
        sum[i] = vaddvq_f32(all);
    }
}

// --- sets ---

#define BIND(set, ...)                                                                                             \
    static const struct engine set = { __VA_ARGS__ };                                                              \
    static void set##_score(int bits, int D, int n_q, const uint8_t * tile, const uint8_t * next, const float * q, \
                            float * s, float * scratch) {                                                          \
        (void) scratch;                                                                                            \
        score_tile(&set, bits, D, n_q, tile, next, q, s);                                                          \
    }                                                                                                              \
    static void set##_value(int bits, int D, int n_q, const uint8_t * tile, const uint8_t * next, const float * p, \
                            float * o, float * scratch) {                                                          \
        (void) scratch;                                                                                            \
        value_tile(&set, bits, D, n_q, tile, next, p, o);                                                          \
    }

#define SET(name, set) { name, set##_score, score_rows, read_mask, mask, soften, set##_value, value_rows, kvarn_seal_ref }

BIND(neon,      dot_neon, 1, 0)
BIND(neon_fast, dot_neon, 1, 1)

const struct kvarn_cpu_kernels * kvarn_cpu_neon(int fast) {
    static const struct kvarn_cpu_kernels kernels[2] = { SET("neon", neon), SET("neon-fast", neon_fast) };
    return &kernels[fast];
}

#if defined(DOTPROD)

// The bits of getauxval() are the kernel's ABI; headers of older systems lack their names.
static int has_dotprod(void) {
#if defined(__linux__)
    return (getauxval(AT_HWCAP) >> 20 & 1) != 0;
#elif defined(__APPLE__)
    int yes = 0;
    size_t size = sizeof(yes);
    return sysctlbyname("hw.optional.arm.FEAT_DotProd", &yes, &size, NULL, 0) == 0 && yes;
#elif defined(__ARM_FEATURE_DOTPROD)
    return 1;
#else
    return 0;
#endif
}

BIND(dotprod,      dot_dotprod, 2, 0)
BIND(dotprod_fast, dot_dotprod, 2, 1)

const struct kvarn_cpu_kernels * kvarn_cpu_dotprod(int fast) {
    static const struct kvarn_cpu_kernels kernels[2] = { SET("dotprod", dotprod), SET("dotprod-fast", dotprod_fast) };
    return has_dotprod() ? &kernels[fast] : NULL;
}

#else

const struct kvarn_cpu_kernels * kvarn_cpu_dotprod(int fast) { (void) fast; return NULL; }

#endif

#if defined(I8MM)

static int has_i8mm(void) {
#if defined(__linux__)
    return (getauxval(AT_HWCAP2) >> 13 & 1) != 0;
#elif defined(__APPLE__)
    int yes = 0;
    size_t size = sizeof(yes);
    return sysctlbyname("hw.optional.arm.FEAT_I8MM", &yes, &size, NULL, 0) == 0 && yes;
#elif defined(__ARM_FEATURE_MATMUL_INT8)
    return 1;
#else
    return 0;
#endif
}

BIND(i8mm,      dot_i8mm, 4, 0)
BIND(i8mm_fast, dot_i8mm, 4, 1)

const struct kvarn_cpu_kernels * kvarn_cpu_i8mm(int fast) {
    static const struct kvarn_cpu_kernels kernels[2] = { SET("i8mm", i8mm), SET("i8mm-fast", i8mm_fast) };
    return has_i8mm() ? &kernels[fast] : NULL;
}

#else

const struct kvarn_cpu_kernels * kvarn_cpu_i8mm(int fast) { (void) fast; return NULL; }

#endif

#else

const struct kvarn_cpu_kernels * kvarn_cpu_neon   (int fast) { (void) fast; return NULL; }
const struct kvarn_cpu_kernels * kvarn_cpu_dotprod(int fast) { (void) fast; return NULL; }
const struct kvarn_cpu_kernels * kvarn_cpu_i8mm   (int fast) { (void) fast; return NULL; }

#endif
