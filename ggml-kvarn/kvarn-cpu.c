// kvarn-cpu.c - the portable attention kernels, and the choice between them and the processor's own.
// A tile is unsealed to f32 once for all query vectors; the loops are what compilers vectorize.
//
// SPDX-License-Identifier: MIT

#include "kvarn-cpu.h"
#include "kvarn-f16.h"

#include <math.h>
#include <string.h>

#define G KVARN_G

int kvarn_cpu_scratch(int D) { return G*D; }

static void score_f32(int D, int n_q, int t0, int t1, const float * x, const float * q, float * s) {
    for (int t = t0; t < t1; ++t) {
        for (int i = 0; i < n_q; ++i) {
            float lane[16] = { 0 };
            for (int d = 0; d < D; d += 16) {
                for (int j = 0; j < 16; ++j) {
                    lane[j] += x[t*D + d + j]*q[i*D + d + j];
                }
            }
            float sum = 0.0f;
            for (int j = 0; j < 16; ++j) {
                sum += lane[j];
            }
            s[i*G + t] = sum;
        }
    }
}

static void value_f32(int D, int n_q, int t0, int t1, const float * x, const float * p, float * o) {
    for (int t = t0; t < t1; ++t) {
        for (int i = 0; i < n_q; ++i) {
            const float pt = p[i*G + t];
            for (int d = 0; d < D; ++d) {
                o[i*D + d] += pt*x[t*D + d];
            }
        }
    }
}

static const float * rows_f32(int D, int t0, int t1, const uint16_t * rows, int64_t stride, float * scratch) {
    for (int t = t0; t < t1; ++t) {
        for (int d = 0; d < D; ++d) {
            scratch[t*D + d] = f16_value(rows[t*stride + d]);
        }
    }
    return scratch;
}

static void score_tile(int bits, int D, int n_q, const uint8_t * tile, const uint8_t * next, const float * q, float * s,
                       float * scratch) {
    (void) next;
    kvarn_unseal_ref(KVARN_KEY, bits, D, tile, scratch);
    score_f32(D, n_q, 0, G, scratch, q, s);
}

static void value_tile(int bits, int D, int n_q, const uint8_t * tile, const uint8_t * next, const float * p, float * o,
                       float * scratch) {
    (void) next;
    kvarn_unseal_ref(KVARN_VALUE, bits, D, tile, scratch);
    value_f32(D, n_q, 0, G, scratch, p, o);
}

static void score_rows(int D, int n_q, int t0, int t1, const uint16_t * rows, int64_t stride, const float * q, float * s,
                       float * scratch) {
    score_f32(D, n_q, t0, t1, rows_f32(D, t0, t1, rows, stride, scratch), q, s);
}

static void value_rows(int D, int n_q, int t0, int t1, const uint16_t * rows, int64_t stride, const float * p, float * o,
                       float * scratch) {
    value_f32(D, n_q, t0, t1, rows_f32(D, t0, t1, rows, stride, scratch), p, o);
}

static void read_mask(const uint16_t * m, float * f32, int * t0, int * t1) {
    for (int t = 0; t < G; ++t) {
        const int is_seen = m[t] != 0xfc00;
        f32[t] = is_seen ? f16_value(m[t]) : -INFINITY;
        *t0 = is_seen && t < *t0 ? t : *t0;
        *t1 = is_seen && t >= *t1 ? t + 1 : *t1;
    }
}

static void mask(int n, const float * slope, const float * m, float * s, float * max) {
    for (int i = 0; i < n; ++i) {
        max[i] = -INFINITY;
        for (int t = 0; t < G; ++t) {
            s[i*G + t] += slope[i]*m[t];
            max[i] = s[i*G + t] > max[i] ? s[i*G + t] : max[i];
        }
    }
}

static void soften(int n, const float * max, float * s, float * sum) {
    for (int i = 0; i < n; ++i) {
        sum[i] = 0.0f;
        for (int t = 0; t < G; ++t) {
            s[i*G + t] = expf(s[i*G + t] - max[i]);
            sum[i] += s[i*G + t];
        }
    }
}

const struct kvarn_cpu_kernels * kvarn_cpu_portable(void) {
    static const struct kvarn_cpu_kernels kernels = {
        "portable", score_tile, score_rows, read_mask, mask, soften, value_tile, value_rows, kvarn_seal_ref,
    };
    return &kernels;
}

const struct kvarn_cpu_kernels * kvarn_cpu_find(const char * name) {
    static const struct kvarn_cpu_kernels * (* const sets[])(int fast) = { // the best first
        kvarn_cpu_avx512, kvarn_cpu_avx2, kvarn_cpu_i8mm, kvarn_cpu_dotprod, kvarn_cpu_neon,
    };
    enum { N_SETS = sizeof(sets)/sizeof(sets[0]) };

    const int fast = name && strcmp(name, "fast") == 0;
    for (int i = 0; i < 2*N_SETS; ++i) {
        const struct kvarn_cpu_kernels * kernels = sets[i/2](i % 2);
        if (kernels && (name && !fast ? strcmp(name, kernels->name) == 0 : fast == i % 2)) {
            return kernels;
        }
    }
    return !name || strcmp(name, "portable") == 0 ? kvarn_cpu_portable() : NULL;
}

// --- the online softmax ---

int64_t kvarn_cpu_state_size(int DK, int DV, int n_rows, int n_gqa) {
    const int64_t n_q = (int64_t) n_rows*n_gqa;
    return n_q*(DK + DV + 2*G + 2) + 3*n_gqa + (int64_t) n_rows*G + kvarn_cpu_scratch(DK > DV ? DK : DV);
}

void kvarn_cpu_start(struct kvarn_cpu_state * state, float * memory) {
    const int64_t n_q = (int64_t) state->n_rows*state->n_gqa;
    const int D = state->D[KVARN_KEY] > state->D[KVARN_VALUE] ? state->D[KVARN_KEY] : state->D[KVARN_VALUE];
    state->q       = memory;                // the large ones first: where memory lies on a cache line, so do they
    state->out     = state->q       + n_q*state->D[KVARN_KEY];
    state->p       = state->out     + n_q*state->D[KVARN_VALUE];
    state->p_before = state->p      + n_q*G;
    state->mask    = state->p_before + n_q*G;
    state->scratch = state->mask    + (int64_t) state->n_rows*G;
    state->max     = state->scratch + kvarn_cpu_scratch(D);
    state->sum     = state->max     + n_q;
    state->slope   = state->sum     + n_q;
    state->tile_max = state->slope   + state->n_gqa;
    state->tile_sum = state->tile_max + state->n_gqa;
    for (int64_t j = 0; j < n_q; ++j) {
        state->max[j] = -INFINITY;
        state->sum[j] = 0.0f;
    }
    memset(state->out, 0, (size_t) (n_q*state->D[KVARN_VALUE])*sizeof(float));
    state->values = (struct kvarn_cpu_source) { 0 };
}

void kvarn_cpu_finish(const struct kvarn_cpu_kernels * kernels, struct kvarn_cpu_state * state, const uint8_t * next_v) {
    const struct kvarn_cpu_source * v = &state->values;
    const int DV = state->D[KVARN_VALUE], n_q = state->n_rows*state->n_gqa;
    if (v->tile) {
        kernels->value_tile(state->bits[KVARN_VALUE], DV, n_q, v->tile, next_v ? next_v : v->tile, state->p_before, state->out,
                state->scratch);
    } else if (v->rows) {
        kernels->value_rows(DV, n_q, state->t0, state->t1, v->rows, v->stride, state->p_before, state->out, state->scratch);
    }
    state->values = (struct kvarn_cpu_source) { 0 };
}

void kvarn_cpu_add(const struct kvarn_cpu_kernels * kernels, struct kvarn_cpu_state * state, const struct kvarn_cpu_source * k,
                   const struct kvarn_cpu_source * v, const uint8_t * next_k, const uint16_t * mask_rows, int64_t stride) {
    const int DK  = state->D[KVARN_KEY];
    const int DV  = state->D[KVARN_VALUE];
    const int n_q = state->n_rows*state->n_gqa;

    int t0 = G; // the tokens that some query row sees
    int t1 = 0;
    for (int r = 0; r < state->n_rows; ++r) {
        kernels->read_mask(mask_rows + r*stride, state->mask + r*G, &t0, &t1);
    }
    if (t0 >= t1) {
        return;
    }

    if (k->tile) {
        kernels->score_tile(state->bits[KVARN_KEY], DK, n_q, k->tile, next_k ? next_k : k->tile, state->q, state->p,
                state->scratch);
    } else {
        if (t1 - t0 < G) {
            memset(state->p, 0, (size_t) n_q*G*sizeof(float));
        }
        kernels->score_rows(DK, n_q, t0, t1, k->rows, k->stride, state->q, state->p, state->scratch);
    }

    kvarn_cpu_finish(kernels, state, v->tile);

    for (int r = 0; r < state->n_rows; ++r) {
        const int n = state->n_gqa, first = r*n;
        float * p = state->p + first*G, * max = state->max + first, * sum = state->sum + first;
        for (int t = 0; t < n*G && state->softcap > 0.0f; ++t) {
            p[t] = state->softcap*tanhf(p[t]);
        }
        kernels->mask(n, state->slope, state->mask + r*G, p, state->tile_max);
        for (int i = 0; i < n; ++i) {
            if (state->tile_max[i] > max[i]) {
                const float shrink = expf(max[i] - state->tile_max[i]);
                for (int d = 0; d < DV; ++d) {
                    state->out[(first + i)*DV + d] *= shrink;
                }
                sum[i] *= shrink;
                max[i]  = state->tile_max[i];
            }
            state->tile_max[i] = max[i] > -INFINITY ? max[i] : 0.0f; // nothing seen yet: every p is exp(-inf - 0)
        }
        kernels->soften(n, state->tile_max, p, state->tile_sum);
        for (int i = 0; i < n; ++i) {
            sum[i] += state->tile_sum[i];
        }
    }

    float * p = state->p;
    state->p        = state->p_before;
    state->p_before = p;
    state->values   = *v;
    state->t0       = t0;
    state->t1       = t1;
}
