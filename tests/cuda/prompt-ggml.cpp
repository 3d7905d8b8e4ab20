// prompt-ggml.cpp - a prompt's attention by kvarn-prompt-ggml.cu, run on the CPU: windows of heads give the bits of GET of all
// heads and one flash attention, also behind a PREP, which takes more rows than ATTN does; and all its layers are sealed in the
// end. Flash attention is stubs/fattn.cuh, the device that of backend-ggml.cpp.
//
// SPDX-License-Identifier: MIT

#include "kvarn-cuda-ggml.cuh"
#include "fattn.cuh"
#include "kvarn-format.h"
#include "kvarn-graph.h"

#include "ggml-alloc.h"
#include "ggml-backend-impl.h"
#include "ggml-cpp.h"

#include <random>

extern "C" ggml_backend_reg_t ggml_backend_init(void);

enum { D = 64, H = 5, GQA = 2, ROWS = 17, N_TILES = 10, N_STREAM = 2, N_SLOTS = N_TILES*N_STREAM };

// the memory of a device that is not the host
static ggml_backend_buffer_type_t device_memory() {
    static ggml_backend_buffer_type type = *ggml_backend_cpu_buffer_type();
    type.iface.is_host = nullptr;
    type.device        = ggml_backend_reg_dev_get(ggml_backend_init(), 0);
    return &type;
}

static ggml_context_ptr context() {
    return ggml_context_ptr(ggml_init({ 64*ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true }));
}

static void randomize(ggml_tensor * t, std::mt19937 & rng) {
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < ggml_nelements(t); ++i) {
        if (t->type == GGML_TYPE_F32) {
            ((float *) t->data)[i] = normal(rng);
        } else {
            ((ggml_fp16_t *) t->data)[i] = ggml_fp32_to_fp16(normal(rng));
        }
    }
}

// bits 0: that side is an f16 cache. Returns how many windows' results differ from those of GET and flash attention
static int check(int bits_k, int bits_v, bool has_sinks) {
    const int64_t n_kv = N_TILES*KVARN_G;
    const int bits[2] = { bits_k, bits_v };
    std::mt19937 rng(bits_k*8 + bits_v);
    const ggml_context_ptr data = context();
    ggml_context * ctx = data.get();

    ggml_tensor * plan  = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, 1 + 2*N_SLOTS + N_TILES*N_STREAM);
    ggml_tensor * mask  = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, n_kv, ROWS, 1, N_STREAM);
    ggml_tensor * q     = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, D, H*GQA, ROWS, N_STREAM);
    ggml_tensor * sinks = has_sinks ? ggml_new_tensor_1d(ctx, GGML_TYPE_F32, H*GQA) : nullptr;
    ggml_tensor * tiles[2] = {}, * rows[2];
    for (int side : { KVARN_KEY, KVARN_VALUE }) {
        if (bits[side]) {
            tiles[side] = ggml_new_tensor_3d(ctx, GGML_TYPE_I8, (int64_t) kvarn_tile_size(D, bits[side])*H, N_TILES, N_STREAM);
            rows [side] = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, D*H, KVARN_G*N_SLOTS);
        } else {
            rows [side] = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, D, H, n_kv, N_STREAM);
        }
    }
    const ggml_backend_buffer_ptr memory(ggml_backend_alloc_ctx_tensors_from_buft(ctx, device_memory()));
    randomize(q, rng);
    randomize(rows[0], rng);
    randomize(rows[1], rng);
    if (sinks) {
        randomize(sinks, rng);
    }
    std::vector<int64_t> p(1, 0);
    for (int i = 0; i < N_SLOTS; ++i) { // slot i is tile i, sealed or read as it is
        p.push_back(i % 5 == 2 ? -1 : i);
        p.push_back(i % 5 == 2 ? -1 : i);
    }
    for (int i = 0; i < N_SLOTS; ++i) {
        p.push_back(i % 5 == 2 ? i : i % 7 == 6 ? KVARN_MAP_EMPTY : KVARN_MAP_SEALED);
    }
    memcpy(plan->data, p.data(), p.size()*sizeof(int64_t));
    for (int64_t i = 0; i < ggml_nelements(mask); ++i) {
        const int64_t tile = i/(n_kv*ROWS)*N_TILES + i % n_kv/KVARN_G;
        ((ggml_fp16_t *) mask->data)[i] = ggml_fp32_to_fp16(tile % 7 == 6 || i % 3 == 1 ? -INFINITY : 0.0f);
    }

    const ggml_context_ptr graph = context();
    ctx = graph.get();
    ggml_backend_cuda_context cuda;
    std::vector<std::vector<uint8_t>> buffers;
    const auto compute = [&](ggml_tensor * t) {
        buffers.emplace_back(ggml_nbytes(t), 0xff);
        t->data = t->view_src ? t->view_src->data : buffers.back().data();
        GGML_ASSERT(ggml_cuda_op_kvarn(cuda, t));
    };
    ggml_tensor * kv[2];
    for (int side : { KVARN_KEY, KVARN_VALUE }) {
        if (bits[side]) {
            const kvarn_shape shape = { side, bits[side], D, H, 1, N_SLOTS, N_TILES };
            compute(ggml_kvarn_seal(ctx, tiles[side], rows[side], plan, shape));
            ggml_tensor * get = ggml_kvarn_get(ctx, tiles[side], rows[side], plan, shape, n_kv, 0, N_STREAM);
            compute(get);
            kv[side] = ggml_permute(ctx, get, 0, 2, 1, 3);
        } else {
            kv[side] = ggml_permute(ctx, rows[side], 0, 2, 1, 3);
        }
    }
    q = ggml_permute(ctx, q, 0, 2, 1, 3);
    ggml_tensor * want = ggml_flash_attn_ext(ctx, q, kv[0], kv[1], mask, 0.2f, 0.0f, 3.0f);
    ggml_flash_attn_ext_add_sinks(want, sinks);
    buffers.emplace_back(ggml_nbytes(want), 0xff);
    want->data = buffers.back().data();
    ggml_cuda_flash_attn_ext(cuda, want);

    int n_bad = 0;
    for (const char * window : { "1", "2", "160" }) { // MiB: a head at a time, three and two, all
        setenv("KVARN_WINDOW", window, 1);
        ggml_tensor * node = ggml_kvarn_attn(ctx, q, kv[0], kv[1], mask, sinks, 0.2f, 0.0f, 3.0f);
        GGML_ASSERT(node && ggml_kvarn_get_op(node) == KVARN_OP_ATTN); // one node for all
        compute(node);
        if (memcmp(node->data, want->data, ggml_nbytes(want)) != 0) {
            printf("FAILED bits %d/%d sinks %d: a window of %s MiB gives other values\n", bits_k, bits_v, has_sinks, window);
            ++n_bad;
        }
    }
    return n_bad;
}

// rotated by a Hadamard matrix, as the cache does it
static ggml_tensor * rotate(ggml_context * ctx, ggml_tensor * cur, ggml_tensor * rot) {
    ggml_tensor * res = ggml_mul_mat(ctx, rot, ggml_reshape_2d(ctx, cur, D, ggml_nelements(cur)/D));
    ggml_mul_mat_set_hint(res, GGML_HINT_SRC0_IS_HADAMARD);
    return ggml_reshape_4d(ctx, res, cur->ne[0], cur->ne[1], cur->ne[2], cur->ne[3]);
}

// A layer of 17 tokens: one tile that they seal, two that stay open, one that is empty. Returns whether the values are wrong.
static int check_layer(int bits_k, int bits_v) {
    const int64_t n_kv = 4*KVARN_G;
    const int bits[2] = { bits_k, bits_v };
    std::mt19937 rng(bits_k*8 + bits_v);
    std::vector<int64_t> p;
    for (int i = 0; i < ROWS; ++i) {
        p.push_back(i % 3*KVARN_G + i);
    }
    p.insert(p.end(), { 0, 0, KVARN_MAP_SEALED, 1, KVARN_MAP_EMPTY, 2 });

    const ggml_context_ptr data = context();
    ggml_context * ctx = data.get();
    ggml_tensor * plan = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, p.size());
    ggml_tensor * mask = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, n_kv, ROWS, 1, 1);
    ggml_tensor * rot  = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, D, D); // PREP knows it without reading
    ggml_tensor * in[3], * tiles[2], * tail[2]; // keys, values, queries
    for (int n = 0; n < 3; ++n) {
        in[n] = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, D, n == 2 ? H*GQA : H, ROWS);
    }
    for (int side : { KVARN_KEY, KVARN_VALUE }) {
        tiles[side] = ggml_new_tensor_3d(ctx, GGML_TYPE_I8, (int64_t) kvarn_tile_size(D, bits[side])*H, 4, 1);
        tail [side] = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, D*H, 3*KVARN_G);
    }
    const ggml_backend_buffer_ptr memory(ggml_backend_alloc_ctx_tensors_from_buft(ctx, device_memory()));
    for (ggml_tensor * t : { in[0], in[1], in[2], tail[0], tail[1] }) {
        randomize(t, rng);
    }
    memcpy(plan->data, p.data(), p.size()*sizeof(int64_t));
    for (int64_t i = 0; i < ggml_nelements(mask); ++i) {
        ((ggml_fp16_t *) mask->data)[i] = ggml_fp32_to_fp16(i % n_kv/KVARN_G == 2 || i % 3 == 1 ? -INFINITY : 0.0f);
    }

    const ggml_context_ptr nodes = context();
    ctx = nodes.get();
    ggml_tensor * cur[3], * get[2];
    for (int n = 0; n < 3; ++n) {
        cur[n] = rotate(ctx, in[n], rot);
    }
    ggml_tensor * index = ggml_view_1d(ctx, plan, ROWS, 0);
    for (int side : { KVARN_KEY, KVARN_VALUE }) {
        const kvarn_shape shape = { side, bits[side], D, H, ROWS, 1, 4 };
        ggml_tensor * rows = ggml_set_rows(ctx, tail[side], ggml_reshape_2d(ctx, cur[side], D*H, ROWS), index);
        get[side] = ggml_kvarn_get(ctx, ggml_kvarn_seal(ctx, tiles[side], rows, plan, shape), rows, plan, shape, n_kv, 0, 1);
    }
    ggml_tensor * q = ggml_permute(ctx, cur[2], 0, 2, 1, 3), * k = ggml_permute(ctx, get[0], 0, 2, 1, 3);
    ggml_tensor * v = ggml_permute(ctx, get[1], 0, 2, 1, 3);
    ggml_tensor * node = ggml_kvarn_attn(ctx, q, k, v, mask, nullptr, 0.2f, 0.0f, 0.0f);
    ggml_tensor * want = ggml_flash_attn_ext(ctx, q, k, v, mask, 0.2f, 0.0f, 0.0f);
    ggml_cgraph * graph = ggml_new_graph(ctx);
    ggml_build_forward_expand(graph, node);
    const ggml_backend_buffer_ptr results(ggml_backend_alloc_ctx_tensors_from_buft(ctx, device_memory()));
    ggml_backend_buffer_clear(results.get(), 0xff);

    const ggml_backend_ptr backend(ggml_backend_dev_init(ggml_backend_reg_dev_get(ggml_backend_init(), 0), nullptr));
    bool is_good = ggml_backend_graph_compute(backend.get(), graph) == GGML_STATUS_SUCCESS;
    ggml_backend_cuda_context cuda; // what PREP has left, unpacked and attended
    GGML_ASSERT(ggml_cuda_op_kvarn(cuda, get[0]) && ggml_cuda_op_kvarn(cuda, get[1]));
    ggml_cuda_flash_attn_ext(cuda, want);
    is_good = is_good && memcmp(node->data, want->data, ggml_nbytes(want)) == 0;
    if (!is_good) {
        printf("FAILED bits %d/%d: a prompt behind PREP gives other values\n", bits_k, bits_v);
    }
    return !is_good;
}

// Three layers of more tokens than PREP takes, the tile they fill sealed where the graph ends. Returns whether a byte is wrong.
static int check_late_seals() {
    enum { N_TOKENS = KVARN_G + 2, N_LAYERS = 3 };
    std::mt19937 rng(7);
    const ggml_context_ptr data = context();
    ggml_context * ctx = data.get();
    std::vector<int64_t> p;
    for (int i = 0; i < N_TOKENS; ++i) {
        p.push_back(i < KVARN_G ? KVARN_G + i : i - KVARN_G); // slot 1 is filled, slot 0 is not
    }
    p.insert(p.end(), { 1, 2, -1, -1, KVARN_MAP_EMPTY, KVARN_MAP_EMPTY, 1, 0 });
    ggml_tensor * plan = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, p.size());
    ggml_tensor * cur[N_LAYERS][2], * tiles[N_LAYERS][2], * tail[N_LAYERS][2];
    for (int l = 0; l < N_LAYERS; ++l) {
        for (int side : { KVARN_KEY, KVARN_VALUE }) {
            cur  [l][side] = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, D*H, N_TOKENS);
            tiles[l][side] = ggml_new_tensor_3d(ctx, GGML_TYPE_I8, (int64_t) kvarn_tile_size(D, 4 - side)*H, 4, 1);
            tail [l][side] = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, D*H, 2*KVARN_G);
        }
    }
    const ggml_backend_buffer_ptr memory(ggml_backend_alloc_ctx_tensors_from_buft(ctx, device_memory()));
    ggml_backend_buffer_clear(memory.get(), 0x11);
    memcpy(plan->data, p.data(), p.size()*sizeof(int64_t));

    const ggml_context_ptr nodes = context();
    ctx = nodes.get();
    ggml_cgraph * graph = ggml_new_graph(ctx);
    ggml_tensor * index = ggml_view_1d(ctx, plan, N_TOKENS, 0);
    const kvarn_shape shape[2] = { { KVARN_KEY, 4, D, H, N_TOKENS, 2, 4, true }, { KVARN_VALUE, 3, D, H, N_TOKENS, 2, 4, true } };
    for (int l = 0; l < N_LAYERS; ++l) {
        for (int side : { KVARN_KEY, KVARN_VALUE }) {
            randomize(cur[l][side], rng);
            ggml_tensor * rows = ggml_set_rows(ctx, tail[l][side], cur[l][side], index);
            ggml_build_forward_expand(graph, ggml_kvarn_seal(ctx, tiles[l][side], rows, plan, shape[side]));
        }
    }
    const ggml_backend_buffer_ptr views(ggml_backend_alloc_ctx_tensors_from_buft(ctx, device_memory()));
    const ggml_backend_ptr backend(ggml_backend_dev_init(ggml_backend_reg_dev_get(ggml_backend_init(), 0), nullptr));
    bool is_good = ggml_backend_graph_compute(backend.get(), graph) == GGML_STATUS_SUCCESS;

    std::vector<ggml_fp16_t> rows(N_TOKENS*D*H);
    std::vector<float> scratch(KVARN_G*D + kvarn_seal_scratch(D));
    for (int l = 0; l < N_LAYERS; ++l) {
        for (int side : { KVARN_KEY, KVARN_VALUE }) {
            std::vector<uint8_t> want(ggml_nbytes(tiles[l][side]), 0x11);
            ggml_fp32_to_fp16_row((const float *) cur[l][side]->data, rows.data(), rows.size());
            for (int h = 0; h < H; ++h) {
                kvarn_seal_rows(&shape[side], rows.data() + h*D, want.data() + 2*tiles[l][side]->nb[1] +
                        h*kvarn_tile_size(D, 4 - side), scratch.data(), ggml_fp16_to_fp32_row, kvarn_seal_ref);
            }
            is_good = is_good && memcmp(want.data(), tiles[l][side]->data, want.size()) == 0;
        }
    }
    if (!is_good) {
        printf("FAILED: %d layers sealed in the end have other bytes\n", N_LAYERS);
    }
    return !is_good;
}

// A rotation that two devices have: a layer takes the one beside its weights, seen through what is computed from these.
static int check_near() {
    const ggml_context_ptr contexts[3] = { context(), context(), context() };
    ggml_tensor * rot[3] = {}, * weights[2];
    ggml_backend_buffer_ptr memory[2];
    for (int i = 0; i < 2; ++i) {
        rot    [i] = ggml_new_tensor_2d(contexts[i].get(), GGML_TYPE_F32, D, D);
        weights[i] = ggml_new_tensor_2d(contexts[i].get(), GGML_TYPE_F32, D, D);
        memory [i].reset(ggml_backend_alloc_ctx_tensors_from_buft(contexts[i].get(), i ? device_memory() :
                ggml_backend_cpu_buffer_type()));
    }
    ggml_context * ctx = contexts[2].get();
    ggml_tensor * x = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, D, 3);
    bool is_good = ggml_kvarn_near(rot[0], ggml_mul_mat(ctx, weights[1], x)) == rot[0]; // has no copies
    rot[0]->extra = rot;
    for (int i = 0; i < 2; ++i) {
        is_good = is_good && ggml_kvarn_near(rot[0], ggml_reshape_1d(ctx, ggml_mul_mat(ctx, weights[i], x), 3*D)) == rot[i];
    }
    is_good = is_good && ggml_kvarn_near(rot[0], x) == rot[0];
    if (!is_good) {
        printf("FAILED: a layer takes its rotation from another device\n");
    }
    return !is_good;
}

int main() {
    const int n_bad = check(4, 2, false) + check(3, 3, true) + check(2, 0, true) + check(0, 4, false) +
        check_layer(4, 2) + check_layer(3, 3) + check_late_seals() + check_near();
    printf("check: 16 prompts, %d failed\n", n_bad);
    return n_bad != 0;
}
