// kvarn-cpu-ggml.cpp - GGML_OP_KVARN on the CPU backend: SEAL and GET threaded over (tile, head), ATTN over (rows, head, tiles).
// Here tensors become pointers; tile bytes are read and written by kvarn-ref.c and the kernels behind kvarn-cpu.h.
//
// SPDX-License-Identifier: MIT

#include "kvarn-graph.h"
#include "kvarn-cpu.h"
#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <mutex>

// query vectors attended at a time: enough that reading a tile is cheap, few enough that they and their outputs stay in the cache
#define KVARN_ATTN_VECTORS 64

// bytes of a cache line; a vector that crosses two takes twice as long
#define KVARN_LINE 64

// query rows of one task
static int64_t kvarn_row_group(const ggml_tensor * attn, const kvarn_attn_shape & shape) {
    const ggml_tensor * q = attn->src[KVARN_SRC_Q];
    return std::min(q->ne[1], std::max<int64_t>(KVARN_ATTN_VECTORS*shape.H/q->ne[2], 1));
}

// floats of scratch per thread, on cache lines of its own
static size_t kvarn_scratch(const ggml_tensor * node) {
    size_t n = 0;
    switch (ggml_kvarn_get_op(node)) {
        case KVARN_OP_SEAL:
        case KVARN_OP_GET: {
            const int D = ggml_kvarn_get_shape(node).D;
            n = KVARN_G*D + kvarn_seal_scratch(D);
        } break;
        case KVARN_OP_ATTN: {
            const kvarn_attn_shape shape = ggml_kvarn_get_attn_shape(node);
            const int64_t n_gqa = node->src[KVARN_SRC_Q]->ne[2]/shape.H;
            n = kvarn_cpu_state_size(shape.D[0], shape.D[1], kvarn_row_group(node, shape), n_gqa);
        } break;
        case KVARN_OP_REDUCE:
            break;
    }
    return (n + 15)/16*16;
}

size_t ggml_kvarn_work_size(const ggml_tensor * node, int n_tasks) {
    return kvarn_scratch(node)*sizeof(float)*n_tasks + KVARN_LINE;
}

static const kvarn_cpu_kernels * kvarn_pick_kernels(const ggml_compute_params * params) {
    if (params->use_ref) {
        return kvarn_cpu_portable();
    }
    const char * name = getenv("KVARN_CPU");
    if (const kvarn_cpu_kernels * kernels = kvarn_cpu_find(name)) {
        return kernels;
    }
    const kvarn_cpu_kernels * best = kvarn_cpu_find(nullptr);
    static std::once_flag once;
    std::call_once(once, [&] {
        GGML_LOG_WARN("kvarn: this processor has no kernels KVARN_CPU=%s; the ones used are %s\n", name, best->name);
    });
    return best;
}

static void kvarn_forward_seal(const ggml_compute_params * params, ggml_tensor * dst, const kvarn_shape & shape,
                               float * scratch) {
    const kvarn_cpu_kernels * kernels = kvarn_pick_kernels(params);

    const ggml_tensor * tail = dst->src[0];
    const int64_t     * list = (const int64_t *) dst->src[1]->data + shape.n_rows;

    const int64_t tile_size = kvarn_tile_size(shape.D, shape.bits);
    const int64_t n_total   = dst->ne[1]*dst->ne[2];

    int64_t job = 0;
    for (int i = 0; i < shape.n_seal; ++i) {
        const int64_t slot = list[2*i + 0];
        const int64_t tile = list[2*i + 1];
        if (slot < 0) {
            continue;
        }
        GGML_ASSERT(slot < tail->ne[1]/KVARN_G && tile >= 0 && tile < n_total);

        for (int h = 0; h < shape.H; ++h, ++job) {
            if (job % params->nth != params->ith) {
                continue;
            }
            const ggml_fp16_t * rows = (const ggml_fp16_t *) ((const char *) tail->data + slot*KVARN_G*tail->nb[1]) + h*shape.D;
            uint8_t           * out  = (uint8_t *) dst->data + (tile*shape.H + h)*tile_size;
            kvarn_seal_rows(&shape, rows, out, scratch, ggml_cpu_fp16_to_fp32, kernels->seal);
        }
    }
}

static void kvarn_forward_get(const ggml_compute_params * params, ggml_tensor * dst, const kvarn_shape & shape, float * scratch) {
    const ggml_tensor * tail  = dst->src[0];
    const ggml_tensor * tiles = dst->src[2];
    const int64_t     * map   = (const int64_t *) dst->src[1]->data + shape.n_rows + 2*shape.n_seal;

    const int64_t tile_size = kvarn_tile_size(shape.D, shape.bits);
    const int64_t n_used    = dst->ne[2]/KVARN_G; // tiles read per stream
    const int64_t s0        = ggml_kvarn_get_s0(dst);
    const size_t  row_size  = dst->nb[2];

    const int64_t n_jobs = dst->ne[3]*n_used*shape.H;
    for (int64_t job = params->ith; job < n_jobs; job += params->nth) {
        const int64_t h = job % shape.H;
        const int64_t i = job / shape.H % n_used;
        const int64_t s = job / shape.H / n_used;

        const int64_t tile  = (s0 + s)*shape.n_tiles + i;
        const int64_t where = map[tile];

        ggml_fp16_t * rows = (ggml_fp16_t *) ((char *) dst->data + s*dst->nb[3] + i*KVARN_G*row_size) + h*shape.D;

        if (where == KVARN_MAP_SEALED) {
            kvarn_unseal_rows(&shape, (const uint8_t *) tiles->data + (tile*shape.H + h)*tile_size, rows, scratch,
                              ggml_cpu_fp32_to_fp16);
            continue;
        }
        GGML_ASSERT(where == KVARN_MAP_EMPTY || (where >= 0 && where < tail->ne[1]/KVARN_G));

        for (int t = 0; t < KVARN_G; ++t) {
            ggml_fp16_t * row = rows + (int64_t) t*shape.D*shape.H;
            if (where == KVARN_MAP_EMPTY) {
                memset(row, 0, shape.D*sizeof(ggml_fp16_t));
            } else {
                const char * src = (const char *) tail->data + (where*KVARN_G + t)*tail->nb[1];
                memcpy(row, (const ggml_fp16_t *) src + h*shape.D, shape.D*sizeof(ggml_fp16_t));
            }
        }
    }
}

static kvarn_cpu_source kvarn_find_source(const ggml_tensor * dst, const kvarn_attn_shape & shape, int side, int64_t where,
                                          int64_t s, int64_t i, int64_t h) {
    const ggml_tensor * tiles = dst->src[side == KVARN_KEY ? KVARN_SRC_K_TILES : KVARN_SRC_V_TILES];
    const ggml_tensor * rows  = dst->src[side == KVARN_KEY ? KVARN_SRC_K_ROWS  : KVARN_SRC_V_ROWS];
    const int64_t       D     = shape.D[side];

    kvarn_cpu_source res = { nullptr, nullptr, (int64_t) (rows->nb[1]/sizeof(ggml_fp16_t)) };
    if (!tiles) { // an f16 cache, permuted: [D, n_kv, H, ns]
        res.rows = (const ggml_fp16_t *) ((const char *) rows->data + i*KVARN_G*rows->nb[1] + h*rows->nb[2] + s*rows->nb[3]);
    } else if (where == KVARN_MAP_SEALED) {
        res.tile = (const uint8_t *) tiles->data + (((shape.s0 + s)*shape.n_tiles + i)*shape.H + h)*kvarn_tile_size(D,
                    shape.bits[side]);
    } else {
        GGML_ASSERT(where >= 0 && where < rows->ne[1]/KVARN_G);
        res.rows = (const ggml_fp16_t *) ((const char *) rows->data + where*KVARN_G*rows->nb[1]) + h*D;
    }
    return res;
}

static float kvarn_slope(float max_bias, int64_t head, int64_t n_head) {
    if (max_bias <= 0.0f) {
        return 1.0f;
    }
    const int64_t n = (int64_t) 1 << (int) floor(log2(n_head)); // heads beyond a power of two lie between the others
    return head < n ? powf(2.0f, -max_bias*(head + 1)/n) : powf(2.0f, -max_bias/2*(2*(head - n) + 1)/n);
}

// What a thread attends at a time: query rows r0 .. r0 + n_rows - 1 of one KV head over one chunk of tiles.
struct kvarn_task {
    int64_t s, h, c, r0, n_rows;
};

static kvarn_task kvarn_find_task(const ggml_tensor * dst, const kvarn_attn_shape & shape, int64_t n_group, int64_t job) {
    const int64_t n_rows   = dst->src[KVARN_SRC_Q]->ne[1];
    const int64_t n_groups = (n_rows + n_group - 1)/n_group;
    const int64_t r0       = job%n_groups*n_group;
    job /= n_groups;
    return { job/dst->ne[1]/shape.H, job/dst->ne[1]%shape.H, job%dst->ne[1], r0, std::min(n_group, n_rows - r0) };
}

static const int64_t * kvarn_find_map(const ggml_tensor * dst, const kvarn_attn_shape & shape, int64_t s) {
    return (const int64_t *) dst->src[KVARN_SRC_PLAN]->data + shape.map_off + (shape.s0 + s)*shape.n_tiles;
}

// n_group query rows per task; the task that comes next is only guessed: its first tile is fetched while the last one is computed
static void kvarn_attend_task(const ggml_compute_params * params, const kvarn_cpu_kernels * kernels, const ggml_tensor * dst,
                              const kvarn_attn_shape & shape, const kvarn_task & task, int64_t n_group, int64_t n_jobs,
                              float * scratch) {
    const ggml_tensor * q    = dst->src[KVARN_SRC_Q];
    const ggml_tensor * mask = dst->src[KVARN_SRC_MASK];
    const int64_t     * map  = kvarn_find_map(dst, shape, task.s);
    const int64_t s = task.s, h = task.h, c = task.c, r0 = task.r0, n_rows = task.n_rows;

    const int64_t n_head = q->ne[2];
    const int64_t n_gqa  = n_head/shape.H;
    const int64_t DK     = shape.D[KVARN_KEY];
    const int64_t DV     = shape.D[KVARN_VALUE];

    kvarn_cpu_state state;
    for (int side = 0; side < 2; ++side) {
        state.bits[side] = shape.bits[side];
        state.D   [side] = shape.D[side];
    }
    state.n_rows  = n_rows;
    state.n_gqa   = n_gqa;
    state.softcap = shape.softcap;
    kvarn_cpu_start(&state, scratch);

    const float scale = shape.softcap > 0.0f ? shape.scale/shape.softcap : shape.scale;
    for (int64_t j = 0; j < n_rows*n_gqa; ++j) {
        const int64_t head = h*n_gqa + j%n_gqa;
        const float * src = (const float *) ((const char *) q->data + (r0 + j/n_gqa)*q->nb[1] + head*q->nb[2] + s*q->nb[3]);
        for (int64_t d = 0; d < DK; ++d) {
            state.q[j*DK + d] = src[d]*scale;
        }
    }
    for (int64_t g = 0; g < n_gqa; ++g) {
        state.slope[g] = kvarn_slope(shape.max_bias, h*n_gqa + g, n_head);
    }

    const char * seen = (const char *) mask->data + r0*mask->nb[1] + s%mask->ne[3]*mask->nb[3];
    const int64_t last = std::min<int64_t>((c + 1)*shape.chunk, mask->ne[0]/KVARN_G);
    const uint8_t * next[2] = { nullptr, nullptr };
    for (int64_t i = c*shape.chunk; i < last; ++i) {
        if (map[i] == KVARN_MAP_EMPTY) {
            continue;
        }
        const kvarn_cpu_source k = kvarn_find_source(dst, shape, KVARN_KEY,   map[i], s, i, h);
        const kvarn_cpu_source v = kvarn_find_source(dst, shape, KVARN_VALUE, map[i], s, i, h);

        kvarn_task follows = task;
        int64_t next_i = i + 1;
        bool has_next  = next_i < last;
        if (!has_next) {
            const int64_t job = ggml_threadpool_chunk_add(params->threadpool, 0);
            has_next = job < n_jobs;
            follows  = kvarn_find_task(dst, shape, n_group, job);
            next_i   = follows.c*shape.chunk;
        }
        has_next = has_next && kvarn_find_map(dst, shape, follows.s)[next_i] == KVARN_MAP_SEALED;
        for (int side = 0; side < 2; ++side) {
            next[side] = !has_next ? nullptr :
                kvarn_find_source(dst, shape, side, KVARN_MAP_SEALED, follows.s, next_i, follows.h).tile;
        }
        kvarn_cpu_add(kernels, &state, &k, &v, next[KVARN_KEY], (const ggml_fp16_t *) seen + i*KVARN_G,
                mask->nb[1]/sizeof(ggml_fp16_t));
    }
    kvarn_cpu_finish(kernels, &state, next[KVARN_VALUE]);

    for (int64_t j = 0; j < n_rows*n_gqa; ++j) {
        const int64_t row = (r0 + j/n_gqa)*n_head + h*n_gqa + j%n_gqa;
        float * part = (float *) ((char *) dst->data + c*dst->nb[1] + row*dst->nb[2] + s*dst->nb[3]);
        part[0] = state.max[j];
        part[1] = state.sum[j];
        memcpy(part + 2, state.out + j*DV, DV*sizeof(float));
    }
}

static void kvarn_forward_attn(const ggml_compute_params * params, ggml_tensor * dst, float * scratch) {
    const kvarn_attn_shape shape = ggml_kvarn_get_attn_shape(dst);

    const kvarn_cpu_kernels * kernels = kvarn_pick_kernels(params);

    const int64_t n_rows   = dst->src[KVARN_SRC_Q]->ne[1];
    const int64_t n_group  = kvarn_row_group(dst, shape);
    const int64_t n_jobs   = (n_rows + n_group - 1)/n_group*dst->ne[1]*shape.H*dst->ne[3];
    // whoever is free takes the next one: tiles that nobody sees cost nothing, and cores are not equally fast
    if (params->ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);
    for (int64_t job = params->ith; job < n_jobs; job = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        kvarn_attend_task(params, kernels, dst, shape, kvarn_find_task(dst, shape, n_group, job), n_group, n_jobs, scratch);
    }
}

static void kvarn_forward_reduce(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * parts = dst->src[0];
    const ggml_tensor * sinks = dst->src[1];

    const int64_t DV     = dst->ne[0];
    const int64_t n_head = dst->ne[1];
    const int64_t n      = n_head*dst->ne[2]; // per stream

    for (int64_t job = params->ith; job < n*dst->ne[3]; job += params->nth) {
        const char * part = (const char *) parts->data + job%n*parts->nb[2] + job/n*parts->nb[3];
        float      * out  = (float *) ((char *) dst->data + job%n*dst->nb[1] + job/n*dst->nb[3]);

        const float sink = sinks ? ((const float *) sinks->data)[job%n_head] : -INFINITY;
        float max = sink;
        for (int64_t c = 0; c < parts->ne[1]; ++c) {
            max = std::max(max, *(const float *) (part + c*parts->nb[1]));
        }
        memset(out, 0, DV*sizeof(float));
        float sum = sinks ? expf(sink - max) : 0.0f;
        for (int64_t c = 0; c < parts->ne[1]; ++c) {
            const float * pc = (const float *) (part + c*parts->nb[1]);
            if (pc[0] == -INFINITY) {
                continue;
            }
            const float w = expf(pc[0] - max);
            sum += w*pc[1];
            for (int64_t d = 0; d < DV; ++d) {
                out[d] += w*pc[2 + d];
            }
        }
        const float r = sum > 0.0f ? 1.0f/sum : 0.0f;
        for (int64_t d = 0; d < DV; ++d) {
            out[d] *= r;
        }
    }
}

void ggml_compute_forward_kvarn(const ggml_compute_params * params, ggml_tensor * dst) {
    float * scratch = (float *) GGML_PAD((uintptr_t) params->wdata, KVARN_LINE) + kvarn_scratch(dst)*params->ith;

    switch (ggml_kvarn_get_op(dst)) {
        case KVARN_OP_SEAL:   kvarn_forward_seal  (params, dst, ggml_kvarn_get_shape(dst), scratch); break;
        case KVARN_OP_GET:    kvarn_forward_get   (params, dst, ggml_kvarn_get_shape(dst), scratch); break;
        case KVARN_OP_ATTN:   kvarn_forward_attn  (params, dst, scratch); break;
        case KVARN_OP_REDUCE: kvarn_forward_reduce(params, dst); break;
    }
}
