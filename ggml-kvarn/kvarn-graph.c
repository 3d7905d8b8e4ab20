// kvarn-graph.c - builds the nodes of GGML_OP_KVARN and checks their shapes; moves rows of a tail slot into a tile and back.
//
// SPDX-License-Identifier: MIT

#include "kvarn-graph.h"
#include "ggml-impl.h"

#include <string.h>

// op_params: word 0 = enum kvarn_op, words 1.. = struct kvarn_shape, then s0
#define SHAPE_WORDS (sizeof(struct kvarn_shape)/sizeof(int32_t))

static_assert((1 + SHAPE_WORDS + 1)*sizeof(int32_t) <= GGML_MAX_OP_PARAMS, "op_params too small for KVARN");

int kvarn_type_bits(enum ggml_type type) {
    switch (type) {
        case GGML_TYPE_KVARN2: return 2;
        case GGML_TYPE_KVARN3: return 3;
        case GGML_TYPE_KVARN4: return 4;
        default:               return 0;
    }
}

static void kvarn_set_params(struct ggml_tensor * node, enum kvarn_op op, struct kvarn_shape shape, int32_t s0) {
    int32_t params[1 + SHAPE_WORDS + 1];
    params[0] = op;
    memcpy(params + 1, &shape, sizeof(shape));
    params[1 + SHAPE_WORDS] = s0;

    node->op = GGML_OP_KVARN;
    memcpy(node->op_params, params, sizeof(params));
}

enum kvarn_op ggml_kvarn_get_op(const struct ggml_tensor * node) {
    return (enum kvarn_op) node->op_params[0];
}

struct kvarn_shape ggml_kvarn_get_shape(const struct ggml_tensor * node) {
    struct kvarn_shape shape;
    memcpy(&shape, node->op_params + 1, sizeof(shape));
    return shape;
}

int64_t ggml_kvarn_get_s0(const struct ggml_tensor * node) {
    return node->op_params[1 + SHAPE_WORDS];
}

static void kvarn_check(const struct ggml_tensor * tiles, const struct ggml_tensor * tail, const struct ggml_tensor * plan,
                        struct kvarn_shape shape) {
    GGML_ASSERT(kvarn_is_valid(shape.D, shape.bits) || shape.bits == KVARN_BITS_EXACT);
    GGML_ASSERT(tiles->type == GGML_TYPE_I8  && ggml_is_contiguous(tiles));
    GGML_ASSERT(tail ->type == GGML_TYPE_F16 && ggml_is_contiguous(tail));
    GGML_ASSERT(plan ->type == GGML_TYPE_I64 && ggml_is_contiguous(plan));
    GGML_ASSERT(tiles->ne[0] == (int64_t) kvarn_tile_size(shape.D, shape.bits)*shape.H);
    GGML_ASSERT(tiles->ne[1] == shape.n_tiles);
    GGML_ASSERT(tail ->ne[0] == (int64_t) shape.D*shape.H && tail->ne[1] % KVARN_G == 0);
    GGML_ASSERT(plan ->ne[0] == shape.n_rows + 2*shape.n_seal + shape.n_tiles*tiles->ne[2]);
}

struct ggml_tensor * ggml_kvarn_seal(
        struct ggml_context * ctx,
        struct ggml_tensor  * tiles,
        struct ggml_tensor  * tail,
        struct ggml_tensor  * plan,
        struct kvarn_shape    shape) {
    kvarn_check(tiles, tail, plan, shape);

    struct ggml_tensor * result = ggml_view_tensor(ctx, tiles);
    kvarn_set_params(result, KVARN_OP_SEAL, shape, 0);

    result->src[0] = tail;
    result->src[1] = plan;
    result->src[2] = tiles;

    return result;
}

struct ggml_tensor * ggml_kvarn_get(
        struct ggml_context * ctx,
        struct ggml_tensor  * tiles,
        struct ggml_tensor  * tail,
        struct ggml_tensor  * plan,
        struct kvarn_shape    shape,
        int64_t               n_kv,
        int64_t               s0,
        int64_t               ns) {
    kvarn_check(tiles, tail, plan, shape);
    GGML_ASSERT(n_kv % KVARN_G == 0 && n_kv <= (int64_t) shape.n_tiles*KVARN_G);
    GGML_ASSERT(s0 >= 0 && ns > 0 && s0 + ns <= tiles->ne[2]);

    struct ggml_tensor * result = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, shape.D, shape.H, n_kv, ns);
    kvarn_set_params(result, KVARN_OP_GET, shape, (int32_t) s0);

    result->src[0] = tail;
    result->src[1] = plan;
    result->src[2] = tiles;

    return result;
}

// Exact tiles keep their rows xor-ed, so that a tile read as if it were tail rows cannot go unnoticed.
#define EXACT_XOR 0x5a5a

void kvarn_seal_rows(const struct kvarn_shape * shape, const ggml_fp16_t * rows, uint8_t * tile, float * scratch, kvarn_to_f32_t to_f32) {
    const int     D      = shape->D;
    const int64_t stride = (int64_t) D*shape->H;

    if (shape->bits == KVARN_BITS_EXACT) {
        uint16_t * out = (uint16_t *) tile;
        for (int t = 0; t < KVARN_G; ++t) {
            for (int d = 0; d < D; ++d) {
                out[t*D + d] = rows[t*stride + d] ^ EXACT_XOR;
            }
        }
        return;
    }

    for (int t = 0; t < KVARN_G; ++t) {
        to_f32(rows + t*stride, scratch + t*D, D);
    }
    kvarn_seal_ref(shape->side, shape->bits, D, scratch, tile, scratch + KVARN_G*D);
}

void kvarn_unseal_rows(const struct kvarn_shape * shape, const uint8_t * tile, ggml_fp16_t * rows, float * scratch, kvarn_to_f16_t to_f16) {
    const int     D      = shape->D;
    const int64_t stride = (int64_t) D*shape->H;

    if (shape->bits == KVARN_BITS_EXACT) {
        const uint16_t * in = (const uint16_t *) tile;
        for (int t = 0; t < KVARN_G; ++t) {
            for (int d = 0; d < D; ++d) {
                rows[t*stride + d] = in[t*D + d] ^ EXACT_XOR;
            }
        }
        return;
    }

    kvarn_unseal_ref(shape->side, shape->bits, D, tile, scratch);
    for (int t = 0; t < KVARN_G; ++t) {
        to_f16(scratch + t*D, rows + t*stride, D);
    }
}
