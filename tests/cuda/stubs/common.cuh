// common.cuh - as much of ggml-cuda's common.cuh as kvarn-cuda-ggml.cu uses, for a device that is the CPU; after ggml-impl.h.
//
// SPDX-License-Identifier: MIT

#pragma once

#define GGML_CUDA_CC_TURING 750

#define CUDA_CHECK(call) GGML_ASSERT((call) == cudaSuccess)

struct ggml_cuda_device_info {
    struct { int cc; } devices[1];
};

inline const ggml_cuda_device_info & ggml_cuda_info() {
    static const ggml_cuda_device_info info = { { { 900 } } };
    return info;
}

struct ggml_backend_cuda_context {
    cudaStream_t stream() { return nullptr; }
};
