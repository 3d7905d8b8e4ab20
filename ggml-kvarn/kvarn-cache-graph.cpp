// kvarn-cache-graph.cpp - the graph nodes of a kvarn cache, and the plan that is their input.
//
// SPDX-License-Identifier: MIT

#include "kvarn-cache.h"

#include "llama-impl.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

ggml_tensor * llama_kvarn::build_plan(ggml_context * ctx, const llama_ubatch & ubatch) {
    // its length may depend only on what decides whether a graph is reused: tokens, sequences, streams
    plan_seal = n_seal(ubatch);
    plan      = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, ubatch.n_tokens + 2*plan_seal + n_tiles*kv.n_stream);
    plan_size = ubatch.n_tokens;
    // Every input is copied to the device on its own. Keys and values in tiles have the same rows: those of the keys serve both.
    plan_rows = has(KVARN_KEY) && has(KVARN_VALUE) ? nullptr : ggml_view_1d(ctx, plan, ubatch.n_tokens, 0);
    return plan;
}

static kvarn_shape kvarn_with_plan(kvarn_shape shape, uint32_t n_rows, uint32_t n_seal) {
    shape.n_rows = n_rows;
    shape.n_seal = n_seal;
    return shape;
}

ggml_tensor * llama_kvarn::build_store(ggml_context * ctx, int side, int32_t ikv, ggml_tensor * cur, ggml_tensor * rows) {
    const auto & layer = layers[side][ikv];

    if (!rows) {
        throw std::runtime_error("kvarn: this model stores values before keys; use cache type f16 for one of them");
    }
    plan_rows = plan_rows ? plan_rows : rows;

    ggml_tensor * tail = ggml_set_rows(ctx, layer.tail, cur, rows);

    return ggml_kvarn_seal(ctx, layer.tiles, tail, plan, kvarn_with_plan(layer.shape, plan_size, plan_seal));
}

ggml_tensor * llama_kvarn::build_get(ggml_context * ctx, int side, int32_t ikv, uint32_t n_kv, const slot_info & sinfo) const {
    const auto & layer = layers[side][ikv];

    return ggml_kvarn_get(ctx, layer.tiles, layer.tail, plan, kvarn_with_plan(layer.shape, plan_size, plan_seal),
            n_kv, sinfo.s0, sinfo.s1 - sinfo.s0 + 1);
}

ggml_tensor * llama_kvarn::build_rot(ggml_context * ctx, int side) const {
    if (!n_rot[side] || rot[side]) {
        return rot[side];
    }
    ggml_tensor * res = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_rot[side], n_rot[side]);
    ggml_set_input(res); // the host writes it
    return res;
}

void llama_kvarn::set_input_rows(int64_t * data, const slot_info & sinfo) const {
    for (uint32_t s = 0; s < sinfo.n_stream(); ++s) {
        for (uint32_t i = 0; i < sinfo.size(); ++i) {
            const uint32_t cell = sinfo.idxs[s][i];
            const int64_t  slot = tiles[tile_index(sinfo.strm[s], cell)].slot;
            GGML_ASSERT(slot >= 0);
            *data++ = slot*KVARN_G + cell%KVARN_G;
        }
    }
}

void llama_kvarn::set_input_plan(int64_t * data, const llama_ubatch & ubatch, const slot_info & sinfo) const {
    if (has(KVARN_VALUE)) {
        set_input_rows(data, sinfo);
    }

    int64_t * seal = data + ubatch.n_tokens;
    int64_t * map  = seal + 2*n_seal(ubatch);

    std::fill(seal, map, -1);
    for (uint32_t tile : seal_list) {
        *seal++ = tiles[tile].slot;
        *seal++ = tile;
    }

    for (uint32_t tile = 0; tile < tiles.size(); ++tile) {
        switch (tiles[tile].state) {
            case FREE: map[tile] = KVARN_MAP_EMPTY;  break;
            case OPEN: map[tile] = tiles[tile].slot; break;
            default:   map[tile] = tiles[tile].is_sink ? tiles[tile].slot : KVARN_MAP_SEALED; break;
        }
    }
    if (!is_strict) {
        // the tokens of a ubatch see each other exactly, also where it fills a tile
        for (uint32_t tile : seal_list) {
            map[tile] = tiles[tile].slot;
        }
    }
}

// The mask of sequences that share no cell with another, filled from the first cell on: tokens see every cell in use but those of
// later tokens. Looking at each cell for every token that is decoded takes longer than the attention does.
bool llama_kvarn::set_input_mask(ggml_tensor * dst, const llama_ubatch & ubatch, bool causal) const {
    const uint32_t n_kv     = dst->ne[0];
    const uint32_t n_stream = dst->ne[3];
    const uint32_t n_rows   = ubatch.n_tokens/n_stream;

    if (dst->type != GGML_TYPE_F16 || !causal || kv.hparams.use_alibi || kv.swa_type != LLAMA_SWA_TYPE_NONE || ubatch.is_pos_2d()) {
        return false;
    }
    for (uint32_t s = 0; s < n_stream; ++s) {
        const llama_seq_id id = ubatch.seq_id[s*n_rows][0];
        const auto & cells = kv.v_cells[kv.seq_to_stream[id]];
        if (cells.seq_pos_get(id).size() != cells.get_used() || cells.used_max_p1() != cells.get_used() || cells.get_used() > n_kv) {
            return false;
        }
        for (uint32_t i = s*n_rows; i < (s + 1)*n_rows; ++i) {
            if (ubatch.seq_id[i][0] != id) {
                return false;
            }
        }
    }

    const ggml_fp16_t drop = ggml_fp32_to_fp16(-INFINITY); // what is kept is 0.0

    ggml_fp16_t * row = (ggml_fp16_t *) dst->data;
    for (uint32_t s = 0; s < n_stream; ++s) {
        const llama_seq_id id = ubatch.seq_id[s*n_rows][0];
        const auto & cells = kv.v_cells[kv.seq_to_stream[id]];

        const llama_pos * pos = ubatch.pos + s*n_rows;
        const llama_pos first = *std::min_element(pos, pos + n_rows);

        std::vector<std::pair<llama_pos, uint32_t>> later; // latest first
        for (auto it = cells.seq_pos_get(id).rbegin(); it != cells.seq_pos_get(id).rend() && it->first > first; ++it) {
            later.push_back(*it);
        }
        for (uint32_t i = 0; i < n_rows; ++i, row += n_kv) {
            memset(row, 0, cells.get_used()*sizeof(*row));          // 140 MB for 2048 tokens that see 32768
            std::fill(row + cells.get_used(), row + n_kv, drop);
            for (const auto & cell : later) {
                if (cell.first <= pos[i]) {
                    break;
                }
                row[cell.second] = drop;
            }
        }
    }
    return true;
}
