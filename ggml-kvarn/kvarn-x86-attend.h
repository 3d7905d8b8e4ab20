// kvarn-x86-attend.h - attention kernels in vectors of W words: what AVX2 and AVX-512 have in common.
//
// SPDX-License-Identifier: MIT
//
// Included by kvarn-x86.c (W = 8) and kvarn-x86-avx512.c (W = 16), which define vec, V_FN, the functions v_.. of their
// instructions, round_vector and dot_codes.
//
// Keys.    v[d] = q[d]*scale[d] rounded to a multiple of step:
//              s[t] = token[t]*(step*sum_d v[d]*code(t,d) + base)
// Values.  v[t] = p[t]*token[t] rounded likewise:
//              o[d] += scale[d]*(step*sum_t v[t]*code(t,d) + base) + zero[d]*sum_t p[t]*token[t]
// The rounding of v would be multiplied by the mean code; base takes that part from the exact sums instead:
//              base = mid*(sum exact - step*sum v) [+ sum_d q[d]*zero[d]],   mid = half of the largest code

// What one vector's sum of products is turned into.
struct fold {
    float step[NV], base[NV];
    float sum[NV]; // values: sum_t p[t]*token[t]
};

// --- tiles ---

// Keys: out f32 [nv][G] is written. Values: out f32 [nv][D] is added to. A strip of W words and two slots at a time.
// The last strip of values may read past its row, at most to the tile's end, and past out's row: that is not stored.
V_FN void fold_tile(const int side, const int fast, const int bits, const int nv, int D, const uint8_t * tile,
                    const uint8_t * next, const int32_t * vectors, const struct fold * fold, float * out) {
    const int F        = side == KVARN_KEY ? G : D;
    const int n_r      = side == KVARN_KEY ? D : G;
    const int X        = bits == 3 ? F/8 : F*bits/8;
    const int row_size = bits == 3 ? 12*X : 4*X;
    const int n_pass   = bits == 3 ? 4 : 4/bits;
    const uint8_t * ahead = next;
    for (int x = 0; x < X; x += W) {
        struct slots others;
        EACH(pass, n_pass) {
            const int plane = bits == 3 && pass < 3 ? 4*pass*X : 0;
            vec   acc[NV][2];
            float factor[2];
            dot_codes(side, fast, bits, pass, nv, n_r, tile + plane + 4*x, row_size, X, ahead, vectors, &others, acc, factor);
            ahead += (n_r + 15)/16*N_FETCH(bits)*64;
            EACH(j, 2) {
                const int f = (2*pass + j)*X + x;
                const vec token = side == KVARN_KEY   ? v_load_f16(tile + kvarn_token_off(D, bits) + 2*f) : v_set(0.0f);
                const vec scale = side == KVARN_VALUE ? v_load_f16(tile + kvarn_scale_off(D, bits) + 2*f) : v_set(0.0f);
                const vec zero  = side == KVARN_VALUE ? v_load_f16(tile + kvarn_zero_off (D, bits) + 2*f) : v_set(0.0f);
                EACH(v, nv) {
                    const vec y = v_fma(acc[v][j], v_set(fold->step[v]*factor[j]), v_set(fold->base[v]));
                    float * o = out + v*F + f;
                    if (side == KVARN_KEY) {
                        v_store(o, y*token);
                    } else if (x + W <= X) {
                        v_store(o, v_fma(y, scale, v_fma(zero, v_set(fold->sum[v]), v_load(o))));
                    } else {
                        v_store_first(X - x, o, v_fma(y, scale, v_fma(zero, v_set(fold->sum[v]), v_load_first(X - x, o))));
                    }
                }
            }
        }
    }
}

V_FN void fold_vectors(const int side, const int fast, const int bits, int nv, int D, const uint8_t * tile,
                       const uint8_t * next, const int32_t * vectors, const struct fold * fold, float * out) {
    switch (nv) {
        case 1:  fold_tile(side, fast, bits, 1, D, tile, next, vectors, fold, out); break;
        case 2:  fold_tile(side, fast, bits, 2, D, tile, next, vectors, fold, out); break;
        case 3:  fold_tile(side, fast, bits, 3, D, tile, next, vectors, fold, out); break;
        default: fold_tile(side, fast, bits, 4, D, tile, next, vectors, fold, out); break;
    }
}

V_FN void fold_any(const int side, const int fast, int bits, int nv, int D, const uint8_t * tile, const uint8_t * next,
                   const int32_t * vectors, const struct fold * fold, float * out) {
    switch (bits) {
        case 2:  fold_vectors(side, fast, 2, nv, D, tile, next, vectors, fold, out); break;
        case 3:  fold_vectors(side, fast, 3, nv, D, tile, next, vectors, fold, out); break;
        default: fold_vectors(side, fast, 4, nv, D, tile, next, vectors, fold, out); break;
    }
}

// the lines behind the codes
V_FN void prefetch_factors(int bits, int D, const uint8_t * next) {
    for (int i = kvarn_scale_off(D, bits); i < kvarn_tile_size(D, bits); i += 64) {
        _mm_prefetch((const char *) next + i, _MM_HINT_T1);
    }
}

// nv vectors x of n floats, the largest of which are max, to multiples of step; base without the part of the exact sum
V_FN void round_vectors(const int side, const int fast, int bits, int nv, int n, const float * x, vec max[NV], int32_t * vectors,
                        struct fold * fold) {
    const float v_max = side == KVARN_KEY ? (fast ? KEY_MAX_FAST : KEY_MAX) : (fast ? VALUE_MAX_FAST : VALUE_MAX);
    const __m128 m   = v_max4(max);
    const __m128 inv = _mm_and_ps(_mm_cmpgt_ps(m, _mm_setzero_ps()), _mm_div_ps(_mm_set1_ps(v_max), m));
    float inverse[NV];
    _mm_storeu_ps(inverse, inv);
    vec sum[NV];
    EACH(j, NV) {
        sum[j] = j < nv ? round_vector(fast, n, x + j*n, inverse[j], vectors + j*n/(fast ? 4 : 2)) : v_set(0.0f);
    }
    const __m128 step = _mm_mul_ps(m, _mm_set1_ps(1.0f/v_max));
    _mm_storeu_ps(fold->step, step);
    _mm_storeu_ps(fold->base, _mm_mul_ps(_mm_mul_ps(v_sum4(sum), step), _mm_set1_ps(-0.5f*(float) ((1 << bits) - 1))));
}

V_FN void score_codes(const int fast, int bits, int D, int n_q, const uint8_t * tile, const uint8_t * next, const float * q,
                      float * s) {
    ON_LINE float scale[D_MAX], centre[D_MAX], x[NV*D_MAX];
    ON_LINE int32_t vectors[NV*D_MAX/2 + 16];
    struct fold fold;

    prefetch_factors(bits, D, next);
    const vec mid = v_set(0.5f*(float) ((1 << bits) - 1));
    for (int d = 0; d < D; d += W) {
        const vec sc = v_load_f16(tile + kvarn_scale_off(D, bits) + 2*d);
        v_store(scale + d, sc);
        v_store(centre + d, v_fma(sc, mid, v_load_f16(tile + kvarn_zero_off(D, bits) + 2*d)));
    }
    for (int i = 0; i < n_q; i += NV) {
        const int n = n_q - i < NV ? n_q - i : NV;
        vec max[NV], sum[NV];
        EACH(j, NV) {
            max[j] = sum[j] = v_set(0.0f);
            for (int d = 0; d < D && j < n; d += W) {
                const vec qd = v_load(q + (i + j)*D + d);
                const vec xd = qd*v_load(scale + d);
                v_store(x + j*D + d, xd);
                max[j] = v_max(max[j], v_abs(xd));
                sum[j] = v_fma(qd, v_load(centre + d), sum[j]);
            }
        }
        round_vectors(KVARN_KEY, fast, bits, n, D, x, max, vectors, &fold);
        _mm_storeu_ps(fold.base, _mm_add_ps(_mm_loadu_ps(fold.base), v_sum4(sum)));
        fold_any(KVARN_KEY, fast, bits, n, D, tile, next, vectors, &fold, s + i*G);
    }
}

V_FN void value_codes(const int fast, int bits, int D, int n_q, const uint8_t * tile, const uint8_t * next, const float * p,
                      float * o) {
    ON_LINE float token[G], x[NV*G];
    ON_LINE int32_t vectors[NV*G/2 + 16];
    struct fold fold;

    prefetch_factors(bits, D, next);
    for (int t = 0; t < G; t += W) {
        v_store(token + t, v_load_f16(tile + kvarn_token_off(D, bits) + 2*t));
    }
    for (int i = 0; i < n_q; i += NV) {
        const int n = n_q - i < NV ? n_q - i : NV;
        vec max[NV], sum[NV];
        EACH(j, NV) {
            max[j] = sum[j] = v_set(0.0f);
            for (int t = 0; t < G && j < n; t += W) {
                const vec xt = v_load(p + (i + j)*G + t)*v_load(token + t);
                v_store(x + j*G + t, xt);
                max[j] = v_max(max[j], xt);
                sum[j] = sum[j] + xt;
            }
        }
        round_vectors(KVARN_VALUE, fast, bits, n, G, x, max, vectors, &fold);
        const __m128 all = v_sum4(sum), mid = _mm_set1_ps(0.5f*(float) ((1 << bits) - 1));
        _mm_storeu_ps(fold.sum, all);
        _mm_storeu_ps(fold.base, _mm_add_ps(_mm_loadu_ps(fold.base), _mm_mul_ps(all, mid)));
        fold_any(KVARN_VALUE, fast, bits, n, D, tile, next, vectors, &fold, o + i*D);
    }
}

#define TILE_FUNCTIONS(suffix, fast)                                                                                 \
    V_TARGET static void score_tile##suffix(int bits, int D, int n_q, const uint8_t * tile, const uint8_t * next,    \
                                            const float * q, float * s, float * scratch) {                           \
        (void) scratch;                                                                                              \
        score_codes(fast, bits, D, n_q, tile, next, q, s);                                                           \
    }                                                                                                                \
    V_TARGET static void value_tile##suffix(int bits, int D, int n_q, const uint8_t * tile, const uint8_t * next,    \
                                            const float * p, float * o, float * scratch) {                           \
        (void) scratch;                                                                                              \
        value_codes(fast, bits, D, n_q, tile, next, p, o);                                                           \
    }
TILE_FUNCTIONS(, 0)
TILE_FUNCTIONS(_fast, 1)

// --- rows of f16 ---

// Rows lie far apart in memory: what is needed a few rows later is fetched by hand.
V_FN void rows_f32(int D, int t, int n, int ahead, int64_t stride, const uint16_t * rows, float * x) {
    for (int k = 0; k < n; ++k) {
        const uint16_t * row = rows + (t + k)*stride;
        if (t + k + ahead < G) {
            for (int d = 0; d < D; d += 32) {
                _mm_prefetch((const char *) (row + ahead*stride + d), _MM_HINT_T0);
            }
        }
        for (int d = 0; d < D; d += W) {
            v_store(x + k*D + d, v_load_f16(row + d));
        }
    }
}

enum {
    AHEAD = 12,    // rows
    NQ    = W/4,   // query vectors that are multiplied with four rows at a time
};

V_FN void score_four(const int n, int D, const float * x, const float * q, float * s) {
    vec sum[NQ][4];
    EACH(j, n) {
        EACH(k, 4) {
            sum[j][k] = v_set(0.0f);
        }
    }
    for (int d = 0; d < D; d += W) {
        EACH(j, n) {
            const vec qd = v_load(q + j*D + d);
            EACH(k, 4) {
                sum[j][k] = v_fma(v_load(x + k*D + d), qd, sum[j][k]);
            }
        }
    }
    EACH(j, n) {
        _mm_storeu_ps(s + j*G, v_sum4(sum[j]));
    }
}

V_TARGET static void score_rows(int D, int n_q, int t0, int t1, const uint16_t * rows, int64_t stride, const float * q, float * s,
                                float * scratch) {
    for (int t = t0/4*4; t < t1; t += 4) { // also tokens beside t0 and t1: they are computed for nothing
        rows_f32(D, t, 4, AHEAD, stride, rows, scratch);
        int i = 0;
        for (; i + NQ <= n_q; i += NQ) {
            score_four(NQ, D, scratch, q + i*D, s + i*G + t);
        }
        for (; i < n_q; ++i) {
            score_four(1, D, scratch, q + i*D, s + i*G + t);
        }
    }
}

// W*w channels of n outputs stay in registers while all rows pass
V_FN void value_strip(const int n, const int w, int D, int t0, int t1, const float * x, const float * p, float * o) {
    vec r[NV][2];
    EACH(j, n) {
        EACH(k, w) {
            r[j][k] = v_load(o + j*D + W*k);
        }
    }
    for (int t = t0; t < t1; ++t) {
        vec xt[2];
        EACH(k, w) {
            xt[k] = v_load(x + t*D + W*k);
        }
        EACH(j, n) {
            const vec pt = v_set(p[j*G + t]);
            EACH(k, w) {
                r[j][k] = v_fma(pt, xt[k], r[j][k]);
            }
        }
    }
    EACH(j, n) {
        EACH(k, w) {
            v_store(o + j*D + W*k, r[j][k]);
        }
    }
}

V_FN void value_vectors(const int n, int D, int t0, int t1, const float * x, const float * p, float * o) {
    int d = 0;
    for (; d + 2*W <= D; d += 2*W) {
        value_strip(n, 2, D, t0, t1, x + d, p, o + d);
    }
    if (d < D) {
        value_strip(n, 1, D, t0, t1, x + d, p, o + d);
    }
}

V_TARGET static void value_rows(int D, int n_q, int t0, int t1, const uint16_t * rows, int64_t stride, const float * p, float * o,
                                float * scratch) {
    rows_f32(D, t0, t1 - t0, AHEAD, stride, rows, scratch + t0*D);
    int i = 0;
    for (; i + NV <= n_q; i += NV) {
        value_vectors(NV, D, t0, t1, scratch, p + i*G, o + i*D);
    }
    for (; i < n_q; ++i) {
        value_vectors(1, D, t0, t1, scratch, p + i*G, o + i*D);
    }
}

// --- softmax ---

V_TARGET static void read_mask(const uint16_t * m, float * f32, int * t0, int * t1) {
    uint64_t seen[2] = { 0, 0 };
    for (int t = 0; t < G; t += W) {
        const vec x = v_load_f16(m + t);
        v_store(f32 + t, x);
        seen[t/64] |= (uint64_t) v_differs(x, v_set(-INFINITY)) << t % 64;
    }
    if (!seen[0] && !seen[1]) {
        return;
    }
    const int first = seen[0] ? __builtin_ctzll(seen[0])      : 64 + __builtin_ctzll(seen[1]);
    const int last  = seen[1] ? 127 - __builtin_clzll(seen[1]) : 63 - __builtin_clzll(seen[0]);
    *t0 = first < *t0 ? first : *t0;
    *t1 = last >= *t1 ? last + 1 : *t1;
}

// the first n floats of x, n <= NV
V_FN void store_few(int n, float * p, __m128 x) {
    float all[NV];
    _mm_storeu_ps(all, x);
    memcpy(p, all, (size_t) n*sizeof(float));
}

V_FN void mask_few(const int n, const float * slope, const float * m, float * s, float * max) {
    vec most[NV];
    EACH(i, NV) {
        most[i] = v_set(-INFINITY);
    }
    for (int t = 0; t < G; t += W) {
        const vec mt = v_load(m + t);
        EACH(i, n) {
            const vec x = v_fma(v_set(slope[i]), mt, v_load(s + i*G + t));
            v_store(s + i*G + t, x);
            most[i] = v_max(most[i], x);
        }
    }
    store_few(n, max, v_max4(most));
}

V_FN void soften_few(const int n, const float * max, float * s, float * sum) {
    vec all[NV];
    EACH(i, NV) {
        all[i] = v_set(0.0f);
    }
    for (int t = 0; t < G; t += W) {
        EACH(i, n) {
            const vec p = v_exp(v_load(s + i*G + t) - v_set(max[i]));
            v_store(s + i*G + t, p);
            all[i] = all[i] + p;
        }
    }
    store_few(n, sum, v_sum4(all));
}

V_TARGET static void mask(int n, const float * slope, const float * m, float * s, float * max) {
    for (int i = 0; i < n; i += NV) {
        switch (n - i) {
            case 1:  mask_few(1, slope + i, m, s + i*G, max + i); break;
            case 2:  mask_few(2, slope + i, m, s + i*G, max + i); break;
            case 3:  mask_few(3, slope + i, m, s + i*G, max + i); break;
            default: mask_few(4, slope + i, m, s + i*G, max + i); break;
        }
    }
}

V_TARGET static void soften(int n, const float * max, float * s, float * sum) {
    for (int i = 0; i < n; i += NV) {
        switch (n - i) {
            case 1:  soften_few(1, max + i, s + i*G, sum + i); break;
            case 2:  soften_few(2, max + i, s + i*G, sum + i); break;
            case 3:  soften_few(3, max + i, s + i*G, sum + i); break;
            default: soften_few(4, max + i, s + i*G, sum + i); break;
        }
    }
}
