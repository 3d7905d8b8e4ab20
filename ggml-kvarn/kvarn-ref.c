// kvarn-ref.c - the values of a KVarN tile: this file defines what seal, unseal and attend compute.
// Plain C11. Every backend and reference.py must give the same tile bytes, so the order of every sum is part of the definition:
//   sums over tokens    f32, one accumulator per channel, t = 0, 1, .. 127
//   sums over channels  f32, 16 lanes: lane j adds d = j, j + 16, ..; then lanes j and j + 8, j and j + 4, j and j + 2, 0 and 1
// Only + - * / and sqrt of f32, each rounded to nearest even by itself: no fused multiply-add, no fast-math.
//
// SPDX-License-Identifier: MIT

#include "kvarn.h"

#include <math.h>
#include <string.h>

// a*b + c must never become one rounding
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC optimize ("fp-contract=off", "no-math-errno", "no-trapping-math")
#elif defined(_MSC_VER)
#pragma fp_contract (off)
#endif

#include "kvarn-f16.h"
#include "kvarn-sums.h"

// The library is built without -march: compile the hot functions for several and pick at load time. Same arithmetic, same bytes.
// The thread sanitizer is not yet there at load time.
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__AVX2__) && !defined(__SANITIZE_THREAD__)
#if defined(__clang__) && __clang_major__ >= 16
#define KVARN_CLONES __attribute__((target_clones("avx2", "default")))
#elif !defined(__clang__) && __GNUC__ >= 12
#define KVARN_CLONES __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#elif !defined(__clang__) && __GNUC__ >= 9
#define KVARN_CLONES __attribute__((target_clones("avx2", "default")))
#endif
#endif
#if !defined(KVARN_CLONES)
#define KVARN_CLONES
#endif

#define G KVARN_G

enum {
    ROUNDS = 4, // of alternating least squares
    ROWS   = 4, // tokens that a walk takes at a time: fewer loads and stores of its sums
};

static const float X_MAX     = 65504.0f;       // largest finite f16
static const float RMS_MIN   = 0x1p-40f;       // a tile below this is all zero
static const float STD_MIN   = 0x1p-10f;       // floor of a token or channel scale, in units of the tile's rms
static const float TINY      = 0x1p-60f;       // steps and token scales below this count as 0
static const float FIT_MIN   = 1e-5f;          // share of its second moment below which a variance is rounding noise
static const float AGREE     = 2.0f;           // two rows agree where the square of their cosine is at least 1/2
static const float ROUND_INT = 12582912.0f;    // 1.5*2^23: adding and subtracting it rounds to an integer, ties to even

// where the rounds begin: a share of [min, max], for 2, 3 and 4 bits
static const float RANGE[3] = { 0.64f, 0.80f, 0.92f };

KVARN_INLINE float max_f32(float a, float b) { return a > b ? a : b; }
KVARN_INLINE float min_f32(float a, float b) { return a < b ? a : b; }

// --- f16, little-endian in the tile ---

KVARN_INLINE void f16_store(uint8_t * p, float v) {
    const uint32_t h = f16_bits(v);
    p[0] = (uint8_t) h;
    p[1] = (uint8_t) (h >> 8);
}

KVARN_INLINE float f16_load(const uint8_t * p) { return f16_value((uint32_t) p[0] | (uint32_t) p[1] << 8); }

// sample variance of n values from their sum and sum of squares
KVARN_INLINE float variance(float sum, float sum2, float n) {
    return max_f32((sum2 - sum*(sum/n))/(n - 1.0f), 0.0f);
}

// --- seal ---

// NaN as 0, the rest clamped to what f16 holds; on the bits, where a compiler needs no branches
KVARN_INLINE float sanitized(float v) {
    uint32_t u = f32_bits(v) & 0x7fffffffu;
    u = u > 0x7f800000u ? 0 : u;
    u = u > 0x477fe000u ? 0x477fe000u : u;
    return bits_f32((f32_bits(v) & 0x80000000u) | u);
}

// Step 1. y = x/rms with NaN as 0 and the rest clamped; returns rms, or 0 for a tile that counts as zero.
KVARN_INLINE float seal_prepare(int D, const float * restrict x, float * restrict y, const float * one, float * restrict sum2) {
    memset(sum2, 0, (size_t) D*sizeof(float));
    for (int t = 0; t < G; ++t) {
        for (int d = 0; d < D; ++d) {
            const float v = sanitized(x[t*D + d]);
            y[t*D + d] = v;
            sum2[d] += v*v;
        }
    }
    float all, unused;
    row_dots(D, sum2, one, &all, &unused);
    const float rms = sqrtf(all/(float) (G*D));
    if (!(rms >= RMS_MIN)) {
        return 0.0f;
    }
    const float r = 1.0f/rms;
    for (int i = 0; i < G*D; ++i) {
        y[i] *= r;
    }
    return rms;
}

// standard deviation of a token's channels, at least STD_MIN
KVARN_INLINE float row_std(int D, const float * v, const float * one) {
    float sum, sum2;
    row_dots(D, v, one, &sum, &sum2);
    return max_f32(sqrtf(variance(sum, sum2, (float) D)), STD_MIN);
}

// Step 2. Variance normalization: in y[t][d]/tok[t]/(channel scale) all tokens and all channels have the same spread, nearly.
// Token scales alone, channel scales for these, token scales for those. The channel scales end here: scale and zero absorb them.
KVARN_INLINE void seal_normalize(int D, const float * restrict y, const float * one, float * restrict tok, float * vec) {
    float * restrict rc   = vec;           // 1/channel scale
    float * restrict v    = vec + D;
    float * restrict ref  = vec + 2*D;     // about the channel's mean: keeps the sums of squares small
    float * restrict sum  = vec + 3*D;
    float * restrict sum2 = vec + 4*D;
    memset(ref, 0, (size_t) (3*D)*sizeof(float));
    for (int t = 0; t < G; ++t) {
        for (int d = 0; d < D; ++d) {
            ref[d] += y[t*D + d]*(1.0f/G);
        }
    }
    for (int t = 0; t < G; ++t) {
        const float * restrict yt = y + t*D;
        tok[t] = row_std(D, yt, one);
        const float r = 1.0f/tok[t];
        for (int d = 0; d < D; ++d) {
            const float c = yt[d]*r - ref[d];
            sum [d] += c;
            sum2[d] += c*c;
        }
    }
    for (int d = 0; d < D; ++d) {
        rc[d] = 1.0f/max_f32(sqrtf(variance(sum[d], sum2[d], G)), STD_MIN);
    }
    for (int t = 0; t < G; ++t) {
        for (int d = 0; d < D; ++d) {
            v[d] = y[t*D + d]*rc[d];
        }
        tok[t] = row_std(D, v, one);
    }
}

// Codes of one row in f32: round((y/tok - zero)/scale), clamped; r = 1/tok, inv = 1/scale, off = -zero/scale
KVARN_INLINE void row_codes(int D, float L, const float * restrict y, float r, const float * restrict inv,
                            const float * restrict off, float * restrict q) {
    for (int d = 0; d < D; ++d) {
        float v = y[d]*r*inv[d] + off[d];
        v = v > 0.0f ? v : 0.0f;
        v = v < L ? v : L;
        q[d] = v + ROUND_INT - ROUND_INT;
    }
}

KVARN_INLINE float reciprocal(float v) { return v > TINY ? 1.0f/v : 0.0f; }

// A code is round(inv*y/tok + off); scale 0 has code 0
KVARN_INLINE void code_line(int D, float h, const float * restrict scale, const float * restrict mid, float * restrict inv,
                            float * restrict off) {
    for (int d = 0; d < D; ++d) {
        inv[d] = reciprocal(scale[d]);
        off[d] = inv[d] > 0.0f ? h - mid[d]*inv[d] : 0.0f;
    }
}

// The sums of seal_walk, for four tokens at a time: fewer loads and stores. Compilers do not vectorize this as a loop over tokens.
KVARN_INLINE void walk_add(int D, const float * restrict y, const float * restrict q, const float * restrict w, float * restrict fit) {
    float * restrict cc = fit;
    float * restrict cw = fit + D;
    float * restrict cy = fit + 2*D;
    float * restrict wy = fit + 3*D;
    const float w0 = w[0], w1 = w[1], w2 = w[2], w3 = w[3];
    for (int d = 0; d < D; ++d) {
        const float y0 = y[d], y1 = y[D + d], y2 = y[2*D + d], y3 = y[3*D + d];
        const float c0 = q[d]*w0, c1 = q[D + d]*w1, c2 = q[2*D + d]*w2, c3 = q[3*D + d]*w3;
        cc[d] = cc[d] + c0*c0 + c1*c1 + c2*c2 + c3*c3;
        cw[d] = cw[d] + c0*w0 + c1*w1 + c2*w2 + c3*w3;
        cy[d] = cy[d] + c0*y0 + c1*y1 + c2*y2 + c3*y3;
        wy[d] = wy[d] + w0*y0 + w1*y1 + w2*y2 + w3*y3;
    }
}

// Step 3. One walk over the tile: the codes for scale and mid, for these codes the least-squares scale of each token, and for both the
// sums of the next fit of scale and mid,
//   y[t][d] ~ tok[t]*((code - h)*scale[d] + mid[d]),   h = half of the largest code
//   fit   out: [5][D], sums over t of (tok*(code - h))^2, tok^2*(code - h), tok*(code - h)*y, tok*y, and once tok^2
KVARN_INLINE void seal_walk(int D, float L, const float * restrict y, float * restrict tok,
                            const float * restrict scale, const float * restrict mid, float * vec, float * fit) {
    float * restrict inv = vec;
    float * restrict off = vec + D;
    float * restrict v   = vec + 2*D;
    float * restrict q   = vec + 3*D;      // of ROWS tokens
    const float h = 0.5f*L;
    float ww = 0.0f;
    memset(fit, 0, (size_t) (5*D)*sizeof(float));
    code_line(D, h, scale, mid, inv, off);
    for (int t = 0; t < G; t += ROWS) {
        const float * restrict yt = y + t*D;
        float * restrict w = tok + t;
        for (int i = 0; i < ROWS; ++i) {
            float * restrict qi = q + i*D;
            row_codes(D, L, yt + i*D, reciprocal(w[i]), inv, off, qi);
            for (int d = 0; d < D; ++d) {
                qi[d] -= h;
                v[d] = qi[d]*scale[d] + mid[d];
            }
            float yv, vv;
            row_dots(D, v, yt + i*D, &yv, &vv);
            w[i] = yv > 0.0f && vv > 0.0f ? min_f32(yv/vv, X_MAX) : 0.0f;
            ww += w[i]*w[i];
        }
        walk_add(D, yt, q, w, fit);
    }
    fit[4*D] = ww > 0.0f ? ww : 1.0f;
}

// least-squares scale of channel d
KVARN_INLINE float fit_scale(int D, const float * fit, int d) {
    const float m   = fit[D + d]/fit[4*D];
    const float cov = fit[2*D + d] - m*fit[3*D + d];
    const float var = fit[d] - m*fit[D + d];
    return cov > 0.0f && var > FIT_MIN*fit[d] ? cov/var : 0.0f;
}

KVARN_INLINE float fit_mid(int D, const float * fit, int d, float scale) {
    return (fit[3*D + d] - scale*fit[D + d])/fit[4*D];
}

// Step 4. Scale and mid of each channel, from a range of y/tok and then by rounds of alternating least squares with the token scales.
// On return scale and mid are f32; fit holds the sums of one more walk, for their codes and the token scales of these.
KVARN_INLINE void seal_fit(int D, int bits, const float * restrict y, float * restrict tok, float * restrict scale,
                           float * restrict mid, float * vec, float * fit) {
    const float L = (float) ((1 << bits) - 1);
    float * restrict lo = vec;
    float * restrict hi = vec + D;

    for (int d = 0; d < D; ++d) {
        lo[d] = INFINITY;
        hi[d] = -INFINITY;
    }
    for (int t = 0; t < G; ++t) {
        const float r = reciprocal(tok[t]);
        for (int d = 0; d < D; ++d) {
            const float v = y[t*D + d]*r;
            lo[d] = min_f32(lo[d], v);
            hi[d] = max_f32(hi[d], v);
        }
    }
    const float share = RANGE[bits - 2]/L;
    for (int d = 0; d < D; ++d) {
        scale[d] = (hi[d] - lo[d])*share;
        mid  [d] = (hi[d] + lo[d])*0.5f;
    }
    for (int k = 0; k < ROUNDS; ++k) {
        seal_walk(D, L, y, tok, scale, mid, vec, fit);
        for (int d = 0; d < D; ++d) {
            scale[d] = fit_scale(D, fit, d);
            mid  [d] = fit_mid(D, fit, d, scale[d]);
        }
    }
    seal_walk(D, L, y, tok, scale, mid, vec, fit);
}

// Step 5. Least squares makes what it fits smaller, by the share of the noise: cov/var of y and the codes c of a channel. What is
// rare in a channel and what a query looks for would lose most. So the scales to store are, for the same codes,
//   keys     var(y)/cov: along itself a channel is as large as it was, on average
//   values   sqrt(var(y)/var(c)): a channel keeps its spread
//   both     least squares where y and c hardly agree
KVARN_INLINE void seal_restore(int side, int D, const float * restrict y, const float * restrict tok, const float * restrict mid,
                               const float * restrict fit, float * restrict spread, float * restrict stored) {
    memset(spread, 0, (size_t) D*sizeof(float));
    for (int t = 0; t < G; ++t) {
        for (int d = 0; d < D; ++d) {
            const float u = y[t*D + d] - tok[t]*mid[d];        // about mid: keeps the squares small
            spread[d] += u*u;
        }
    }
    const float ww = fit[4*D];
    for (int d = 0; d < D; ++d) {
        const float m   = fit[D + d]/ww;
        const float cov = fit[2*D + d] - m*fit[3*D + d];
        const float var = fit[d] - m*fit[D + d];
        const float b   = fit[3*D + d] - mid[d]*ww;
        const float own = spread[d] - b*(b/ww);
        stored[d] = fit_scale(D, fit, d);
        if (stored[d] > 0.0f && AGREE*cov*cov >= own*var) {
            stored[d] = side == KVARN_KEY ? own/cov : sqrtf(own/var);
        }
    }
}

// Step 6. Scale and zero to f16, the codes, token scales for exactly these.
//   keys     y.y/y.c: a key keeps its length along itself, so that scores do not shrink
//   values   |y|/|c|: a value keeps its length
//   both     y.c/c.c, least squares, where y and c hardly agree
KVARN_INLINE void seal_round(int side, int D, int bits, float rms, const float * restrict y, float * restrict tok,
                             const float * restrict scale, const float * restrict mid, float * restrict stored, float * vec,
                             const float * restrict fit, uint8_t * restrict code, uint8_t * tile) {
    const float L = (float) ((1 << bits) - 1);
    const float h = 0.5f*L;
    float * restrict inv  = vec;
    float * restrict off  = vec + D;
    float * restrict q    = vec + 2*D;
    float * restrict v    = vec + 3*D;
    float * restrict zero = vec + 4*D;

    float t_max = 0.0f;
    float c_max = 0.0f;
    for (int t = 0; t < G; ++t) {
        t_max = max_f32(t_max, tok[t]);
    }
    for (int d = 0; d < D; ++d) {
        c_max = max_f32(c_max, max_f32(stored[d], fabsf(fit_mid(D, fit, d, stored[d]) - h*stored[d])));
    }
    int e;
    (void) frexpf(t_max, &e);
    float f = ldexpf(1.0f, e);             // power of two that moves to scale and zero: leaves token scales of 1 at most
    while (c_max*rms*f > X_MAX) {          // unless scale or zero would leave f16
        f *= 0.5f;
    }
    const float unit = rms*f;
    c_max = 0.0f;
    for (int d = 0; d < D; ++d) {
        stored[d] = f16_value(f16_bits(stored[d]*unit));
        zero  [d] = f16_value(f16_bits(fit_mid(D, fit, d, stored[d]/unit)*unit - h*stored[d]));
        c_max     = max_f32(c_max, max_f32(stored[d], fabsf(zero[d])));
    }
    code_line(D, h, scale, mid, inv, off);

    t_max = 0.0f;
    for (int t = 0; t < G; ++t) {
        const float * restrict yt = y + t*D;
        row_codes(D, L, yt, reciprocal(tok[t]), inv, off, q);
        for (int d = 0; d < D; ++d) {
            v[d] = q[d]*stored[d] + zero[d];
            code[t*D + d] = (uint8_t) (int) q[d];
        }
        float yc, cc, yy, unused;
        row_dots(D, v, yt, &yc, &cc);
        row_dots(D, yt, yt, &yy, &unused);
        float r = yc > 0.0f && cc > 0.0f ? yc/cc : 0.0f;
        if (r > 0.0f && AGREE*yc*yc >= yy*cc) {
            r = side == KVARN_KEY ? yy/yc : sqrtf(yy/cc);
        }
        tok[t] = r*rms;
        t_max  = max_f32(t_max, tok[t]);
    }

    f = 1.0f;
    while (t_max > f && 2.0f*f*c_max <= X_MAX) {               // moves a power of two again: exact
        f *= 2.0f;
    }
    for (int d = 0; d < D; ++d) {
        f16_store(tile + kvarn_scale_off(D, bits) + 2*d, stored[d]*f);
        f16_store(tile + kvarn_zero_off (D, bits) + 2*d, zero [d]*f);
    }
    for (int t = 0; t < G; ++t) {
        f16_store(tile + kvarn_token_off(D, bits) + 2*t, tok[t]/f);
    }
}

// --- codes to bytes and back: one group of four contracted indices, whose codes for free index f are the bytes of w[f] ---

// where byte k of a word in memory lies inside its integer value
KVARN_INLINE int byte_shift(int k) {
    const uint32_t one = 1;
    uint8_t first;
    memcpy(&first, &one, 1);
    return first ? 8*k : 24 - 8*k;
}

// Fields never cross a byte, so whole words can be shifted whatever the byte order of the machine.
// Slot s lies s*bits up in its byte; with 3 bits two slots to a plane, and slots 6 and 7 in what the planes leave over.
KVARN_INLINE void group_pack(int bits, int F, const uint32_t * restrict w, uint8_t * restrict group) {
    const int X = bits == 3 ? F/8 : F*bits/8;
    const int S = bits == 3 ? 6   : 8/bits;
    const int P = bits == 3 ? 2   : 8/bits; // slots of a plane
    uint32_t out[KVARN_D_MAX/2] = { 0 };
    for (int s = 0; s < S; ++s) {
        for (int x = 0; x < X; ++x) {
            out[x + s/P*X] |= w[x + s*X] << s%P*bits;
        }
    }
    for (int x = 0; x < X && bits == 3; ++x) {
        const uint32_t c6 = w[x + 6*X];
        const uint32_t c7 = w[x + 7*X];
        out[x      ] |= (c6 & 0x06060606u) << 5;
        out[x +   X] |= (c6 & 0x01010101u) << 7 | (c7 & 0x04040404u) << 4;
        out[x + 2*X] |= (c7 & 0x03030303u) << 6;
    }
    memcpy(group, out, (size_t) (F*bits/2));
}

KVARN_INLINE void group_unpack(int bits, int F, const uint8_t * restrict group, uint32_t * restrict w) {
    const int X = bits == 3 ? F/8 : F*bits/8;
    const int S = bits == 3 ? 6   : 8/bits;
    const int P = bits == 3 ? 2   : 8/bits;
    const uint32_t mask = 0x01010101u*((1u << bits) - 1);
    uint32_t in[KVARN_D_MAX/2];
    memcpy(in, group, (size_t) (F*bits/2));
    for (int s = 0; s < S; ++s) {
        for (int x = 0; x < X; ++x) {
            w[x + s*X] = in[x + s/P*X] >> s%P*bits & mask;
        }
    }
    for (int x = 0; x < X && bits == 3; ++x) {
        const uint32_t a = in[x];
        const uint32_t b = in[x + X];
        const uint32_t c = in[x + 2*X];
        w[x + 6*X] = (a >> 5 & 0x06060606u) | (b >> 7 & 0x01010101u);
        w[x + 7*X] = (b >> 4 & 0x04040404u) | (c >> 6 & 0x03030303u);
    }
}

// Step 7. code[t][d], one per byte, to the codes of the tile
KVARN_INLINE void seal_pack(int side, int D, int bits, const uint8_t * restrict code, uint8_t * restrict tile) {
    uint32_t w[KVARN_D_MAX];
    if (side == KVARN_KEY) {
        for (int R = 0; R < D/4; ++R) {
            for (int t = 0; t < G; ++t) {
                memcpy(w + t, code + t*D + 4*R, 4);
            }
            group_pack(bits, G, w, tile + R*(G*bits/2));
        }
    } else {
        for (int R = 0; R < G/4; ++R) {
            const uint8_t * restrict c = code + 4*R*D;
            for (int d = 0; d < D; ++d) {
                w[d] = (uint32_t) c[d] << byte_shift(0) | (uint32_t) c[d + D] << byte_shift(1) |
                       (uint32_t) c[d + 2*D] << byte_shift(2) | (uint32_t) c[d + 3*D] << byte_shift(3);
            }
            group_pack(bits, D, w, tile + R*(D*bits/2));
        }
    }
}

int kvarn_format_version(void) { return KVARN_FORMAT_VERSION; }

int kvarn_tile_bytes(int D, int bits) { return kvarn_is_valid(D, bits) ? kvarn_tile_size(D, bits) : 0; }

enum { VECTORS = 16 }; // channel vectors in the scratch memory, behind the tile in f32 and before its codes in bytes

int kvarn_seal_scratch(int D) { return G*D + VECTORS*D + G*D/4; }

KVARN_CLONES
void kvarn_seal_ref(int side, int bits, int D, const float * x, uint8_t * tile, float * scratch) {
    float * y = scratch, * scale = y + G*D, * mid = scale + D, * stored = mid + D, * one = stored + D, * fit = one + D;
    float * vec = fit + 5*D;
    uint8_t * code = (uint8_t *) (y + G*D + VECTORS*D);
    float tok[G];

    for (int d = 0; d < D; ++d) { one[d] = 1.0f; }
    const float rms = seal_prepare(D, x, y, one, vec);
    if (rms == 0.0f) {
        memset(tile, 0, (size_t) kvarn_tile_size(D, bits));
        return;
    }
    seal_normalize(D, y, one, tok, vec);
    seal_fit(D, bits, y, tok, scale, mid, vec, fit);
    seal_restore(side, D, y, tok, mid, fit, vec, stored);
    seal_round(side, D, bits, rms, y, tok, scale, mid, stored, vec, fit, code, tile);
    seal_pack(side, D, bits, code, tile);
}

// --- unseal ---

enum { CHUNK = 64 }; // channels whose codes are turned from one group of four to one token

KVARN_CLONES
void kvarn_unseal_ref(int side, int bits, int D, const uint8_t * tile, float * x) {
    float scale[KVARN_D_MAX];
    float zero [KVARN_D_MAX];
    uint32_t w [KVARN_D_MAX];
    const uint8_t * token = tile + kvarn_token_off(D, bits);
    for (int d = 0; d < D; ++d) {
        scale[d] = f16_load(tile + kvarn_scale_off(D, bits) + 2*d);
        zero [d] = f16_load(tile + kvarn_zero_off (D, bits) + 2*d);
    }
    if (side == KVARN_KEY) {
        uint8_t code[G*CHUNK];
        for (int d0 = 0; d0 < D; d0 += CHUNK) {
            const int n = D - d0 < CHUNK ? D - d0 : CHUNK;
            for (int d = 0; d < n; d += 4) {
                group_unpack(bits, G, tile + (d0 + d)/4*(G*bits/2), w);
                for (int t = 0; t < G; ++t) {
                    memcpy(code + t*CHUNK + d, w + t, 4);
                }
            }
            for (int t = 0; t < G; ++t) {
                const float tok = f16_load(token + 2*t);
                for (int d = 0; d < n; ++d) {
                    x[t*D + d0 + d] = ((float) code[t*CHUNK + d]*scale[d0 + d] + zero[d0 + d])*tok;
                }
            }
        }
    } else {
        for (int R = 0; R < G/4; ++R) {
            group_unpack(bits, D, tile + R*(D*bits/2), w);
            for (int k = 0; k < 4; ++k) {
                const int   t   = 4*R + k;
                const float tok = f16_load(token + 2*t);
                for (int d = 0; d < D; ++d) {
                    x[t*D + d] = ((float) (int) (w[d] >> byte_shift(k) & 0xff)*scale[d] + zero[d])*tok;
                }
            }
        }
    }
}

// --- attend ---

static int code_at(int bits, int F, int r, int f, const uint8_t * tile) {
    int code = 0;
    for (int i = 0; i < bits; ++i) {
        const int at = kvarn_code_bit(bits, F, r, f, i);
        code |= (tile[at/8] >> at%8 & 1) << i;
    }
    return code;
}

// Codes are contracted as integers; scale, zero and token enter once per channel or token:
//   score(t) = token[t]*(sum_d (q[d]*scale[d])*code(t,d) + sum_d q[d]*zero[d])
//   out[d]   = scale[d]*(sum_t (p[t]*token[t])*code(t,d)) + zero[d]*sum_t p[t]*token[t]
// The softmax is online over tiles: when a tile raises the maximum, what is summed so far is scaled down.
void kvarn_attend_ref(int bits_k, int bits_v, int D, int n_q, int n_tiles, const float * q,
                      const uint8_t * k, const uint8_t * v, float scale, float * out) {
    double acc[KVARN_D_MAX];
    double qs [KVARN_D_MAX];
    double p  [G];
    for (int iq = 0; iq < n_q; ++iq) {
        double max = (double) -INFINITY;
        double sum = 0.0;
        memset(acc, 0, sizeof(acc));
        for (int i = 0; i < n_tiles; ++i) {
            const uint8_t * kt = k + (size_t) i*(size_t) kvarn_tile_size(D, bits_k);
            const uint8_t * vt = v + (size_t) i*(size_t) kvarn_tile_size(D, bits_v);
            double qz = 0.0;
            for (int d = 0; d < D; ++d) {
                const double qd = (double) q[iq*D + d]*(double) scale;
                qs[d] = qd*(double) f16_load(kt + kvarn_scale_off(D, bits_k) + 2*d);
                qz   += qd*(double) f16_load(kt + kvarn_zero_off (D, bits_k) + 2*d);
            }
            double tile_max = max;
            for (int t = 0; t < G; ++t) {
                double s = qz;
                for (int d = 0; d < D; ++d) {
                    s += qs[d]*code_at(bits_k, G, d, t, kt);
                }
                p[t] = s*(double) f16_load(kt + kvarn_token_off(D, bits_k) + 2*t);
                tile_max = p[t] > tile_max ? p[t] : tile_max;
            }
            const double shrink = exp(max - tile_max);
            max  = tile_max;
            sum *= shrink;
            double pz = 0.0;
            for (int t = 0; t < G; ++t) {
                p[t]  = exp(p[t] - max);
                sum  += p[t];
                p[t] *= (double) f16_load(vt + kvarn_token_off(D, bits_v) + 2*t);
                pz   += p[t];
            }
            for (int d = 0; d < D; ++d) {
                double s = 0.0;
                for (int t = 0; t < G; ++t) {
                    s += p[t]*code_at(bits_v, D, t, d, vt);
                }
                acc[d] = acc[d]*shrink + s*(double) f16_load(vt + kvarn_scale_off(D, bits_v) + 2*d)
                                       + pz*(double) f16_load(vt + kvarn_zero_off(D, bits_v) + 2*d);
            }
        }
        for (int d = 0; d < D; ++d) {
            out[iq*D + d] = n_tiles > 0 ? (float) (acc[d]/sum) : 0.0f;
        }
    }
}
