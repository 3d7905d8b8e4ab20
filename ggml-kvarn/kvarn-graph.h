// kvarn-graph.h - GGML_OP_KVARN: builders of its graph nodes and the shapes they take.
// The only ggml header of kvarn; included by the llama cache, by the backends' glue and by the patched call sites.
//
// SPDX-License-Identifier: MIT
//
// No tensor has the type GGML_TYPE_KVARN2/3/4: these ids only select a cache. What a cache side (keys or values) stores, per layer:
//
//   tiles  I8  [kvarn_tile_size(D, bits)*H, n_tiles, n_stream]   sealed tiles, the H heads of one tile side by side
//   tail   F16 [D*H, G*n_slots]                                  slots of G rows: tokens whose tile is not sealed, or only just
//
// The plan is an I64 input that the host fills for every ubatch, so that one graph serves them all:
//
//   | rows[n_rows]          | seal[n_seal][2]                     | map[n_stream][n_tiles]                                    |
//   | tail row of a token   | (slot, tile), slot -1: nothing      | KVARN_MAP_SEALED, KVARN_MAP_EMPTY or the slot of the tile |

#ifndef KVARN_GRAPH_H
#define KVARN_GRAPH_H

#include "ggml.h"
#include "kvarn.h"

#ifdef __cplusplus
extern "C" {
#endif

#define KVARN_MAP_SEALED (-1) // read the tile
#define KVARN_MAP_EMPTY  (-2) // no token in it: zeros

// A tile of this "width" keeps its f16 rows, scrambled: what the cache does around the quantizer can then be tested to the last bit.
#define KVARN_BITS_EXACT 16

enum kvarn_op {
    KVARN_OP_SEAL,   // tail rows -> tiles
    KVARN_OP_GET,    // tiles and tail rows -> F16
    KVARN_OP_ATTN,   // attention over a chunk of tiles, straight from tiles and tail rows -> partial results
    KVARN_OP_REDUCE, // partial results -> attention output
};

// one side of a layer's cache and the plan's partition
struct kvarn_shape {
    int32_t side;    // KVARN_KEY or KVARN_VALUE
    int32_t bits;    // 2, 3, 4 or KVARN_BITS_EXACT
    int32_t D;       // channels per head
    int32_t H;       // KV heads
    int32_t n_rows;  // entries of the plan before the seal list
    int32_t n_seal;  // pairs in the seal list
    int32_t n_tiles; // tiles per stream
    int32_t is_late; // of SEAL: no node of the graph reads what it seals, so it may run behind later nodes; 0 where it may not
};

// A constant that each device has a copy of: `tensor`'s extra is NULL or the list of them, NULL at its end. Returns the one on
// the device of the weights or the cache that `cur` is computed from, else `tensor`. Without it layers of one device would go to
// another for a matrix of 64 KiB.
GGML_API struct ggml_tensor * ggml_kvarn_near(struct ggml_tensor * tensor, const struct ggml_tensor * cur);

// Bytes of f16 rows that a device unpacks at once where it attends a prompt a few heads at a time: KVARN_WINDOW in MiB, or 160 MiB
GGML_API size_t kvarn_window_size(void);

// code width of a cache type: 2, 3, 4; 0 for any other type
GGML_API int kvarn_type_bits(enum ggml_type type);

// Seals the tiles listed in the plan. Returns a view of tiles, so that later nodes can depend on it.
//   tail  the written tail: pass the result of ggml_set_rows, so that the rows are there
GGML_API struct ggml_tensor * ggml_kvarn_seal(
        struct ggml_context * ctx,
        struct ggml_tensor  * tiles,
        struct ggml_tensor  * tail,
        struct ggml_tensor  * plan,
        struct kvarn_shape    shape);

// The first n_kv tokens of streams s0 .. s0+ns-1 as F16 [D, H, n_kv, ns]; n_kv is a multiple of G.
GGML_API struct ggml_tensor * ggml_kvarn_get(
        struct ggml_context * ctx,
        struct ggml_tensor  * tiles,
        struct ggml_tensor  * tail,
        struct ggml_tensor  * plan,
        struct kvarn_shape    shape,
        int64_t               n_kv,
        int64_t               s0,
        int64_t               ns);

// ATTN and REDUCE in place of flash attention on the result of GET. Takes what ggml_flash_attn_ext takes:
//   q      F32 [D, n_rows, n_head, ns], a permuted view
//   k, v   permuted views of GET nodes; one of them may be a permuted view of an F16 cache instead
//   mask   F16 [n_kv, >= n_rows, 1, ns or 1]        sinks  F32 [n_head] or NULL
// Returns F32 [D, n_head, n_rows, ns], or NULL where this form does not apply: then use the other one.
GGML_API struct ggml_tensor * ggml_kvarn_attn(
        struct ggml_context * ctx,
        struct ggml_tensor  * q,
        struct ggml_tensor  * k,
        struct ggml_tensor  * v,
        struct ggml_tensor  * mask,
        struct ggml_tensor  * sinks,
        float                 scale,
        float                 max_bias,
        float                 softcap);

// sources of an ATTN node; tiles are NULL for a side that is an F16 cache
enum kvarn_attn_src { KVARN_SRC_Q, KVARN_SRC_PLAN, KVARN_SRC_K_TILES, KVARN_SRC_K_ROWS, KVARN_SRC_V_TILES, KVARN_SRC_V_ROWS,
                      KVARN_SRC_MASK, KVARN_SRC_SINKS };

// what an ATTN and its REDUCE share. A partial result is D[KVARN_VALUE] + 2 floats: the maximum, the sum, the output times the sum.
struct kvarn_attn_shape {
    int32_t bits[2], D[2]; // keys, values; bits 0: an F16 cache
    int32_t H;
    int32_t map_off;       // entries of the plan before the map
    int32_t n_tiles;       // per stream
    int32_t s0;
    int32_t chunk;         // tiles of a partial result; 0: the node is the whole attention of a prompt, without a REDUCE
    float   scale, max_bias, softcap;
};

GGML_API struct kvarn_attn_shape ggml_kvarn_get_attn_shape(const struct ggml_tensor * node);

// what a SEAL's or GET's op_params hold
GGML_API enum kvarn_op      ggml_kvarn_get_op   (const struct ggml_tensor * node); // of any node
GGML_API struct kvarn_shape ggml_kvarn_get_shape(const struct ggml_tensor * node);
GGML_API int64_t            ggml_kvarn_get_s0   (const struct ggml_tensor * node);

// One head's G rows of a tail slot (rows D*H apart) to one tile and back. scratch: G*D + kvarn_seal_scratch(D) floats.
// The conversion is the caller's, and so is what seals, kvarn_seal_ref or a faster way to its bytes: the CPU backend has fast ones.
typedef void (*kvarn_to_f32_t)(const ggml_fp16_t * x, float * y, int64_t n);
typedef void (*kvarn_to_f16_t)(const float * x, ggml_fp16_t * y, int64_t n);

typedef void (*kvarn_seal_t)(int side, int bits, int D, const float * x, uint8_t * tile, float * scratch);

GGML_API void kvarn_seal_rows(const struct kvarn_shape * shape, const ggml_fp16_t * rows, uint8_t * tile, float * scratch,
                              kvarn_to_f32_t to_f32, kvarn_seal_t seal);
GGML_API void kvarn_unseal_rows(const struct kvarn_shape * shape, const uint8_t * tile, ggml_fp16_t * rows, float * scratch,
                                kvarn_to_f16_t to_f16);

// CPU backend: called from the hooks in ggml-cpu.c
struct ggml_compute_params;
size_t ggml_kvarn_work_size(const struct ggml_tensor * node, int n_tasks);
void   ggml_compute_forward_kvarn(const struct ggml_compute_params * params, struct ggml_tensor * dst);

#ifdef __cplusplus
}
#endif

#endif
