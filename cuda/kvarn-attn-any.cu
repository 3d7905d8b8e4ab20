// kvarn-attn-any.cu - ATTN for every shape: other head sizes, keys and values of different sizes. f32 multiply-adds.
//
// SPDX-License-Identifier: MIT
//
//   block   one KV head, one share of the tiles, 4 columns; 128 threads
//   thread  a token while scores are summed up, then channels thread, thread + 128, ..
// Bound by arithmetic: about a tenth of the speed of kvarn-attn.cuh, of which it shares little but the formula.

#if !defined(GGML_USE_HIP) && !defined(GGML_USE_MUSA)

#include "kvarn-block.cuh"
#include "kvarn-cuda.h"
#include "kvarn-format.h"
#include "kvarn-mma.cuh"

#define COLUMNS 4
#define PER_THREAD ((KVARN_D_MAX + KVARN_G - 1)/KVARN_G) // channels

// the codes of four r of free index f, one per byte. row: the first word of these r
static __device__ __forceinline__ uint32_t kvarn_codes_of(int bits, int F, const uint8_t * row, int f) {
    const int X = bits == 3 ? F/8 : F*bits/8, x = f % X, s = f/X;
    const uint32_t * w = (const uint32_t *) row + x;
    if (bits != 3) {
        return *w >> s*bits & (bits == 2 ? 0x03030303 : 0x0f0f0f0f);
    }
    if (s < 6) {
        return w[s/2*X] >> s%2*3 & 0x07070707;
    }
    return s == 6 ? (w[0] >> 5 & 0x06060606) | (w[X] >> 7 & 0x01010101) : (w[X] >> 4 & 0x04040404) | (w[2*X] >> 6 & 0x03030303);
}

static __device__ __forceinline__ float kvarn_byte(uint32_t w, int k) { return (float) (w >> 8*k & 0xff); }

static __global__ void __launch_bounds__(KVARN_G) kvarn_attn_any_kernel(const kvarn_attn_args a) {
    __shared__ float q [COLUMNS][KVARN_D_MAX];
    __shared__ float qs[COLUMNS][KVARN_D_MAX]; // times the tile's scales
    __shared__ float p [COLUMNS][KVARN_G];
    __shared__ float qz[COLUMNS], scratch[KVARN_G/32];

    const int x    = threadIdx.x;
    const int n_q  = a.n_rows*a.n_gqa, n_head = a.H*a.n_gqa;
    const int n_cb = (n_q + COLUMNS - 1)/COLUMNS;
    const int c0   = blockIdx.x % n_cb*COLUMNS, n_c = min(COLUMNS, n_q - c0);
    const int part = blockIdx.x/n_cb, h = blockIdx.y, s = blockIdx.z;
    const int DK   = a.side[0].D, DV = a.side[1].D;

    const int64_t * map  = a.map + (int64_t) s*a.n_tiles;
    const float    scale = a.softcap > 0.0f ? a.scale/a.softcap : a.scale*1.44269504f;
    for (int c = 0; c < COLUMNS; ++c) {
        for (int d = x; d < DK; d += KVARN_G) {
            q[c][d] = c < n_c ? scale*a.q[s*a.q_stream + (c0 + c)/a.n_gqa*a.q_row + (h*a.n_gqa + (c0 + c)%a.n_gqa)*a.q_head + d] :
                    0.0f;
        }
    }
    float max[COLUMNS], sum[COLUMNS], out[COLUMNS][PER_THREAD];
    for (int c = 0; c < COLUMNS; ++c) {
        max[c] = -1e30f;
        sum[c] = 0.0f;
        for (int n = 0; n < PER_THREAD; ++n) {
            out[c][n] = 0.0f;
        }
    }
    __syncthreads();

    for (int t = (int64_t) a.n_used*part/a.n_split; t < (int64_t) a.n_used*(part + 1)/a.n_split; ++t) {
        const int where = (int) map[t];
        float mask[COLUMNS];
        bool  is_seen = false;
        for (int c = 0; c < COLUMNS; ++c) {
            const int row = min(c0 + c, n_q - 1)/a.n_gqa;
            mask[c]  = __half2float(a.mask[s*a.mask_stream + row*a.mask_row + t*KVARN_G + x]);
            is_seen |= mask[c] > -INFINITY;
        }
        if (!__syncthreads_or(is_seen) || where == -2) {
            continue;
        }
        const uint8_t * tile[2];
        const half    * rows[2];
        for (int side = 0; side < 2; ++side) {
            const kvarn_cuda_side & k = a.side[side];
            const bool is_tile = k.bits && where < 0;
            tile[side] = is_tile ? k.tiles + (((int64_t) (a.s0 + s)*a.n_tiles + t)*a.H + h)*kvarn_tile_size(k.D, k.bits) :
                    nullptr;
            rows[side] = is_tile ? nullptr : k.rows + h*k.head_stride +
                    (k.bits ? (int64_t) where*KVARN_G*k.row_stride : s*k.stream_stride + (int64_t) t*KVARN_G*k.row_stride);
        }

        float score[COLUMNS] = { 0.0f, 0.0f, 0.0f, 0.0f };
        if (tile[0]) {
            const int bits = a.side[0].bits;
            const half * scales = (const half *) (tile[0] + kvarn_scale_off(DK, bits));
            const half * zeros  = (const half *) (tile[0] + kvarn_zero_off (DK, bits));
            for (int d = x; d < DK; d += KVARN_G) {
                for (int c = 0; c < COLUMNS; ++c) {
                    qs[c][d] = q[c][d]*__half2float(scales[d]);
                }
            }
            const int c = x/32;
            float z = 0.0f;
            for (int d = x%32; d < DK; d += 32) {
                z = fmaf(q[c][d], __half2float(zeros[d]), z);
            }
            for (int o = 16; o > 0; o /= 2) {
                z += __shfl_xor_sync(0xffffffff, z, o);
            }
            if (x%32 == 0) {
                qz[c] = z;
            }
            __syncthreads();
            for (int R = 0; R < DK/4; ++R) {
                const uint32_t w = kvarn_codes_of(bits, KVARN_G, tile[0] + R*(KVARN_G*bits/2), x);
                for (int k = 0; k < 4; ++k) {
                    for (int e = 0; e < COLUMNS; ++e) {
                        score[e] = fmaf(qs[e][4*R + k], kvarn_byte(w, k), score[e]);
                    }
                }
            }
            const float token = __half2float(((const half *) (tile[0] + kvarn_token_off(DK, bits)))[x]);
            for (int e = 0; e < COLUMNS; ++e) {
                score[e] = (score[e] + qz[e])*token;
            }
        } else {
            const half * row = rows[0] + x*a.side[0].row_stride;
            for (int d = 0; d < DK; ++d) {
                const float v = __half2float(row[d]);
                for (int c = 0; c < COLUMNS; ++c) {
                    score[c] = fmaf(q[c][d], v, score[c]);
                }
            }
        }

        const float token = tile[1] ? __half2float(((const half *) (tile[1] + kvarn_token_off(DV, a.side[1].bits)))[x]) : 1.0f;
        float shrink[COLUMNS];
        for (int c = 0; c < COLUMNS; ++c) {
            float v = a.softcap > 0.0f ? a.softcap*1.44269504f*tanhf(score[c]) : score[c];
            v = fmaf(1.44269504f*kvarn_slope(a.max_bias, h*a.n_gqa + min(c0 + c, n_q - 1)%a.n_gqa, n_head), mask[c], v);
            const float now = fmaxf(max[c], kvarn_block_max<KVARN_G/32>(v, scratch));
            shrink[c] = kvarn_exp2(max[c] - now);
            max[c] = now;
            const float e = kvarn_exp2(v - now);
            sum[c]  = fmaf(sum[c], shrink[c], e); // this thread's tokens
            p[c][x] = e*token;
        }
        __syncthreads();

        float pz[COLUMNS] = { 0.0f, 0.0f, 0.0f, 0.0f };
        for (int n = 0; n < PER_THREAD && n*KVARN_G < DV; ++n) {
            const int d = min(n*KVARN_G + x, DV - 1);
            float acc[COLUMNS] = { 0.0f, 0.0f, 0.0f, 0.0f };
            if (tile[1]) {
                const int bits = a.side[1].bits;
                for (int R = 0; R < KVARN_G/4; ++R) {
                    const uint32_t w = kvarn_codes_of(bits, DV, tile[1] + R*(DV*bits/2), d);
                    for (int k = 0; k < 4; ++k) {
                        for (int c = 0; c < COLUMNS; ++c) {
                            acc[c] = fmaf(p[c][4*R + k], kvarn_byte(w, k), acc[c]);
                            pz [c] += n == 0 ? p[c][4*R + k] : 0.0f;
                        }
                    }
                }
                const float vs = __half2float(((const half *) (tile[1] + kvarn_scale_off(DV, bits)))[d]);
                const float vz = __half2float(((const half *) (tile[1] + kvarn_zero_off (DV, bits)))[d]);
                for (int c = 0; c < COLUMNS; ++c) {
                    acc[c] = fmaf(acc[c], vs, vz*pz[c]);
                }
            } else {
                for (int r = 0; r < KVARN_G; ++r) {
                    const float v = __half2float(rows[1][r*a.side[1].row_stride + d]);
                    for (int c = 0; c < COLUMNS; ++c) {
                        acc[c] = fmaf(p[c][r], v, acc[c]);
                    }
                }
            }
#pragma unroll
            for (int m = 0; m < PER_THREAD; ++m) {
                for (int c = 0; c < COLUMNS && m == n; ++c) {
                    out[c][m] = fmaf(out[c][m], shrink[c], acc[c]);
                }
            }
        }
        __syncthreads();
    }

    for (int c = 0; c < COLUMNS; ++c) {
        p[c][x] = sum[c];
    }
    __syncthreads();
    for (int c = 0; c < n_c; ++c) {
        const int row = (c0 + c)/a.n_gqa, head = h*a.n_gqa + (c0 + c)%a.n_gqa;
        float * dst = a.part + ((((int64_t) s*a.n_rows + row)*n_head + head)*a.cap + part)*(DV + 2);
        if (x == 0) {
            float total = 0.0f;
            for (int r = 0; r < KVARN_G; ++r) {
                total += p[c][r];
            }
            dst[0] = max[c];
            dst[1] = total;
        }
        for (int n = 0; n < PER_THREAD; ++n) {
            if (n*KVARN_G + x < DV) {
                dst[2 + n*KVARN_G + x] = out[c][n];
            }
        }
    }
}

cudaError_t kvarn_attn_any(const kvarn_attn_args & a, cudaStream_t stream) {
    const dim3 grid(a.n_split*((a.n_rows*a.n_gqa + COLUMNS - 1)/COLUMNS), a.H, a.n_stream);
    KVARN_LAUNCH(kvarn_attn_any_kernel, grid, KVARN_G, 0, stream, a);
    return cudaGetLastError();
}

#endif
