// kvarn-metal-args.h - what the Metal kernels take: argument structs, function constants, buffer slots.
// Read by kvarn.metal, by the plan and by the tests: plain structs of 32- and 64-bit numbers, nothing else. No #include.
//
// SPDX-License-Identifier: MIT

#ifndef KVARN_METAL_ARGS_H
#define KVARN_METAL_ARGS_H

// as in kvarn-graph.h: entries of the plan's map, the width of lossless tiles and what their rows are xor-ed with
#define KVARN_METAL_SEALED (-1)
#define KVARN_METAL_EMPTY  (-2)
#define KVARN_METAL_EXACT  16
#define KVARN_METAL_XOR    0x5a5a

// function constants: known when a pipeline is compiled, so that a pipeline holds the code of one width and head size only
#define KVARN_FC_BITS_K  2200   // 0: an f16 cache; SEAL and GET: the width of their side
#define KVARN_FC_BITS_V  2201
#define KVARN_FC_D_K     2202   // SEAL and GET: channels per head
#define KVARN_FC_D_V     2203
#define KVARN_FC_SIDE    2204   // SEAL and GET: KVARN_KEY or KVARN_VALUE
#define KVARN_FC_BIAS    2205   // ALiBi
#define KVARN_FC_SOFTCAP 2206
#define KVARN_FC_SINKS   2207
#define KVARN_FC_MASK    2208   // 0: every token is seen but those of empty tiles
#define KVARN_FC_TINY    2209   // codes as f16 subnormals: see kvarn_codes.h
#define KVARN_FC_FIRST   KVARN_FC_BITS_K
#define KVARN_FC_COUNT   10

// buffer slots: the argument struct, then the sources of the node in their order, then the node itself
#define KVARN_BUF_ARGS    0

#define KVARN_BUF_Q       1   // ATTN: as enum kvarn_attn_src of kvarn-graph.h, without the sinks
#define KVARN_BUF_PLAN    2
#define KVARN_BUF_K_TILES 3
#define KVARN_BUF_K_ROWS  4
#define KVARN_BUF_V_TILES 5
#define KVARN_BUF_V_ROWS  6
#define KVARN_BUF_MASK    7
#define KVARN_BUF_PART    8

#define KVARN_BUF_PARTS   1   // REDUCE
#define KVARN_BUF_SINKS   2
#define KVARN_BUF_OUT     3

#define KVARN_BUF_TAIL    1   // SEAL and GET; the plan is 2 as above
#define KVARN_BUF_TILES   3   // GET reads them
#define KVARN_BUF_RESULT  4   // SEAL: tiles, GET: rows

// strides are in bytes
struct kvarn_metal_attn_args {
    uint64_t q_row, q_head, q_stream;
    uint64_t k_row, k_head, k_stream;       // of an f16 cache; a tail has k_row only, and heads side by side
    uint64_t v_row, v_head, v_stream;
    uint64_t mask_row, mask_stream;
    uint64_t part_chunk, part_q, part_stream;
    int32_t  n_rows, n_head, H;
    int32_t  n_used;                        // tiles read per stream
    int32_t  n_tiles, map_off, s0;          // tiles per stream, entries of the plan before the map, first stream
    int32_t  chunk;                         // tiles of a partial result
    int32_t  n_chunks, n_parts;             // partial results that are used, and that there are
    int32_t  mask_streams;
    int32_t  n_groups;                      // groups of query vectors per KV head
    int32_t  n_pow2;                        // ALiBi: largest power of two <= n_head
    float    scale, max_bias, softcap;
    int32_t  region;                        // float4 of threadgroup memory per simdgroup
};

struct kvarn_metal_reduce_args {
    uint64_t part_chunk, part_q, part_stream;
    uint64_t out_q, out_stream;
    int32_t  n_parts;
    int32_t  n_head;
};

struct kvarn_metal_tiles_args {             // SEAL and GET
    uint64_t tail_row;                      // bytes
    uint64_t out_row, out_stream;           // GET
    int32_t  H;
    int32_t  n_tiles;                       // tiles per stream
    int32_t  list_off;                      // SEAL: entries of the plan before the seal list; GET: before the map
    int32_t  s0;                            // GET: first stream
};

#endif
