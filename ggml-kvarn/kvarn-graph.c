// kvarn-graph.c - builds the nodes of GGML_OP_KVARN and checks their shapes; moves rows of a tail slot into a tile and back.
//
// SPDX-License-Identifier: MIT

#include "kvarn-graph.h"
#include "ggml-backend.h"
#include "ggml-impl.h"

#include <stdlib.h>
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

size_t kvarn_window_size(void) {
    const char * value = getenv("KVARN_WINDOW");
    const int    mib   = value ? atoi(value) : 0;
    return (size_t) (mib > 0 ? mib : 160) << 20;
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

// query rows up to which tiles outside of main memory are attended directly; more of them share one GET.
// The CPU unpacks a tile while it multiplies: there is no number of rows from which GET would be faster.
#define ATTN_ROWS_MAX 16

// On the CPU: tiles of a partial result, at least, and partial results per KV head and stream, at most. Several tasks for every
// thread, whatever their number, since results do not depend on it; but each task that begins or ends costs what half a tile does.
// With many rows these are tasks enough.
#define CHUNK_MIN  8
#define CHUNKS_MAX 16

// A device shares the tiles out over all its multiprocessors: as many partial results per layer, and some for the tiles that are not
// sealed. Which of them it uses is its own affair; what it does not use, REDUCE does not read.
#define CHUNK_MIN_DEVICE 4
#define CHUNKS_DEVICE    512 // of all heads and streams, but not fewer than the next
#define CHUNKS_HEAD      32
#define CHUNKS_OPEN      4

static_assert(sizeof(int32_t) + sizeof(struct kvarn_attn_shape) <= GGML_MAX_OP_PARAMS, "op_params too small for KVARN");

struct kvarn_attn_shape ggml_kvarn_get_attn_shape(const struct ggml_tensor * node) {
    struct kvarn_attn_shape shape;
    memcpy(&shape, node->op_params + 1, sizeof(shape));
    return shape;
}

static void kvarn_set_attn_params(struct ggml_tensor * node, enum kvarn_op op, struct kvarn_attn_shape shape) {
    node->op = GGML_OP_KVARN;
    node->op_params[0] = op;
    memcpy(node->op_params + 1, &shape, sizeof(shape));
}

// the GET node behind a permuted view, NULL if there is none
static struct ggml_tensor * kvarn_find_get(struct ggml_tensor * view) {
    struct ggml_tensor * t = view->op == GGML_OP_PERMUTE ? view->src[0] : NULL;
    return t && t->op == GGML_OP_KVARN && ggml_kvarn_get_op(t) == KVARN_OP_GET ? t : NULL;
}

// whether the CPU will compute on these tiles; without a buffer they lie in a context's own memory
static bool kvarn_is_host(const struct ggml_tensor * tiles) {
    const struct ggml_tensor * t = tiles->view_src ? tiles->view_src : tiles;
    return !t->buffer || ggml_backend_buffer_is_host(t->buffer);
}

static ggml_backend_dev_t kvarn_device(const struct ggml_tensor * tiles) {
    const struct ggml_tensor * t = tiles->view_src ? tiles->view_src : tiles;
    return ggml_backend_buft_get_device(ggml_backend_buffer_get_type(t->buffer));
}

struct ggml_tensor * ggml_kvarn_near(struct ggml_tensor * tensor, const struct ggml_tensor * cur) {
    struct ggml_tensor ** copies = (struct ggml_tensor **) tensor->extra;
    if (!copies) {
        return tensor;
    }
    while (cur && !cur->buffer && !(cur->view_src && cur->view_src->buffer)) {
        cur = cur->src[0];
    }
    for (; cur && *copies; ++copies) {
        if (kvarn_device(*copies) == kvarn_device(cur)) {
            return *copies;
        }
    }
    return tensor;
}

static void kvarn_set_attn_sources(
        struct ggml_tensor  * node,
        struct ggml_tensor  * q,
        struct ggml_tensor  * mask,
        struct ggml_tensor  * plan,
        struct ggml_tensor ** get,
        struct ggml_tensor ** kv) {
    node->src[KVARN_SRC_Q]    = q;
    node->src[KVARN_SRC_PLAN] = plan;
    node->src[KVARN_SRC_MASK] = mask;
    for (int side = 0; side < 2; ++side) {
        node->src[side == KVARN_KEY ? KVARN_SRC_K_TILES : KVARN_SRC_V_TILES] = get[side] ? get[side]->src[2] : NULL;
        node->src[side == KVARN_KEY ? KVARN_SRC_K_ROWS  : KVARN_SRC_V_ROWS ] = get[side] ? get[side]->src[0] : kv[side];
    }
}

struct ggml_tensor * ggml_kvarn_attn(
        struct ggml_context * ctx,
        struct ggml_tensor  * q,
        struct ggml_tensor  * k,
        struct ggml_tensor  * v,
        struct ggml_tensor  * mask,
        struct ggml_tensor  * sinks,
        float                 scale,
        float                 max_bias,
        float                 softcap) {
    struct ggml_tensor * kv [2] = { k, v };
    struct ggml_tensor * get[2] = { kvarn_find_get(k), kvarn_find_get(v) };

    if ((!get[KVARN_KEY] && !get[KVARN_VALUE]) || !mask) {
        return NULL;
    }

    const struct ggml_tensor * any       = get[KVARN_KEY] ? get[KVARN_KEY] : get[KVARN_VALUE];
    const bool                 is_prompt = q->ne[1] > ATTN_ROWS_MAX && !kvarn_is_host(any->src[2]);
    const struct kvarn_shape   plan  = ggml_kvarn_get_shape(any);
    struct kvarn_attn_shape    shape = {
        .H        = (int32_t) k->ne[2],
        .map_off  = plan.n_rows + 2*plan.n_seal,
        .n_tiles  = plan.n_tiles,
        .s0       = (int32_t) ggml_kvarn_get_s0(any),
        .scale    = scale,
        .max_bias = max_bias,
        .softcap  = softcap,
    };
    for (int side = 0; side < 2; ++side) {
        shape.D   [side] = (int32_t) kv[side]->ne[0];
        shape.bits[side] = get[side] ? ggml_kvarn_get_shape(get[side]).bits : 0;
        if (shape.bits[side] == KVARN_BITS_EXACT && !is_prompt) {
            return NULL; // has to be what flash attention computes, to the last bit
        }
        if (!get[side] && (kv[side]->type != GGML_TYPE_F16 || kv[side]->nb[0] != sizeof(ggml_fp16_t) ||
                           shape.D[side] % KVARN_D_STEP != 0 || shape.D[side] > KVARN_D_MAX)) {
            return NULL;
        }
    }
    GGML_ASSERT(q->type == GGML_TYPE_F32 && q->nb[0] == sizeof(float) && q->ne[0] == k->ne[0]);
    GGML_ASSERT(k->ne[1] == v->ne[1] && k->ne[2] == v->ne[2] && k->ne[1] % KVARN_G == 0 && q->ne[2] % k->ne[2] == 0);
    GGML_ASSERT(mask->type == GGML_TYPE_F16 && mask->ne[0] == k->ne[1] && mask->ne[1] >= q->ne[1] && mask->ne[2] == 1);

    if (is_prompt) { // in one node that unpacks some heads at a time, where the device has it; else GET unpacks all of them
        struct ggml_tensor * prompt = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, shape.D[KVARN_VALUE], q->ne[2], q->ne[1], q->ne[3]);
        kvarn_set_attn_params(prompt, KVARN_OP_ATTN, shape); // chunk 0
        kvarn_set_attn_sources(prompt, q, mask, any->src[1], get, kv);
        prompt->src[KVARN_SRC_SINKS] = sinks;
        ggml_backend_dev_t dev = kvarn_device(any->src[2]);
        return dev && ggml_backend_dev_supports_op(dev, prompt) ? prompt : NULL;
    }

    const int64_t n_used   = k->ne[1]/KVARN_G;
    const bool    is_host  = kvarn_is_host(any->src[2]);
    const int64_t least    = is_host ? CHUNK_MIN : CHUNK_MIN_DEVICE;
    const int64_t n_max    = !is_host ? MAX(CHUNKS_HEAD, CHUNKS_DEVICE/(shape.H*q->ne[3])) : q->ne[1] <= ATTN_ROWS_MAX ? CHUNKS_MAX : 1;
    const int64_t n_chunks = MIN((n_used + least - 1)/least, n_max);
    shape.chunk = (int32_t) ((n_used + n_chunks - 1)/n_chunks);

    struct ggml_tensor * part = ggml_new_tensor_4d(ctx, GGML_TYPE_F32,
            shape.D[KVARN_VALUE] + 2, (n_used + shape.chunk - 1)/shape.chunk + (is_host ? 0 : CHUNKS_OPEN), q->ne[1]*q->ne[2], q->ne[3]);
    kvarn_set_attn_params(part, KVARN_OP_ATTN, shape);
    kvarn_set_attn_sources(part, q, mask, any->src[1], get, kv);

    struct ggml_tensor * result = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, shape.D[KVARN_VALUE], q->ne[2], q->ne[1], q->ne[3]);
    kvarn_set_attn_params(result, KVARN_OP_REDUCE, shape);
    result->src[0] = part;
    result->src[1] = sinks;

    return result;
}

// Exact tiles keep their rows xor-ed, so that a tile read as if it were tail rows cannot go unnoticed.
#define EXACT_XOR 0x5a5a

void kvarn_seal_rows(const struct kvarn_shape * shape, const ggml_fp16_t * rows, uint8_t * tile, float * scratch,
                     kvarn_to_f32_t to_f32, kvarn_seal_t seal) {
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
    seal(shape->side, shape->bits, D, scratch, tile, scratch + KVARN_G*D);
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
