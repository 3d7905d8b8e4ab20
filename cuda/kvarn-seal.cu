// kvarn-seal.cu - SEAL: groups of 128 tail rows become tiles, see kvarn-seal.cuh.
//
// SPDX-License-Identifier: MIT
//
//   block  one entry of the list, one head of one layer's keys or values; an entry without a slot ends at once
// A block keeps a multiprocessor busy only in part and lasts as long as 128 additions in a row, a dozen times: so all layers are
// sealed in one launch where nothing reads the tiles before the next graph.

#if !defined(GGML_USE_HIP) && !defined(GGML_USE_MUSA)

#include "kvarn-seal.cuh"

#include <algorithm>

#define SIDES_MAX 64 // of one launch: arguments of 2 KiB

struct kvarn_seal_args {
    kvarn_seal_side side[SIDES_MAX];
    const int64_t * list;
};

template <bool in_shared>
static __global__ void __launch_bounds__(THREADS) kvarn_seal_kernel(const kvarn_seal_args a) {
    KVARN_DYNAMIC_SHARED(shared);
    const kvarn_seal_side & s = a.side[blockIdx.z];
    kvarn_wait_for_kernel_before();
    kvarn_let_kernel_behind_start();
    const int64_t slot = a.list[2*blockIdx.y], index = a.list[2*blockIdx.y + 1];
    if (slot >= 0 && (int) blockIdx.x < s.H) {
        kvarn_seal_head<in_shared>(s.side, s.bits, s.D, s.H, blockIdx.x, s.tail, slot, index, s.tiles, shared);
    }
}

template <bool in_shared>
static cudaError_t kvarn_seal_start(const kvarn_seal_args & a, dim3 grid, int D, cudaStream_t stream, bool is_behind) {
    const int size = kvarn_seal_shared(D, in_shared);
    const cudaError_t error = cudaFuncSetAttribute((const void *) kvarn_seal_kernel<in_shared>,
            cudaFuncAttributeMaxDynamicSharedMemorySize, size);
    if (error != cudaSuccess) {
        return error;
    }
    if (is_behind) {
        return kvarn_launch_behind(kvarn_seal_kernel<in_shared>, grid, THREADS, size, stream, a);
    }
    KVARN_LAUNCH(kvarn_seal_kernel<in_shared>, grid, THREADS, size, stream, a);
    return cudaGetLastError();
}

cudaError_t kvarn_seal(const kvarn_seal_side * sides, int n_sides, const int64_t * list, int n_list, cudaStream_t stream,
                       bool is_behind) {
    for (int at = 0; at < n_sides && n_list > 0; at += SIDES_MAX) {
        kvarn_seal_args a = {};
        const int n = std::min(n_sides - at, SIDES_MAX);
        int D = 0, H = 0;
        for (int i = 0; i < n; ++i) {
            a.side[i] = sides[at + i];
            D = std::max(D, a.side[i].D);
            H = std::max(H, a.side[i].H);
        }
        a.list = list;
        bool in_shared = false;
        cudaError_t error = kvarn_seal_fits(D, 4096, &in_shared);
        if (error == cudaSuccess) {
            const auto start = in_shared ? kvarn_seal_start<true> : kvarn_seal_start<false>;
            error = start(a, dim3(H, n_list, n), D, stream, is_behind);
        }
        if (error != cudaSuccess) {
            return error;
        }
    }
    return cudaSuccess;
}

#endif
