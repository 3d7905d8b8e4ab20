// kvarn-attn-plan.h - how attention's blocks divide shared memory and tiles: worked out on the host, read by the kernel.
//
// SPDX-License-Identifier: MIT

#pragma once

#include "kvarn-cuda.h"
#include "kvarn-format.h"
#include "kvarn-mma.cuh"

#define KVARN_P_WORDS 36 // words per column of p on its way between lanes: 32, and 4 that keep columns in different banks

struct kvarn_attn_layout {
    int n_blocks;          // that share a tile, each with its own query vectors
    int row_factor;        // 65536/n_gqa, rounded up: column to row without a division
    int n_mask;            // mask rows that the query vectors of a block see
    int share, share_more; // tiles of a share; this many shares have one more
    int factors, barriers, p_words, masks, tiles, tile_size, total; // bytes in shared memory
};

#define KVARN_ATTN_WARPS 8 // of a block that does all of a KV head, at most
#define KVARN_ATTN_WHOLE 4 // tiles up to which there is such a block
#define KVARN_ATTN_EARLY 128 // tiles up to which ATTN starts while PREP runs; with more, starting behind it is as fast or faster
#define KVARN_ATTN_SMALL 6144 // bytes of a tile of keys and one of values of which more have to be in flight

// Warps per multiprocessor, at most: what they have in flight keeps the memory of a large device busy, and more are slower. Small
// tiles take more, and more query vectors than memory can keep busy.
static __host__ __device__ __forceinline__ constexpr int kvarn_attn_warps_sm(int D, int nc) {
    return D > 64 ? 8 : nc > 1 ? 12 : 16;
}

// whether a block can do sealed tiles and open ones, and start early: with the most sums there are not enough registers
static __host__ __device__ __forceinline__ constexpr bool kvarn_attn_may_be_whole(int D, int nc) { return D*nc <= 256; }

// query vectors per lane: 1 (up to 4 in all) or 2
static inline int kvarn_attn_columns(const kvarn_attn_args & a) {
    return a.side[0].bits && a.side[1].bits && a.n_rows*a.n_gqa <= 4 ? 1 : 2;
}

static inline kvarn_attn_layout kvarn_attn_lay_out(const kvarn_attn_args & a) {
    kvarn_attn_layout l;
    const int D = a.side[0].D, n_q = a.n_rows*a.n_gqa, nc = kvarn_attn_columns(a), n_col = 4*nc;
    const int columns = n_q < n_col ? n_q : n_col;
    l.n_blocks   = (n_q + n_col - 1)/n_col;
    l.row_factor = (65536 + a.n_gqa - 1)/a.n_gqa;
    l.n_mask     = a.n_gqa % n_col == 0 ? 1 : (columns - 1)/a.n_gqa + 1 + (a.n_gqa < n_q && n_col % a.n_gqa != 0);
    l.share      = a.n_split ? a.n_used/a.n_split : 0;
    l.share_more = a.n_split ? a.n_used%a.n_split : 0;
    l.factors    = n_col*D*2;
    l.barriers   = l.factors  + n_col*4;
    l.p_words    = l.barriers + a.n_warps*16;
    l.masks      = l.p_words  + (a.side[1].bits ? a.n_warps*nc*8*KVARN_P_WORDS*4 : 0);
    l.tiles      = (l.masks + a.n_warps*l.n_mask*KVARN_G*2 + 127)/128*128;
    l.tile_size  = 0;
    for (int side = 0; side < 2; ++side) {
        l.tile_size += a.side[side].bits ? kvarn_tile_size(D, a.side[side].bits) + 3*KVARN_PAD : 0;
    }
    const int merge = a.n_warps*n_col*(D + 10)*4, tiles = a.n_warps*l.tile_size;
    l.total      = l.tiles + (merge > tiles ? merge : tiles);
    return l;
}

// the query row of column c
static __host__ __device__ __forceinline__ int kvarn_attn_row(const kvarn_attn_layout & l, int c) { return c*l.row_factor >> 16; }
