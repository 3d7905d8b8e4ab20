// kvarn-backend-ops.h - cases of GGML_OP_KVARN for upstream's test-backend-ops: every backend against the CPU.
// Included by test-backend-ops.cpp (patch 0005); uses its test_case and init_tensor_uniform.
//
// SPDX-License-Identifier: MIT

#include "kvarn-graph.h"

#include <bitset>

// SEAL two of four slots into tiles, then GET a window that holds sealed, open and empty tiles of two streams.
struct test_kvarn : public test_case {
    const int side, bits, D, H;

    static constexpr int n_slots = 4, n_tiles = 4, n_stream = 2, n_rows = 3, n_seal = 3;

    std::string op_desc(ggml_tensor * t) override { GGML_UNUSED(t); return "KVARN"; }
    std::string vars()                   override { return VARS_TO_STR4(side, bits, D, H); }
    bool        run_whole_graph()        override { return true; }

    // a value on the border of two codes may round to either: 1 of 1000 codes off by one step of 1/2^bits of the range
    double max_nmse_err() override { return 1e-3*4.0/(1 << 2*bits); }

    test_kvarn(int side, int bits, int D, int H) : side(side), bits(bits), D(D), H(H) {}

    ggml_tensor * build_graph(ggml_context * ctx) override {
        const kvarn_shape shape = { side, bits, D, H, n_rows, n_seal, n_tiles };

        ggml_tensor * tiles = ggml_new_tensor_3d(ctx, GGML_TYPE_I8,  (int64_t) kvarn_tile_size(D, bits)*H, n_tiles, n_stream);
        ggml_tensor * tail  = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, (int64_t) D*H, KVARN_G*n_slots);
        ggml_tensor * plan  = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, n_rows + 2*n_seal + n_tiles*n_stream);

        ggml_tensor * seal = ggml_kvarn_seal(ctx, tiles, tail, plan, shape);
        return ggml_kvarn_get(ctx, seal, tail, plan, shape, 3*KVARN_G, 0, n_stream);
    }

    void initialize_tensors(ggml_context * ctx) override {
        const int64_t plan[n_rows + 2*n_seal + n_tiles*n_stream] = {
            0, 0, 0,                                                     // rows: not for this op
            2, 1,  -1, -1,  0, n_tiles + 2,                              // slot 2 -> tile 1 of stream 0, slot 0 -> tile 2 of stream 1
            3, KVARN_MAP_SEALED, KVARN_MAP_EMPTY, KVARN_MAP_EMPTY,       // stream 0
            KVARN_MAP_EMPTY, 1, KVARN_MAP_SEALED, KVARN_MAP_EMPTY,       // stream 1
        };
        for (ggml_tensor * t = ggml_get_first_tensor(ctx); t != nullptr; t = ggml_get_next_tensor(ctx, t)) {
            switch (t->type) {
                case GGML_TYPE_I64: ggml_backend_tensor_set(t, plan, 0, sizeof(plan)); break;
                case GGML_TYPE_I8:  ggml_backend_tensor_memset(t, 0, 0, ggml_nbytes(t)); break;
                default:            init_tensor_uniform(t); break;
            }
        }
    }
};

// Attention straight from tiles: sealed by the same graph, open and empty ones. One side may be an f16 cache (bits 0).
struct test_kvarn_attn : public test_case {
    const int bits_k, bits_v, D_k, D_v, gqa, rows, n_used;
    const bool sinks;
    const float max_bias, softcap;

    static constexpr int H = 2, n_slots = 4, n_stream = 2;

    std::string op_desc(ggml_tensor * t) override { GGML_UNUSED(t); return "KVARN"; }
    bool        run_whole_graph()        override { return true; }

    std::string vars() override {
        return VARS_TO_STR10(bits_k, bits_v, D_k, D_v, gqa, rows, n_used, sinks, max_bias, softcap);
    }

    // 8 bits for p*token: an rms error of 1.3 % where one token of a tile outweighs all others
    double max_nmse_err() override { return 1.7e-4; }

    test_kvarn_attn(int bits_k, int bits_v, int D_k = 128, int D_v = 128, int gqa = 4, int rows = 1, int n_used = 5,
                    bool sinks = false, float max_bias = 0.0f, float softcap = 0.0f)
        : bits_k(bits_k), bits_v(bits_v), D_k(D_k), D_v(D_v), gqa(gqa), rows(rows), n_used(n_used),
          sinks(sinks), max_bias(max_bias), softcap(softcap) {}

    int n_tiles() const { return n_used + 1; }

    ggml_tensor * build_side(ggml_context * ctx, ggml_tensor * plan, int side) {
        const int     bits = side == KVARN_KEY ? bits_k : bits_v;
        const int     D    = side == KVARN_KEY ? D_k    : D_v;
        const int64_t n_kv = (int64_t) n_used*KVARN_G;

        if (bits == 0) {
            ggml_tensor * cache = ggml_new_tensor_3d(ctx, GGML_TYPE_F16, (int64_t) D*H, (int64_t) n_tiles()*KVARN_G, n_stream);
            ggml_tensor * view  = ggml_view_4d(ctx, cache, D, H, n_kv, n_stream,
                                               ggml_row_size(cache->type, D), cache->nb[1], cache->nb[2], 0);
            return ggml_permute(ctx, view, 0, 2, 1, 3);
        }
        const kvarn_shape shape = { side, bits, D, H, 0, n_slots - 1, n_tiles() };

        ggml_tensor * tiles = ggml_new_tensor_3d(ctx, GGML_TYPE_I8,  (int64_t) kvarn_tile_size(D, bits)*H, n_tiles(), n_stream);
        ggml_tensor * tail  = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, (int64_t) D*H, KVARN_G*n_slots);
        ggml_tensor * seal  = ggml_kvarn_seal(ctx, tiles, tail, plan, shape);
        return ggml_permute(ctx, ggml_kvarn_get(ctx, seal, tail, plan, shape, n_kv, 0, n_stream), 0, 2, 1, 3);
    }

    ggml_tensor * build_graph(ggml_context * ctx) override {
        ggml_tensor * plan = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, 2*(n_slots - 1) + n_tiles()*n_stream);
        ggml_tensor * q    = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, D_k, H*gqa, rows, n_stream);
        ggml_tensor * k    = build_side(ctx, plan, KVARN_KEY);
        ggml_tensor * v    = build_side(ctx, plan, KVARN_VALUE);
        ggml_tensor * mask = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, n_used*KVARN_G, rows, 1, n_stream);
        ggml_tensor * s    = sinks ? ggml_new_tensor_1d(ctx, GGML_TYPE_F32, H*gqa) : nullptr;
        ggml_set_name(mask, "mask");

        return ggml_kvarn_attn(ctx, ggml_permute(ctx, q, 0, 2, 1, 3), k, v, mask, s, 4.0f/sqrtf(D_k), max_bias, softcap);
    }

    // slots 0 .. 2 are sealed into the first three tiles of stream 0; further tiles take turns: slot 3, empty, slot 1
    std::vector<int64_t> make_plan() const {
        std::vector<int64_t> plan;
        for (int slot = 0; slot < n_slots - 1; ++slot) {
            plan.push_back(slot < n_tiles() ? slot : -1);
            plan.push_back(slot);
        }
        const int64_t turns[3] = { n_slots - 1, KVARN_MAP_EMPTY, 1 };
        for (int i = 0; i < n_tiles()*n_stream; ++i) {
            plan.push_back(i < std::min(n_slots - 1, n_tiles()) ? KVARN_MAP_SEALED : turns[i % 3]);
        }
        return plan;
    }

    void initialize_tensors(ggml_context * ctx) override {
        const std::vector<int64_t> plan = make_plan();
        for (ggml_tensor * t = ggml_get_first_tensor(ctx); t != nullptr; t = ggml_get_next_tensor(ctx, t)) {
            switch (t->type) {
                case GGML_TYPE_I64: ggml_backend_tensor_set(t, plan.data(), 0, plan.size()*sizeof(int64_t)); break;
                case GGML_TYPE_I8:  ggml_backend_tensor_memset(t, 0, 0, ggml_nbytes(t)); break;
                default:
                    if (strcmp(t->name, "mask") == 0) {
                        init_mask(t, plan.data() + 2*(n_slots - 1));
                    } else {
                        init_tensor_uniform(t);
                    }
            }
        }
    }

    // Each row sees three tokens of four, of the tiles that are not empty, and every second row not the first tile.
    void init_mask(ggml_tensor * mask, const int64_t * map) const {
        std::vector<ggml_fp16_t> data;
        for (int s = 0; s < n_stream; ++s) {
            for (int r = 0; r < rows; ++r) {
                for (int c = 0; c < n_used*KVARN_G; ++c) {
                    const int64_t where   = map[s*n_tiles() + c/KVARN_G];
                    const bool    is_seen = where != KVARN_MAP_EMPTY && (c + r) % 4 != 0 && (r % 2 == 0 || c >= KVARN_G);
                    data.push_back(ggml_fp32_to_fp16(!is_seen ? -INFINITY : max_bias > 0.0f ? -1.0f*(c % 61) : 0.0f));
                }
            }
        }
        ggml_backend_tensor_set(mask, data.data(), 0, data.size()*sizeof(ggml_fp16_t));
    }
};

// A token's whole way as llama.cpp builds it: RoPE, rotations, SET_ROWS, SEAL of the tile it fills, ATTN, REDUCE, the rotation
// back.
struct test_kvarn_step : public test_kvarn_attn {
    const int  rope;    // 0: none, 1: pairs side by side, 2: apart, half the channels, divided by factors, YaRN's correction
    const bool is_late; // what is sealed is read from its slot

    test_kvarn_step(int bits_k, int bits_v, int D = 128, int gqa = 4, int rows = 1, int rope = 0, bool is_late = false)
        : test_kvarn_attn(bits_k, bits_v, D, D, gqa, rows), rope(rope), is_late(is_late) {}

    static constexpr int n_seal = n_slots - 1;

    std::string vars() override { return "step," + VARS_TO_STR7(bits_k, bits_v, D_k, gqa, rows, rope, is_late); }

    ggml_tensor * turn(ggml_context * ctx, ggml_tensor * cur, ggml_tensor * pos, ggml_tensor * factors) {
        switch (rope) {
            case 0:  return cur;
            case 1:  return ggml_rope_ext(ctx, cur, pos, nullptr, D_k, GGML_ROPE_TYPE_NORMAL, 0, 10000, 1, 0, 1, 0, 0);
            default: return ggml_rope_ext(ctx, cur, pos, factors, D_k/2, GGML_ROPE_TYPE_NEOX, 64, 10000, 0.25f, 1, 1, 32, 1);
        }
    }

    ggml_tensor * rotate(ggml_context * ctx, ggml_tensor * cur, ggml_tensor * rot) {
        ggml_tensor * res = ggml_mul_mat(ctx, rot, ggml_reshape_2d(ctx, cur, rot->ne[0], ggml_nelements(cur)/rot->ne[0]));
        ggml_mul_mat_set_hint(res, GGML_HINT_SRC0_IS_HADAMARD);
        return ggml_reshape_4d(ctx, res, cur->ne[0], cur->ne[1], cur->ne[2], cur->ne[3]);
    }

    ggml_tensor * build_graph(ggml_context * ctx) override {
        const int64_t n_tokens = rows*n_stream, n_kv = (int64_t) n_used*KVARN_G;

        const int64_t n_rot = D_k & -D_k; // the largest power of two that divides it

        ggml_tensor * plan = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, n_tokens + 2*n_seal + n_tiles()*n_stream);
        ggml_tensor * rot  = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_rot, n_rot);
        ggml_set_name(rot, "rot");

        ggml_tensor * pos     = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n_tokens);
        ggml_tensor * factors = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, D_k/4);
        ggml_set_name(factors, "factors");

        const int bits[2] = { bits_k, bits_v };
        ggml_tensor * q = rotate(ctx, turn(ctx, ggml_new_tensor_3d(ctx, GGML_TYPE_F32, D_k, H*gqa, n_tokens), pos, factors), rot);
        ggml_tensor * cur[2], * kv[2];
        for (int side : { KVARN_KEY, KVARN_VALUE }) {
            cur[side] = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, D_k, H, n_tokens);
            cur[side] = rotate(ctx, side == KVARN_KEY ? turn(ctx, cur[side], pos, factors) : cur[side], rot);
        }
        ggml_tensor * index = ggml_view_1d(ctx, plan, n_tokens, 0);
        for (int side : { KVARN_KEY, KVARN_VALUE }) {
            const kvarn_shape shape = { side, bits[side], D_k, H, (int32_t) n_tokens, n_seal, n_tiles(), is_late };

            const int64_t size = (int64_t) kvarn_tile_size(D_k, bits[side])*H;
            ggml_tensor * tiles = ggml_new_tensor_3d(ctx, GGML_TYPE_I8,  size, n_tiles(), n_stream);
            ggml_tensor * tail  = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, (int64_t) D_k*H, KVARN_G*n_slots);
            ggml_tensor * rows  = ggml_set_rows(ctx, tail, ggml_reshape_2d(ctx, cur[side], (int64_t) D_k*H, n_tokens), index);
            ggml_tensor * seal  = ggml_kvarn_seal(ctx, tiles, rows, plan, shape);
            kv[side] = ggml_permute(ctx, ggml_kvarn_get(ctx, seal, rows, plan, shape, n_kv, 0, n_stream), 0, 2, 1, 3);
        }
        ggml_tensor * mask = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, n_kv, rows, 1, n_stream);
        ggml_set_name(mask, "mask");

        q = ggml_permute(ctx, ggml_reshape_4d(ctx, q, D_k, H*gqa, rows, n_stream), 0, 2, 1, 3);
        ggml_tensor * out = ggml_kvarn_attn(ctx, q, kv[0], kv[1], mask, nullptr, 4.0f/sqrtf(D_k), 0.0f, 0.0f);
        return rotate(ctx, ggml_reshape_2d(ctx, out, (int64_t) D_k*H*gqa, n_tokens), rot);
    }

    void initialize_tensors(ggml_context * ctx) override {
        std::vector<int64_t> plan;
        for (int i = 0; i < rows*n_stream; ++i) {
            plan.push_back(i % 2 ? KVARN_G*n_slots - 1 - i : KVARN_G - 1 - i); // a slot that stays open, one that is sealed
        }
        std::vector<int64_t> rest = make_plan();
        for (int slot = 0; slot < n_seal && is_late; ++slot) {
            rest[2*n_seal + slot] = slot;
        }
        plan.insert(plan.end(), rest.begin(), rest.end());

        for (ggml_tensor * t = ggml_get_first_tensor(ctx); t != nullptr; t = ggml_get_next_tensor(ctx, t)) {
            if (t->view_src || t->op != GGML_OP_NONE) {
                continue;
            }
            if (t->type == GGML_TYPE_I64) {
                ggml_backend_tensor_set(t, plan.data(), 0, plan.size()*sizeof(int64_t));
            } else if (t->type == GGML_TYPE_I8) {
                ggml_backend_tensor_memset(t, 0, 0, ggml_nbytes(t));
            } else if (t->type == GGML_TYPE_I32) {
                std::vector<int32_t> pos;
                for (int64_t i = 0; i < t->ne[0]; ++i) {
                    pos.push_back(37*i + 100);
                }
                ggml_backend_tensor_set(t, pos.data(), 0, ggml_nbytes(t));
            } else if (strcmp(t->name, "factors") == 0) {
                init_tensor_uniform(t, 0.5f, 2.0f);
            } else if (strcmp(t->name, "mask") == 0) {
                init_mask(t, rest.data() + 2*n_seal);
            } else if (strcmp(t->name, "rot") == 0) {
                init_rotation(t);
            } else {
                init_tensor_uniform(t);
            }
        }
    }

    static void init_rotation(ggml_tensor * rot) {
        const int n = rot->ne[0];
        std::vector<float> data(n*n);
        for (int i = 0; i < n*n; ++i) {
            data[i] = (std::bitset<32>(i/n & i%n).count() % 2 ? -1.0f : 1.0f)/sqrtf(n);
        }
        ggml_backend_tensor_set(rot, data.data(), 0, data.size()*sizeof(float));
    }
};

static void kvarn_add_cases(std::vector<std::unique_ptr<test_case>> & cases) {
    for (int side : { KVARN_KEY, KVARN_VALUE }) {
        for (int bits : { 2, 3, 4, KVARN_BITS_EXACT }) {
            for (int D : { 64, 80, 96, 112, 128, 192, 256, 512 }) {
                cases.emplace_back(new test_kvarn(side, bits, D, D == 128 ? 8 : 2));
            }
        }
    }

    for (int bits_k : { 0, 2, 3, 4 }) {
        for (int bits_v : { 0, 2, 3, 4 }) {
            if (bits_k || bits_v) {
                cases.emplace_back(new test_kvarn_attn(bits_k, bits_v));
            }
        }
    }
    for (int bits : { 2, 3, 4 }) {
        for (int D : { 64, 80, 96, 112, 192, 256, 512 }) {
            cases.emplace_back(new test_kvarn_attn(bits, bits, D, D));
        }
        for (int gqa : { 1, 2, 3, 7, 8, 16 }) {
            cases.emplace_back(new test_kvarn_attn(bits, bits, 64, 64, gqa));
        }
        for (int rows : { 2, 5, 16 }) {
            cases.emplace_back(new test_kvarn_attn(bits, bits, 128, 128, 4, rows));
        }
        for (int n_used : { 1, 2, 33, 130 }) {
            cases.emplace_back(new test_kvarn_attn(bits, bits, 64, 64, 2, 1, n_used));
        }
        cases.emplace_back(new test_kvarn_attn(bits, bits, 192, 128, 2, 3));
        cases.emplace_back(new test_kvarn_attn(bits, bits, 128, 128, 3, 2, 5, true));
        cases.emplace_back(new test_kvarn_attn(bits, bits, 128, 128, 3, 2, 5, false, 8.0f));
        cases.emplace_back(new test_kvarn_attn(bits, bits, 128, 128, 3, 2, 5, false, 0.0f, 10.0f));
        cases.emplace_back(new test_kvarn_attn(bits, bits, 128, 128, 3, 2, 5, true, 8.0f, 10.0f));
    }
    for (int bits_k : { 2, 3, 4 }) {
        for (int bits_v : { 2, 4 }) {
            cases.emplace_back(new test_kvarn_step(bits_k, bits_v));
        }
    }
    for (int D : { 64, 80, 256 }) {
        cases.emplace_back(new test_kvarn_step(4, 2, D, 2));
    }
    for (int rows : { 2, 5, 16 }) {
        cases.emplace_back(new test_kvarn_step(4, 2, 128, 8, rows));
    }
    for (int rope : { 1, 2 }) {
        for (int D : { 64, 80, 128, 256 }) {
            cases.emplace_back(new test_kvarn_step(3, 4, D, 4, 1, rope, D >= 128));
        }
        cases.emplace_back(new test_kvarn_step(4, 2, 128, 4, 5, rope, true));
    }
}
