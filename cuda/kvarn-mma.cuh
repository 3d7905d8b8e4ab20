// kvarn-mma.cuh - the PTX that attention is made of: matrix instructions, the 8 x 8 transpose, copies of whole tiles.
// Raw pointers, no ggml. sm_90 and later copy in bulk, sm_80 to sm_89 with cp.async, sm_75 through registers.
//
// SPDX-License-Identifier: MIT

#pragma once

#include <cuda_fp16.h>
#include <stdint.h>

#define KVARN_PAD 32 // bytes

// four consecutive f16 -> elements 0 and 2, elements 1 and 3: the order in which bytes of a word of codes become operands
static __device__ __forceinline__ uint2 kvarn_even_odd(uint2 v) {
    return make_uint2(__byte_perm(v.x, v.y, 0x5410), __byte_perm(v.x, v.y, 0x7632));
}

#if !defined(KVARN_ON_CPU) // tests/cuda/on-cpu.h has the rest in plain C++

#define KVARN_LAUNCH(kernel, grid, block, shared, stream, ...) kernel<<<grid, block, shared, stream>>>(__VA_ARGS__)
#define KVARN_KEEP_ORDER() asm volatile("" ::: "memory")
#define KVARN_DYNAMIC_SHARED(name) extern __shared__ __align__(128) uint8_t name[]

// One mma of 16 rows x 8 columns over 16 contracted indices. Lane = 4*g + i holds
//   a0 row g, a1 row g + 8, both k = 2i, 2i+1;  a2, a3 the same rows, k + 8      b0 column g, k = 2i, 2i+1;  b1 k + 8
//   c0, c1 row g, columns 2i, 2i+1;  c2, c3 row g + 8
static __device__ __forceinline__ void kvarn_mma(float & c0, float & c1, float & c2, float & c3,
                                                 uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3) : "r"(a0), "r"(a1), "r"(b0));
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3) : "r"(a2), "r"(a3), "r"(b1));
#endif
}

// One integer mma of 16 rows x 8 columns over 32 contracted indices, codes unsigned. Lane = 4*g + i holds
//   a0 row g, a1 row g + 8, both k = 4i .. 4i+3;  a2, a3 the same rows, k + 16     b0 column g, k = 4i .. 4i+3;  b1 k + 16
//   c0, c1 row g, columns 2i, 2i+1;  c2, c3 row g + 8
// kvarn_mma_s8: b is signed; kvarn_mma_u8: b is unsigned
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define KVARN_MMA_INT(name, type) static __device__ __forceinline__ void name(int & c0, int & c1, int & c2, int & c3, \
        uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) { \
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8." type ".s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
        : "+r"(c0), "+r"(c1), "+r"(c2), "+r"(c3) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1)); }
#else
#define KVARN_MMA_ONE(type, c, d, a, b) \
    asm("mma.sync.aligned.m8n8k16.row.col.s32.u8." type ".s32 {%0,%1}, {%2}, {%3}, {%0,%1};" : "+r"(c), "+r"(d) : "r"(a), "r"(b))
#define KVARN_MMA_INT(name, type) static __device__ __forceinline__ void name(int & c0, int & c1, int & c2, int & c3, \
        uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) { \
    KVARN_MMA_ONE(type, c0, c1, a0, b0); KVARN_MMA_ONE(type, c0, c1, a2, b1); \
    KVARN_MMA_ONE(type, c2, c3, a1, b0); KVARN_MMA_ONE(type, c2, c3, a3, b1); }
#endif
KVARN_MMA_INT(kvarn_mma_s8, "s8")
KVARN_MMA_INT(kvarn_mma_u8, "u8")

// Transpose of an 8 x 8 matrix of 16-bit elements: lane 4*g + i gives row g, columns 2i, 2i+1, and gets column g, rows 2i, 2i+1.
static __device__ __forceinline__ uint32_t kvarn_transpose(uint32_t v) {
    uint32_t r;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v));
    return r;
}

static __device__ __forceinline__ float kvarn_exp2(float v) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
}

static __device__ __forceinline__ uint32_t kvarn_pack(float lo, float hi) {
    const half2 h = __floats2half2_rn(lo, hi);
    return *(const uint32_t *) &h;
}

static __device__ __forceinline__ float2 kvarn_unpack(uint32_t v) { return __half22float2(*(const half2 *) &v); }

static __device__ __forceinline__ uint32_t kvarn_mul2(uint32_t a, uint32_t b) {
    const half2 h = __hmul2(*(const half2 *) &a, *(const half2 *) &b);
    return *(const uint32_t *) &h;
}

// a*b + c and a + b of two f16 each, one rounding; the larger of m and |v|
static __device__ __forceinline__ uint32_t kvarn_fma2(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t r;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
}

static __device__ __forceinline__ uint32_t kvarn_add2(uint32_t a, uint32_t b) {
    uint32_t r;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}

static __device__ __forceinline__ uint32_t kvarn_max_abs2(uint32_t m, uint32_t v) {
    const half2 h = __hmax2(*(const half2 *) &m, __habs2(*(const half2 *) &v));
    return *(const uint32_t *) &h;
}

// --- one kernel behind another (sm_90 and later): kvarn_launch_behind ---

// Waits until the kernel before has ended and its results are there. Launched in the ordinary way, this is so from the start.
static __device__ __forceinline__ void kvarn_wait_for_kernel_before() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// From here on the next kernel's blocks may take the room of blocks that end.
static __device__ __forceinline__ void kvarn_let_kernel_behind_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Launches a kernel so that its blocks may be placed while the kernel before ends, or from where that one lets them start. Every
// block of such a kernel waits for the kernel before, and writes nothing and reads nothing of what that one writes until then;
// and it lets the next one start only behind its own wait, so that the next one finds all but one kernel's work done. In code
// for older devices nothing waits, and older drivers cannot keep such a launch in a graph: there it is an ordinary one.
template <typename... P, typename... A>
static cudaError_t kvarn_launch_behind(void (*kernel)(P...), dim3 grid, int block, int shared, cudaStream_t stream,
        const A &... args) {
#if CUDART_VERSION >= 12030
    cudaFuncAttributes f;
    int driver;
    cudaError_t error;
    if ((error = cudaFuncGetAttributes(&f, (const void *) kernel)) != cudaSuccess ||
        (error = cudaDriverGetVersion(&driver)) != cudaSuccess) {
        return error;
    }
    cudaLaunchAttribute early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim  = grid;
    config.blockDim = dim3(block);
    config.stream   = stream;
    config.dynamicSmemBytes = shared;
    config.attrs    = &early;
    config.numAttrs = f.ptxVersion >= 90 && driver >= 12030;
    return cudaLaunchKernelEx(&config, kernel, P(args)...);
#else
    KVARN_LAUNCH(kernel, grid, block, shared, stream, P(args)...);
    return cudaGetLastError();
#endif
}

// Asks for the lines of some bytes, for the time when they are read: what other blocks still write to them is not missed.
template <int bytes>
static __device__ __forceinline__ void kvarn_ask_for(const void * p) {
#pragma unroll
    for (int at = 0; at < bytes; at += 128) {
        asm volatile("prefetch.global.L2 [%0];" :: "l"((const char *) p + at));
    }
}

// Brings what nobody writes to the multiprocessor.
static __device__ __forceinline__ void kvarn_bring(const half * p) {
    asm volatile("{\n"
                 ".reg .b16 v;\n"
                 "ld.global.ca.b16 v, [%0];\n"
                 "}" :: "l"(p));
}

// --- copies to shared memory: one warp, one barrier per destination; sizes and addresses are multiples of 16 ---

static __device__ __forceinline__ uint32_t kvarn_shared(const void * p) { return (uint32_t) __cvta_generic_to_shared(p); }

// true in one lane of a whole warp; the compiler knows that it is only one, which a comparison with a lane does not tell it
static __device__ __forceinline__ bool kvarn_elect() {
    uint32_t is_elected = 0;
#if __CUDA_ARCH__ >= 900
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "elect.sync _|p, 0xffffffff;\n"
                 "selp.u32 %0, 1, 0, p;\n"
                 "}" : "=r"(is_elected));
#endif
    return is_elected;
}

static __device__ __forceinline__ void kvarn_barrier_init(uint64_t * barrier) {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(kvarn_shared(barrier)) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// Starts the copy of a tile whose codes are parted in quarters: behind each of them there is room of KVARN_PAD bytes in dst. All
// lanes call it, after __syncwarp(): everybody has read what is overwritten.
static __device__ __forceinline__ void kvarn_copy_tile(uint64_t * barrier, uint8_t * dst, const uint8_t * src, int quarter,
        int size, int lane) {
#if __CUDA_ARCH__ >= 900
    if (kvarn_elect()) {
        const uint32_t b = kvarn_shared(barrier), d = kvarn_shared(dst);
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(b), "r"(size) : "memory");
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            const int bytes = n < 3 ? quarter : size - 3*quarter;
            asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                         :: "r"(d + n*(quarter + KVARN_PAD)), "l"(src + n*quarter), "r"(bytes), "r"(b) : "memory");
        }
    }
#else
    for (int at = 16*lane; at < size; at += 16*32) {
        uint8_t * to = dst + at + (at/quarter < 3 ? at/quarter : 3)*KVARN_PAD;
#if __CUDA_ARCH__ >= 800
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(kvarn_shared(to)), "l"(src + at) : "memory");
#else
        *(uint4 *) to = *(const uint4 *) (src + at);
#endif
    }
#endif
}

// Closes a group of copies for kvarn_copy_wait on sm_80 to sm_89, where groups are waited for in order: one call per place where
// the others may start a copy, whether one was started or not.
static __device__ __forceinline__ void kvarn_copy_commit() {
#if __CUDA_ARCH__ >= 800 && __CUDA_ARCH__ < 900
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for the copy, behind which one more group may be open: keys and values take turns.
static __device__ __forceinline__ void kvarn_copy_wait(uint64_t * barrier, int phase) {
#if __CUDA_ARCH__ >= 900
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "wait:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
                 "@!p bra wait;\n"
                 "}" :: "r"(kvarn_shared(barrier)), "r"(phase) : "memory");
#else
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group 1;" ::: "memory");
#endif
    __syncwarp();
#endif
}

#endif
