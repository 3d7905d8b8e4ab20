// kvarn-attn-d64.cu - attention for heads of 64 channels, up to 8 query vectors a block.
//
// SPDX-License-Identifier: MIT

#if !defined(GGML_USE_HIP) && !defined(GGML_USE_MUSA)

#include "kvarn-attn.cuh"

cudaError_t kvarn_attn_d64(const kvarn_attn_args & a, cudaStream_t stream) { return kvarn_attn_start_any<64, 2>(a, stream); }

#endif
