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
    const int n_q = a->n_rows*a->n_gqa;
    int n_blocks  = 4; // per multiprocessor
    int n_columns = 4; // query vectors per block
    a->n_warps = 4;
    a->n_open  = 0;    // kvarn_attn_any takes tiles as they come
    if (kvarn_attn_pick(*a) != kvarn_attn_any) {
        n_columns = 4*kvarn_attn_columns(*a);
        a->n_open = a->n_rows < 4 ? a->n_rows : 4; // as many sequences may be in the batch
        a->n_open = a->n_open < a->cap ? a->n_open : a->cap - 1;
        // as many warps as there is room for; large blocks, since each reads the query vectors and writes a partial result
        int best = 0, n_warps = 0;
        for (int warps = KVARN_ATTN_WARPS; warps >= 1; --warps) {
            a->n_warps = warps;
            const int size   = kvarn_attn_lay_out(*a).total;
            const int fit    = shared_sm/(size + 1024), most = KVARN_ATTN_WARPS_SM/warps;
            const int blocks = fit < most ? fit : most;
            if (size <= shared_block && 2*blocks*warps + warps > best) {
                best     = 2*blocks*warps + warps;
                n_blocks = blocks;
                n_warps  = warps;
            }
        }
        if (best == 0) {
            return cudaErrorInvalidValue;
        }
        a->n_warps = n_warps;
    }
    // blocks of open tiles are short: four share one place, behind each other
    const int n_shares = a->H*a->n_stream*((n_q + n_columns - 1)/n_columns);
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
    if (kvarn_attn_pick(*a) == kvarn_attn_any || a->n_used > KVARN_ATTN_WHOLE*a->n_warps ||
            !kvarn_attn_may_be_whole(a->side[0].D, kvarn_attn_columns(*a))) {
        return false;
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
