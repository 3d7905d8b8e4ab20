// kvarn-seal.cu - SEAL: groups of 128 tail rows become tiles, see kvarn-seal.cuh.
//
// SPDX-License-Identifier: MIT
//
//   block  one entry of the list, one head; an entry without a slot ends at once

#if !defined(GGML_USE_HIP) && !defined(GGML_USE_MUSA)

#include "kvarn-seal.cuh"

static __global__ void __launch_bounds__(THREADS) kvarn_seal_kernel(int side, int bits, int D, int H, const half * tail,
                                                                    const int64_t * list, uint8_t * tiles) {
    const int64_t slot = list[2*blockIdx.y], index = list[2*blockIdx.y + 1];
    if (slot >= 0) {
        kvarn_seal_head(side, bits, D, H, blockIdx.x, tail, slot, index, tiles);
    }
}

cudaError_t kvarn_seal(int side, int bits, int D, int H, const half * tail, const int64_t * list, int n_list, uint8_t * tiles,
                       cudaStream_t stream) {
    if (n_list > 0) {
        KVARN_LAUNCH(kvarn_seal_kernel, dim3(H, n_list), THREADS, 0, stream, side, bits, D, H, tail, list, tiles);
    }
    return cudaGetLastError();
}

#endif
