// kvarn-metal-ggml.cpp - GGML_OP_KVARN in ggml's Metal backend: a node becomes a plan (kvarn-metal-plan.h), replayed here.
// Included at the end of ggml-metal-ops.cpp, where struct ggml_metal_op and its helpers are.
//
// SPDX-License-Identifier: MIT

#include "kvarn-graph.h"
#include "kvarn-metal-ggml.h"
#include "kvarn-metal-plan.h"

#include <algorithm>
#include <cstdlib>
#include <string>

static_assert(KVARN_METAL_SEALED == KVARN_MAP_SEALED && KVARN_METAL_EMPTY == KVARN_MAP_EMPTY, "as in kvarn-graph.h");
static_assert(KVARN_METAL_EXACT == KVARN_BITS_EXACT, "as in kvarn-graph.h");
static_assert(KVARN_BUF_Q == KVARN_SRC_Q + 1 && KVARN_BUF_PLAN == KVARN_SRC_PLAN + 1 && KVARN_BUF_MASK == KVARN_SRC_MASK + 1 &&
              KVARN_BUF_K_TILES == KVARN_SRC_K_TILES + 1 && KVARN_BUF_K_ROWS == KVARN_SRC_K_ROWS + 1 &&
              KVARN_BUF_V_TILES == KVARN_SRC_V_TILES + 1 && KVARN_BUF_V_ROWS == KVARN_SRC_V_ROWS + 1,
              "source n is bound to slot n + 1");

static kvarn_metal_tensor kvarn_metal_shape(const ggml_tensor * t) {
    kvarn_metal_tensor res = {};
    for (int i = 0; t && i < 4; ++i) {
        res.ne[i] = t->ne[i];
        res.nb[i] = t->nb[i];
    }
    return res;
}

// Whether codes are read as f16 subnormals: a third of the instructions (metal/README.md). KVARN_METAL_TINY=1; not the default
// before a Mac has shown that they are not flushed to zero.
static bool kvarn_metal_is_tiny() {
    static const bool is_tiny = getenv("KVARN_METAL_TINY") && atoi(getenv("KVARN_METAL_TINY")) != 0;
    return is_tiny;
}

static kvarn_metal_attn_op kvarn_metal_attn(const ggml_tensor * op) {
    const kvarn_attn_shape shape = ggml_kvarn_get_attn_shape(op);
    const ggml_tensor    * mask  = op->src[KVARN_SRC_MASK];
    kvarn_metal_attn_op res = {};
    for (int side = 0; side < 2; ++side) {
        res.bits[side] = shape.bits[side];
        res.D   [side] = shape.D[side];
        res.rows[side] = kvarn_metal_shape(op->src[side == KVARN_KEY ? KVARN_SRC_K_ROWS : KVARN_SRC_V_ROWS]);
    }
    res.H        = shape.H;
    res.map_off  = shape.map_off;
    res.n_tiles  = shape.n_tiles;
    res.s0       = shape.s0;
    res.n_used   = mask ? (int32_t) (mask->ne[0]/KVARN_G) : shape.n_tiles;
    res.has_mask = mask != nullptr;
    res.tiny     = kvarn_metal_is_tiny();
    res.scale    = shape.scale;
    res.max_bias = shape.max_bias;
    res.softcap  = shape.softcap;
    res.q        = kvarn_metal_shape(op->src[KVARN_SRC_Q]);
    res.mask     = kvarn_metal_shape(mask);
    res.part     = kvarn_metal_shape(op);
    return res;
}

static kvarn_metal_tiles_op kvarn_metal_tiles(const ggml_tensor * op) {
    const kvarn_shape shape = ggml_kvarn_get_shape(op);
    kvarn_metal_tiles_op res = {};
    res.side    = shape.side;
    res.bits    = shape.bits;
    res.D       = shape.D;
    res.H       = shape.H;
    res.n_rows  = shape.n_rows;
    res.n_seal  = shape.n_seal;
    res.n_tiles = shape.n_tiles;
    res.s0      = (int32_t) ggml_kvarn_get_s0(op);
    res.tail    = kvarn_metal_shape(op->src[0]);
    res.out     = kvarn_metal_shape(op);
    return res;
}

static kvarn_metal_dispatch kvarn_metal_plan(const ggml_tensor * op) {
    switch (ggml_kvarn_get_op(op)) {
        case KVARN_OP_SEAL: return kvarn_metal_plan_seal(kvarn_metal_tiles(op));
        case KVARN_OP_GET:  return kvarn_metal_plan_get (kvarn_metal_tiles(op));
        case KVARN_OP_ATTN: return kvarn_metal_plan_attn(kvarn_metal_attn(op));
        case KVARN_OP_REDUCE: break;
    }
    kvarn_metal_reduce_op reduce = {};
    reduce.has_sinks = op->src[1] != nullptr;
    reduce.part      = kvarn_metal_shape(op->src[0]);
    reduce.out       = kvarn_metal_shape(op);
    return kvarn_metal_plan_reduce(reduce);
}

bool ggml_metal_kvarn_supports(const ggml_tensor * op) {
    switch (ggml_kvarn_get_op(op)) {
        case KVARN_OP_SEAL:
        case KVARN_OP_GET: {
            const kvarn_shape shape = ggml_kvarn_get_shape(op);
            return kvarn_is_valid(shape.D, shape.bits) || (shape.bits == KVARN_BITS_EXACT && shape.D % KVARN_D_STEP == 0);
        }
        case KVARN_OP_ATTN:
            return ggml_kvarn_get_attn_shape(op).chunk != 0 && // a whole prompt in one node: not here
                   op->src[KVARN_SRC_Q]->view_offs % 16 == 0 && kvarn_metal_refuses_attn(kvarn_metal_attn(op)) == nullptr;
        case KVARN_OP_REDUCE:
            return true;
    }
    return false;
}

// The pipeline of a kernel with these constants; compiled when it is first asked for.
static ggml_metal_pipeline_with_params kvarn_metal_pipeline(ggml_metal_library_t lib, const kvarn_metal_dispatch & d) {
    std::string name = d.name;
    for (int c = 0; c < KVARN_FC_COUNT; ++c) {
        name += "_" + std::to_string(d.constant[c]);
    }
    ggml_metal_pipeline_with_params res = ggml_metal_library_get_pipeline(lib, name.c_str());
    if (!res.pipeline) {
        ggml_metal_cv_t cv = ggml_metal_cv_init();
        for (int c = 0; c < KVARN_FC_COUNT; ++c) {
            ggml_metal_cv_set_int32(cv, d.constant[c], KVARN_FC_FIRST + c);
        }
        res = ggml_metal_library_compile_pipeline(lib, d.name, name.c_str(), cv);
        ggml_metal_cv_free(cv);
    }
    return res;
}

int ggml_metal_op_kvarn(ggml_metal_op_t ctx, int idx) {
    ggml_tensor        * op  = ctx->node(idx);
    ggml_metal_encoder_t enc = ctx->enc;

    kvarn_metal_dispatch d = kvarn_metal_plan(op);
    const ggml_metal_pipeline_with_params pipeline = kvarn_metal_pipeline(ctx->lib, d);
    if (!pipeline.pipeline) {
        GGML_ABORT("%s does not compile, see above; please report it, and use another cache type", d.name);
    }
    // a pipeline allows fewer threads the more registers it needs
    d.threads = std::min(d.threads, (uint32_t) ggml_metal_pipeline_max_theads_per_threadgroup(pipeline)/32*32);

    ggml_metal_encoder_set_pipeline(enc, pipeline);
    ggml_metal_encoder_set_bytes   (enc, d.args, d.args_size, KVARN_BUF_ARGS);
    for (uint32_t n = 0; n < d.n_src; ++n) { // what a node does not have is not read: any buffer will do
        ggml_metal_encoder_set_buffer(enc, ggml_metal_get_buffer_id(op->src[n] ? op->src[n] : op), (int) n + 1);
    }
    ggml_metal_encoder_set_buffer(enc, ggml_metal_get_buffer_id(op), (int) d.n_src + 1);
    if (d.memory > 0) {
        ggml_metal_encoder_set_threadgroup_memory_size(enc, d.memory, 0);
    }
    ggml_metal_encoder_dispatch_threadgroups(enc, (int) d.groups[0], (int) d.groups[1], (int) d.groups[2], (int) d.threads, 1, 1);
    return 1;
}
