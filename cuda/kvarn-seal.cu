// kvarn-seal.cu - SEAL: groups of 128 tail rows become tiles, see kvarn-seal.cuh.
//
// SPDX-License-Identifier: MIT
//
//   block  one entry of the list, one head; an entry without a slot ends at once

#if !defined(GGML_USE_HIP) && !defined(GGML_USE_MUSA)

#include "kvarn-seal.cuh"

template <bool in_shared>
static __global__ void __launch_bounds__(THREADS) kvarn_seal_kernel(int side, int bits, int D, int H, const half * tail,
                                                                    const int64_t * list, uint8_t * tiles) {
    KVARN_DYNAMIC_SHARED(shared);
    const int64_t slot = list[2*blockIdx.y], index = list[2*blockIdx.y + 1];
    if (slot >= 0) {
        kvarn_seal_head<in_shared>(side, bits, D, H, blockIdx.x, tail, slot, index, tiles, shared);
    }
}

template <bool in_shared>
static cudaError_t kvarn_seal_start(int side, int bits, int D, int H, const half * tail, const int64_t * list, int n_list,
        uint8_t * tiles, cudaStream_t stream) {
    const int size = kvarn_seal_shared(D, in_shared);
    const cudaError_t error = cudaFuncSetAttribute((const void *) kvarn_seal_kernel<in_shared>,
            cudaFuncAttributeMaxDynamicSharedMemorySize, size);
    if (error != cudaSuccess) {
        return error;
    }
    KVARN_LAUNCH(kvarn_seal_kernel<in_shared>, dim3(H, n_list), THREADS, size, stream, side, bits, D, H, tail, list, tiles);
    return cudaGetLastError();
}

cudaError_t kvarn_seal(int side, int bits, int D, int H, const half * tail, const int64_t * list, int n_list, uint8_t * tiles,
                       cudaStream_t stream) {
    if (n_list <= 0) {
        return cudaSuccess;
    }
    bool in_shared = false;
    const cudaError_t error = kvarn_seal_fits(D, 4096, &in_shared);
    if (error != cudaSuccess) {
        return error;
    }
    const auto start = in_shared ? kvarn_seal_start<true> : kvarn_seal_start<false>;
    return start(side, bits, D, H, tail, list, n_list, tiles, stream);
}

#endif
