// kvarn-cuda-ggml.cu - GGML_OP_KVARN on the CUDA backend: tensors become pointers, kvarn-cuda.h does the rest.
// With kvarn-fuse-ggml.cu and kvarn-prompt-ggml.cu the only CUDA code that knows ggml. Nothing here waits for the device.
//
// SPDX-License-Identifier: MIT

#include "kvarn-cuda-ggml.cuh"

#if defined(GGML_USE_HIP) || defined(GGML_USE_MUSA)

// the kernels are written for NVIDIA's matrix instructions: the cache refuses such a device with a line that says so
bool ggml_cuda_kvarn_supported(int device, const ggml_tensor * op) { GGML_UNUSED(device); GGML_UNUSED(op); return false; }
bool ggml_cuda_op_kvarn(ggml_backend_cuda_context & ctx, ggml_tensor * dst) { GGML_UNUSED(ctx); GGML_UNUSED(dst); return false; }

#else

#include "kvarn-cuda.h"
#include "kvarn-graph.h"

bool ggml_cuda_kvarn_supported(int device, const ggml_tensor * op) {
    if (ggml_cuda_info().devices[device].cc < GGML_CUDA_CC_TURING) {
        return false; // no 8 x 8 transpose between lanes
    }
    switch (ggml_kvarn_get_op(op)) {
        case KVARN_OP_SEAL:
        case KVARN_OP_GET: {
            const kvarn_shape shape = ggml_kvarn_get_shape(op);
            return kvarn_is_valid(shape.D, shape.bits) || shape.bits == KVARN_BITS_EXACT;
        }
        case KVARN_OP_ATTN:
            return ggml_kvarn_get_attn_shape(op).chunk != 0 || ggml_cuda_kvarn_prompt_supported(device, op);
        case KVARN_OP_REDUCE:
            return true;
    }
    return false;
}

// an ATTN node as the kernels see it; of a REDUCE's source only shapes are looked at
static kvarn_attn_args kvarn_attn_args_of(const ggml_tensor * attn) {
    const kvarn_attn_shape shape = ggml_kvarn_get_attn_shape(attn);
    const ggml_tensor * q    = attn->src[KVARN_SRC_Q];
    const ggml_tensor * mask = attn->src[KVARN_SRC_MASK];

    kvarn_attn_args a = {};
    for (int side = 0; side < 2; ++side) {
        const ggml_tensor * tiles = attn->src[side == KVARN_KEY ? KVARN_SRC_K_TILES : KVARN_SRC_V_TILES];
        const ggml_tensor * rows  = attn->src[side == KVARN_KEY ? KVARN_SRC_K_ROWS  : KVARN_SRC_V_ROWS];
        kvarn_cuda_side & s = a.side[side];
        s.bits       = tiles ? shape.bits[side] : 0;
        s.D          = shape.D[side];
        s.tiles      = tiles ? (const uint8_t *) tiles->data : nullptr;
        s.rows       = (const half *) rows->data;
        s.row_stride = rows->nb[1]/sizeof(half);
        s.head_stride   = tiles ? s.D : rows->nb[2]/sizeof(half); // an f16 cache is permuted: [D, n_kv, H, ns]
        s.stream_stride = tiles ? 0   : rows->nb[3]/sizeof(half);
    }
    a.q           = (const float *) q->data;
    a.q_row       = q->nb[1]/sizeof(float);
    a.q_head      = q->nb[2]/sizeof(float);
    a.q_stream    = q->nb[3]/sizeof(float);
    a.map         = (const int64_t *) attn->src[KVARN_SRC_PLAN]->data + shape.map_off + (int64_t) shape.s0*shape.n_tiles;
    a.mask        = (const half *) mask->data;
    a.mask_row    = mask->nb[1]/sizeof(half);
    a.mask_stream = mask->ne[3] > 1 ? mask->nb[3]/sizeof(half) : 0;
    a.part        = (float *) attn->data;
    a.s0          = shape.s0;
    a.n_stream    = q->ne[3];
    a.H           = shape.H;
    a.n_gqa       = q->ne[2]/shape.H;
    a.n_rows      = q->ne[1];
    a.n_used      = mask->ne[0]/KVARN_G;
    a.n_tiles     = shape.n_tiles;
    a.cap         = attn->ne[1];
    a.scale       = shape.scale;
    a.max_bias    = shape.max_bias;
    a.softcap     = shape.softcap;
    CUDA_CHECK(kvarn_attn_plan(&a));
    return a;
}

bool ggml_cuda_kvarn_attn(ggml_backend_cuda_context & ctx, ggml_tensor * attn, bool is_behind, const ggml_tensor * sinks,
        ggml_tensor * out) {
    kvarn_attn_args a = kvarn_attn_args_of(attn);
    a.is_behind = is_behind;
    const bool is_whole = out && kvarn_attn_make_whole(&a, (float *) out->data, sinks ? (const float *) sinks->data : nullptr,
            out->op == GGML_OP_KVARN ? 0 : (int) out->ne[0]);
    CUDA_CHECK(kvarn_attn(a, ctx.stream()));
    return is_whole;
}

void ggml_cuda_kvarn_reduce(ggml_backend_cuda_context & ctx, ggml_tensor * reduce, ggml_tensor * out) {
    const kvarn_attn_args a = kvarn_attn_args_of(reduce->src[0]);
    const float * sinks = reduce->src[1] ? (const float *) reduce->src[1]->data : nullptr;
    CUDA_CHECK(kvarn_reduce(a.part, sinks, (float *) out->data, a.side[1].D, a.n_stream*a.n_rows*a.H*a.n_gqa, a.H*a.n_gqa, a.cap,
                            a.n_split + a.n_open, ctx.stream(), out == reduce ? 0 : (int) out->ne[0]));
}

bool ggml_cuda_op_kvarn(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    cudaStream_t stream = ctx.stream();

    switch (ggml_kvarn_get_op(dst)) {
        case KVARN_OP_SEAL: {
            const kvarn_shape s = ggml_kvarn_get_shape(dst);
            const kvarn_seal_side side = { s.side, s.bits, s.D, s.H, (const half *) dst->src[0]->data, (uint8_t *) dst->data };
            CUDA_CHECK(kvarn_seal(&side, 1, (const int64_t *) dst->src[1]->data + s.n_rows, s.n_seal, stream));
        } break;
        case KVARN_OP_GET: {
            const kvarn_shape s = ggml_kvarn_get_shape(dst);
            CUDA_CHECK(kvarn_get(s.side, s.bits, s.D, s.H, (const uint8_t *) dst->src[2]->data, (const half *) dst->src[0]->data,
                    (const int64_t *) dst->src[1]->data + s.n_rows + 2*s.n_seal, (half *) dst->data, dst->ne[2]/KVARN_G, s.n_tiles,
                    ggml_kvarn_get_s0(dst), dst->ne[3], stream));
        } break;
        case KVARN_OP_ATTN:
            if (ggml_kvarn_get_attn_shape(dst).chunk == 0) {
                ggml_cuda_kvarn_prompt(ctx, dst);
            } else {
                ggml_cuda_kvarn_attn(ctx, dst, false, nullptr, nullptr);
            }
            break;
        case KVARN_OP_REDUCE:
            ggml_cuda_kvarn_reduce(ctx, dst, dst);
            break;
    }
    return true;
}

#endif
