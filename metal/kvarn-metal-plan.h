// kvarn-metal-plan.h - from an op's shapes to what is launched: which kernel, its constants and arguments, grid and memory.
// Knows neither Metal nor ggml: kvarn-metal-ggml.cpp replays a plan on a Mac, tests/metal/runner.cpp the same plan on any CPU.
//
// SPDX-License-Identifier: MIT

#ifndef KVARN_METAL_PLAN_H
#define KVARN_METAL_PLAN_H

#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include "kvarn-format.h"
#include "kvarn-metal-args.h"

#define KVARN_METAL_MEMORY (16*1024) // of the decode kernel at most: two threadgroups fit a core's 32 KB

// Threadgroups of the decode kernel: as many as the context has work for, the first number even if a simdgroup then has not one
// tile of its own to read; beyond the second, more tiles each, for a partial result is 1/10 of the bytes of four tiles (2 bits,
// D = 128, 4 query heads per KV head). Between them lie one threadgroup per core of the largest chip, and four.
#define KVARN_METAL_GROUPS_MIN 64
#define KVARN_METAL_GROUPS_MAX 256

struct kvarn_metal_tensor { // sizes and strides in bytes
    int64_t  ne[4];
    uint64_t nb[4];
};

// one launch; buffer slot n + 1 holds source n of the node, n < n_src, and slot n_src + 1 the node
struct kvarn_metal_dispatch {
    char     name[64];
    int32_t  constant[KVARN_FC_COUNT]; // numbers KVARN_FC_FIRST ..
    uint8_t  args[256];
    uint32_t args_size;
    uint32_t n_src;
    uint32_t groups[3];
    uint32_t threads;                  // any smaller multiple of 32 does, too
    uint32_t memory;                   // bytes for [[threadgroup(0)]], a multiple of 16
};

struct kvarn_metal_attn_op {
    int32_t bits[2], D[2];             // keys, values; bits 0: an f16 cache
    int32_t H, map_off, n_tiles, s0;
    int32_t n_used;                    // tiles read per stream
    int32_t has_mask;
    int32_t tiny;                      // KVARN_FC_TINY
    float   scale, max_bias, softcap;
    kvarn_metal_tensor q;              // [D_k, n_rows, n_head, n_stream]
    kvarn_metal_tensor rows[2];        // f16 cache [D, n_kv, H, n_stream], or tail [D*H, rows]
    kvarn_metal_tensor mask;           // [n_kv, >= n_rows, 1, n_stream or 1]
    kvarn_metal_tensor part;           // [D_v + 2, partial results at most, n_rows*n_head, n_stream]
};

struct kvarn_metal_reduce_op {
    int32_t            has_sinks;
    kvarn_metal_tensor part;
    kvarn_metal_tensor out;            // [D_v, n_head, n_rows, n_stream]
};

static inline kvarn_metal_dispatch kvarn_metal_launch(const char * name, uint32_t n_src, const void * args, size_t args_size) {
    kvarn_metal_dispatch d = {};
    snprintf(d.name, sizeof(d.name), "%s", name);
    memcpy(d.args, args, args_size);
    d.args_size = (uint32_t) args_size;
    d.n_src     = n_src;
    return d;
}

// Passes of 32 units of 4 channels that the values need: 1, 2 or 4.
static inline int kvarn_metal_passes(int D_v) {
    return D_v <= 128 ? 1 : D_v <= 256 ? 2 : 4;
}

// Query vectors of a threadgroup. Unpacking costs about 2.5 issue slots a code, whatever their number, and each query one: take
// what makes the sum over all groups smallest, within the registers for the output.
static inline int kvarn_metal_queries(int n_q, int passes) {
    int best = 1;
    for (int nq = 1; nq <= (passes == 1 ? 8 : 4); nq *= 2) {
        if ((n_q + nq - 1)/nq*(2*nq + 5) < (n_q + best - 1)/best*(2*best + 5)) {
            best = nq;
        }
    }
    return best;
}

// NULL if the kernels can do it, or what they cannot do
static inline const char * kvarn_metal_refuses_attn(const kvarn_metal_attn_op & op) {
    for (int side = 0; side < 2; ++side) {
        if (op.D[side] % KVARN_D_STEP != 0 || op.D[side] > KVARN_D_MAX) {
            return "heads must have a multiple of 16 channels, 512 at most";
        }
        if (op.rows[side].nb[1] % 8 != 0 || op.rows[side].nb[2] % 8 != 0 || op.rows[side].nb[3] % 8 != 0) {
            return "rows of f16 must start at multiples of 8 bytes";
        }
    }
    if (op.q.nb[0] != 4 || op.q.nb[1] % 16 != 0 || op.q.nb[2] % 16 != 0 || op.q.nb[3] % 16 != 0) {
        return "query vectors must start at multiples of 16 bytes";
    }
    if (op.has_mask && (op.mask.nb[0] != 2 || op.mask.nb[1] % 8 != 0 || op.mask.nb[3] % 8 != 0)) {
        return "mask rows must start at multiples of 8 bytes";
    }
    return NULL;
}

// Tiles of a threadgroup, if n_one threadgroups share each tile's place in the context (KV heads, streams, groups of queries).
static constexpr int kvarn_metal_chunk(int n_used, int n_one, int n_parts) {
    int n = (n_used + 3)/4; // a tile per simdgroup
    const int least = (KVARN_METAL_GROUPS_MIN + n_one - 1)/n_one;
    const int most  = KVARN_METAL_GROUPS_MAX > n_one ? KVARN_METAL_GROUPS_MAX/n_one : 1;
    n = n > least ? n : least;
    n = n < most ? n : most;
    n = n < n_parts ? n : n_parts;
    return (n_used + n - 1)/n;
}

static inline kvarn_metal_dispatch kvarn_metal_plan_attn(const kvarn_metal_attn_op & op) {
    kvarn_metal_attn_args a = {};
    a.q_row    = op.q.nb[1];
    a.q_head   = op.q.nb[2];
    a.q_stream = op.q.nb[3];
    a.k_row    = op.rows[KVARN_KEY].nb[1];
    a.k_head   = op.rows[KVARN_KEY].nb[2];
    a.k_stream = op.rows[KVARN_KEY].nb[3];
    a.v_row    = op.rows[KVARN_VALUE].nb[1];
    a.v_head   = op.rows[KVARN_VALUE].nb[2];
    a.v_stream = op.rows[KVARN_VALUE].nb[3];

    a.mask_row     = op.mask.nb[1];
    a.mask_stream  = op.mask.nb[3];
    a.mask_streams = op.has_mask ? (int32_t) op.mask.ne[3] : 1;
    a.part_chunk   = op.part.nb[1];
    a.part_q       = op.part.nb[2];
    a.part_stream  = op.part.nb[3];

    a.n_rows  = (int32_t) op.q.ne[1];
    a.n_head  = (int32_t) op.q.ne[2];
    a.H       = op.H;
    a.n_used  = op.n_used;
    a.n_tiles = op.n_tiles;
    a.map_off = op.map_off;
    a.s0      = op.s0;

    const int passes  = kvarn_metal_passes(op.D[KVARN_VALUE]);
    const int n_q     = a.n_rows*(a.n_head/a.H);
    const int queries = kvarn_metal_queries(n_q, passes);

    a.n_groups = (n_q + queries - 1)/queries;
    a.n_parts  = (int32_t) op.part.ne[1];
    a.chunk    = kvarn_metal_chunk(a.n_used, (int) (a.n_groups*a.H*op.part.ne[3]), a.n_parts);
    a.n_chunks = (a.n_used + a.chunk - 1)/a.chunk;

    // memory of a simdgroup, in float4 per query vector: channels of a key, or 128 tokens, or in the end the output
    const int units = op.D[KVARN_KEY]/4 > 32*passes ? op.D[KVARN_KEY]/4 : 32*passes;
    a.region   = units*queries;

    int nsg = KVARN_METAL_MEMORY/(16*a.region) < 4 ? KVARN_METAL_MEMORY/(16*a.region) : 4;
    nsg = nsg < a.chunk ? nsg : a.chunk;
    a.n_pow2   = 1;
    while (2*a.n_pow2 <= a.n_head) {
        a.n_pow2 *= 2;
    }
    a.scale    = op.softcap > 0.0f ? op.scale/op.softcap : op.scale;
    a.max_bias = op.max_bias;
    a.softcap  = op.softcap;

    char name[64];
    snprintf(name, sizeof(name), "kernel_kvarn_attn_q%d_v%d", queries, passes);
    kvarn_metal_dispatch d = kvarn_metal_launch(name, 7, &a, sizeof(a));
    d.constant[KVARN_FC_BITS_K  - KVARN_FC_FIRST] = op.bits[KVARN_KEY];
    d.constant[KVARN_FC_BITS_V  - KVARN_FC_FIRST] = op.bits[KVARN_VALUE];
    d.constant[KVARN_FC_D_K     - KVARN_FC_FIRST] = op.D[KVARN_KEY];
    d.constant[KVARN_FC_D_V     - KVARN_FC_FIRST] = op.D[KVARN_VALUE];
    d.constant[KVARN_FC_BIAS    - KVARN_FC_FIRST] = op.max_bias > 0.0f;
    d.constant[KVARN_FC_SOFTCAP - KVARN_FC_FIRST] = op.softcap  > 0.0f;
    d.constant[KVARN_FC_MASK    - KVARN_FC_FIRST] = op.has_mask != 0;
    d.constant[KVARN_FC_TINY    - KVARN_FC_FIRST] = op.tiny     != 0;
    d.groups[0] = (uint32_t) a.n_chunks;
    d.groups[1] = (uint32_t) op.H;
    d.groups[2] = (uint32_t) (op.part.ne[3]*a.n_groups);
    d.threads   = (uint32_t) (32*nsg);
    d.memory    = (uint32_t) (16*a.region*nsg);
    return d;
}

static inline kvarn_metal_dispatch kvarn_metal_plan_reduce(const kvarn_metal_reduce_op & op) {
    kvarn_metal_reduce_args a = {};
    a.part_chunk  = op.part.nb[1];
    a.part_q      = op.part.nb[2];
    a.part_stream = op.part.nb[3];
    a.out_q       = op.out.nb[1];
    a.out_stream  = op.out.nb[3];
    a.n_parts     = (int32_t) op.part.ne[1];
    a.n_head      = (int32_t) op.out.ne[1];

    kvarn_metal_dispatch d = kvarn_metal_launch("kernel_kvarn_reduce", 2, &a, sizeof(a));
    d.constant[KVARN_FC_D_V   - KVARN_FC_FIRST] = (int32_t) op.out.ne[0];
    d.constant[KVARN_FC_SINKS - KVARN_FC_FIRST] = op.has_sinks;
    d.groups[0] = (uint32_t) (op.out.ne[1]*op.out.ne[2]);
    d.groups[1] = (uint32_t) op.out.ne[3];
    d.groups[2] = (uint32_t) ((op.out.ne[0] + 63)/64);
    d.threads   = 32;
    return d;
}

struct kvarn_metal_tiles_op {
    int32_t side, bits, D, H;
    int32_t n_rows, n_seal, n_tiles;   // of the plan
    int32_t s0;                        // GET: first stream
    kvarn_metal_tensor tail;           // [D*H, rows]
    kvarn_metal_tensor out;            // GET: [D, H, n_kv, n_stream]
};

static inline kvarn_metal_dispatch kvarn_metal_plan_tiles(const char * name, const kvarn_metal_tiles_op & op, int32_t list_off) {
    kvarn_metal_tiles_args a = {};
    a.tail_row   = op.tail.nb[1];
    a.out_row    = op.out.nb[2];
    a.out_stream = op.out.nb[3];
    a.H          = op.H;
    a.n_tiles    = op.n_tiles;
    a.list_off   = list_off;
    a.s0         = op.s0;

    kvarn_metal_dispatch d = kvarn_metal_launch(name, 3, &a, sizeof(a));
    d.constant[KVARN_FC_BITS_K - KVARN_FC_FIRST] = op.bits;
    d.constant[KVARN_FC_D_K    - KVARN_FC_FIRST] = op.D;
    d.constant[KVARN_FC_SIDE   - KVARN_FC_FIRST] = op.side;
    d.groups[1] = (uint32_t) op.H;
    return d;
}

static inline kvarn_metal_dispatch kvarn_metal_plan_seal(const kvarn_metal_tiles_op & op) {
    kvarn_metal_dispatch d = kvarn_metal_plan_tiles("kernel_kvarn_seal", op, op.n_rows);
    d.groups[0] = (uint32_t) op.n_seal;
    d.groups[2] = 1;
    d.threads   = op.D <= 128 ? 128 : 256;
    d.memory    = (uint32_t) (sizeof(float)*(6*op.D + 3*KVARN_G));
    return d;
}

static inline kvarn_metal_dispatch kvarn_metal_plan_get(const kvarn_metal_tiles_op & op) {
    kvarn_metal_dispatch d = kvarn_metal_plan_tiles("kernel_kvarn_get", op, op.n_rows + 2*op.n_seal);
    d.groups[0] = (uint32_t) (op.out.ne[2]/KVARN_G);
    d.groups[2] = (uint32_t) op.out.ne[3];
    d.threads   = 128;
    return d;
}

#endif
