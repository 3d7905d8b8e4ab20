// kvarn-get.cu - GET: tiles and tail rows become f16 rows, for flash attention over many query rows. No ggml.
//
// SPDX-License-Identifier: MIT
//
//   block   one tile of one head; 128 threads
//   keys    16 groups of four channels at a time through shared memory: a word of codes is four channels of one token, a row of
//           the
//           result is all channels of one token
//   values  a thread takes two neighbouring words: two channels of four tokens, for each field
// Bound by the f16 rows written. Multiplies and adds are separate f32 roundings, as in kvarn-ref.c.

#if !defined(GGML_USE_HIP) && !defined(GGML_USE_MUSA)

#include "kvarn-cuda.h"
#include "kvarn-format.h"
#include "kvarn-mma.cuh"

#define THREADS 128
#define EXACT_BITS 16
#define EXACT_XOR  0x5a5a // exact tiles are f16 rows, xor-ed: kvarn-graph.c
#define CHANNELS   64     // of keys, in shared memory at once

static __device__ __forceinline__ half kvarn_value(uint32_t code, float scale, float zero, float token) {
    return __float2half_rn(__fmul_rn(__fadd_rn(__fmul_rn((float) code, scale), zero), token));
}

// four codes, one per byte, of slot s of the words a (and b, c: the planes of 3 bits)
static __device__ __forceinline__ uint32_t kvarn_slot(int bits, int s, uint32_t a, uint32_t b, uint32_t c) {
    if (bits != 3) {
        return a >> s*bits & (bits == 2 ? 0x03030303 : 0x0f0f0f0f);
    }
    if (s < 6) {
        return (s < 2 ? a : s < 4 ? b : c) >> s%2*3 & 0x07070707;
    }
    return s == 6 ? (a >> 5 & 0x06060606) | (b >> 7 & 0x01010101) : (b >> 4 & 0x04040404) | (c >> 6 & 0x03030303);
}

static __global__ void __launch_bounds__(THREADS) kvarn_get_kernel(int side, int bits, int D, int H, const uint8_t * tiles,
        const half * tail, const int64_t * map, half * out, int n_used, int n_tiles, int s0, int h0, int n_heads) {
    __shared__ __align__(8) half rows[KVARN_G][CHANNELS + 4];

    const int i = blockIdx.x/n_heads, s = blockIdx.y, x = threadIdx.x;
    const int h = h0 + blockIdx.x % n_heads;
    const int64_t stride = (int64_t) D*n_heads; // of the result
    const int64_t index  = (int64_t) (s0 + s)*n_tiles + i;
    const int64_t where  = map[index];
    half * dst = out + ((int64_t) s*n_used + i)*KVARN_G*stride + (h - h0)*D;

    if (where != -1 || bits == EXACT_BITS) {
        const uint4 * src  = nullptr;
        int64_t src_stride = 0; // in 16 bytes, D % 16 == 0
        uint32_t flip      = 0;
        if (where >= 0) {
            src = (const uint4 *) (tail + where*KVARN_G*D*H + h*D);
            src_stride = (int64_t) D*H/8;
        } else if (where == -1) {
            src = (const uint4 *) (tiles + (index*H + h)*kvarn_tile_size(D, bits));
            src_stride = D/8;
            flip = EXACT_XOR*0x10001u;
        }
        for (int at = x; at < KVARN_G*D/8; at += THREADS) {
            const int t = at/(D/8), d8 = at % (D/8);
            uint4 v = src ? src[t*src_stride + d8] : make_uint4(0, 0, 0, 0);
            v.x ^= flip; v.y ^= flip; v.z ^= flip; v.w ^= flip;
            ((uint4 *) (dst + t*stride))[d8] = v;
        }
        return;
    }

    const uint8_t * tile  = tiles + (index*H + h)*kvarn_tile_size(D, bits);
    const half    * scale = (const half *) (tile + kvarn_scale_off(D, bits));
    const half    * zero  = (const half *) (tile + kvarn_zero_off (D, bits));
    const half    * token = (const half *) (tile + kvarn_token_off(D, bits));
    const int n_slots = bits == 3 ? 8 : 8/bits;

    if (side == KVARN_KEY) {
        const int X = KVARN_G/n_slots, planes = bits == 3 ? X : 0;
        for (int d0 = 0; d0 < D; d0 += CHANNELS) {
            const int n_d = min(CHANNELS, D - d0);
            for (int at = x; at < n_d/4*X; at += THREADS) {
                const int R = at/X, w = at % X, d = d0 + 4*R;
                const uint32_t * p = (const uint32_t *) (tile + (d0/4 + R)*(KVARN_G*bits/2)) + w;
                const uint32_t a = p[0], b = p[planes], c = p[2*planes];
                for (int f = 0; f < n_slots; ++f) {
                    const uint32_t code = kvarn_slot(bits, f, a, b, c);
                    const float tok = __half2float(token[w + X*f]);
                    __align__(8) half v[4];
                    for (int k = 0; k < 4; ++k) {
                        v[k] = kvarn_value(code >> 8*k & 0xff, __half2float(scale[d + k]), __half2float(zero[d + k]), tok);
                    }
                    *(uint2 *) &rows[w + X*f][4*R] = *(const uint2 *) v;
                }
            }
            __syncthreads();
            for (int at = x; at < KVARN_G*n_d/4; at += THREADS) {
                const int t = at/(n_d/4), d4 = at % (n_d/4);
                *(uint2 *) (dst + t*stride + d0 + 4*d4) = *(const uint2 *) &rows[t][4*d4];
            }
            __syncthreads();
        }
    } else {
        const int X = D/n_slots, planes = bits == 3 ? X : 0;
        for (int at = x; at < KVARN_G/4*X/2; at += THREADS) {
            const int R = at/(X/2), w = at % (X/2)*2;
            const uint32_t * p = (const uint32_t *) (tile + R*(D*bits/2)) + w;
            const uint32_t a0 = p[0], b0 = p[planes], c0 = p[2*planes], a1 = p[1], b1 = p[planes + 1], c1 = p[2*planes + 1];
            for (int f = 0; f < n_slots; ++f) {
                const uint32_t code0 = kvarn_slot(bits, f, a0, b0, c0), code1 = kvarn_slot(bits, f, a1, b1, c1);
                const int d = w + X*f;
                const float2 sc = __half22float2(*(const half2 *) (scale + d)), zr = __half22float2(*(const half2 *) (zero + d));
                for (int k = 0; k < 4; ++k) {
                    const float tok = __half2float(token[4*R + k]);
                    *(half2 *) (dst + (4*R + k)*stride + d) = __halves2half2(kvarn_value(code0 >> 8*k & 0xff, sc.x, zr.x, tok),
                                                                             kvarn_value(code1 >> 8*k & 0xff, sc.y, zr.y, tok));
                }
            }
        }
    }
}

cudaError_t kvarn_get(int side, int bits, int D, int H, const uint8_t * tiles, const half * tail, const int64_t * map, half * out,
                      int n_used, int n_tiles, int s0, int n_stream, cudaStream_t stream, int h0, int n_heads) {
    n_heads = n_heads ? n_heads : H;
    KVARN_LAUNCH(kvarn_get_kernel, dim3(n_used*n_heads, n_stream), THREADS, 0, stream, side, bits, D, H, tiles, tail, map, out,
            n_used, n_tiles, s0, h0, n_heads);
    return cudaGetLastError();
}

#endif
