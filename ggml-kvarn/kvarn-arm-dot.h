// kvarn-arm-dot.h - codes times bytes for 64-bit ARM, the inner loops of kvarn-arm.c: with SMLAL, SDOT or SMMLA.
//
// SPDX-License-Identifier: MIT
//
// A pair is two byte vectors a and b, in turns of 8 contracted indices: hi and lo of a query vector, or two vectors in fast mode.
//
//     pair       | a[0..7] | b[0..7] | a[8..15] | b[8..15] | ..        16 bytes face two rows of words, r = 8i .. 8i+7
//     SDOT       row 2i with lanes 0 (a) and 2 (b), row 2i+1 with lanes 1 and 3: 4 free indices, one sum each
//     SMMLA      two rows zipped by words are 2 free indices x 8 bytes, the pair is 2 vectors x 8 bytes: 2x2 sums
//     SMLAL      lanes as with SDOT, repeated over a register: 16-bit sums, widened before they can overflow

#ifndef KVARN_ARM_DOT_H
#define KVARN_ARM_DOT_H

#define PAIRS 4 // pairs multiplied at a time, at most

// What is inlined into a function of another instruction set must not ask for more than that one has: gcc compares.
#if defined(__clang__)
#define NEON_INLINE static inline __attribute__((always_inline))
#else
#define NEON_INLINE static inline __attribute__((always_inline, target("+nothing+simd")))
#endif

// Old compilers have these only where the whole build asks for them.
#if defined(__apple_build_version__)
#define HAS_TARGETS (__clang_major__ >= 15)
#elif defined(__clang__)
#define HAS_TARGETS (__clang_major__ >= 16)
#else
#define HAS_TARGETS (__GNUC__ >= 10)
#endif
#if defined(__ARM_FEATURE_DOTPROD)
#define DOTPROD
#elif HAS_TARGETS
#define DOTPROD __attribute__((target("arch=armv8.2-a+dotprod")))
#endif
#if defined(__ARM_FEATURE_MATMUL_INT8)
#define I8MM
#elif HAS_TARGETS
#define I8MM __attribute__((target("arch=armv8.2-a+i8mm")))
#endif

// --- codes ---

// A pass takes four slots of a strip of words at a time: with 4 bits two slots of two strips of 4 words, with 3 bits slots 0..3,
// then 4..7. With 3 bits the last strip may read past its row: what it reads is still inside the tile, and is not stored.
NEON_INLINE int strip_of(const int bits)        { return bits == 4 ? 8 : 4; }
NEON_INLINE int words_of(const int bits, int F) { return bits == 3 ? F/8 : F*bits/8; }

NEON_INLINE void load_words(const int bits, const int pass, const uint8_t * row, int X, uint8x16_t z[3]) {
    z[0] = vld1q_u8(row);
    z[1] = bits == 2 ? z[0] : vld1q_u8(bits == 4 ? row + 16 : row + 4*X);
    z[2] = bits == 3 && pass == 1 ? vld1q_u8(row + 8*X) : z[0];
}

// Four registers of codes, one per byte. Slots are masked where they are if a signed byte can hold that: shift_of() is left.
NEON_INLINE void codes_of(const int bits, const int pass, const uint8x16_t z[3], int8x16_t c[4]) {
    uint8x16_t u[4];
    if (bits == 2) {
        u[0] = vandq_u8(z[0], vdupq_n_u8(0x03));
        u[1] = vandq_u8(z[0], vdupq_n_u8(0x0c));
        u[2] = vandq_u8(z[0], vdupq_n_u8(0x30));
        u[3] = vshrq_n_u8(z[0], 6);
    } else if (bits == 4) {
        u[0] = vandq_u8(z[0], vdupq_n_u8(0x0f));
        u[1] = vshrq_n_u8(z[0], 4);
        u[2] = vandq_u8(z[1], vdupq_n_u8(0x0f));
        u[3] = vshrq_n_u8(z[1], 4);
    } else if (pass == 0) {
        u[0] = vandq_u8(z[0], vdupq_n_u8(0x07));
        u[1] = vandq_u8(z[0], vdupq_n_u8(0x38));
        u[2] = vandq_u8(z[1], vdupq_n_u8(0x07));
        u[3] = vandq_u8(z[1], vdupq_n_u8(0x38));
    } else {
        const uint8x16_t rest = vsriq_n_u8(vsriq_n_u8(z[0], z[1], 2), z[2], 4); // A7 A6 B7 B6 C7 C6 . .
        u[0] = vandq_u8(z[2], vdupq_n_u8(0x07));
        u[1] = vandq_u8(z[2], vdupq_n_u8(0x38));
        u[2] = vshrq_n_u8(rest, 5);
        u[3] = vandq_u8(rest, vdupq_n_u8(0x1c));
    }
    for (int j = 0; j < 4; ++j) {
        c[j] = vreinterpretq_s8_u8(u[j]);
    }
}

NEON_INLINE int shift_of(const int bits, const int pass, const int j) {
    return bits == 2 ? (j < 3 ? 2*j : 0) : bits == 4 ? 0 : j == 1 ? 3 : j == 3 ? (pass == 0 ? 3 : 2) : 0;
}

// where register j of the strip at word x begins: its first free index
NEON_INLINE int free_of(const int bits, const int pass, const int j, int x, int X) {
    return bits == 4 ? j%2*X + x + j/2*4 : (4*pass + j)*X + x;
}

// the sums of one register, for n free indices; those beyond the row are left out
NEON_INLINE void store_sums(int32_t * out, int32x4_t v, int n) {
    if (n >= 4) {
        vst1q_s32(out, v);
    } else {
        vst1_s32(out, vget_low_s32(v));
    }
}

struct dot {
    int F, n_r;                            // free indices, contracted ones
    const uint8_t * codes;
    const uint8_t * next;                  // of the tile after this one: a line is asked for in every step, all by the end
    const int8_t (* pair)[2*KVARN_D_MAX];
    int32_t (* acc)[KVARN_D_MAX];          // acc[2*i][f] = sum_r a[r]*code(r, f) of pair i, acc[2*i + 1][f] the same of b
};

typedef void (* dot_t)(int bits, int n, const struct dot * dot); // n pairs

// with 3 bits, the lines that the second pass asks for
NEON_INLINE const uint8_t * next_of(const int pass, const struct dot * dot) {
    return dot->next + pass*(dot->F*dot->n_r*3/16);
}

// --- SMLAL: one pair, 8 products an instruction ---

NEON_INLINE void dot_neon_pass(const int bits, const int pass, const struct dot * dot) {
    const int X        = words_of(bits, dot->F);
    const int row_size = dot->F*bits/2;
    const int n_row    = dot->n_r/4;
    const int run      = 256 >> bits; // rows: 64*3*128, 32*7*128 and 16*15*128 < 32768
    const uint8_t * next = next_of(pass, dot);

    for (int x = 0; x < X; x += strip_of(bits)) {
        for (int R0 = 0; R0 < n_row; R0 += run) {
            const int R1 = R0 + run < n_row ? R0 + run : n_row;
            int16x8_t sum[2][4][2];
            for (int j = 0; j < 4; ++j) {
                sum[0][j][0] = sum[0][j][1] = sum[1][j][0] = sum[1][j][1] = vdupq_n_s16(0);
            }
            for (int R = R0; R < R1; R += 2, next += 16*bits) {
                __builtin_prefetch(next, 0, 2);
                const int32x4_t v = vreinterpretq_s32_s8(vld1q_s8(dot->pair[0] + 8*R));
                for (int k = 0; k < 2; ++k) {
                    uint8x16_t z[3];
                    int8x16_t  c[4];
                    load_words(bits, pass, dot->codes + (R + k)*row_size + 4*x, X, z);
                    codes_of(bits, pass, z, c);
                    const int8x16_t a = vreinterpretq_s8_s32(k == 0 ? vdupq_laneq_s32(v, 0) : vdupq_laneq_s32(v, 1));
                    const int8x16_t b = vreinterpretq_s8_s32(k == 0 ? vdupq_laneq_s32(v, 2) : vdupq_laneq_s32(v, 3));
                    for (int j = 0; j < 4; ++j) {
                        const int8x16_t cj = vshlq_s8(c[j], vdupq_n_s8((int8_t) -shift_of(bits, pass, j)));
                        sum[0][j][0] = vmlal_s8     (sum[0][j][0], vget_low_s8(cj), vget_low_s8(a));
                        sum[0][j][1] = vmlal_high_s8(sum[0][j][1], cj, a);
                        sum[1][j][0] = vmlal_s8     (sum[1][j][0], vget_low_s8(cj), vget_low_s8(b));
                        sum[1][j][1] = vmlal_high_s8(sum[1][j][1], cj, b);
                    }
                }
            }
            for (int i = 0; i < 2; ++i) {
                for (int j = 0; j < 4; ++j) {
                    int32_t * out = dot->acc[i] + free_of(bits, pass, j, x, X);
                    int32x4_t s = vpaddq_s32(vpaddlq_s16(sum[i][j][0]), vpaddlq_s16(sum[i][j][1]));
                    if (R0 > 0) {
                        int32x4_t before = vdupq_n_s32(0);
                        memcpy(&before, out, X - x < 4 ? 8 : 16);
                        s = vaddq_s32(s, before);
                    }
                    store_sums(out, s, X - x);
                }
            }
        }
    }
}

static void dot_neon(int bits, int n, const struct dot * dot) {
    (void) n;
    switch (bits) {
        case 2:  dot_neon_pass(2, 0, dot); break;
        case 3:  dot_neon_pass(3, 0, dot);
                 dot_neon_pass(3, 1, dot); break;
        default: dot_neon_pass(4, 0, dot); break;
    }
}

// --- SDOT: one or two pairs, 16 products an instruction ---

#if defined(DOTPROD)

DOTPROD static inline __attribute__((always_inline))
void dot_dotprod_pass(const int bits, const int pass, const int n, const struct dot * dot) {
    const int X        = words_of(bits, dot->F);
    const int row_size = dot->F*bits/2;
    const uint8_t * next = next_of(pass, dot);

    for (int x = 0; x < X; x += strip_of(bits)) {
        int32x4_t sum[2][2][4];
        for (int i = 0; i < n; ++i) {
            for (int j = 0; j < 4; ++j) {
                sum[i][0][j] = sum[i][1][j] = vdupq_n_s32(0);
            }
        }
        for (int R = 0; R < dot->n_r/4; R += 2, next += 16*bits) {
            __builtin_prefetch(next, 0, 2);
            const uint8_t * row = dot->codes + R*row_size + 4*x;
            uint8x16_t z[3];
            int8x16_t  c[4], v[2];
            for (int i = 0; i < n; ++i) {
                v[i] = vld1q_s8(dot->pair[i] + 8*R);
            }
            load_words(bits, pass, row, X, z);
            codes_of(bits, pass, z, c);
            for (int j = 0; j < 4; ++j) {
                for (int i = 0; i < n; ++i) {
                    sum[i][0][j] = vdotq_laneq_s32(sum[i][0][j], c[j], v[i], 0);
                    sum[i][1][j] = vdotq_laneq_s32(sum[i][1][j], c[j], v[i], 2);
                }
            }
            load_words(bits, pass, row + row_size, X, z);
            codes_of(bits, pass, z, c);
            for (int j = 0; j < 4; ++j) {
                for (int i = 0; i < n; ++i) {
                    sum[i][0][j] = vdotq_laneq_s32(sum[i][0][j], c[j], v[i], 1);
                    sum[i][1][j] = vdotq_laneq_s32(sum[i][1][j], c[j], v[i], 3);
                }
            }
        }
        for (int i = 0; i < 2*n; ++i) {
            for (int j = 0; j < 4; ++j) {
                const int32x4_t s = vshlq_s32(sum[i/2][i%2][j], vdupq_n_s32(-shift_of(bits, pass, j)));
                store_sums(dot->acc[i] + free_of(bits, pass, j, x, X), s, X - x);
            }
        }
    }
}

DOTPROD static inline __attribute__((always_inline))
void dot_dotprod_n(int bits, const int n, const struct dot * dot) {
    switch (bits) {
        case 2:  dot_dotprod_pass(2, 0, n, dot); break;
        case 3:  dot_dotprod_pass(3, 0, n, dot);
                 dot_dotprod_pass(3, 1, n, dot); break;
        default: dot_dotprod_pass(4, 0, n, dot); break;
    }
}

DOTPROD static void dot_dotprod(int bits, int n, const struct dot * dot) {
    switch (n) {
        case 1:  dot_dotprod_n(bits, 1, dot); break;
        default: dot_dotprod_n(bits, 2, dot); break;
    }
}

#endif

// --- SMMLA: up to four pairs, 32 products an instruction ---

#if defined(I8MM)

// The zipped words of two rows are two halves of two free indices each: from half `first` on, `halves` of them.
I8MM static inline __attribute__((always_inline))
void dot_i8mm_pass(const int bits, const int pass, const int first, const int halves, const int n, const struct dot * dot) {
    const int X        = words_of(bits, dot->F);
    const int row_size = dot->F*bits/2;
    const uint8_t * next = next_of(pass, dot);

    for (int x = 0; x < X; x += strip_of(bits)) {
        int32x4_t sum[PAIRS][2][4];
        for (int i = 0; i < n; ++i) {
            for (int j = 0; j < 4; ++j) {
                sum[i][0][j] = sum[i][1][j] = vdupq_n_s32(0);
            }
        }
        for (int R = 0; R < dot->n_r/4; R += 2, next += 16*bits) {
            __builtin_prefetch(next, 0, 2);
            const uint8_t * row = dot->codes + R*row_size + 4*x;
            uint8x16_t even[3], odd[3], z[3];
            int8x16_t  c[4], v[PAIRS];
            for (int i = 0; i < n; ++i) {
                v[i] = vld1q_s8(dot->pair[i] + 8*R);
            }
            load_words(bits, pass, row,            X, even);
            load_words(bits, pass, row + row_size, X, odd);
            for (int h = 0; h < halves; ++h) {
                for (int k = 0; k < 3; ++k) {
                    const uint32x4_t e = vreinterpretq_u32_u8(even[k]), o = vreinterpretq_u32_u8(odd[k]);
                    z[k] = vreinterpretq_u8_u32(first + h == 0 ? vzip1q_u32(e, o) : vzip2q_u32(e, o));
                }
                codes_of(bits, pass, z, c);
                for (int j = 0; j < 4; ++j) {
                    for (int i = 0; i < n; ++i) {
                        sum[i][h][j] = vmmlaq_s32(sum[i][h][j], c[j], v[i]);
                    }
                }
            }
        }
        for (int j = 0; j < 4; ++j) {
            const int32x4_t shift = vdupq_n_s32(-shift_of(bits, pass, j));
            const int f    = free_of(bits, pass, j, x, X) + 2*first;
            const int left = halves == 2 ? X - x : 2;
            for (int i = 0; i < n && X - x > 2*first; ++i) {
                const int32x4_t s0 = sum[i][0][j], s1 = sum[i][halves - 1][j];
                store_sums(dot->acc[2*i    ] + f, vshlq_s32(vuzp1q_s32(s0, s1), shift), left);
                store_sums(dot->acc[2*i + 1] + f, vshlq_s32(vuzp2q_s32(s0, s1), shift), left);
            }
        }
    }
}

// Both halves at once as long as their sums fit into the registers.
I8MM static inline __attribute__((always_inline)) void dot_i8mm_n(const int bits, const int pass, int n, const struct dot * dot) {
    switch (n) {
        case 1:  dot_i8mm_pass(bits, pass, 0, 2, 1, dot); break;
        case 2:  dot_i8mm_pass(bits, pass, 0, 2, 2, dot); break;
        case 3:  dot_i8mm_pass(bits, pass, 0, 1, 3, dot);
                 dot_i8mm_pass(bits, pass, 1, 1, 3, dot); break;
        default: dot_i8mm_pass(bits, pass, 0, 1, 4, dot);
                 dot_i8mm_pass(bits, pass, 1, 1, 4, dot); break;
    }
}

I8MM static void dot_i8mm(int bits, int n, const struct dot * dot) {
    switch (bits) {
        case 2:  dot_i8mm_n(2, 0, n, dot); break;
        case 3:  dot_i8mm_n(3, 0, n, dot);
                 dot_i8mm_n(3, 1, n, dot); break;
        default: dot_i8mm_n(4, 0, n, dot); break;
    }
}

#endif

#endif
