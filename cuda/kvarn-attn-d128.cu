// kvarn-attn-d128.cu - attention for heads of 128 channels, up to 8 query vectors a block.
//
// SPDX-License-Identifier: MIT

#if !defined(GGML_USE_HIP) && !defined(GGML_USE_MUSA)

#include "kvarn-attn.cuh"

cudaError_t kvarn_attn_d128(const kvarn_attn_args & a, cudaStream_t stream) { return kvarn_attn_start_any<128, 2>(a, stream); }

#endif
