// kvarn-backend-ops.h - cases of GGML_OP_KVARN for upstream's test-backend-ops: every backend against the CPU.
// Included by test-backend-ops.cpp (patch 0005); uses its test_case and init_tensor_uniform.
//
// SPDX-License-Identifier: MIT

#include "kvarn-graph.h"

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

static void kvarn_add_cases(std::vector<std::unique_ptr<test_case>> & cases) {
    for (int side : { KVARN_KEY, KVARN_VALUE }) {
        for (int bits : { 2, 3, 4, KVARN_BITS_EXACT }) {
            for (int D : { 64, 80, 96, 112, 128, 192, 256, 512 }) {
                cases.emplace_back(new test_kvarn(side, bits, D, D == 128 ? 8 : 2));
            }
        }
    }
}
