// kvarn-x86-seal.h - kvarn_seal_ref in vectors of W channels: the same operations on the same numbers in the same order, so the
// same bytes. kvarn-ref.c says what the steps are for; here stands only what is done differently.
//
// SPDX-License-Identifier: MIT
//
// Included last by kvarn-x86.c (W = 8) and kvarn-x86-avx512.c (W = 16), which define vec, V_FN and the functions v_.. of their
// instructions. + - * / of two vec are the compiler's.
//
// Tokens are taken ROWS at a time. First the sums over their channels, which give their token scales; then, while the rows are
// still in the L1 cache, what these scales are needed for: the sums over tokens, in the order of the tokens.
//
//   channels ->  | d 0..15 | 16..31 | ..                     sums over channels: 16 lanes, here LV vectors, see kvarn-ref.c
//   row t        |    y    |   y    | ..   -> tok[t]
//   ..  t+3      |    y    |   y    | ..   -> tok[t+3]
//                     |         |
//                  fit[d] += t, t+1, t+2, t+3                sums over tokens: one lane per channel

// a*b + c must never become one rounding
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#else
#pragma GCC optimize ("fp-contract=off", "no-math-errno", "no-trapping-math")
#endif

enum {
    ROWS = 4,
    LV   = 16/W,       // vectors of the 16 lanes of a sum over channels
    STEP = ROWS/LV,    // tokens whose two sums over channels fit in registers
    SEAL_BLOCK = 4,    // vectors of sums over tokens that stay in registers while all rows pass
};

static const float X_MAX     = 65504.0f;
static const float RMS_MIN   = 0x1p-40f;
static const float STD_MIN   = 0x1p-10f;
static const float TINY      = 0x1p-60f;
static const float FIT_MIN   = 1e-5f;
static const float AGREE     = 2.0f;
static const float RANGE[3]  = { 0.64f, 0.80f, 0.92f };

// What is known per channel, [D] each, and of the tile so far.
struct seal {
    int     side, bits, D;
    float   L, h;                               // largest code, half of it
    float   rms;
    float * y;                                  // [G][D], x/rms
    float * scale, * mid, * stored, * zero;
    float * inv, * off;                         // a code is round(inv*y/tok + off)
    float * cc, * cw, * cy, * wy, * spread;     // sums over tokens
    float   ww;
    float * q;                                  // [2*ROWS][D], codes - h
    uint8_t * code;                             // [G][D]
    float   tok[G], r[G], yy[G];                // token scales, 1/token scale, y.y
};

V_FN __m128 tiny_reciprocal(__m128 v) {
    return _mm_and_ps(_mm_cmpgt_ps(v, _mm_set1_ps(TINY)), _mm_div_ps(_mm_set1_ps(1.0f), v));
}

V_FN void v_zero(vec a[STEP][LV]) {
    EACH(k, STEP) {
        EACH(j, LV) {
            a[k][j] = v_set(0.0f);
        }
    }
}

V_FN float largest_of(int n, const float * x) {
    float max = 0.0f;
    for (int i = 0; i < n; ++i) {
        max = x[i] > max ? x[i] : max;
    }
    return max;
}

// --- steps 1 and 2: prepare, normalize ---

V_FN void prepare_block(const int n, int D, const float * x, float * y, float * sum2) {
    vec s[SEAL_BLOCK];
    EACH(i, n) {
        s[i] = v_set(0.0f);
    }
    for (int t = 0; t < G; ++t) {
        EACH(i, n) {
            const vec v = v_sanitized(v_load(x + t*D + i*W));
            v_store(y + t*D + i*W, v);
            s[i] += v*v;
        }
    }
    EACH(i, n) {
        v_store(sum2 + i*W, s[i]);
    }
}

V_FN void spread_block(const int n, int D, const float * y, const float * r, const float * ref, float * sum, float * sum2) {
    vec a[SEAL_BLOCK], s[SEAL_BLOCK], s2[SEAL_BLOCK];
    EACH(i, n) {
        a[i] = v_load(ref + i*W);
        s[i] = s2[i] = v_set(0.0f);
    }
    for (int t = 0; t < G; ++t) {
        const vec rt = v_set(r[t]);
        EACH(i, n) {
            const vec c = v_load(y + t*D + i*W)*rt - a[i];
            s [i] += c;
            s2[i] += c*c;
        }
    }
    EACH(i, n) {
        v_store(sum  + i*W, s [i]);
        v_store(sum2 + i*W, s2[i]);
    }
}

// standard deviations of ROWS tokens' channels, at least STD_MIN, from their sums and sums of squares
V_FN __m128 rows_std(int D, __m128 sum, __m128 sum2) {
    const __m128 n   = _mm_set1_ps((float) D);
    const __m128 var = _mm_max_ps((sum2 - sum*(sum/n))/(n - _mm_set1_ps(1.0f)), _mm_setzero_ps());
    return _mm_max_ps(_mm_sqrt_ps(var), _mm_set1_ps(STD_MIN));
}

// 0 for a tile that counts as zero
V_FN int seal_prepare(struct seal * s, const float * x) {
    const int D = s->D;
    float * ref = s->cc, * sum = s->cw, * sum2 = s->cy, * rc = s->wy;
    int d = 0;
    for (; d + SEAL_BLOCK*W <= D; d += SEAL_BLOCK*W) {
        prepare_block(SEAL_BLOCK, D, x + d, s->y + d, sum2 + d);
    }
    for (; d < D; d += W) {
        prepare_block(1, D, x + d, s->y + d, sum2 + d);
    }
    vec lanes[LV];
    EACH(j, LV) {
        lanes[j] = v_set(0.0f);
    }
    for (d = 0; d < D; d += 16) {
        EACH(j, LV) {
            lanes[j] += v_load(sum2 + d + j*W);
        }
        EACH(j, LV) {
            v_store(ref + d + j*W, v_set(0.0f));
        }
    }
    vec both[2][ROWS][LV];
    EACH(k, ROWS) {
        EACH(j, LV) {
            both[0][k][j] = both[1][k][j] = lanes[j];
        }
    }
    __m128 all, same;
    v_sums(both, &all, &same);
    s->rms = sqrtf(_mm_cvtss_f32(all)/(float) (G*D));
    if (!(s->rms >= RMS_MIN)) {
        return 0;
    }

    const vec scale = v_set(1.0f/s->rms), part = v_set(1.0f/G);
    for (int t = 0; t < G; t += ROWS) {
        vec dots[2][ROWS][LV];
        for (int k0 = 0; k0 < ROWS; k0 += STEP) {
            float * y = s->y + (t + k0)*D;
            vec a[STEP][LV], b[STEP][LV];
            v_zero(a);
            v_zero(b);
            for (d = 0; d < D; d += 16) {
                EACH(j, LV) {
                    vec mean = v_load(ref + d + j*W);
                    EACH(k, STEP) {
                        const vec v = v_load(y + k*D + d + j*W)*scale;
                        v_store(y + k*D + d + j*W, v);
                        mean += v*part;
                        a[k][j] += v;
                        b[k][j] += v*v;
                    }
                    v_store(ref + d + j*W, mean);
                }
            }
            memcpy(dots[0] + k0, a, sizeof(a));
            memcpy(dots[1] + k0, b, sizeof(b));
        }
        __m128 all4, square;
        v_sums(dots, &all4, &square);
        _mm_storeu_ps(s->yy + t, square);
        _mm_storeu_ps(s->r + t, _mm_set1_ps(1.0f)/rows_std(D, all4, square));
    }

    for (d = 0; d + SEAL_BLOCK*W <= D; d += SEAL_BLOCK*W) {
        spread_block(SEAL_BLOCK, D, s->y + d, s->r, ref + d, sum + d, sum2 + d);
    }
    for (; d < D; d += W) {
        spread_block(1, D, s->y + d, s->r, ref + d, sum + d, sum2 + d);
    }
    for (d = 0; d < D; d += W) {
        const vec a = v_load(sum + d), n = v_set((float) G);
        const vec var = v_max((v_load(sum2 + d) - a*(a/n))/(n - v_set(1.0f)), v_set(0.0f));
        v_store(rc + d, v_set(1.0f)/v_max(v_sqrt(var), v_set(STD_MIN)));
    }
    return 1;
}

// The token scales of step 2 and, with them, the ranges where step 4 begins.
V_FN void seal_start(struct seal * s) {
    const int D = s->D;
    const float * rc = s->wy;
    float * lo = s->inv, * hi = s->off;
    for (int d = 0; d < D; d += W) {
        v_store(lo + d, v_set( INFINITY));
        v_store(hi + d, v_set(-INFINITY));
    }
    for (int t = 0; t < G; t += ROWS) {
        const float * y = s->y + t*D;
        vec dots[2][ROWS][LV];
        for (int k0 = 0; k0 < ROWS; k0 += STEP) {
            vec a[STEP][LV], b[STEP][LV];
            v_zero(a);
            v_zero(b);
            for (int d = 0; d < D; d += 16) {
                EACH(j, LV) {
                    const vec c = v_load(rc + d + j*W);
                    EACH(k, STEP) {
                        const vec v = v_load(y + (k0 + k)*D + d + j*W)*c;
                        a[k][j] += v;
                        b[k][j] += v*v;
                    }
                }
            }
            memcpy(dots[0] + k0, a, sizeof(a));
            memcpy(dots[1] + k0, b, sizeof(b));
        }
        __m128 sum, sum2;
        v_sums(dots, &sum, &sum2);
        const __m128 r = tiny_reciprocal(rows_std(D, sum, sum2));
        _mm_storeu_ps(s->r + t, r);
        vec rt[ROWS];
        EACH(k, ROWS) {
            rt[k] = v_set(s->r[t + k]);
        }
        for (int d = 0; d < D; d += W) {
            vec a = v_load(lo + d), b = v_load(hi + d);
            EACH(k, ROWS) {
                const vec v = v_load(y + k*D + d)*rt[k];
                a = v_min(a, v);
                b = v_max(b, v);
            }
            v_store(lo + d, a);
            v_store(hi + d, b);
        }
    }
    const vec share = v_set(RANGE[s->bits - 2]/s->L);
    for (int d = 0; d < D; d += W) {
        const vec a = v_load(lo + d), b = v_load(hi + d);
        v_store(s->scale + d, (b - a)*share);
        v_store(s->mid   + d, (b + a)*v_set(0.5f));
    }
}

// --- steps 3 and 4: walks ---

V_FN void code_line(struct seal * s) {
    for (int d = 0; d < s->D; d += W) {
        const vec scale = v_load(s->scale + d);
        const vec inv   = v_above(scale, v_set(TINY), v_set(1.0f)/scale);
        v_store(s->inv + d, inv);
        v_store(s->off + d, v_above(inv, v_set(0.0f), v_set(s->h) - v_load(s->mid + d)*inv));
    }
}

V_FN vec fit_scale(const struct seal * s, int d) {
    const vec cc = v_load(s->cc + d), cw = v_load(s->cw + d);
    const vec m   = cw/v_set(s->ww);
    const vec cov = v_load(s->cy + d) - m*v_load(s->wy + d);
    const vec var = cc - m*cw;
    return v_above(cov, v_set(0.0f), v_above(var, v_set(FIT_MIN)*cc, cov/var));
}

V_FN vec fit_mid(const struct seal * s, int d, vec scale) {
    return (v_load(s->wy + d) - scale*v_load(s->cw + d))/v_set(s->ww);
}

// Adds tokens t to t + ROWS - 1 to the sums of the next fit; in the last walk also (y - tok*mid)^2.
V_FN void walk_add(struct seal * s, const int is_last, int t) {
    const int D = s->D;
    const float * y = s->y + t*D, * q = s->q + t%(2*ROWS)*D, * mid = s->mid;
    float * cc = s->cc, * cw = s->cw, * cy = s->cy, * wy = s->wy, * spread = s->spread;
    vec w[ROWS];
    EACH(k, ROWS) {
        w[k] = v_set(s->tok[t + k]);
    }
    for (int d = 0; d < D; d += W) {
        vec s0 = v_load(cc + d), s1 = v_load(cw + d), s2 = v_load(cy + d), s3 = v_load(wy + d);
        EACH(k, ROWS) {
            const vec yk = v_load(y + k*D + d);
            const vec c  = v_load(q + k*D + d)*w[k];
            s0 += c*c;
            s1 += c*w[k];
            s2 += c*yk;
            s3 += w[k]*yk;
        }
        v_store(cc + d, s0);
        v_store(cw + d, s1);
        v_store(cy + d, s2);
        v_store(wy + d, s3);
        if (is_last) {
            const vec m = v_load(mid + d);
            vec sum = v_load(spread + d);
            EACH(k, ROWS) {
                const vec u = v_load(y + k*D + d) - w[k]*m;
                sum += u*u;
            }
            v_store(spread + d, sum);
        }
    }
}

// Codes of STEP tokens, and the sums over their channels of v*y and v*v for the values v that these codes stand for.
V_FN void walk_dots(struct coder coder, int D, const float * y, const float * r, const float * inv, const float * off,
                    const float * scale, const float * mid, float * q, vec yv[STEP][LV], vec vv[STEP][LV]) {
    vec a[STEP][LV], b[STEP][LV], rk[STEP];
    v_zero(a);
    v_zero(b);
    EACH(k, STEP) {
        rk[k] = v_set(r[k]);
    }
    for (int d = 0; d < D; d += 16) {
        EACH(j, LV) {
            const int at = d + j*W;
            EACH(k, STEP) {
                const vec yk = v_load(y + k*D + at);
                const vec c  = v_code(coder, yk*rk[k]*v_load(inv + at) + v_load(off + at));
                v_store(q + k*D + at, c);
                const vec v  = c*v_load(scale + at) + v_load(mid + at);
                a[k][j] += v*yk;
                b[k][j] += v*v;
            }
        }
    }
    memcpy(yv, a, sizeof(a));
    memcpy(vv, b, sizeof(b));
}

V_FN void seal_walk(struct seal * s, const int is_last) {
    const int D = s->D;
    code_line(s);
    for (int d = 0; d < D; d += W) {
        v_store(s->cc + d, v_set(0.0f));
        v_store(s->cw + d, v_set(0.0f));
        v_store(s->cy + d, v_set(0.0f));
        v_store(s->wy + d, v_set(0.0f));
        v_store(s->spread + d, v_set(0.0f));
    }
    const struct coder coder = v_coder(s->L);
    float ww = 0.0f;
    for (int t = 0; t < G; t += ROWS) {
        vec dots[2][ROWS][LV];
        for (int k0 = 0; k0 < ROWS; k0 += STEP) {
            walk_dots(coder, D, s->y + (t + k0)*D, s->r + t + k0, s->inv, s->off, s->scale, s->mid, s->q + (t + k0)%(2*ROWS)*D,
                      dots[0] + k0, dots[1] + k0);
        }
        if (t > 0) { // one group later: its token scales are there by now
            walk_add(s, is_last, t - ROWS);
        }
        __m128 yv, vv;
        v_sums(dots, &yv, &vv);
        const __m128 zero = _mm_setzero_ps();
        const __m128 w = _mm_and_ps(_mm_and_ps(_mm_cmpgt_ps(yv, zero), _mm_cmpgt_ps(vv, zero)),
                                    _mm_min_ps(yv/vv, _mm_set1_ps(X_MAX)));
        _mm_storeu_ps(s->tok + t, w);
        _mm_storeu_ps(s->r   + t, tiny_reciprocal(w));
        EACH(k, ROWS) {
            ww += s->tok[t + k]*s->tok[t + k];
        }
    }
    walk_add(s, is_last, G - ROWS);
    s->ww = ww > 0.0f ? ww : 1.0f;
}

// --- steps 5 and 6: restore, round ---

V_FN void seal_restore(struct seal * s) {
    const vec ww = v_set(s->ww);
    for (int d = 0; d < s->D; d += W) {
        const vec cw = v_load(s->cw + d), wy = v_load(s->wy + d);
        const vec m     = cw/ww;
        const vec cov   = v_load(s->cy + d) - m*wy;
        const vec var   = v_load(s->cc + d) - m*cw;
        const vec b     = wy - v_load(s->mid + d)*ww;
        const vec own   = v_load(s->spread + d) - b*(b/ww);
        const vec least = fit_scale(s, d);
        vec full = own/cov;
        if (s->side == KVARN_VALUE) {
            full = v_sqrt(own/var);
        }
        const vec scale = v_at_least(v_set(AGREE)*cov*cov, own*var, full, least);
        v_store(s->stored + d, v_above(least, v_set(0.0f), scale));
    }
}

// walk_dots for the scales and zeros that are stored, with the codes to bytes
V_FN void round_dots(struct coder coder, int D, vec h, const float * y, const float * r, const float * inv, const float * off,
                     const float * scale, const float * zero, uint8_t * code, vec yc[STEP][LV], vec cc[STEP][LV]) {
    vec a[STEP][LV], b[STEP][LV];
    v_zero(a);
    v_zero(b);
    for (int d = 0; d < D; d += 16) {
        EACH(k, STEP) {
            vec q[LV];
            EACH(j, LV) {
                const int at = d + j*W;
                const vec yk = v_load(y + k*D + at);
                q[j] = v_code(coder, yk*v_set(r[k])*v_load(inv + at) + v_load(off + at)) + h;
                const vec v  = q[j]*v_load(scale + at) + v_load(zero + at);
                a[k][j] += v*yk;
                b[k][j] += v*v;
            }
            v_bytes(q, code + k*D + d);
        }
    }
    memcpy(yc, a, sizeof(a));
    memcpy(cc, b, sizeof(b));
}

V_FN void seal_round(struct seal * s, uint8_t * tile) {
    const int D = s->D;
    const vec h = v_set(s->h);
    float c_max = 0.0f;
    for (int d = 0; d < D; d += W) {
        const vec scale = v_load(s->stored + d);
        v_store(s->zero + d, v_max(scale, v_abs(fit_mid(s, d, scale) - h*scale)));
    }
    c_max = largest_of(D, s->zero);
    int e;
    (void) frexpf(largest_of(G, s->tok), &e);
    float f = ldexpf(1.0f, e);
    while (c_max*s->rms*f > X_MAX) {
        f *= 0.5f;
    }
    const vec unit = v_set(s->rms*f);
    vec max = v_set(0.0f);
    for (int d = 0; d < D; d += W) {
        const vec scale = v_f16(v_load(s->stored + d)*unit);
        const vec zero  = v_f16(fit_mid(s, d, scale/unit)*unit - h*scale);
        v_store(s->stored + d, scale);
        v_store(s->zero   + d, zero);
        max = v_max(max, v_max(scale, v_abs(zero)));
    }
    float last[W];
    v_store(last, max);
    c_max = largest_of(W, last);

    const struct coder coder = v_coder(s->L);
    for (int t = 0; t < G; t += ROWS) {
        vec dots[2][ROWS][LV];
        for (int k0 = 0; k0 < ROWS; k0 += STEP) {
            round_dots(coder, D, h, s->y + (t + k0)*D, s->r + t + k0, s->inv, s->off, s->stored, s->zero, s->code + (t + k0)*D,
                       dots[0] + k0, dots[1] + k0);
        }
        __m128 yc, cc;
        v_sums(dots, &yc, &cc);
        const __m128 zero = _mm_setzero_ps(), yy = _mm_loadu_ps(s->yy + t);
        const __m128 r    = _mm_and_ps(_mm_and_ps(_mm_cmpgt_ps(yc, zero), _mm_cmpgt_ps(cc, zero)), yc/cc);
        __m128 full = yy/yc;
        if (s->side == KVARN_VALUE) {
            full = _mm_sqrt_ps(yy/cc);
        }
        const __m128 good = _mm_and_ps(_mm_cmpgt_ps(r, zero), _mm_cmpge_ps(_mm_set1_ps(AGREE)*yc*yc, yy*cc));
        _mm_storeu_ps(s->tok + t, _mm_blendv_ps(r, full, good)*_mm_set1_ps(s->rms));
    }

    const float t_max = largest_of(G, s->tok);
    f = 1.0f;
    while (t_max > f && 2.0f*f*c_max <= X_MAX) {
        f *= 2.0f;
    }
    for (int d = 0; d < D; d += W) {
        v_store_f16(tile + kvarn_scale_off(D, s->bits) + 2*d, v_load(s->stored + d)*v_set(f));
        v_store_f16(tile + kvarn_zero_off (D, s->bits) + 2*d, v_load(s->zero   + d)*v_set(f));
    }
    for (int t = 0; t < G; t += W) {
        v_store_f16(tile + kvarn_token_off(D, s->bits) + 2*t, v_load(s->tok + t)/v_set(f));
    }
}

// --- step 7: pack ---

typedef uint32_t word __attribute__((aligned(1), may_alias));

// Slots to words: in holds the slots one after the other, n words each; out the words, or with 3 bits three planes of n words.
V_FN void pack_slots(int bits, int n, const word * restrict in, word * restrict out) {
    if (bits == 2) {
        for (int i = 0; i < n; ++i) {
            out[i] = in[i] | in[i + n] << 2 | in[i + 2*n] << 4 | in[i + 3*n] << 6;
        }
    } else if (bits == 4) {
        for (int i = 0; i < n; ++i) {
            out[i] = in[i] | in[i + n] << 4;
        }
    } else {
        for (int i = 0; i < n; ++i) {
            const uint32_t c6 = in[i + 6*n], c7 = in[i + 7*n];
            out[i      ] = in[i      ] | in[i +   n] << 3 | (c6 & 0x06060606u) << 5;
            out[i +   n] = in[i + 2*n] | in[i + 3*n] << 3 | (c6 & 0x01010101u) << 7 | (c7 & 0x04040404u) << 4;
            out[i + 2*n] = in[i + 4*n] | in[i + 5*n] << 3 | (c7 & 0x03030303u) << 6;
        }
    }
}

// Keys: the slots are runs of tokens, so whole runs of rows are packed first; then rows of four channels become rows of tokens.
V_FN void pack_keys(int bits, int D, const uint8_t * code, float * packed, uint8_t * tile) {
    const int X = bits == 3 ? G/8 : G*bits/8, P = bits == 3 ? 3 : 1;
    pack_slots(bits, X*D/4, (const word *) code, (word *) packed);
    for (int R = 0; R < D/4; R += 4) {
        for (int px = 0; px < P*X; px += 4) {      // word x of plane p: px = p*X + x
            const float * in = packed + px*(D/4) + R;
            float * out = (float *) tile + R*P*X + px;
            __m128 a = _mm_loadu_ps(in), b = _mm_loadu_ps(in + D/4), c = _mm_loadu_ps(in + D/2), d = _mm_loadu_ps(in + 3*(D/4));
            _MM_TRANSPOSE4_PS(a, b, c, d);
            _mm_storeu_ps(out, a);
            _mm_storeu_ps(out + P*X, b);
            _mm_storeu_ps(out + 2*P*X, c);
            _mm_storeu_ps(out + 3*P*X, d);
        }
    }
}

// Values: four rows become words, then the words of a row are packed.
V_FN void pack_values(int bits, int D, const uint8_t * code, word * words, uint8_t * tile) {
    const int X = bits == 3 ? D/8 : D*bits/8;
    for (int R = 0; R < G/4; ++R) {
        for (int d = 0; d < D; d += 16) {
            __m128i row[4];
            EACH(k, 4) {
                row[k] = _mm_loadu_si128((const __m128i *) (code + (4*R + k)*D + d));
            }
            const __m128i a0 = _mm_unpacklo_epi8(row[0], row[1]), a1 = _mm_unpackhi_epi8(row[0], row[1]);
            const __m128i b0 = _mm_unpacklo_epi8(row[2], row[3]), b1 = _mm_unpackhi_epi8(row[2], row[3]);
            __m128i * out = (__m128i *) (words + d);
            _mm_storeu_si128(out,     _mm_unpacklo_epi16(a0, b0));
            _mm_storeu_si128(out + 1, _mm_unpackhi_epi16(a0, b0));
            _mm_storeu_si128(out + 2, _mm_unpacklo_epi16(a1, b1));
            _mm_storeu_si128(out + 3, _mm_unpackhi_epi16(a1, b1));
        }
        pack_slots(bits, X, words, (word *) (tile + R*(D*bits/2)));
    }
}

V_TARGET static void seal(int side, int bits, int D, const float * x, uint8_t * tile, float * scratch) {
    struct seal s = { .side = side, .bits = bits, .D = D, .L = (float) ((1 << bits) - 1), .y = scratch };
    float * v = scratch + G*D;
    s.h      = 0.5f*s.L;
    s.scale  = v;
    s.mid    = v + D;
    s.stored = v + 2*D;
    s.zero   = v + 3*D;
    s.inv    = v + 4*D;
    s.off    = v + 5*D;
    s.cc     = v + 6*D;
    s.cw     = v + 7*D;
    s.cy     = v + 8*D;
    s.wy     = v + 9*D;
    s.spread = v + 10*D;
    s.q      = v + 16*D;                        // until the codes are final
    s.code   = (uint8_t *) s.q;

    if (!seal_prepare(&s, x)) {
        memset(tile, 0, (size_t) kvarn_tile_size(D, bits));
        return;
    }
    seal_start(&s);
    EACH(i, 4) {
        seal_walk(&s, 0);
        for (int d = 0; d < D; d += W) {
            const vec scale = fit_scale(&s, d);
            v_store(s.scale + d, scale);
            v_store(s.mid   + d, fit_mid(&s, d, scale));
        }
    }
    seal_walk(&s, 1);
    seal_restore(&s);
    seal_round(&s, tile);
    if (side == KVARN_KEY) {
        pack_keys(bits, D, s.code, s.y, tile);
    } else {
        pack_values(bits, D, s.code, (word *) s.y, tile);
    }
}
