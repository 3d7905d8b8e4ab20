// kvarn-cache-host.cpp - what happens to the data between graphs, on the host: late seals, copies, compaction.
//
// SPDX-License-Identifier: MIT

#include "kvarn-cache.h"

#include "llama-context.h"
#include "llama-impl.h"

#include <algorithm>
#include <new>

// The rows of one layer and side in host memory. Each row is f16 for a kvarn side, of the cache's own type otherwise.
class llama_kvarn::host_rows {
public:
    host_rows(const llama_kvarn & kvarn, int side, size_t ikv) : kvarn(kvarn), side(side) {
        if (kvarn.has(side)) {
            layer    = &kvarn.layers[side][ikv];
            row_size = layer->tail->nb[1];
            scratch.resize(KVARN_G*layer->shape.D + kvarn_seal_scratch(layer->shape.D));
            sealed .resize(layer->tiles->nb[1]);
        } else {
            tensor   = side == KVARN_KEY ? kvarn.kv.layers[ikv].k : kvarn.kv.layers[ikv].v;
            row_size = tensor ? tensor->nb[1] : 0;
        }
    }

    // appends the listed cells of a tile
    void read(uint32_t tile, const std::vector<uint32_t> & cells) {
        if (row_size == 0) {
            return;
        }
        std::vector<uint8_t> all(KVARN_G*row_size);
        if (!layer) {
            ggml_backend_tensor_get(tensor, all.data(), (size_t) tile*KVARN_G*row_size, all.size());
        } else if (kvarn.tiles[tile].slot >= 0) {
            ggml_backend_tensor_get(layer->tail, all.data(), kvarn.tiles[tile].slot*KVARN_G*row_size, all.size());
        } else {
            ggml_backend_tensor_get(layer->tiles, sealed.data(), tile*sealed.size(), sealed.size());
            for (int32_t h = 0; h < layer->shape.H; ++h) {
                kvarn_unseal_rows(&layer->shape, sealed.data() + h*sealed.size()/layer->shape.H,
                        (ggml_fp16_t *) all.data() + h*layer->shape.D, scratch.data(), ggml_fp32_to_fp16_row);
            }
        }
        for (uint32_t cell : cells) {
            const uint8_t * row = all.data() + cell%KVARN_G*row_size;
            rows.insert(rows.end(), row, row + row_size);
        }
    }

    // Rows [i0, i0 + n) to a tile's first cells: into its slot if it has one, and sealed if there are G of them.
    // Takes no memory: compact() has changed the cells by now.
    void write(uint32_t tile, size_t i0, size_t n) {
        if (row_size == 0) {
            return;
        }
        const uint8_t * src = rows.data() + i0*row_size;
        if (!layer) {
            ggml_backend_tensor_set(tensor, src, (size_t) tile*KVARN_G*row_size, n*row_size);
            return;
        }
        if (kvarn.tiles[tile].slot >= 0) {
            ggml_backend_tensor_set(layer->tail, src, kvarn.tiles[tile].slot*KVARN_G*row_size, n*row_size);
        }
        if (n == KVARN_G) {
            for (int32_t h = 0; h < layer->shape.H; ++h) {
                kvarn_seal_rows(&layer->shape, (const ggml_fp16_t *) src + h*layer->shape.D,
                        sealed.data() + h*sealed.size()/layer->shape.H, scratch.data(), ggml_fp16_to_fp32_row, kvarn_seal_ref);
            }
            ggml_backend_tensor_set(layer->tiles, sealed.data(), tile*sealed.size(), sealed.size());
        }
    }

private:
    const llama_kvarn & kvarn;
    const int           side;

    const side_layer * layer  = nullptr; // kvarn side
    ggml_tensor      * tensor = nullptr; // row-wise side

    size_t               row_size = 0;
    std::vector<uint8_t> rows;
    std::vector<uint8_t> sealed; // one tile
    std::vector<float>   scratch;
};

static std::vector<uint32_t> kvarn_all_cells() {
    std::vector<uint32_t> cells(KVARN_G);
    for (uint32_t i = 0; i < KVARN_G; ++i) {
        cells[i] = i;
    }
    return cells;
}

void llama_kvarn::seal_on_host(uint32_t tile) {
    try {
        for (int side : { KVARN_KEY, KVARN_VALUE }) {
            for (size_t ikv = 0; ikv < layers[side].size(); ++ikv) {
                host_rows rows(*this, side, ikv);
                rows.read (tile, kvarn_all_cells());
                rows.write(tile, 0, KVARN_G);
            }
        }
    } catch (const std::bad_alloc &) {
        LLAMA_LOG_WARN("kvarn: no memory to seal a restored tile: it stays in f16 until the next batch\n");
        return;
    }
    mark_sealed(tile);
}

void llama_kvarn::copy_data(const copy & c) const {
    for (int side : { KVARN_KEY, KVARN_VALUE }) {
        for (const auto & layer : layers[side]) {
            ggml_tensor * tensor = c.is_slot ? layer.tail : layer.tiles;
            const size_t  size   = c.is_slot ? KVARN_G*tensor->nb[1] : tensor->nb[1];

            ggml_init_params params = { 2*ggml_tensor_overhead(), nullptr, true };
            ggml_context_ptr ctx { ggml_init(params) };

            ggml_tensor * views[2];
            for (int i = 0; i < 2; ++i) {
                views[i] = ggml_view_1d(ctx.get(), tensor, size/ggml_element_size(tensor), (i == 0 ? c.src : c.dst)*size);
                ggml_backend_view_init(views[i]);
            }
            ggml_backend_tensor_copy(views[0], views[1]);
        }
    }
}

// In the order they were asked for: a slot may be the target of one and the source of the next.
void llama_kvarn::copy_pending() {
    for (const copy & c : copies) {
        copy_data(c);
    }
    copies.clear();

    // rows of a side without tiles: the cache copies them itself in its update(), but not before a state is saved or restored
    for (size_t i = 0; i < kv.sc_info.ssrc.size(); ++i) {
        for (const auto & layer : kv.layers) {
            for (const auto * streams : { &layer.k_stream, &layer.v_stream }) {
                if ((*streams)[kv.sc_info.ssrc[i]]) {
                    ggml_backend_tensor_copy((*streams)[kv.sc_info.ssrc[i]], (*streams)[kv.sc_info.sdst[i]]);
                }
            }
        }
    }
    kv.sc_info = {};
}

bool llama_kvarn::has_update(bool optimize) {
    if (optimize) {
        for (uint32_t strm = 0; strm < kv.n_stream; ++strm) {
            for (int32_t owner = 0; owner < (int32_t) n_owners; ++owner) {
                is_full = is_full || compact(strm, owner, true);
            }
        }
    }
    return is_full || !copies.empty();
}

bool llama_kvarn::update(llama_context * lctx) {
    if (is_full || !copies.empty()) {
        llama_synchronize(lctx);
    }
    copy_pending();

    if (kv.get_has_shift()) {
        if (!has(KVARN_KEY)) {
            return true; // compaction waits: it does not move shifts
        }
        shift_keys(lctx);
    }
    if (is_full && !kv.get_has_shift()) {
        is_full = false;
        try {
            for (uint32_t strm = 0; strm < kv.n_stream; ++strm) {
                for (int32_t owner = 0; owner < (int32_t) n_owners; ++owner) {
                    compact(strm, owner, false);
                }
            }
        } catch (const std::bad_alloc &) {
            LLAMA_LOG_ERROR("kvarn: no memory to make room in tiles with holes; remove a sequence, or try again\n");
        }
    }
    return false;
}

// The rows of all tiles of an owner that have holes, moved together: what fills a tile is sealed, the rest is left open.
// Afterwards an owner has less than one tile of cells that nobody can use, so that the spare tiles make up for them.
bool llama_kvarn::compact(uint32_t strm, int32_t owner, bool is_trial) {
    auto & cells = kv.v_cells[strm];

    std::vector<uint32_t> from;   // tiles with holes
    std::vector<std::vector<uint32_t>> cells_of; // their cells in use
    std::vector<uint32_t> cells_from, cells_to;
    bool is_open = false; // one of them takes tokens

    for (uint32_t tile = strm*n_tiles; tile < (strm + 1)*n_tiles; ++tile) {
        if (tiles[tile].state == FREE || tiles[tile].owner != owner || n_used(tile) == KVARN_G) {
            continue;
        }
        from.push_back(tile);
        cells_of.emplace_back();
        is_open = is_open || tiles[tile].state == OPEN;
        for (uint32_t cell = tile%n_tiles*KVARN_G; cell < (tile%n_tiles + 1)*KVARN_G; ++cell) {
            if (!cells.is_empty(cell)) {
                cells_of.back().push_back(cell);
                cells_from.push_back(cell);
            }
        }
    }

    const size_t n_rows = cells_from.size();
    const size_t n_to   = (n_rows + KVARN_G - 1)/KVARN_G;
    const bool is_useful = n_to < from.size() || (!is_open && n_rows%KVARN_G != 0);
    if (is_trial || !is_useful) {
        return is_useful;
    }

    LLAMA_LOG_DEBUG("kvarn: %zu tiles with %zu tokens become %zu\n", from.size(), n_rows, n_to);

    for (size_t i = 0; i < n_rows; ++i) {
        cells_to.push_back(from[i/KVARN_G]%n_tiles*KVARN_G + i%KVARN_G);
    }

    std::vector<host_rows> rows;
    for (int side : { KVARN_KEY, KVARN_VALUE }) {
        for (size_t ikv = 0; ikv < kv.layers.size(); ++ikv) {
            rows.emplace_back(*this, side, ikv);
            for (size_t i = 0; i < from.size(); ++i) {
                rows.back().read(from[i], cells_of[i]);
            }
        }
    }

    // the cells
    const llama_kv_cells moved = cells.cp(cells_from);
    for (uint32_t cell : cells_from) {
        cells.rm(cell);
    }
    cells.set(cells_to, moved);

    // the tiles
    for (uint32_t tile : from) {
        free_tile(tile);
    }
    for (size_t i = 0; i < n_to; ++i) {
        const size_t n = std::min<size_t>(KVARN_G, n_rows - i*KVARN_G);
        tiles[from[i]].owner = owner;
        tiles[from[i]].state = SEALED;
        if (n < KVARN_G) {
            open(from[i], owner);
        } else if (is_sink(from[i])) {
            open(from[i], owner);
            mark_sealed(from[i]);
        }
        for (auto & r : rows) {
            r.write(from[i], i*KVARN_G, n);
        }
    }
    return true;
}
