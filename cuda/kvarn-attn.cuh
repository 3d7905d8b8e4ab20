// kvarn-attn.cuh - ATTN for heads of 64, 128 and 256 channels: up to 8 query vectors, a share of one KV head's tiles.
// Instantiated by kvarn-attn-d*.cu; needs no ggml.
//
// SPDX-License-Identifier: MIT
//
//   block  one KV head, one share of the sealed tiles or of the open ones, 8 columns (query heads of the KV head, for every query
//          row)
//   warp   one tile of keys and values after the other: its own copies in flight, its own softmax; no barrier between warps in
//          the loop
//   lane   4*g + i: the rows (tokens, then channels) of half tiles n at g, columns 2i and 2i + 1
//
//   shared | q operands | barriers | per warp and stage: where, mask rows | per warp and stage: tile of keys, tile of values |
//
// Scores and outputs come out of the codes as integers do on the CPU:
//   score(t) = token[t]*(sum_d (q[d]*scale[d])*code + sum_d q[d]*zero[d])        out[d] = scale[d]*sum_t p'[t]*code +
//   zero[d]*sum_t p'[t]
// with p' = p*token[t], p relative to the largest score of the tile, so that f16 holds it whatever the running maximum is.
// Open tiles (f16 rows of the tail) are shares of their own: a quarter of a tile per warp, straight from global memory.

#pragma once

#include "kvarn-attn-tile.cuh"

// what a warp knows about a tile in flight
enum { KVARN_SKIPPED, KVARN_MASKED, KVARN_SEEN }; // no row sees it, or it is not sealed; some mask values count; all are 0

template <int BK, int BV, int D>
static __global__ void __launch_bounds__(128, D <= 128 ? 3 : 2) kvarn_attn_kernel(const kvarn_attn_args a,
                                                                                               const kvarn_attn_layout lay) {
    using C = kvarn_codes<BV ? BV : 2, D>; // layout of the output
    const int size_k = BK ? kvarn_tile_size(D, BK ? BK : 2) : 0;
    const int size_v = BV ? kvarn_tile_size(D, BV ? BV : 2) : 0;

    KVARN_DYNAMIC_SHARED(shared);

    const int lane = threadIdx.x % 32, warp = threadIdx.x/32, n_warps = a.n_warps;
    const int g = lane/4, i = lane%4;

    const int n_q  = a.n_rows*a.n_gqa, n_head = a.H*a.n_gqa;
    const int n_cb = (n_q + KVARN_COLUMNS - 1)/KVARN_COLUMNS;
    const int c0   = blockIdx.x % n_cb*KVARN_COLUMNS;
    const int part = blockIdx.x/n_cb;
    const int h    = blockIdx.y;
    const int s    = blockIdx.z;

    uint2    * qf       = (uint2 *) shared;
    uint64_t * barriers = (uint64_t *) (shared + lay.barriers) + warp*a.n_stages*2;
    uint8_t  * masks    = shared + lay.masks + warp*a.n_stages*lay.mask_size;
    uint8_t  * stages   = shared + lay.tiles + warp*a.n_stages*lay.tile_size;

    const int64_t * map  = a.map + (int64_t) s*a.n_tiles;
    const int       row0 = c0/a.n_gqa;
    const half    * mask = a.mask + row0*a.mask_row + s*a.mask_stream;
    const int    n_mask  = min(lay.n_mask, a.n_rows - row0);

    const bool is_open = part >= a.n_split; // the last shares are the tiles that are not sealed
    const int  t_begin = is_open ? 0 : (int64_t) a.n_used*part/a.n_split;
    const int  t_end   = is_open ? 0 : (int64_t) a.n_used*(part + 1)/a.n_split;

    // What start_keys will want to know about tile t, asked for early: the map's entry and the first row's mask.
    int   ahead_where;
    uint2 ahead_mask;
    const auto look_ahead = [&](int t) {
        const int at = min(t, a.n_used - 1);
        ahead_where = t < t_end ? (int) map[at] : -2;
        ahead_mask  = *(const uint2 *) (mask + at*KVARN_G + 4*lane);
    };
    // Starts on tile t: looks whether any row sees it, keeps its mask, starts the copy of the keys.
    const auto start_keys = [&](int t, int stage) {
        uint8_t * slot = masks + stage*lay.mask_size;
        if (ahead_where == -1) {
            uint32_t is_seen = ahead_mask.x != 0xfc00fc00 || ahead_mask.y != 0xfc00fc00;
            uint32_t bits    = ahead_mask.x | ahead_mask.y;
            *(uint2 *) (slot + 16 + 8*lane) = ahead_mask;
            for (int r = 1; r < n_mask; ++r) {
                const uint2 m = *(const uint2 *) (mask + r*a.mask_row + t*KVARN_G + 4*lane);
                is_seen |= m.x != 0xfc00fc00 || m.y != 0xfc00fc00;
                bits    |= m.x | m.y;
                *(uint2 *) (slot + 16 + (r*KVARN_G + 4*lane)*2) = m;
            }
            ahead_where = !__any_sync(0xffffffff, is_seen) ? KVARN_SKIPPED : __any_sync(0xffffffff, bits) ? KVARN_MASKED :
                    KVARN_SEEN;
        } else {
            ahead_where = KVARN_SKIPPED;
        }
        if (lane == 0) {
            *(int *) slot = ahead_where;
        }
        if (BK && ahead_where != KVARN_SKIPPED) {
            kvarn_copy_start(barriers + 2*stage, stages + stage*lay.tile_size,
                    a.side[0].tiles + (((int64_t) (a.s0 + s)*a.n_tiles + t)*a.H + h)*size_k, size_k, lane);
        }
        kvarn_copy_commit();
    };
    const auto start_values = [&](int t, int stage, bool is_wanted) {
        if (BV && is_wanted) {
            kvarn_copy_start(barriers + 2*stage + 1, stages + stage*lay.tile_size + size_k,
                    a.side[1].tiles + (((int64_t) (a.s0 + s)*a.n_tiles + t)*a.H + h)*size_v, size_v, lane);
        }
        kvarn_copy_commit();
    };

    if (lane == 0) {
        for (int n = 0; n < 2*a.n_stages; ++n) {
            kvarn_barrier_init(barriers + n);
        }
    }
    __syncwarp();
    for (int stage = 0; stage < a.n_stages && !is_open; ++stage) {
        const int t = t_begin + warp + stage*n_warps;
        look_ahead(t);
        start_keys(t, stage);
        start_values(t, stage, ahead_where != KVARN_SKIPPED);
    }

    // q of each column, a power of two taken out, as operands
    float * factors = (float *) (shared + lay.factors);
    for (int c = warp; c < KVARN_COLUMNS; c += n_warps) {
        const bool is_used = c0 + c < n_q;
        const float * q = a.q + s*a.q_stream + (is_used ? (c0 + c)/a.n_gqa*a.q_row + (h*a.n_gqa + (c0 + c)%a.n_gqa)*a.q_head : 0);
        const float scale = is_used ? a.softcap > 0.0f ? a.scale/a.softcap : a.scale*1.44269504f : 0.0f;
        constexpr int R = (D/4 + 31)/32;
        float4 v[R];
        float  m = 0.0f;
#pragma unroll
        for (int n = 0; n < R; ++n) {
            v[n] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (n*32 + lane < D/4) {
                v[n] = *(const float4 *) (q + 4*(n*32 + lane));
            }
            v[n].x *= scale; v[n].y *= scale; v[n].z *= scale; v[n].w *= scale;
            m = fmaxf(m, fmaxf(fmaxf(fabsf(v[n].x), fabsf(v[n].y)), fmaxf(fabsf(v[n].z), fabsf(v[n].w))));
        }
        for (int o = 16; o > 0; o /= 2) {
            m = fmaxf(m, __shfl_xor_sync(0xffffffff, m, o));
        }
        const float factor = m > 1e-30f && m < 1e30f ? __uint_as_float(__float_as_uint(m) & 0x7f800000) : 1.0f;
        const float r      = 1.0f/factor;
#pragma unroll
        for (int n = 0; n < R; ++n) {
            const int k = n*32 + lane; // four channels: lane k % 4 of k-step k/4
            if (k < D/4) {
                qf[k/4*32 + 4*c + k%4] = make_uint2(kvarn_pack(v[n].x*r, v[n].z*r), kvarn_pack(v[n].y*r, v[n].w*r));
            }
        }
        if (lane == 0) {
            factors[c] = factor;
        }
    }
    __syncthreads();

    kvarn_columns col;
    col.softcap = a.softcap*1.44269504f;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
        const int at = min(c0 + 2*i + c, n_q - 1);
        col.factor  [c] = factors[2*i + c];
        col.slope   [c] = 1.44269504f*kvarn_slope(a.max_bias, h*a.n_gqa + at%a.n_gqa, n_head);
        col.mask_row[c] = at/a.n_gqa - row0;
    }

    kvarn_sums<D/8> sums;
    sums.clear();

    if (!is_open) { // sealed tiles
        int phase_k = 0, phase_v = 0; // a bit per stage
        for (int t = t_begin + warp, stage = 0; t < t_end; t += n_warps, stage = stage + 1 == a.n_stages ? 0 : stage + 1) {
            const int next = t + a.n_stages*n_warps;
            uint8_t * slot = masks + stage*lay.mask_size;
            uint8_t * kt   = stages + stage*lay.tile_size;
            uint8_t * vt   = kt + size_k;

            look_ahead(next);
            const int  seen    = *(const int *) slot;
            const bool is_here = seen != KVARN_SKIPPED;
            float    tile_max[2], tile_sum[2], weight[2];
            float    p[16][2];
            if (is_here) {
                if (BK) {
                    kvarn_copy_wait(barriers + 2*stage, phase_k >> stage & 1, 2*a.n_stages - 1);
                    phase_k ^= 1 << stage;
                    kvarn_score_tile<BK ? BK : 2, D>(p, kt, qf, col, lane);
                } else {
#pragma unroll
                    for (int n = 0; n < 16; ++n) {
                        p[n][0] = p[n][1] = 0.0f;
                    }
                    kvarn_score_rows<D, 8>(p, a.side[0].rows + s*a.side[0].stream_stride + h*a.side[0].head_stride +
                            (int64_t) t*KVARN_G*a.side[0].row_stride, a.side[0].row_stride, qf, lane);
#pragma unroll
                    for (int n = 0; n < 16; ++n) {
                        p[n][0] *= col.factor[0];
                        p[n][1] *= col.factor[1];
                    }
                }
                kvarn_cap_scores(p, col);
                if (seen == KVARN_MASKED) {
                    kvarn_mask_scores(p, (const half *) (slot + 16) + col.mask_row[0]*KVARN_G, 0, col, g);
                    kvarn_mask_scores(p, (const half *) (slot + 16) + col.mask_row[1]*KVARN_G, 1, col, g);
                }
            }
            __syncwarp();
            start_keys(next, stage);
            if (is_here) {
                kvarn_soften<16>(p, tile_max, tile_sum);
                sums.raise(tile_max, weight);
                sums.sum[0] = fmaf(weight[0], tile_sum[0], sums.sum[0]);
                sums.sum[1] = fmaf(weight[1], tile_sum[1], sums.sum[1]);

                uint32_t b[16];
                if (BV) {
                    kvarn_copy_wait(barriers + 2*stage + 1, phase_v >> stage & 1, 2*a.n_stages - 1);
                    phase_v ^= 1 << stage;
#pragma unroll
                    for (int n = 0; n < 16; n += 2) {
                        const float2 token = kvarn_unpack(*(const uint32_t *) (vt + kvarn_token_off(D, BV ? BV :
                                2) + 2*(8*n + 2*g)));
                        p[n    ][0] *= token.x; p[n    ][1] *= token.x;
                        p[n + 1][0] *= token.y; p[n + 1][1] *= token.y;
                    }
                    kvarn_pack_p(p, b);
                    kvarn_add_tile<BV ? BV : 2, D>(sums.out, weight, vt, b, lane);
                } else {
                    kvarn_pack_p(p, b);
#pragma unroll 1
                    for (int ks = 0; ks < 8; ++ks) {
                        uint32_t b0 = b[0], b1 = b[1];
#pragma unroll
                        for (int n = 1; n < 8; ++n) { // registers cannot be indexed
                            b0 = ks == n ? b[2*n] : b0;
                            b1 = ks == n ? b[2*n + 1] : b1;
                        }
                        kvarn_add_rows<BV ? BV : 2, D>(sums.out, weight,
                                a.side[1].rows + s*a.side[1].stream_stride + h*a.side[1].head_stride +
                                ((int64_t) t*KVARN_G + 16*ks)*a.side[1].row_stride, a.side[1].row_stride, b0, b1, lane);
                    }
                }
            }
            __syncwarp();
            start_values(next, stage, ahead_where != KVARN_SKIPPED);
        }
    } else { // open tiles, 32 tokens at a time
        for (int t0 = 0, n_seen = 0; t0 < a.n_used; t0 += 32) {
            const int mine = t0 + lane < a.n_used ? (int) map[t0 + lane] : -2;
            for (uint32_t left = __ballot_sync(0xffffffff, mine >= 0); left != 0; left &= left - 1, ++n_seen) {
                const int at    = __ffs(left) - 1;
                const int t     = t0 + at;
                const int where = __shfl_sync(0xffffffff, mine, at);
                if (n_seen % a.n_open != part - a.n_split) {
                    continue;
                }
                const half * rows[2];
#pragma unroll
                for (int side = 0; side < 2; ++side) {
                    const kvarn_cuda_side & k = a.side[side];
                    rows[side] = k.rows + h*k.head_stride + (k.bits ? (int64_t) where*KVARN_G*k.row_stride :
                                                             s*k.stream_stride + (int64_t) t*KVARN_G*k.row_stride);
                }
                for (int part32 = warp; part32 < 4; part32 += n_warps) {
                    const half * m = mask + t*KVARN_G + 32*part32;
                    bool is_seen = false;
                    for (int r = 0; r < n_mask; ++r) {
                        is_seen |= __half_as_ushort(m[r*a.mask_row + lane]) != 0xfc00;
                    }
                    if (!__any_sync(0xffffffff, is_seen)) {
                        continue;
                    }
                    float p[4][2] = { { 0.0f, 0.0f }, { 0.0f, 0.0f }, { 0.0f, 0.0f }, { 0.0f, 0.0f } };
                    kvarn_score_rows<D, 2>(p, rows[0] + 32*part32*a.side[0].row_stride, a.side[0].row_stride, qf, lane);
#pragma unroll
                    for (int n = 0; n < 4; ++n) {
                        p[n][0] *= col.factor[0];
                        p[n][1] *= col.factor[1];
                    }
                    kvarn_cap_scores(p, col);
                    kvarn_mask_scores(p, m + col.mask_row[0]*a.mask_row, 0, col, g);
                    kvarn_mask_scores(p, m + col.mask_row[1]*a.mask_row, 1, col, g);
                    float tile_max[2], tile_sum[2], weight[2];
                    kvarn_soften<4>(p, tile_max, tile_sum);
                    sums.raise(tile_max, weight);
                    sums.sum[0] = fmaf(weight[0], tile_sum[0], sums.sum[0]);
                    sums.sum[1] = fmaf(weight[1], tile_sum[1], sums.sum[1]);
#pragma unroll
                    for (int b = 0; b < 2; ++b) {
                        kvarn_add_rows<BV ? BV : 2, D>(sums.out, weight, rows[1] + (32*part32 + 16*b)*a.side[1].row_stride,
                                a.side[1].row_stride,
                                kvarn_transpose(kvarn_pack(p[2*b][0], p[2*b][1])), kvarn_transpose(kvarn_pack(p[2*b + 1][0],
                                        p[2*b + 1][1])), lane);
                    }
                }
            }
        }
    }

    // the warps' sums become one partial result
#pragma unroll
    for (int c = 0; c < 2; ++c) {
        sums.sum[c] += __shfl_xor_sync(0xffffffff, sums.sum[c], 4);
        sums.sum[c] += __shfl_xor_sync(0xffffffff, sums.sum[c], 8);
        sums.sum[c] += __shfl_xor_sync(0xffffffff, sums.sum[c], 16);
    }
    __syncthreads();
    float * merge = (float *) (shared + lay.tiles); // [warp][column][max, sum, out[D]]
#pragma unroll
    for (int c = 0; c < 2; ++c) {
        float * m = merge + (warp*KVARN_COLUMNS + 2*i + c)*(D + 2);
        if (g == 0) {
            m[0] = sums.max[c];
            m[1] = sums.sum[c];
        }
#pragma unroll
        for (int n = 0; n < D/8; ++n) {
            m[2 + C::index(n, g)] = sums.out[n][c];
        }
    }
    __syncthreads();
    for (int c = warp; c < KVARN_COLUMNS && c0 + c < n_q; c += n_warps) {
        const float * m = merge + c*(D + 2);
        float max = -1e30f, sum = 0.0f;
        for (int w = 0; w < n_warps; ++w) {
            max = fmaxf(max, m[w*KVARN_COLUMNS*(D + 2)]);
        }
        float out[D/32];
#pragma unroll
        for (int n = 0; n < D/32; ++n) {
            out[n] = 0.0f;
        }
        for (int w = 0; w < n_warps; ++w) {
            const float * mw = m + w*KVARN_COLUMNS*(D + 2);
            const float   f  = kvarn_exp2(mw[0] - max);
            sum += f*mw[1];
#pragma unroll
            for (int n = 0; n < D/32; ++n) {
                out[n] = fmaf(f, mw[2 + 32*n + lane], out[n]);
            }
        }
        const int row = (c0 + c)/a.n_gqa, head = h*a.n_gqa + (c0 + c)%a.n_gqa;
        float * dst = a.part + (((int64_t) s*a.n_rows + row)*n_head + head)*a.cap*(D + 2) + (int64_t) part*(D + 2);
        if (lane == 0) {
            dst[0] = max;
            dst[1] = sum;
        }
#pragma unroll
        for (int n = 0; n < D/32; ++n) {
            dst[2 + 32*n + lane] = out[n];
        }
    }
}

template <int BK, int BV, int D>
static cudaError_t kvarn_attn_start(const kvarn_attn_args & a, cudaStream_t stream) {
    const int n_q = a.n_rows*a.n_gqa;
    const kvarn_attn_layout lay = kvarn_attn_lay_out(D, BK, BV, a.n_gqa, n_q, a.n_warps, a.n_stages);
    const cudaError_t error = cudaFuncSetAttribute((const void *) kvarn_attn_kernel<BK, BV, D>,
            cudaFuncAttributeMaxDynamicSharedMemorySize, lay.total);
    if (error != cudaSuccess) {
        return error;
    }
    const dim3 grid((a.n_split + a.n_open)*((n_q + KVARN_COLUMNS - 1)/KVARN_COLUMNS), a.H, a.n_stream);
    KVARN_LAUNCH((kvarn_attn_kernel<BK, BV, D>), grid, 32*a.n_warps, lay.total, stream, a, lay);
    return cudaGetLastError();
}

// all widths of one head size
template <int D>
static cudaError_t kvarn_attn_start_any(const kvarn_attn_args & a, cudaStream_t stream) {
    switch (a.side[0].bits*8 + a.side[1].bits) {
        case 2*8 + 2: return kvarn_attn_start<2, 2, D>(a, stream);
        case 2*8 + 3: return kvarn_attn_start<2, 3, D>(a, stream);
        case 2*8 + 4: return kvarn_attn_start<2, 4, D>(a, stream);
        case 3*8 + 2: return kvarn_attn_start<3, 2, D>(a, stream);
        case 3*8 + 3: return kvarn_attn_start<3, 3, D>(a, stream);
        case 3*8 + 4: return kvarn_attn_start<3, 4, D>(a, stream);
        case 4*8 + 2: return kvarn_attn_start<4, 2, D>(a, stream);
        case 4*8 + 3: return kvarn_attn_start<4, 3, D>(a, stream);
        case 4*8 + 4: return kvarn_attn_start<4, 4, D>(a, stream);
        default:      return cudaErrorInvalidValue;
    }
}
