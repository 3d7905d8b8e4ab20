// kvarn-attn.cu - picks the attention kernel for a shape and how its tiles are shared out over the device. No ggml.
//
// SPDX-License-Identifier: MIT

#if !defined(GGML_USE_HIP) && !defined(GGML_USE_MUSA)

#include "kvarn-attn.cuh"

typedef cudaError_t (*kvarn_attn_kernel_t)(const kvarn_attn_args & a, cudaStream_t stream);

static kvarn_attn_kernel_t kvarn_attn_pick(const kvarn_attn_args & a) {
    const int D = a.side[0].D;
    if (D != a.side[1].D || a.cap < 2) {
        return kvarn_attn_any;
    }
    if (!a.side[0].bits || !a.side[1].bits) {
        return D == 128 ? kvarn_attn_f16 : kvarn_attn_any;
    }
    return D == 64 ? kvarn_attn_d64 : D == 128 ? kvarn_attn_d128 : D == 256 ? kvarn_attn_d256 : kvarn_attn_any;
}

cudaError_t kvarn_attn_plan(kvarn_attn_args * a) {
    int device, n_sm, shared_sm, shared_block;
    cudaError_t error;
    if ((error = cudaGetDevice(&device)) != cudaSuccess ||
        (error = cudaDeviceGetAttribute(&n_sm,         cudaDevAttrMultiProcessorCount,             device)) != cudaSuccess ||
        (error = cudaDeviceGetAttribute(&shared_sm,    cudaDevAttrMaxSharedMemoryPerMultiprocessor, device)) != cudaSuccess ||
        (error = cudaDeviceGetAttribute(&shared_block, cudaDevAttrMaxSharedMemoryPerBlockOptin,     device)) != cudaSuccess) {
        return error;
    }
    const int n_q = a->n_rows*a->n_gqa;
    int n_blocks = 4; // per multiprocessor
    a->n_warps  = 4;
    a->n_stages = 1;
    a->n_open   = 0; // kvarn_attn_any takes tiles as they come
    if (kvarn_attn_pick(*a) != kvarn_attn_any) {
        a->n_open = a->n_rows < 4 ? a->n_rows : 4; // as many sequences may be in the batch
        a->n_open = a->n_open < a->cap ? a->n_open : a->cap - 1;
        // as many warps as there is room for, then tiles in flight
        int best = 0;
        for (int warps = 4; warps >= 1; --warps) {
            for (int stages = 2; stages >= 1; --stages) {
                const int size = kvarn_attn_lay_out(a->side[0].D, a->side[0].bits, a->side[1].bits, a->n_gqa, n_q, warps,
                        stages).total;
                const int fit  = shared_sm/(size + 1024);
                const int by_registers = (a->side[0].D <= 128 ? 12 : 8)/warps;
                const int blocks = fit < by_registers ? fit : by_registers;
                if (size <= shared_block && blocks*warps > best) {
                    best        = blocks*warps;
                    n_blocks    = blocks;
                    a->n_warps  = warps;
                    a->n_stages = stages;
                }
            }
        }
        if (best == 0) {
            return cudaErrorInvalidValue;
        }
    }
    const int n_shares = a->H*a->n_stream*((n_q + KVARN_COLUMNS - 1)/KVARN_COLUMNS);
    const int by_tiles = (a->n_used + a->n_warps - 1)/a->n_warps;
    int n_split = n_sm*n_blocks/n_shares - a->n_open;
    n_split = n_split < by_tiles            ? n_split : by_tiles;
    n_split = n_split < a->cap - a->n_open  ? n_split : a->cap - a->n_open;
    a->n_split = n_split > 1 ? n_split : 1;
    if (a->n_split + a->n_open > a->cap) {
        return cudaErrorInvalidValue;
    }
    return cudaSuccess;
}

cudaError_t kvarn_attn(const kvarn_attn_args & a, cudaStream_t stream) { return kvarn_attn_pick(a)(a, stream); }

#endif
