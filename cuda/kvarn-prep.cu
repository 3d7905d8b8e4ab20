// kvarn-prep.cu - PREP: what a decoded token needs before attention, in one launch. No ggml.
//
// SPDX-License-Identifier: MIT
//
//   block  a head of keys or of values: its rows are rotated and written to the tail, then its tiles of the list are sealed;
//          or 16 query vectors
//   warp   one vector at a time: a Hadamard transform of n_rot channels in shared memory
// Bound by the latency of one launch, which is why it is one: rotating, storing and sealing apart are eight.

#if !defined(GGML_USE_HIP) && !defined(GGML_USE_MUSA)

#include "kvarn-seal.cuh"

#define N_WARPS (THREADS/32)

// D channels of x to y, each n_rot of them transformed; the order of kvarn-cache.cpp's matrix, scaled by 1/sqrt(n_rot)
template <typename T>
static __device__ __forceinline__ void kvarn_rotate(const float * x, T * y, int D, int n_rot, float * buffer) {
    const int lane = threadIdx.x % 32;
    for (int d = lane; d < D; d += 32) {
        buffer[d] = x[d];
    }
    __syncwarp();
    const float scale = kvarn_hadamard(buffer, D, n_rot, lane);
    for (int d = lane; d < D; d += 32) {
        y[d] = (T) (buffer[d]*scale);
    }
    __syncwarp();
}

template <bool in_shared>
static __global__ void __launch_bounds__(THREADS) kvarn_prep_kernel(const kvarn_prep_args a) {
    KVARN_DYNAMIC_SHARED(shared); // a vector per warp, then what sealing needs: one after the other

    const int warp = threadIdx.x/32;
    float * buffer = (float *) shared + warp*KVARN_D_MAX;
    kvarn_wait_for_kernel_before();
    kvarn_let_kernel_behind_start(); // it knows what is written here, and waits for that
    const int lane = threadIdx.x % 32;
    const int64_t slot = lane < a.n_list ? a.list[2*lane] : -1; // on its way while rows are rotated
    int block = blockIdx.x;

    for (int side = 0; side < 2; ++side) {
        const kvarn_prep_side & s = a.side[side];
        const int H = s.bits ? a.H : 0;
        if (block >= H) {
            block -= H;
            continue;
        }
        const int64_t stride = (int64_t) s.D*H;
        for (int t = warp; t < a.n_tokens; t += N_WARPS) {
            kvarn_rotate(s.cur + t*stride + block*s.D, s.tail + s.rows[t]*stride + block*s.D, s.D, s.n_rot, buffer);
        }
        for (uint32_t left = __ballot_sync(0xffffffff, slot >= 0); left != 0; left &= left - 1) {
            const int n = __ffs(left) - 1;
            __syncthreads(); // the rows are there; the last tile is done
            kvarn_seal_head<in_shared>(side, s.bits, s.D, H, block, s.tail, a.list[2*n], a.list[2*n + 1], s.tiles, shared);
        }
        return;
    }

    const int vector = block*N_WARPS + warp;
    if (vector < a.n_q) {
        kvarn_rotate(a.q + (int64_t) vector*a.q_size, a.q_out + (int64_t) vector*a.q_size, a.q_size, a.q_rot, buffer);
    }
}

template <bool in_shared>
static cudaError_t kvarn_prep_start(const kvarn_prep_args & a, int D, cudaStream_t stream, bool is_behind) {
    const int n_blocks = (a.side[0].bits ? a.H : 0) + (a.side[1].bits ? a.H : 0) + (a.n_q + N_WARPS - 1)/N_WARPS;
    const int rotate = N_WARPS*KVARN_D_MAX*(int) sizeof(float), seal = a.n_list > 0 ? kvarn_seal_shared(D, in_shared) : 0;
    const int size   = seal > rotate ? seal : rotate;
    const cudaError_t error = cudaFuncSetAttribute((const void *) kvarn_prep_kernel<in_shared>,
            cudaFuncAttributeMaxDynamicSharedMemorySize, size);
    if (error != cudaSuccess) {
        return error;
    }
    if (is_behind) {
        return kvarn_launch_behind(kvarn_prep_kernel<in_shared>, dim3(n_blocks), THREADS, size, stream, a);
    }
    KVARN_LAUNCH(kvarn_prep_kernel<in_shared>, n_blocks, THREADS, size, stream, a);
    return cudaGetLastError();
}

cudaError_t kvarn_prep(const kvarn_prep_args & a, cudaStream_t stream, bool is_behind) {
    int D = 0;
    for (const kvarn_prep_side & s : a.side) {
        D = s.bits && s.D > D ? s.D : D;
    }
    bool in_shared = false;
    const cudaError_t error = kvarn_seal_fits(D, 4096, &in_shared);
    if (error != cudaSuccess) {
        return error;
    }
    return in_shared ? kvarn_prep_start<true>(a, D, stream, is_behind) : kvarn_prep_start<false>(a, D, stream, is_behind);
}

#endif
