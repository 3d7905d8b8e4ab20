// kvarn-cuda-ggml.cuh - GGML_OP_KVARN on the CUDA backend: what the hooks in ggml-cuda.cu call.
//
// SPDX-License-Identifier: MIT

#pragma once

#include "common.cuh"

bool ggml_cuda_kvarn_supported(int device, const ggml_tensor * op);
bool ggml_cuda_op_kvarn(ggml_backend_cuda_context & ctx, ggml_tensor * dst);
