// kvarn-attn-f16.cu - attention for heads of 128 channels where one side is an f16 cache.
//
// SPDX-License-Identifier: MIT

#if !defined(GGML_USE_HIP) && !defined(GGML_USE_MUSA)

#include "kvarn-attn.cuh"

cudaError_t kvarn_attn_f16(const kvarn_attn_args & a, cudaStream_t stream) {
    switch (a.side[0].bits*8 + a.side[1].bits) {
        case 0*8 + 2: return kvarn_attn_start<0, 2, 128, 2>(a, stream);
        case 0*8 + 3: return kvarn_attn_start<0, 3, 128, 2>(a, stream);
        case 0*8 + 4: return kvarn_attn_start<0, 4, 128, 2>(a, stream);
        case 2*8 + 0: return kvarn_attn_start<2, 0, 128, 2>(a, stream);
        case 3*8 + 0: return kvarn_attn_start<3, 0, 128, 2>(a, stream);
        case 4*8 + 0: return kvarn_attn_start<4, 0, 128, 2>(a, stream);
        default:      return cudaErrorInvalidValue;
    }
}

#endif
