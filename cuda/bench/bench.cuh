// bench.cuh - what the standalone drivers share: calls that must not fail, copies from and to the device.
//
// SPDX-License-Identifier: MIT

#pragma once

#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

static void ok(cudaError_t error, const char * what) {
    if (error != cudaSuccess) {
        fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
        exit(1);
    }
}

template <typename T>
static T * on_device(const std::vector<T> & v) {
    T * p;
    ok(cudaMalloc(&p, v.size()*sizeof(T)), "cudaMalloc");
    ok(cudaMemcpy(p, v.data(), v.size()*sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
    return p;
}

template <typename T>
static std::vector<T> from_device(const T * p, size_t n) {
    std::vector<T> v(n);
    ok(cudaMemcpy(v.data(), p, n*sizeof(T), cudaMemcpyDeviceToHost), "cudaMemcpy");
    return v;
}
