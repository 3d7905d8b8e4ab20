// common.cuh - as much of ggml-cuda's common.cuh as our glue uses, for a device that is the CPU; after ggml-impl.h.
//
// SPDX-License-Identifier: MIT

#pragma once

#include <vector>

#define GGML_CUDA_CC_TURING 750

#define CUDA_CHECK(call) GGML_ASSERT((call) == cudaSuccess)

struct ggml_cuda_device_info {
    struct { int cc; } devices[1];
};

inline const ggml_cuda_device_info & ggml_cuda_info() {
    static const ggml_cuda_device_info info = { { { 900 } } };
    return info;
}

struct ggml_cuda_pool {};

template <typename T> struct ggml_cuda_pool_alloc {
    explicit ggml_cuda_pool_alloc(ggml_cuda_pool &) {}
    ggml_cuda_pool_alloc(ggml_cuda_pool &, size_t size) : data(size) {}

    T * alloc(size_t size) { data.resize(size); return data.data(); }
    T * get() { return data.data(); }

    std::vector<T> data;
};

struct ggml_backend_cuda_context {
    ggml_cuda_pool none;

    cudaStream_t     stream() { return nullptr; }
    ggml_cuda_pool & pool()   { return none; }
};
