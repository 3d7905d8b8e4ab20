// kvarn-cuda.h - the CUDA kernels as functions of raw pointers: what the glue and the standalone benchmark call.
// No ggml. Everything is launched on the stream and nothing waits for it; a launch error is returned.
//
// SPDX-License-Identifier: MIT

#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

// Where the rows of one side of a layer's cache lie. Strides in elements.
struct kvarn_cuda_side {
    int             bits;          // 2, 3, 4; 0: an f16 cache, tile i = rows 128*i ..
    int             D;
    const uint8_t * tiles;         // [stream][tile][head]
    const half    * rows;          // tail slots of 128 rows, or the f16 cache
    int64_t         row_stride;
    int64_t         head_stride;
    int64_t         stream_stride; // f16 cache only
};

struct kvarn_attn_args {
    kvarn_cuda_side side[2];
    const float   * q;             // [stream][head][row][D], strides in elements
    int64_t         q_row, q_head, q_stream;
    const int64_t * map;           // of the first stream: [stream][n_tiles]
    const half    * mask;          // [stream][row][n_used*128]; stride 0: one for all streams
    int64_t         mask_row, mask_stream;
    // [stream][row*n_head + head][cap][D of the values + 2]: maximum (base 2), sum, output times the sum
    float         * part;
    int             s0, n_stream;  // tiles of stream s are those of s0 + s
    int             H, n_gqa, n_rows;
    int             n_used;        // tiles looked at
    int             n_tiles;       // tiles per stream
    int             cap;           // partial results there is room for, at least 2
    int             n_split;       // partial results of sealed tiles, set by kvarn_attn_plan
    int             n_open;        // and of open ones, behind them
    int             n_warps;       // per block, set by kvarn_attn_plan
    float           scale, max_bias, softcap;
    bool            is_behind;     // PREP: the launch is one behind it, and may come early. false: an ordinary one
    // few tiles: the output itself, as REDUCE has it, with sinks and rotation. NULL: partial results
    float         * out;           // [stream][row*n_head + head][D]
    const float   * sinks;
    int             n_rot;
};

// Chooses n_split, n_open and n_warps for this device: depends on nothing but the arguments, so REDUCE finds the same.
cudaError_t kvarn_attn_plan(kvarn_attn_args * args);

// Without REDUCE, where there are few tiles: then ATTN writes to out. false: it has to be partial results
bool kvarn_attn_make_whole(kvarn_attn_args * args, float * out, const float * sinks, int n_rot);

// ATTN: tiles and rows -> partial results
cudaError_t kvarn_attn(const kvarn_attn_args & args, cudaStream_t stream);

// the kernels that it picks from, by head size; few: up to 4 query vectors per KV head
cudaError_t kvarn_attn_d64      (const kvarn_attn_args & a, cudaStream_t stream);
cudaError_t kvarn_attn_d64_few  (const kvarn_attn_args & a, cudaStream_t stream);
cudaError_t kvarn_attn_d128     (const kvarn_attn_args & a, cudaStream_t stream);
cudaError_t kvarn_attn_d128_few (const kvarn_attn_args & a, cudaStream_t stream);
cudaError_t kvarn_attn_d256     (const kvarn_attn_args & a, cudaStream_t stream);
cudaError_t kvarn_attn_d256_few (const kvarn_attn_args & a, cudaStream_t stream);
cudaError_t kvarn_attn_f16      (const kvarn_attn_args & a, cudaStream_t stream); // one side an f16 cache, heads of 128 channels
cudaError_t kvarn_attn_any      (const kvarn_attn_args & a, cudaStream_t stream); // every shape

// REDUCE: partial results of n query vectors -> out[n][D].  sinks: one logit per head or NULL
// n_rot: channels rotated together, the power of two that undoes the values' rotation; 0: none
// is_behind: its blocks may be placed while the kernel before it on the stream ends (sm_90 and later)
cudaError_t kvarn_reduce(const float * part, const float * sinks, float * out, int D, int n, int n_head, int cap, int n_split,
                         cudaStream_t stream, int n_rot = 0, bool is_behind = true);

// GET: tiles map[stream][i], i < n_used -> f16 rows [stream][i*128 + t][head][D] of heads h0 .. h0 + n_heads - 1; n_heads 0: all
cudaError_t kvarn_get(int side, int bits, int D, int H, const uint8_t * tiles, const half * tail, const int64_t * map, half * out,
                      int n_used, int n_tiles, int s0, int n_stream, cudaStream_t stream, int h0 = 0, int n_heads = 0);

// keys or values of one layer, to be sealed
struct kvarn_seal_side {
    int          side, bits, D, H;
    const half * tail;
    uint8_t    * tiles;
};

// SEAL: pairs (slot, tile) of the list, slot -1: nothing; of any number of layers
// is_behind: its blocks may be placed while the kernel before it on the stream ends
cudaError_t kvarn_seal(const kvarn_seal_side * sides, int n_sides, const int64_t * list, int n_list, cudaStream_t stream,
                       bool is_behind = true);

// how heads are turned by their token's position (RoPE with YaRN's correction)
struct kvarn_rope {
    const int32_t * pos;         // [token]
    const float   * factors;     // a pair's divisor, or NULL
    int             n_dims;      // channels that are turned, from the first one on
    bool            is_neox;     // pairs are n_dims/2 channels apart; else neighbours
    float           theta_scale; // from one pair to the next
    float           freq_scale, ext_factor, attn_factor, low, high;
};

// what PREP does with the tokens' keys, values or queries
struct kvarn_prep_part {
    int             D, H;            // H 0: nothing
    int             n_rot;           // channels rotated together
    bool            is_turned;       // by rope, before they are rotated
    const float   * x;               // [token][head][D], strides in elements
    int64_t         x_token, x_head;
    const int64_t * rows;            // keys and values: row of the tail for each token
    half          * tail;
    float         * out;             // queries: [token][head][D]
};

struct kvarn_prep_args {
    kvarn_prep_part part[3]; // keys, values, queries
    kvarn_rope      rope;
    int             n_tokens;
};

// PREP: few tokens' keys, values and queries turned and rotated, keys and values stored in the tail
// is_behind: its blocks may be placed while the kernel before it on the stream ends
cudaError_t kvarn_prep(const kvarn_prep_args & args, cudaStream_t stream, bool is_behind = true);
