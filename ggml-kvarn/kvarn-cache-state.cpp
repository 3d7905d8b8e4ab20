// kvarn-cache-state.cpp - saved states. Sealed tiles move as they are, to any free tile; rows of open tiles are appended anew.
//
// SPDX-License-Identifier: MIT
//
//   magic, what describe() says, number of streams, then per stream:
//     number of sealed and of open tiles; per sealed tile its owner and which cells count, per open tile its owner and how many
//     per cell: position, sequences, extra data of the model
//     keys of every layer, then values: the sealed tiles, then the rows of the open ones
//
// Readers trust nothing: a state of another build, model or type is refused before anything changes.

#include "kvarn-cache.h"

#include "llama-hparams.h"
#include "llama-impl.h"
#include "llama-io.h"

#include <algorithm>
#include <stdexcept>

static const uint32_t KVARN_STATE_MAGIC    = 0x4e52564b; // "KVRN"
static const uint32_t KVARN_STATE_VERSION  = 1;
static const uint32_t KVARN_STATE_TEXT_MAX = 1 << 16;

static void kvarn_state_fail(const std::string & what) {
    throw std::runtime_error("kvarn: cannot restore the state: " + what);
}

template <typename T> static void kvarn_write(llama_io_write_i & io, const T & value) {
    io.write(&value, sizeof(value));
}

template <typename T> static T kvarn_read(llama_io_read_i & io) {
    T value;
    io.read(&value, sizeof(value));
    return value;
}

// cells of one tile: a whole sealed tile, or a run of rows of an open one
struct kvarn_piece {
    bool     is_sealed;
    uint32_t tile;
    uint32_t row, n;
};

static void kvarn_add_rows(std::vector<kvarn_piece> & pieces, uint32_t tile, uint32_t row) {
    if (!pieces.empty()) {
        auto & last = pieces.back();
        if (!last.is_sealed && last.tile == tile && last.row + last.n == row) {
            ++last.n;
            return;
        }
    }
    pieces.push_back({ false, tile, row, 1 });
}

// what both sides must agree on
std::string llama_kvarn::describe() const {
    std::string res = format("state %u, tile format %d", KVARN_STATE_VERSION, KVARN_FORMAT_VERSION);
    for (int side : { KVARN_KEY, KVARN_VALUE }) {
        res += format("; %s %s", side == KVARN_KEY ? "keys" : "values", ggml_type_name(types[side]));
        if (has(side)) {
            res += format(" (%d bits, rotated by %d)", bits[side], n_rot[side]);
        }
        for (const auto & layer : kv.layers) {
            res += side == KVARN_KEY
                ? format(" %ux%u", kv.hparams.n_head_kv(layer.il), kv.hparams.n_embd_head_k(layer.il))
                : format(" %ux%u", kv.hparams.n_head_kv(layer.il), kv.hparams.n_embd_head_v(layer.il));
        }
    }
    return res;
}

// f(tensor, offset, size) for all data of the listed pieces, in the order of the state
template <typename F>
void llama_kvarn::for_each_part(const std::vector<kvarn_piece> & pieces, F && f) const {
    for (int side : { KVARN_KEY, KVARN_VALUE }) {
        for (size_t ikv = 0; ikv < kv.layers.size(); ++ikv) {
            ggml_tensor * cache = side == KVARN_KEY ? kv.layers[ikv].k : kv.layers[ikv].v;
            for (const auto & p : pieces) {
                if (has(side) && p.is_sealed) {
                    f(cache, p.tile*cache->nb[1], cache->nb[1]);
                } else {
                    ggml_tensor * rows = has(side) ? layers[side][ikv].tail : cache;
                    const size_t  row  = (size_t) KVARN_G*(has(side) ? tiles[p.tile].slot : p.tile) + p.row;
                    f(rows, row*rows->nb[1], p.n*rows->nb[1]);
                }
            }
        }
    }
}

void llama_kvarn::state_write(llama_io_write_i & io, llama_seq_id seq_id) {
    copy_pending();

    kvarn_write(io, KVARN_STATE_MAGIC);
    const std::string text = describe();
    kvarn_write(io, (uint32_t) text.size());
    io.write(text.data(), text.size());

    if (seq_id == -1) {
        kvarn_write(io, kv.n_stream);
        for (uint32_t strm = 0; strm < kv.n_stream; ++strm) {
            write_stream(io, strm, seq_id);
        }
    } else {
        kvarn_write(io, (uint32_t) 1);
        write_stream(io, kv.seq_to_stream[seq_id], seq_id);
    }
}

void llama_kvarn::write_stream(llama_io_write_i & io, uint32_t strm, llama_seq_id seq_id) const {
    const auto & cells = kv.v_cells[strm];

    struct group { uint32_t tile; uint64_t mask[2]; uint32_t n; };
    std::vector<group> groups[2]; // open, sealed

    for (uint32_t i = 0; i < n_tiles; ++i) {
        const uint32_t tile = strm*n_tiles + i;
        group g = { tile, { 0, 0 }, 0 };
        for (uint32_t row = 0; row < KVARN_G; ++row) {
            const uint32_t cell = i*KVARN_G + row;
            if (!cells.is_empty(cell) && (seq_id == -1 || cells.seq_has(cell, seq_id))) {
                g.mask[row/64] |= (uint64_t) 1 << row%64;
                g.n++;
            }
        }
        if (g.n > 0) {
            groups[tiles[tile].state != OPEN].push_back(g);
        }
    }

    std::vector<kvarn_piece> pieces;
    std::vector<uint32_t>    order; // of the cells

    kvarn_write(io, (uint32_t) groups[1].size());
    kvarn_write(io, (uint32_t) groups[0].size());
    for (int is_sealed : { 1, 0 }) {
        for (const auto & g : groups[is_sealed]) {
            // a sequence may be restored as another one, whose tiles it then shares
            kvarn_write(io, seq_id == -1 ? tiles[g.tile].owner : 0);
            if (is_sealed) {
                kvarn_write(io, g.mask);
                pieces.push_back({ true, g.tile, 0, KVARN_G });
            } else {
                kvarn_write(io, g.n);
            }
            for (uint32_t row = 0; row < KVARN_G; ++row) {
                if (g.mask[row/64] >> row%64 & 1) {
                    order.push_back(g.tile%n_tiles*KVARN_G + row);
                    if (!is_sealed) {
                        kvarn_add_rows(pieces, g.tile, row);
                    }
                }
            }
        }
    }

    for (uint32_t cell : order) {
        std::vector<llama_seq_id> seq_ids;
        for (llama_seq_id cur = 0; cur < (llama_seq_id) kv.n_seq_max; ++cur) {
            if ((seq_id == -1 || cur == seq_id) && cells.seq_has(cell, cur)) {
                seq_ids.push_back(cur);
            }
        }
        kvarn_write(io, cells.pos_get(cell));
        kvarn_write(io, (uint32_t) seq_ids.size());
        if (kv.has_cell_ext()) {
            kvarn_write(io, cells.ext_get(cell));
        }
        io.write(seq_ids.data(), seq_ids.size()*sizeof(llama_seq_id));
    }

    for_each_part(pieces, [&](ggml_tensor * tensor, size_t offset, size_t size) { io.write_tensor(tensor, offset, size); });
}

void llama_kvarn::state_read(llama_io_read_i & io, llama_seq_id seq_id) {
    if (kvarn_read<uint32_t>(io) != KVARN_STATE_MAGIC) {
        kvarn_state_fail("it was not saved from a kvarn cache");
    }
    const uint32_t n_text = kvarn_read<uint32_t>(io);
    if (n_text > KVARN_STATE_TEXT_MAX) {
        kvarn_state_fail("it is damaged");
    }
    std::string text(n_text, ' ');
    io.read(&text[0], n_text);
    if (text != describe()) {
        kvarn_state_fail("it was saved as [" + text + "], this cache is [" + describe() + "]");
    }

    const uint32_t n_strm = kvarn_read<uint32_t>(io);
    if (n_strm != (seq_id == -1 ? kv.n_stream : 1)) {
        kvarn_state_fail(format("it holds %u streams, this cache has %u", n_strm, kv.n_stream));
    }

    copy_pending();

    if (seq_id == -1) {
        kv.clear(true);
    } else {
        kv.seq_rm(seq_id, -1, -1);
    }
    try {
        for (uint32_t s = 0; s < n_strm; ++s) {
            read_stream(io, seq_id == -1 ? s : kv.seq_to_stream[seq_id], seq_id);
        }
    } catch (...) {
        if (seq_id == -1) {
            kv.clear(true);
        } else {
            std::fill(used.begin(), used.end(), UINT32_MAX); // look at every tile
            kv.seq_rm(seq_id, -1, -1);
        }
        throw;
    }
}

void llama_kvarn::read_stream(llama_io_read_i & io, uint32_t strm, llama_seq_id seq_id) {
    auto & cells = kv.v_cells[strm];

    const uint32_t n_sealed_groups = kvarn_read<uint32_t>(io);
    const uint32_t n_open_groups   = kvarn_read<uint32_t>(io);
    if (n_sealed_groups > n_tiles || n_open_groups > n_tiles) {
        kvarn_state_fail(format("it holds %u sealed and %u open tiles, this cache has %u", n_sealed_groups, n_open_groups, n_tiles));
    }

    std::vector<kvarn_piece> pieces;
    std::vector<uint32_t>    order;
    std::vector<int32_t>     owners; // of the tiles in order

    placer place(*this);
    for (uint32_t i = 0; i < n_sealed_groups + n_open_groups; ++i) {
        const int32_t saved_owner = kvarn_read<int32_t>(io);
        const int32_t owner = owner_of(strm, seq_id == -1 ? std::abs(saved_owner) : seq_id);

        if (i < n_sealed_groups) {
            const int32_t tile = place.next_free(strm);
            if (tile < 0) {
                kvarn_state_fail("there are not enough free tiles");
            }
            const uint64_t mask[2] = { kvarn_read<uint64_t>(io), kvarn_read<uint64_t>(io) };
            pieces.push_back({ true, strm*n_tiles + tile, 0, KVARN_G });
            for (uint32_t row = 0; row < KVARN_G; ++row) {
                if (mask[row/64] >> row%64 & 1) {
                    order.push_back(tile*KVARN_G + row);
                    owners.push_back(owner);
                }
            }
        } else {
            const uint32_t n = kvarn_read<uint32_t>(io);
            for (uint32_t j = 0; j < n; ++j) {
                const int32_t cell = n <= KVARN_G ? place.next(strm, owner) : -1;
                if (cell < 0) {
                    kvarn_state_fail("there are not enough free tiles");
                }
                kvarn_add_rows(pieces, tile_index(strm, cell), cell%KVARN_G);
                order.push_back(cell);
                owners.push_back(owner);
            }
        }
    }
    if (cells.get_used() + order.size() > n_user || !place.fits()) {
        kvarn_state_fail(format("it holds %zu tokens, this cache has room for %u", order.size(), n_user - std::min(n_user, cells.get_used())));
    }

    struct cell_data { llama_pos pos; llama_kv_cell_ext ext; std::vector<llama_seq_id> seq_ids; };
    std::vector<cell_data> data(order.size());
    for (auto & c : data) {
        c.pos = kvarn_read<llama_pos>(io);
        const uint32_t n_seq_id = kvarn_read<uint32_t>(io);
        if (c.pos < 0 || n_seq_id == 0 || n_seq_id > kv.n_seq_max || (seq_id != -1 && n_seq_id != 1)) {
            kvarn_state_fail("it is damaged");
        }
        if (kv.has_cell_ext()) {
            c.ext = kvarn_read<llama_kv_cell_ext>(io);
        }
        for (uint32_t j = 0; j < n_seq_id; ++j) {
            const llama_seq_id id = kvarn_read<llama_seq_id>(io);
            if (seq_id == -1 && (id < 0 || id >= (llama_seq_id) kv.n_seq_max)) {
                kvarn_state_fail(format("sequence %d is out of range [0, %u)", id, kv.n_seq_max));
            }
            c.seq_ids.push_back(seq_id == -1 ? id : seq_id);
        }
    }

    // all of it is understood: now the cells and tiles change
    for (size_t i = 0; i < order.size(); ++i) {
        cells.pos_set(order[i], data[i].pos);
        if (kv.has_cell_ext()) {
            cells.ext_set(order[i], data[i].ext);
        }
        for (llama_seq_id id : data[i].seq_ids) {
            cells.seq_add(order[i], id);
        }
    }
    for (const auto & p : pieces) {
        if (p.is_sealed) {
            tiles[p.tile].state = SEALED;
        }
    }
    for (size_t i = 0; i < order.size(); ++i) {
        const uint32_t tile = tile_index(strm, order[i]);
        if (tiles[tile].state == FREE) {
            open(tile, owners[i]);
        } else {
            tiles[tile].owner = owners[i];
        }
    }
    used[strm] = cells.get_used();

    for_each_part(pieces, [&](ggml_tensor * tensor, size_t offset, size_t size) { io.read_tensor(tensor, offset, size); });
}
