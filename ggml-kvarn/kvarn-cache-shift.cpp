// kvarn-cache-shift.cpp - K-shift: after llama_memory_seq_add/div the keys are turned to the new positions of their tokens.
//
// RoPE turns pairs of channels, the cache holds keys in the Hadamard basis, and a tile can only be sealed as a whole:
//
//   rows of the tail   get_rows ----> H -> RoPE(shift) -> H ----> set_rows, and SEAL where the tile is sealed as well
//   sealed tiles       GET      ----> H -> RoPE(shift) -> H ----> SEAL
//
// Only tiles with a moved token are touched. Those that exist only as codes are rounded once more; docs/quality.md says what it costs.
//
// SPDX-License-Identifier: MIT

#include "kvarn-cache.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <new>

// tiles of one graph: what it takes is a few f32 copies of their keys of one layer
static const uint32_t KVARN_SHIFT_TILES = 8;

class llama_kvarn::shifter {
public:
    shifter(llama_kvarn & kvarn, llama_context * lctx) :
        kvarn(kvarn), lctx(lctx), abort_callback(lctx->abort_callback), abort_data(lctx->abort_callback_data) {
        lctx->set_abort_callback(nullptr, nullptr); // half a shift could neither be finished nor taken back
    }

    ~shifter() { lctx->set_abort_callback(abort_callback, abort_data); }

    // Takes the memory that the graphs need, and turns nothing: a shift that ends half way could not be repeated.
    bool rehearse() {
        is_rehearsal = true;
        return turn_sealed() && turn_tail();
    }

    // false if the device failed
    bool run() {
        is_rehearsal = false;
        return turn_sealed() && turn_tail();
    }

private:
    // what a graph is given
    struct inputs {
        std::vector<int32_t> shift; // by row
        std::vector<int32_t> rows;  // of the tail
        std::vector<int64_t> plan;
    };

    llama_pos shift_of(uint32_t tile, uint32_t row) const {
        const auto & cells = kvarn.kv.v_cells[tile/kvarn.n_tiles];
        const uint32_t cell = tile%kvarn.n_tiles*KVARN_G + row;
        return cells.is_empty(cell) ? 0 : cells.get_shift(cell);
    }

    bool is_shifted(uint32_t tile) const {
        for (uint32_t row = 0; row < KVARN_G; ++row) {
            if (shift_of(tile, row) != 0) {
                return true;
            }
        }
        return false;
    }

    // tiles that have no slot, in runs of KVARN_SHIFT_TILES of one stream
    bool turn_sealed() {
        const auto is_wanted = [&](uint32_t tile) { return kvarn.tiles[tile].state == SEALED && is_shifted(tile); };

        for (uint32_t strm = 0; strm < kvarn.kv.n_stream; ++strm) {
            const uint32_t end = (strm + 1)*kvarn.n_tiles;
            for (uint32_t tile = strm*kvarn.n_tiles; tile < end; ) {
                if (!is_wanted(tile)) {
                    ++tile;
                    continue;
                }
                const uint32_t n = std::min(KVARN_SHIFT_TILES, end - tile);

                inputs in;
                in.plan.assign(3*n, -1);
                std::fill(in.plan.begin() + 2*n, in.plan.end(), KVARN_MAP_EMPTY);
                for (uint32_t i = 0; i < n; ++i) {
                    if (is_wanted(tile + i)) {
                        in.plan[2*i]     = i;
                        in.plan[2*i + 1] = i;
                        in.plan[2*n + i] = KVARN_MAP_SEALED;
                    }
                    for (uint32_t row = 0; row < KVARN_G; ++row) {
                        in.shift.push_back(shift_of(tile + i, row));
                    }
                }
                if (!compute(in, [&](const graph & g, const side_layer & layer, uint32_t il) { return build_sealed(g, layer, il, tile, n); })) {
                    return false;
                }
                tile += n;
            }
        }
        return true;
    }

    // rows in slots, KVARN_SHIFT_TILES slots at a time
    bool turn_tail() {
        for (uint32_t first = 0; first < kvarn.n_slots; first += KVARN_SHIFT_TILES) {
            inputs in;
            for (uint32_t slot = first; slot < std::min(first + KVARN_SHIFT_TILES, kvarn.n_slots); ++slot) {
                const int32_t tile = kvarn.slot_tile[slot];
                if (tile < 0 || !is_shifted(tile)) {
                    continue;
                }
                for (uint32_t row = 0; row < KVARN_G; ++row) {
                    if (shift_of(tile, row) != 0) {
                        in.rows .push_back(slot*KVARN_G + row);
                        in.shift.push_back(shift_of(tile, row));
                    }
                }
                if (kvarn.tiles[tile].state == CACHED) {
                    in.plan.push_back(slot);
                    in.plan.push_back(tile);
                }
            }
            if (in.rows.empty()) {
                continue;
            }
            const uint32_t n_seal = in.plan.size()/2;
            in.plan.insert(in.plan.begin(), in.rows.begin(), in.rows.end());
            in.plan.insert(in.plan.end(), kvarn.tiles.size(), KVARN_MAP_EMPTY);
            if (!compute(in, [&](const graph & g, const side_layer & layer, uint32_t il) { return build_tail(g, layer, il, n_seal); })) {
                return false;
            }
        }
        return true;
    }

    // inputs of the graph being built
    struct graph {
        ggml_context * ctx;
        ggml_tensor  * plan;
        ggml_tensor  * shift;
        ggml_tensor  * rows; // nullptr without rows of the tail
        ggml_tensor  * rot;  // nullptr: no rotation
    };

    ggml_tensor * build_sealed(const graph & g, const side_layer & layer, uint32_t il, uint32_t tile, uint32_t n) const {
        kvarn_shape shape = layer.shape;
        shape.n_rows  = 0;
        shape.n_seal  = n;
        shape.n_tiles = n;

        ggml_tensor * all   = layer.tiles;
        ggml_tensor * tiles = ggml_view_3d(g.ctx, all, all->ne[0], n, 1, all->nb[1], n*all->nb[1], tile*all->nb[1]);
        ggml_tensor * cur   = ggml_kvarn_get(g.ctx, tiles, layer.tail, g.plan, shape, n*KVARN_G, 0, 1);

        cur = build_turn(g, ggml_cast(g.ctx, cur, GGML_TYPE_F32), il);
        cur = ggml_cast(g.ctx, cur, GGML_TYPE_F16);
        cur = ggml_reshape_2d(g.ctx, cur, layer.tail->ne[0], n*KVARN_G);

        return ggml_kvarn_seal(g.ctx, tiles, cur, g.plan, shape);
    }

    ggml_tensor * build_tail(const graph & g, const side_layer & layer, uint32_t il, uint32_t n_seal) const {
        const int64_t n_rows = g.rows->ne[0];

        kvarn_shape shape = layer.shape;
        shape.n_rows = n_rows;
        shape.n_seal = n_seal;

        ggml_tensor * cur = ggml_get_rows(g.ctx, layer.tail, g.rows); // f32
        cur = build_turn(g, ggml_reshape_3d(g.ctx, cur, shape.D, shape.H, n_rows), il);
        cur = ggml_reshape_2d(g.ctx, cur, layer.tail->ne[0], n_rows);
        cur = ggml_set_rows(g.ctx, layer.tail, cur, ggml_view_1d(g.ctx, g.plan, n_rows, 0));

        return n_seal == 0 ? cur : ggml_kvarn_seal(g.ctx, layer.tiles, cur, g.plan, shape);
    }

    // F32 [D, H, n]
    ggml_tensor * build_turn(const graph & g, ggml_tensor * cur, uint32_t il) const {
        const auto & kv      = kvarn.kv;
        const auto & cparams = lctx->get_cparams();

        const float freq_scale = kv.model.get_rope_freq_scale(cparams, il);

        // YaRN's length was given to the key when it was made: only turn it
        const float length = cparams.yarn_ext_factor != 0.0f ? 1.0f/(1.0f + 0.1f*logf(1.0f/freq_scale)) : 1.0f;

        if (g.rot) {
            cur = llama_mul_mat_hadamard(g.ctx, cur, g.rot);
        }
        cur = ggml_rope_ext_inplace(g.ctx, cur, g.shift, kv.model.get_rope_factors(cparams, il), kv.hparams.n_rot(il), kv.hparams.rope_type,
                cparams.n_ctx_orig_yarn, kv.model.get_rope_freq_base(cparams, il), freq_scale,
                cparams.yarn_ext_factor, length, cparams.yarn_beta_fast, cparams.yarn_beta_slow);
        if (g.rot) {
            cur = llama_mul_mat_hadamard(g.ctx, cur, g.rot);
        }
        return cur;
    }

    template <typename F>
    bool compute(const inputs & in, F && build_layer) {
        auto * sched = lctx->get_sched();
        auto * res   = lctx->get_gf_res_reserve();

        ggml_backend_sched_reset(sched);
        res->reset();

        const auto new_input = [&](ggml_type type, size_t n) {
            ggml_tensor * t = n ? ggml_new_tensor_1d(res->get_ctx(), type, n) : nullptr;
            if (t) {
                ggml_set_input(t);
            }
            return t;
        };
        graph g = { res->get_ctx(), new_input(GGML_TYPE_I64, in.plan.size()), new_input(GGML_TYPE_I32, in.shift.size()),
                    new_input(GGML_TYPE_I32, in.rows.size()), kvarn.build_rot(res->get_ctx(), KVARN_KEY) };

        const auto & layers = kvarn.kv.layers;
        for (size_t ikv = 0; ikv < layers.size(); ++ikv) {
            if (kvarn.kv.hparams.has_rope(layers[ikv].il)) {
                ggml_build_forward_expand(res->get_gf(), build_layer(g, kvarn.layers[KVARN_KEY][ikv], layers[ikv].il));
            }
        }
        if (ggml_graph_n_nodes(res->get_gf()) == 0) {
            return true;
        }
        if (!ggml_backend_sched_alloc_graph(sched, res->get_gf())) {
            return false;
        }
        if (is_rehearsal) {
            return true;
        }

        set_input(g.plan,  in.plan.data());
        set_input(g.shift, in.shift.data());
        set_input(g.rows,  in.rows.data());
        return lctx->graph_compute(res->get_gf(), true) == GGML_STATUS_SUCCESS;
    }

    static void set_input(ggml_tensor * t, const void * data) {
        if (t && t->buffer) { // not without a use in the graph
            ggml_backend_tensor_set(t, data, 0, ggml_nbytes(t));
        }
    }

    llama_kvarn   & kvarn;
    llama_context * lctx;

    bool is_rehearsal = false;

    ggml_abort_callback abort_callback;
    void              * abort_data;
};

bool llama_kvarn::can_shift(const char * func) const {
    if (kv.get_can_shift()) {
        return true;
    }
    LLAMA_LOG_ERROR("kvarn: %s: this model's positions cannot be changed after the fact; nothing was done, clear the sequence instead\n", func);
    return false;
}

void llama_kvarn::shift_keys(llama_context * lctx) {
    if (kv.hparams.rope_type != LLAMA_ROPE_TYPE_NONE) {
        llama_synchronize(lctx);
        shifter shift(*this, lctx);
        bool has_memory = false;
        try {
            has_memory = shift.rehearse();
        } catch (const std::bad_alloc &) {
        }
        if (!has_memory) {
            LLAMA_LOG_ERROR("kvarn: no memory to move keys to new positions, tried again before the next batch; free some or clear a sequence\n");
            return;
        }
        if (!shift.run()) {
            LLAMA_LOG_ERROR("kvarn: the device failed while it moved keys to new positions; clear the sequences that were moved\n");
        }
    }
    for (auto & cells : kv.v_cells) {
        cells.reset_shift();
    }
}
