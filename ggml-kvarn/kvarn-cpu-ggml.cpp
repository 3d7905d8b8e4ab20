// kvarn-cpu-ggml.cpp - GGML_OP_KVARN on the CPU backend: SEAL and GET, threaded over (tile, head).
// Tile bytes are read and written by kvarn-ref.c only; here tensors become pointers.
//
// SPDX-License-Identifier: MIT

#include "kvarn-graph.h"
#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"

#include <cstring>

// floats of scratch per thread: one tile, and what sealing needs
static size_t kvarn_scratch(const kvarn_shape & shape) {
    const size_t n = (size_t) KVARN_G*shape.D + kvarn_seal_scratch(shape.D);
    return (n + 15)/16*16; // keep the threads on separate cache lines
}

size_t ggml_kvarn_work_size(const ggml_tensor * node, int n_tasks) {
    return kvarn_scratch(ggml_kvarn_get_shape(node))*sizeof(float)*n_tasks;
}

static void kvarn_forward_seal(const ggml_compute_params * params, ggml_tensor * dst, const kvarn_shape & shape, float * scratch) {
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
            kvarn_seal_rows(&shape,
                    (const ggml_fp16_t *) ((const char *) tail->data + slot*KVARN_G*tail->nb[1]) + (int64_t) h*shape.D,
                    (uint8_t *) dst->data + (tile*shape.H + h)*tile_size, scratch, ggml_cpu_fp16_to_fp32);
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
            kvarn_unseal_rows(&shape, (const uint8_t *) tiles->data + (tile*shape.H + h)*tile_size, rows, scratch, ggml_cpu_fp32_to_fp16);
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

void ggml_compute_forward_kvarn(const ggml_compute_params * params, ggml_tensor * dst) {
    const kvarn_shape shape = ggml_kvarn_get_shape(dst);

    float * scratch = (float *) params->wdata + kvarn_scratch(shape)*params->ith;

    switch (ggml_kvarn_get_op(dst)) {
        case KVARN_OP_SEAL: kvarn_forward_seal(params, dst, shape, scratch); break;
        case KVARN_OP_GET:  kvarn_forward_get (params, dst, shape, scratch); break;
    }
}
