// fattn.cuh - ggml-cuda's flash attention, which the CPU does not have: prompts are refused.
//
// SPDX-License-Identifier: MIT

#pragma once

#include "common.cuh"

inline bool ggml_cuda_flash_attn_ext_supported(int, const ggml_tensor *) { return false; }
inline void ggml_cuda_flash_attn_ext(ggml_backend_cuda_context &, ggml_tensor *) { GGML_ABORT("refused before"); }
