// bench.cuh - what the standalone drivers share: calls that must not fail, copies from and to the device, times.
//
// SPDX-License-Identifier: MIT

#pragma once

#include <cuda_runtime.h>

#include <algorithm>
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

#if !defined(KVARN_ON_CPU) // no times from tests/cuda/on-cpu.h

// median of n runs on the stream, by events; the first n_skip runs do not count
template <typename F>
static double median_ms(int n, int n_skip, cudaStream_t stream, F && run) {
    cudaEvent_t e0, e1;
    ok(cudaEventCreate(&e0), "event");
    ok(cudaEventCreate(&e1), "event");
    std::vector<float> times;
    for (int i = 0; i < n; ++i) {
        float ms;
        cudaEventRecord(e0, stream);
        run();
        cudaEventRecord(e1, stream);
        ok(cudaEventSynchronize(e1), "run");
        cudaEventElapsedTime(&ms, e0, e1);
        if (i >= n_skip) { times.push_back(ms); }
    }
    cudaEventDestroy(e0);
    cudaEventDestroy(e1);
    std::sort(times.begin(), times.end());
    return times[times.size()/2];
}

#endif
