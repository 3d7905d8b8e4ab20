// kvarn-prompt-ggml.cu - attention of a prompt on CUDA: keys and values of some heads become f16 rows, then flash attention.
// Never more rows at once than fit in the window (kvarn_window_size), unless one head has more. Fewer heads in a window keep
// flash attention less busy, so it holds all of a layer up to some 40000 tokens of 8 heads.
//
// SPDX-License-Identifier: MIT

#include "kvarn-cuda-ggml.cuh"

#if !defined(GGML_USE_HIP) && !defined(GGML_USE_MUSA)

#include "fattn.cuh"
#include "kvarn-cuda.h"
#include "kvarn-graph.h"

#include "ggml-cpp.h"

#include <algorithm>

static const ggml_tensor * kvarn_tiles_of(const ggml_tensor * node, int side) {
    return node->src[side == KVARN_KEY ? KVARN_SRC_K_TILES : KVARN_SRC_V_TILES];
}

// flash attention of KV heads h0 .. h0 + n; rows: their f16 rows where keys or values are in tiles
static ggml_tensor * kvarn_flash(ggml_context * ctx, const ggml_tensor * node, int h0, int n, half * const rows[2]) {
    const kvarn_attn_shape shape = ggml_kvarn_get_attn_shape(node);
    ggml_tensor * q = node->src[KVARN_SRC_Q], * mask = node->src[KVARN_SRC_MASK], * sinks = node->src[KVARN_SRC_SINKS];
    const int64_t n_gqa = q->ne[2]/shape.H;

    ggml_tensor * kv[2];
    for (int side = 0; side < 2; ++side) {
        if (kvarn_tiles_of(node, side)) {
            ggml_tensor * t = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, shape.D[side], n, mask->ne[0], q->ne[3]);
            t->data  = rows[side];
            kv[side] = ggml_permute(ctx, t, 0, 2, 1, 3);
        } else {
            ggml_tensor * t = node->src[side == KVARN_KEY ? KVARN_SRC_K_ROWS : KVARN_SRC_V_ROWS];
            kv[side] = ggml_view_4d(ctx, t, t->ne[0], t->ne[1], n, t->ne[3], t->nb[1], t->nb[2], t->nb[3], h0*t->nb[2]);
        }
    }
    q = ggml_view_4d(ctx, q, q->ne[0], q->ne[1], n*n_gqa, q->ne[3], q->nb[1], q->nb[2], q->nb[3], h0*n_gqa*q->nb[2]);

    ggml_tensor * res = ggml_flash_attn_ext(ctx, q, kv[0], kv[1], mask, shape.scale, shape.max_bias, shape.softcap);
    ggml_flash_attn_ext_add_sinks(res, sinks ? ggml_view_1d(ctx, sinks, n*n_gqa, h0*n_gqa*sizeof(float)) : nullptr);
    ggml_prec_set_acc(res, GGML_PREC_F32);
    return res;
}

static ggml_context_ptr kvarn_scratch_context() {
    return ggml_context_ptr(ggml_init({ 16*ggml_tensor_overhead(), nullptr, true }));
}

bool ggml_cuda_kvarn_prompt_supported(int device, const ggml_tensor * node) {
    half * const none[2] = { nullptr, nullptr };
    const ggml_context_ptr ctx = kvarn_scratch_context();
    return ggml_cuda_flash_attn_ext_supported(device, kvarn_flash(ctx.get(), node, 0, ggml_kvarn_get_attn_shape(node).H, none));
}

void ggml_cuda_kvarn_prompt(ggml_backend_cuda_context & ctx, ggml_tensor * node) {
    const kvarn_attn_shape shape = ggml_kvarn_get_attn_shape(node);
    const ggml_tensor * q = node->src[KVARN_SRC_Q];
    const int64_t n_kv  = node->src[KVARN_SRC_MASK]->ne[0];
    const int64_t n_gqa = q->ne[2]/shape.H, n_rows = q->ne[1]*q->ne[3];

    // heads of a window, all windows about alike; ALiBi's slopes hang on all heads being there
    int64_t size = 0;
    for (int side = 0; side < 2; ++side) {
        size += kvarn_tiles_of(node, side) ? (int64_t) sizeof(half)*shape.D[side]*n_kv*q->ne[3] : 0;
    }
    const int64_t most     = std::max<int64_t>((int64_t) kvarn_window_size()/size, 1);
    const int64_t n_window = shape.max_bias > 0.0f ? 1 : (shape.H + most - 1)/most;
    const int     n_heads  = (shape.H + n_window - 1)/n_window;

    ggml_cuda_pool_alloc<half> rows_k(ctx.pool()), rows_v(ctx.pool());
    half * const rows[2] = {
        kvarn_tiles_of(node, KVARN_KEY)   ? rows_k.alloc(n_heads*shape.D[KVARN_KEY]  *n_kv*q->ne[3]) : nullptr,
        kvarn_tiles_of(node, KVARN_VALUE) ? rows_v.alloc(n_heads*shape.D[KVARN_VALUE]*n_kv*q->ne[3]) : nullptr,
    };
    const bool is_whole = n_heads == shape.H; // then flash attention writes the result itself
    ggml_cuda_pool_alloc<float> out(ctx.pool());
    float * const dst = is_whole ? (float *) node->data : out.alloc(n_heads*n_gqa*shape.D[KVARN_VALUE]*n_rows);

    for (int h0 = 0; h0 < shape.H; h0 += n_heads) {
        const int n = std::min(n_heads, shape.H - h0);
        for (int side = 0; side < 2; ++side) {
            if (const ggml_tensor * tiles = kvarn_tiles_of(node, side)) {
                const ggml_tensor * tail = node->src[side == KVARN_KEY ? KVARN_SRC_K_ROWS : KVARN_SRC_V_ROWS];
                CUDA_CHECK(kvarn_get(side, shape.bits[side], shape.D[side], shape.H, (const uint8_t *) tiles->data,
                        (const half *) tail->data, (const int64_t *) node->src[KVARN_SRC_PLAN]->data + shape.map_off, rows[side],
                        n_kv/KVARN_G, shape.n_tiles, shape.s0, q->ne[3], ctx.stream(), h0, n));
            }
        }
        const ggml_context_ptr scratch = kvarn_scratch_context();
        ggml_tensor * flash = kvarn_flash(scratch.get(), node, h0, n, rows);
        flash->data = dst;
        ggml_cuda_flash_attn_ext(ctx, flash);
        if (is_whole) {
            break;
        }

        const size_t width = n*n_gqa*shape.D[KVARN_VALUE]*sizeof(float);
        CUDA_CHECK(cudaMemcpy2DAsync((float *) node->data + h0*n_gqa*shape.D[KVARN_VALUE], node->nb[2], dst, width, width,
                n_rows, cudaMemcpyDeviceToDevice, ctx.stream()));
    }
}

#endif
