// kvarn-attn.cu - picks the attention kernel for a shape and how its tiles are shared out over the device. No ggml.
//
// SPDX-License-Identifier: MIT

#if !defined(GGML_USE_HIP) && !defined(GGML_USE_MUSA)

#include "kvarn-attn-plan.h"

typedef cudaError_t (*kvarn_attn_kernel_t)(const kvarn_attn_args & a, cudaStream_t stream);

static kvarn_attn_kernel_t kvarn_attn_pick(const kvarn_attn_args & a) {
    const int D = a.side[0].D;
    if (D != a.side[1].D || a.cap < 2) {
        return kvarn_attn_any;
    }
    if (!a.side[0].bits || !a.side[1].bits) {
        return D == 128 ? kvarn_attn_f16 : kvarn_attn_any;
    }
    const bool is_few = kvarn_attn_columns(a) == 1;
    switch (D) {
        case 64:  return is_few ? kvarn_attn_d64_few  : kvarn_attn_d64;
        case 128: return is_few ? kvarn_attn_d128_few : kvarn_attn_d128;
        case 256: return is_few ? kvarn_attn_d256_few : kvarn_attn_d256;
        default:  return kvarn_attn_any;
    }
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
    const bool is_any   = kvarn_attn_pick(*a) == kvarn_attn_any;
    const int n_q       = a->n_rows*a->n_gqa;
    const int n_columns = is_any ? 4 : 4*kvarn_attn_columns(*a); // query vectors per block
    const int n_shares  = a->H*a->n_stream*((n_q + n_columns - 1)/n_columns);
    int n_blocks = 4; // per multiprocessor
    a->n_warps = 4;
    a->n_open  = 0;   // kvarn_attn_any takes tiles as they come
    if (!is_any) {
        a->n_open = a->n_rows < 4 ? a->n_rows : 4; // as many sequences may be in the batch
        a->n_open = a->n_open < a->cap ? a->n_open : a->cap - 1;
        // As many warps as there is room for. Two blocks on a multiprocessor: while one of them starts or ends the other works.
        // One of four warps if every block has a multiprocessor of its own; a larger one if two together have fewer warps
        int most = kvarn_attn_warps_sm(a->side[0].D, n_columns/4);
        if (kvarn_attn_lay_out(*a).tile_size > KVARN_ATTN_SMALL) {
            most = 8;
        }
        const bool is_few = n_shares*((a->n_used + 3)/4 + a->n_open) <= n_sm;
        const int  usual  = is_few ? 4 : most/2;
        int best = 0, n_warps = 0;
        for (int k = 0; k < most - 1; ++k) {
            a->n_warps = k < usual ? usual - k : k + 2; // one more than usual leaves tiles over for a last round
            const int size = kvarn_attn_lay_out(*a).total;
            const int fit  = shared_sm/(size + 1024) < 2 ? 1 : 2, blocks = fit < most/a->n_warps ? fit : most/a->n_warps;
            if (size <= shared_block && blocks*a->n_warps > best && (best == 0 || !is_few)) {
                best     = blocks*a->n_warps;
                n_blocks = blocks;
                n_warps  = a->n_warps;
            }
        }
        if (best == 0) {
            return cudaErrorInvalidValue;
        }
        a->n_warps = n_warps;
    }
    // blocks of open tiles are short: four share one place, behind each other
    const int by_tiles = (a->n_used + a->n_warps - 1)/a->n_warps;
    int n_split = (n_sm*n_blocks - (n_shares*a->n_open + 3)/4)/n_shares;
    n_split = n_split < by_tiles           ? n_split : by_tiles;
    n_split = n_split < a->cap - a->n_open ? n_split : a->cap - a->n_open;
    a->n_split = n_split > 1 ? n_split : 1;
    if (a->n_split + a->n_open > a->cap) {
        return cudaErrorInvalidValue;
    }
    return cudaSuccess;
}

bool kvarn_attn_make_whole(kvarn_attn_args * a, float * out, const float * sinks, int n_rot) {
    int device, shared_block;
    if (kvarn_attn_pick(*a) == kvarn_attn_any || a->n_used > KVARN_ATTN_WHOLE ||
            !kvarn_attn_may_be_whole(a->side[0].D, kvarn_attn_columns(*a)) || cudaGetDevice(&device) != cudaSuccess ||
            cudaDeviceGetAttribute(&shared_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) {
        return false;
    }
    a->n_warps = KVARN_ATTN_WARPS;
    while (kvarn_attn_lay_out(*a).total > shared_block) {
        --a->n_warps; // fewer were found to fit
    }
    a->n_split = 1;
    a->n_open  = 0;
    a->out     = out;
    a->sinks   = sinks;
    a->n_rot   = n_rot;
    return true;
}

cudaError_t kvarn_attn(const kvarn_attn_args & args, cudaStream_t stream) {
    kvarn_attn_args a = args;
    a.is_behind = a.is_behind && a.n_used <= KVARN_ATTN_EARLY;
    return kvarn_attn_pick(a)(a, stream);
}

#endif
