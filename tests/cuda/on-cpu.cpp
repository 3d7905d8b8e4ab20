// on-cpu.cpp - the fibers behind on-cpu.h, and as much of the CUDA runtime as the checks call.
//
// SPDX-License-Identifier: MIT

#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include <ucontext.h>

kvarn_fiber_id threadIdx, blockIdx, blockDim, gridDim;
uint8_t * kvarn_dynamic_shared;

namespace {

constexpr size_t STACK = 256*1024;

struct fiber {
    jmp_buf    at;
    ucontext_t first;
    bool       is_done;
};

struct warp { int arrived, left; unsigned turn; kvarn_exchange exchange; };

std::vector<fiber>   fibers;
std::vector<warp>    warps;
std::vector<uint8_t> stacks;
int                  current, n_fibers, n_done, block_arrived, block_or[2];
unsigned             block_turn;
jmp_buf              outside;
const std::function<void()> * body;

void resume(int n) {
    current     = n;
    threadIdx.x = n;
    _longjmp(fibers[n].at, 1);
}

// the next fiber that is not done
void yield() {
    if (_setjmp(fibers[current].at) == 0) {
        int n = current;
        do { n = (n + 1) % n_fibers; } while (fibers[n].is_done);
        resume(n);
    }
}

void enter() {
    if (_setjmp(fibers[current].at) == 0) {
        _longjmp(outside, 1); // all fibers are made before the first one runs
    }
    (*body)();
    fibers[current].is_done = true;
    if (++n_done == n_fibers) {
        _longjmp(outside, 1);
    }
    int n = current;
    do { n = (n + 1) % n_fibers; } while (fibers[n].is_done);
    resume(n);
}

void run_block() {
    n_done = block_arrived = block_or[0] = block_or[1] = 0;
    for (warp & w : warps) { w.arrived = 0; }
    for (int n = 0; n < n_fibers; ++n) {
        fiber & f = fibers[n];
        f.is_done = false;
        current   = n;
        getcontext(&f.first);
        f.first.uc_stack.ss_sp   = stacks.data() + n*STACK;
        f.first.uc_stack.ss_size = STACK;
        f.first.uc_link          = nullptr;
        makecontext(&f.first, enter, 0);
        if (_setjmp(outside) == 0) {
            setcontext(&f.first);
        }
    }
    if (_setjmp(outside) == 0) {
        resume(0);
    }
}

}

kvarn_exchange & kvarn_warp_exchange() { return warps[current/32].exchange; }

void kvarn_warp_wait() {
    warp & w = warps[current/32];
    if (++w.arrived == 32) {
        w.arrived = 0;
        ++w.turn;
        return;
    }
    for (const unsigned turn = w.turn; w.turn == turn;) { yield(); }
}

void kvarn_block_wait() {
    if (++block_arrived == n_fibers) {
        block_arrived = 0;
        block_or[(block_turn + 1) % 2] = 0;
        ++block_turn;
        return;
    }
    for (const unsigned turn = block_turn; block_turn == turn;) { yield(); }
}

bool kvarn_block_or(bool v) {
    const unsigned turn = block_turn;
    block_or[turn % 2] |= v;
    kvarn_block_wait();
    return block_or[turn % 2];
}

void kvarn_run(dim3 grid, dim3 block, size_t shared, const std::function<void()> & kernel) {
    n_fibers = block.x*block.y*block.z;
    fibers.resize(n_fibers);
    warps .resize((n_fibers + 31)/32);
    stacks.resize(n_fibers*STACK);
    std::vector<uint8_t> dynamic(shared + 128, 0xcd);
    kvarn_dynamic_shared = (uint8_t *) (((uintptr_t) dynamic.data() + 127)/128*128);
    body     = &kernel;
    blockDim = { block.x, block.y, block.z };
    gridDim  = { grid.x, grid.y, grid.z };
    for (unsigned z = 0; z < grid.z; ++z) {
        for (unsigned y = 0; y < grid.y; ++y) {
            for (unsigned x = 0; x < grid.x; ++x) {
                blockIdx = { x, y, z };
                memset(kvarn_dynamic_shared, 0xcd, shared);
                run_block();
            }
        }
    }
}

extern "C" {

cudaError_t cudaMalloc(void ** p, size_t size) { return (*p = malloc(size + 256)) ? cudaSuccess : cudaErrorMemoryAllocation; }
cudaError_t cudaFree(void * p) { free(p); return cudaSuccess; }
cudaError_t cudaMemcpy(void * dst, const void * src, size_t size, cudaMemcpyKind) { memcpy(dst, src, size); return cudaSuccess; }
cudaError_t cudaMemset(void * p, int byte, size_t size) { memset(p, byte, size); return cudaSuccess; }
cudaError_t cudaMemcpy2DAsync(void * dst, size_t dst_pitch, const void * src, size_t src_pitch, size_t width, size_t height,
        cudaMemcpyKind, cudaStream_t) {
    for (size_t row = 0; row < height; ++row) {
        memcpy((char *) dst + row*dst_pitch, (const char *) src + row*src_pitch, width);
    }
    return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaGetDevice(int * device) { *device = 0; return cudaSuccess; }
cudaError_t cudaFuncSetAttribute(const void *, cudaFuncAttribute, int) { return cudaSuccess; }
const char * cudaGetErrorString(cudaError_t) { return "CUDA error"; }

// a small device: shares are few, and long
cudaError_t cudaDeviceGetAttribute(int * value, cudaDeviceAttr attribute, int) {
    switch (attribute) {
        case cudaDevAttrMultiProcessorCount:             *value = 3;      return cudaSuccess;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = 102400; return cudaSuccess;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin:     *value = 101376; return cudaSuccess;
        default: return cudaErrorInvalidValue;
    }
}

}
