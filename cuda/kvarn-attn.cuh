// kvarn-attn.cuh - ATTN for heads of 64, 128 and 256 channels: up to 4 or 8 query vectors, a share of one KV head's tiles.
// Instantiated by kvarn-attn-d*.cu and kvarn-attn-f16.cu; needs no ggml.
//
// SPDX-License-Identifier: MIT
//
//   block  one KV head, one share of the sealed tiles or of the open ones, 4 or 8 query vectors (query heads of the KV head, for
//          every query row)
//   warp   one tile of keys and values after the other: its own copies in flight, its own softmax; no barrier between warps in
//          the loop
//   lane   4*g + i: the rows (tokens, then channels) of half tiles n at g; query vector i, or 2i and 2i + 1
//
//   shared | query vectors | factors | per warp: barriers | p | mask rows | tile of keys, tile of values |
//
// Scores and outputs come out of the codes as integers do on the CPU:
//   score(t) = token[t]*(sum_d (q[d]*scale[d])*code + sum_d q[d]*zero[d])
//   out[d]   = scale[d]*sum_t p'[t]*code + zero[d]*sum_t p'[t]
// with p' = p*token[t], p relative to the largest score of the tile, so that an integer holds it whatever the running maximum is.
// Open tiles (f16 rows of the tail) are shares of their own: a quarter of a tile per warp, straight from global memory.
//
// The first tile of a warp is asked for before it is known whether anybody sees it: the answer would take as long as the tile.
// Behind PREP it is asked for while PREP still runs: sealed tiles, map and mask have been there before, only queries and rows of
// the tail come from PREP.
// With few tiles one block does all of a KV head and writes what REDUCE would.

#pragma once

#include "kvarn-attn-plan.h"
#include "kvarn-attn-tile.cuh"
#include "kvarn-block.cuh"

// what a warp knows about a tile in flight
enum { KVARN_SKIPPED, KVARN_MASKED, KVARN_SEEN }; // no row sees it, or it is not sealed; some mask values count; all are 0

template <int BK, int BV, int D, int NC>
static __global__ void __launch_bounds__(32*kvarn_attn_warps_sm(D, NC), 1)
        kvarn_attn_kernel(const kvarn_attn_args a, const kvarn_attn_layout lay) {
    using C = kvarn_values<BV ? BV : 2, D, NC>; // layout of the output
    const int size_k = BK ? kvarn_tile_size(D, BK ? BK : 2) : 0;
    const int size_v = BV ? kvarn_tile_size(D, BV ? BV : 2) : 0;
    const int values = BK ? size_k + 3*KVARN_PAD : 0; // where they lie behind the keys
    constexpr int n_col = 4*NC;
    constexpr bool values_first = !kvarn_attn_may_be_whole(D, NC); // with the most sums registers are short until the loop begins

    KVARN_DYNAMIC_SHARED(shared);

    const int lane = threadIdx.x % 32, n_warps = a.n_warps;
    const int warp = __shfl_sync(0xffffffff, threadIdx.x/32, 0); // the compiler learns that it is the same in all lanes
    const int g = lane/4, i = lane%4;

    // shares vary slowest, those of open tiles come last: the blocks that run at once read neighbouring heads of the same tokens
    int h = blockIdx.x, c0 = 0;
    const int s = blockIdx.y, part = blockIdx.z;
    if (lay.n_blocks > 1) { // more query vectors than a block has columns
        h  = blockIdx.x/lay.n_blocks;
        c0 = (blockIdx.x - h*lay.n_blocks)*n_col;
    }
    const int n_q = a.n_rows*a.n_gqa, n_head = a.H*a.n_gqa;
    const int row0 = kvarn_attn_row(lay, c0), n_mask = min(lay.n_mask, a.n_rows - row0);

    uint4    * qf       = (uint4 *) shared;
    float    * factors  = (float *) (shared + lay.factors);
    uint64_t * barriers = (uint64_t *) (shared + lay.barriers) + warp*2; // keys, values
    uint32_t * p_words  = (uint32_t *) (shared + lay.p_words) + warp*(NC*8*KVARN_P_WORDS);
    half     * masks    = (half *) (shared + lay.masks) + warp*lay.n_mask*KVARN_G;
    uint8_t  * kt       = shared + lay.tiles + warp*lay.tile_size;
    uint8_t  * vt       = kt + values;

    const int64_t * map  = a.map + (int64_t) s*a.n_tiles;
    const half    * mask = a.mask + row0*a.mask_row + s*a.mask_stream;

    const bool is_open  = part >= a.n_split; // the last shares are the tiles that are not sealed
    const bool is_whole = kvarn_attn_may_be_whole(D, NC) && a.out; // no shares: the block does everything
    const int  t_begin = is_open ? 0 : part*lay.share + min(part, lay.share_more) + warp;
    const int  t_end   = is_open ? 0 : (part + 1)*lay.share + min(part + 1, lay.share_more);

    const int64_t   tile0   = ((int64_t) (a.s0 + s)*a.n_tiles)*a.H + h;
    const uint8_t * k_tiles = BK ? a.side[0].tiles + tile0*size_k : nullptr;
    const uint8_t * v_tiles = BV ? a.side[1].tiles + tile0*size_v : nullptr;

    const auto start_keys = [&](int t, bool is_wanted) {
        if (BK && is_wanted) {
            kvarn_copy_tile(barriers, kt, k_tiles + (int64_t) t*a.H*size_k, kvarn_codes_size(D, BK ? BK : 2)/4, size_k, lane);
        }
        kvarn_copy_commit();
    };
    const auto start_values = [&](int t, bool is_wanted) {
        if (BV && is_wanted) {
            kvarn_copy_tile(barriers + 1, vt, v_tiles + (int64_t) t*a.H*size_v, kvarn_codes_size(D, BV ? BV : 2)/4, size_v, lane);
        }
        kvarn_copy_commit();
    };

    // What will be asked about tile t, looked up two tiles early: the map's entry and the first row's mask.
    struct ahead { int where; uint2 mask; };
    const auto look_ahead = [&](int t) {
        ahead f = { -2, { 0, 0 } };
        if (t < t_end) {
            f.where = (int) map[t];
            f.mask  = *(const uint2 *) (mask + t*KVARN_G + 4*lane);
        }
        return f;
    };
    // Whether any row sees the tile; keeps its mask where it matters.
    const auto examine = [&](const ahead & f, int t) -> int {
        if (f.where != -1) {
            return KVARN_SKIPPED;
        }
        uint32_t is_seen = f.mask.x != 0xfc00fc00 || f.mask.y != 0xfc00fc00;
        uint32_t bits    = f.mask.x | f.mask.y;
        for (int r = 1; r < n_mask; ++r) {
            const uint2 m = *(const uint2 *) (mask + r*a.mask_row + t*KVARN_G + 4*lane);
            is_seen |= m.x != 0xfc00fc00 || m.y != 0xfc00fc00;
            bits    |= m.x | m.y;
            *(uint2 *) (masks + r*KVARN_G + 4*lane) = m;
        }
        if (!__any_sync(0xffffffff, bits)) {
            return KVARN_SEEN;
        }
        *(uint2 *) (masks + 4*lane) = f.mask;
        return __any_sync(0xffffffff, is_seen) ? KVARN_MASKED : KVARN_SKIPPED;
    };

    // The open tiles of this block: f(tile, its slot). Every warp looks through the map, many entries per lane at once: one
    // behind the other, 1024 of them take longer than all other blocks' work.
    const auto for_open_tiles = [&](auto && f) {
        constexpr int N = values_first ? 4 : 16;
        for (int t0 = 0, n_seen = 0; t0 < a.n_used; t0 += 32*N) {
            int where[N];
#pragma unroll
            for (int n = 0; n < N; ++n) {
                const int t = t0 + 32*n + lane;
                where[n] = t < a.n_used ? (int) map[t] : -2;
            }
            uint32_t open = 0; // of lane n: which of tiles t0 + 32*n .. are
#pragma unroll
            for (int n = 0; n < N; ++n) {
                const uint32_t some = __ballot_sync(0xffffffff, where[n] >= 0);
                open = lane == n ? some : open;
            }
            for (uint32_t words = __ballot_sync(0xffffffff, open != 0); words != 0; words &= words - 1) {
                const int n = __ffs(words) - 1;
                for (uint32_t left = __shfl_sync(0xffffffff, open, n); left != 0; left &= left - 1, ++n_seen) {
                    const int t = t0 + 32*n + __ffs(left) - 1;
                    if (is_whole || n_seen % a.n_open == part - a.n_split) {
                        f(t, (int) map[t]);
                    }
                }
            }
        }
    };

    // q of each query vector, a power of two taken out, as operands
    constexpr int R = (D/4 + 31)/32;
    const auto load_q = [&](int c, float4 (&v)[R]) {
        const int row = kvarn_attn_row(lay, c0 + c);
        const float * q = a.q + s*a.q_stream + row*a.q_row + (h*a.n_gqa + c0 + c - row*a.n_gqa)*a.q_head;
#pragma unroll
        for (int n = 0; n < R; ++n) {
            v[n] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (c < n_col && c0 + c < n_q && n*32 + lane < D/4) {
                v[n] = *(const float4 *) (q + 4*(n*32 + lane));
            }
        }
    };
    const auto store_q = [&](int c, float4 (&v)[R]) {
        const float scale = a.softcap > 0.0f ? a.scale/a.softcap : a.scale*KVARN_LOG2E;
        float m = 0.0f;
#pragma unroll
        for (int n = 0; n < R; ++n) {
            v[n].x *= scale; v[n].y *= scale; v[n].z *= scale; v[n].w *= scale;
            m = fmaxf(m, fmaxf(fmaxf(fabsf(v[n].x), fabsf(v[n].y)), fmaxf(fabsf(v[n].z), fabsf(v[n].w))));
        }
        for (int o = 16; o > 0; o /= 2) {
            m = fmaxf(m, __shfl_xor_sync(0xffffffff, m, o));
        }
        // the largest is between 1/4 and 1/2: times any f16 scale it is finite
        const float factor = m > 1e-30f && m < 1e30f ? 4.0f*__uint_as_float(__float_as_uint(m) & 0x7f800000) : 1.0f;
        const float r      = 1.0f/factor;
#pragma unroll
        for (int n = 0; n < R; ++n) {
            const int d = 4*(n*32 + lane); // channel 8*j + d%8 of lane k
            const int j = BK ? d % (D/4)/8 : d/32, k = BK ? d/(D/4) : d/8 % 4;
            if (d < D) {
                ((uint2 *) (qf + j*4*n_col + c*4 + k))[d/4 % 2] = make_uint2(kvarn_pack(v[n].x*r, v[n].y*r),
                        kvarn_pack(v[n].z*r, v[n].w*r));
            }
        }
        if (lane == 0) {
            factors[c] = factor;
        }
    };

    const bool is_early = kvarn_attn_may_be_whole(D, NC) && a.is_behind;

    // small things are asked for before tiles: whatever comes behind these waits for them
    float4 q[NC][R];
    if (!is_early) {
        kvarn_wait_for_kernel_before();
#pragma unroll
        for (int n = 0; n < NC; ++n) {
            load_q(warp + n*n_warps, q[n]);
        }
    }
    const ahead first = look_ahead(t_begin);
    ahead second = look_ahead(t_begin + n_warps);
    KVARN_KEEP_ORDER();
    if (lane < 2) {
        kvarn_barrier_init(barriers + lane);
    }
    __syncwarp();
    start_keys(t_begin, t_begin < t_end);
    int seen = examine(first, t_begin);
    if (is_early || values_first) {
        start_values(t_begin, t_begin < t_end);
    }
    if (is_early) {
        if (is_open || is_whole) {
            for_open_tiles([&](int t, int where) {
                for (int row = 32*warp + lane; row < KVARN_G; row += 32*n_warps) {
                    kvarn_bring(mask + t*KVARN_G + row);
#pragma unroll
                    for (int side = 0; side < 2; ++side) {
                        const kvarn_cuda_side & k = a.side[side];
                        if (k.bits) {
                            kvarn_ask_for<D*2>(k.rows + h*k.head_stride + ((int64_t) where*KVARN_G + row)*k.row_stride);
                        }
                    }
                }
            });
        }
        kvarn_wait_for_kernel_before();
#pragma unroll
        for (int n = 0; n < NC; ++n) {
            load_q(warp + n*n_warps, q[n]);
        }
    }
#pragma unroll
    for (int n = 0; n < NC; ++n) {
        if (warp + n*n_warps < n_col) {
            store_q(warp + n*n_warps, q[n]);
        }
    }
    for (int c = warp + NC*n_warps; c < n_col; c += n_warps) { // fewer warps than usual
        load_q(c, q[0]);
        store_q(c, q[0]);
    }
    __syncthreads();
    if (!is_early && !values_first) {
        start_values(t_begin, t_begin < t_end); // behind all warps' keys: work begins as soon as those are there
    }

    kvarn_columns<NC> col;
    col.softcap = a.softcap*KVARN_LOG2E;
#pragma unroll
    for (int c = 0; c < NC; ++c) {
        const int at = min(c0 + NC*i + c, n_q - 1), row = kvarn_attn_row(lay, at);
        col.factor  [c] = factors[NC*i + c];
        col.slope   [c] = KVARN_LOG2E*kvarn_slope(a.max_bias, h*a.n_gqa + at - row*a.n_gqa, n_head);
        col.mask_row[c] = row - row0;
    }

    kvarn_sums<D/8, NC> sums;
    sums.clear();

    const auto attend_sealed = [&] {
        int  phase    = 0;
        bool is_first = true; // was asked for whether anybody sees it or not
        for (int t = t_begin; t < t_end; t += n_warps, is_first = false) {
            const int   next   = t + n_warps;
            const ahead f      = second;
            const bool is_here = seen != KVARN_SKIPPED, is_coming = is_here || is_first;

            second = look_ahead(next + n_warps);
            float p[16][NC];
            if (BK && is_coming) {
                kvarn_copy_wait(barriers, phase);
            }
            if (is_here) {
                if (BK) {
                    kvarn_score_tile<BK ? BK : 2, D>(p, kt, qf, col, lane);
                } else {
                    kvarn_score_rows<D, 8, NC, false>(p, a.side[0].rows + s*a.side[0].stream_stride + h*a.side[0].head_stride +
                            (int64_t) t*KVARN_G*a.side[0].row_stride, a.side[0].row_stride, qf, col, lane);
                }
                kvarn_cap_scores(p, col);
                if (seen == KVARN_MASKED) {
                    kvarn_mask_scores(p, masks, KVARN_G, col, g);
                }
            }
            __syncwarp();
            seen = examine(f, next);
            start_keys(next, seen != KVARN_SKIPPED);

            if (is_here) {
                float tile_max[NC], tile_sum[NC], weight[NC];
                kvarn_soften(p, tile_max, tile_sum);
                sums.raise(tile_max, tile_sum, weight);
                if (BV) {
                    kvarn_copy_wait(barriers + 1, phase);
                    kvarn_add_tile<BV ? BV : 2, D>(sums.out, weight, vt, p, p_words, lane);
                } else {
                    uint2 b[8];
#pragma unroll
                    for (int ks = 0; ks < 8; ++ks) {
                        b[ks] = kvarn_pack_p(p, 2*ks);
                    }
#pragma unroll 1
                    for (int ks = 0; ks < 8; ++ks) {
                        uint2 now = b[0];
#pragma unroll
                        for (int n = 1; n < 8; ++n) { // registers cannot be indexed
                            now.x = ks == n ? b[n].x : now.x;
                            now.y = ks == n ? b[n].y : now.y;
                        }
                        kvarn_add_rows<BV ? BV : 2, D>(sums.out, weight,
                                a.side[1].rows + s*a.side[1].stream_stride + h*a.side[1].head_stride +
                                ((int64_t) t*KVARN_G + 16*ks)*a.side[1].row_stride, a.side[1].row_stride, now, lane);
                    }
                }
            } else if (BV && is_coming) {
                kvarn_copy_wait(barriers + 1, phase);
            }
            phase ^= is_coming;
            __syncwarp();
            start_values(next, seen != KVARN_SKIPPED);
        }
    };
    const auto attend_open = [&] {
        for_open_tiles([&](int t, int where) {
            const half * rows[2];
#pragma unroll
            for (int side = 0; side < 2; ++side) {
                const kvarn_cuda_side & k = a.side[side];
                rows[side] = k.rows + h*k.head_stride + (k.bits ? (int64_t) where*KVARN_G*k.row_stride :
                                                         s*k.stream_stride + (int64_t) t*KVARN_G*k.row_stride);
            }
            for (int quarter = n_warps - 1 - warp; quarter < 4; quarter += n_warps) { // the first warps may have sealed tiles
                const half * m = mask + t*KVARN_G + 32*quarter;
                bool is_seen = false;
                for (int r = 0; r < n_mask; ++r) {
                    is_seen |= __half_as_ushort(m[r*a.mask_row + lane]) != 0xfc00;
                }
                if (!__any_sync(0xffffffff, is_seen)) {
                    continue;
                }
                float p[4][NC], tile_max[NC], tile_sum[NC], weight[NC];
                kvarn_score_rows<D, 2, NC, BK != 0>(p, rows[0] + 32*quarter*a.side[0].row_stride, a.side[0].row_stride, qf, col,
                        lane);
                kvarn_cap_scores(p, col);
                kvarn_mask_scores(p, m, a.mask_row, col, g);
                kvarn_soften(p, tile_max, tile_sum);
                sums.raise(tile_max, tile_sum, weight);
#pragma unroll
                for (int b = 0; b < 2; ++b) {
                    kvarn_add_rows<BV ? BV : 2, D>(sums.out, weight, rows[1] + (32*quarter + 16*b)*a.side[1].row_stride,
                            a.side[1].row_stride, kvarn_pack_p(p, 2*b), lane);
                }
            }
        });
    };
    if (kvarn_attn_may_be_whole(D, NC)) {
        attend_sealed(); // of open shares there are none
        if (is_open || is_whole) {
            attend_open();
        }
    } else if (!is_open) { // sums of one loop are not kept through the other
        attend_sealed();
    } else {
        attend_open();
    }
    kvarn_let_kernel_behind_start();

    // the warps' sums become one partial result
#pragma unroll
    for (int c = 0; c < NC; ++c) {
        sums.sum[c] += __shfl_xor_sync(0xffffffff, sums.sum[c], 4);
        sums.sum[c] += __shfl_xor_sync(0xffffffff, sums.sum[c], 8);
        sums.sum[c] += __shfl_xor_sync(0xffffffff, sums.sum[c], 16);
    }
    __syncthreads();
    float2 * heads = (float2 *) (shared + lay.tiles);      // [warp][column]: maximum, sum
    float  * outs  = (float *) (heads + n_warps*n_col);    // [warp][column][D + 8]
#pragma unroll
    for (int c = 0; c < NC; ++c) {
        float * out = outs + (warp*n_col + NC*i + c)*(D + 8);
        if (g == 0) {
            heads[warp*n_col + NC*i + c] = make_float2(sums.max[c], sums.sum[c]);
        }
#pragma unroll
        for (int n = 0; n < D/8; n += C::step) {
            if (C::wide) {
                *(float2 *) (out + C::index(n, g)) = make_float2(sums.out[n][c], sums.out[n + C::step - 1][c]);
            } else {
                out[C::index(n, g)] = sums.out[n][c];
            }
        }
    }
    __syncthreads();
    for (int at = threadIdx.x; at < n_col*D/2; at += blockDim.x) {
        const int c = at/(D/2), d = at%(D/2)*2;
        if (c0 + c >= n_q) {
            break;
        }
        float max = -1e30f, sum = 0.0f;
#pragma unroll 4
        for (int w = 0; w < n_warps; ++w) {
            max = fmaxf(max, heads[w*n_col + c].x);
        }
        float2 out = make_float2(0.0f, 0.0f);
#pragma unroll 4
        for (int w = 0; w < n_warps; ++w) {
            const float2 v = *(const float2 *) (outs + (w*n_col + c)*(D + 8) + d), e = heads[w*n_col + c];
            const float  f = kvarn_exp2(e.x - max);
            sum   = fmaf(f, e.y, sum);
            out.x = fmaf(f, v.x, out.x);
            out.y = fmaf(f, v.y, out.y);
        }
        const int row = kvarn_attn_row(lay, c0 + c), head = h*a.n_gqa + c0 + c - row*a.n_gqa;
        if (is_whole) {
            const float sink = a.sinks ? a.sinks[head]*KVARN_LOG2E : -1e30f; // a token without a value
            const float now  = fmaxf(max, sink), f = kvarn_exp2(max - now);
            sum = a.sinks ? fmaf(f, sum, kvarn_exp2(sink - now)) : sum;
            const float r = sum > 0.0f ? (a.sinks ? f : 1.0f)/sum : 0.0f;
            *(float2 *) (outs + c*(D + 8) + d) = make_float2(out.x*r, out.y*r); // nobody else reads these
            continue;
        }
        float * dst = a.part + ((((int64_t) s*a.n_rows + row)*n_head + head)*a.cap + part)*(D + 2);
        *(float2 *) (dst + 2 + d) = out;
        if (d == 0) {
            *(float2 *) dst = make_float2(max, sum);
        }
    }
    if (!is_whole) {
        return;
    }
    __syncthreads();
    constexpr int N = D/32;
    for (int c = warp; c < n_col && c0 + c < n_q; c += n_warps) {
        float x[N];
#pragma unroll
        for (int n = 0; n < N; ++n) {
            x[n] = outs[c*(D + 8) + 32*n + lane];
        }
        kvarn_hadamard_lanes<N>(x, a.n_rot, lane);
        const int row = kvarn_attn_row(lay, c0 + c), head = h*a.n_gqa + c0 + c - row*a.n_gqa;
        float * dst = a.out + (((int64_t) s*a.n_rows + row)*n_head + head)*D;
#pragma unroll
        for (int n = 0; n < N; ++n) {
            dst[32*n + lane] = x[n];
        }
    }
}

template <int BK, int BV, int D, int NC>
static cudaError_t kvarn_attn_start(const kvarn_attn_args & a, cudaStream_t stream) {
    const kvarn_attn_layout lay = kvarn_attn_lay_out(a);
    const cudaError_t error = cudaFuncSetAttribute((const void *) kvarn_attn_kernel<BK, BV, D, NC>,
            cudaFuncAttributeMaxDynamicSharedMemorySize, lay.total);
    if (error != cudaSuccess) {
        return error;
    }
    const dim3 grid(a.H*lay.n_blocks, a.n_stream, a.n_split + a.n_open);
    if (a.is_behind) {
        return kvarn_launch_behind(kvarn_attn_kernel<BK, BV, D, NC>, grid, 32*a.n_warps, lay.total, stream, a, lay);
    }
    KVARN_LAUNCH((kvarn_attn_kernel<BK, BV, D, NC>), grid, 32*a.n_warps, lay.total, stream, a, lay);
    return cudaGetLastError();
}

// all widths of one head size
template <int D, int NC>
static cudaError_t kvarn_attn_start_any(const kvarn_attn_args & a, cudaStream_t stream) {
    switch (a.side[0].bits*8 + a.side[1].bits) {
        case 2*8 + 2: return kvarn_attn_start<2, 2, D, NC>(a, stream);
        case 2*8 + 3: return kvarn_attn_start<2, 3, D, NC>(a, stream);
        case 2*8 + 4: return kvarn_attn_start<2, 4, D, NC>(a, stream);
        case 3*8 + 2: return kvarn_attn_start<3, 2, D, NC>(a, stream);
        case 3*8 + 3: return kvarn_attn_start<3, 3, D, NC>(a, stream);
        case 3*8 + 4: return kvarn_attn_start<3, 4, D, NC>(a, stream);
        case 4*8 + 2: return kvarn_attn_start<4, 2, D, NC>(a, stream);
        case 4*8 + 3: return kvarn_attn_start<4, 3, D, NC>(a, stream);
        case 4*8 + 4: return kvarn_attn_start<4, 4, D, NC>(a, stream);
        default:      return cudaErrorInvalidValue;
    }
}
