// kvarn-cache-state.cpp - saved states. Sealed tiles move as they are, to any free tile; rows of open tiles are appended anew.
//
// SPDX-License-Identifier: MIT
//
//   magic, what describe() says, number of streams, then per stream:
//     a record (size, hash, bytes):
//       number of sealed and of open tiles; per sealed tile its owner and which cells count, per open tile its owner and how many
//       per cell: position, shift that its key still lacks, sequences, extra data of the model
//     keys of every layer, then values: the sealed tiles, then the rows of the open ones (a sink counts as open)
//     hash of these data; 0 if they stay on the device
//
// Readers trust nothing: a state of another build, model or type, or with a damaged record, is refused before anything changes. Data go
// to tiles and rows that are free, and count only once their hash is right.

#include "kvarn-cache.h"

#include "llama-hparams.h"
#include "llama-impl.h"
#include "llama-io.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

static const uint32_t KVARN_STATE_MAGIC    = 0x4e52564b; // "KVRN"
static const uint32_t KVARN_STATE_VERSION  = 2;
static const uint32_t KVARN_STATE_TEXT_MAX = 1 << 16;

static void kvarn_state_fail(const std::string & what) {
    throw std::runtime_error("kvarn: cannot restore the state: " + what);
}

// Every step is a bijection of the state, so that a change of one word cannot be undone by the words behind it.
class kvarn_hash {
public:
    void add(const void * data, size_t size) {
        const uint8_t * src = (const uint8_t *) data;
        for (; size >= 32; src += 32, size -= 32) {
            for (int i = 0; i < 4; ++i) {
                step(i, src + 8*i, 8);
            }
        }
        for (; size > 0; ) {
            const size_t n = std::min<size_t>(size, 8);
            step(0, src, n);
            src  += n;
            size -= n;
        }
    }

    uint64_t get() const {
        uint64_t res = 0;
        for (uint64_t lane : lanes) {
            res = mix(res ^ lane);
        }
        return res;
    }

private:
    static uint64_t mix(uint64_t x) {
        x *= 0x9e3779b97f4a7c15;
        return x ^ x >> 29;
    }

    void step(int lane, const uint8_t * src, size_t n) {
        uint64_t word = 0;
        memcpy(&word, src, n);
        lanes[lane] = mix(lanes[lane] ^ word);
    }

    uint64_t lanes[4] = { 1, 2, 3, 4 }; // side by side: one alone waits for its multiplication
};

template <typename T> static void kvarn_write(llama_io_write_i & io, const T & value) {
    io.write(&value, sizeof(value));
}

template <typename T> static T kvarn_read(llama_io_read_i & io) {
    T value;
    io.read(&value, sizeof(value));
    return value;
}

// what a state says about the tiles and cells of a stream
class kvarn_record {
public:
    template <typename T> void put(const T & value) {
        const uint8_t * src = (const uint8_t *) &value;
        bytes.insert(bytes.end(), src, src + sizeof(value));
    }

    template <typename T> T get() {
        T value;
        if (bytes.size() - pos < sizeof(value)) {
            kvarn_state_fail("it is damaged");
        }
        memcpy(&value, bytes.data() + pos, sizeof(value));
        pos += sizeof(value);
        return value;
    }

    bool is_read() const { return pos == bytes.size(); }

    void write(llama_io_write_i & io) const {
        kvarn_write(io, (uint64_t) bytes.size());
        kvarn_write(io, hash());
        io.write(bytes.data(), bytes.size());
    }

    // the size is checked before memory is taken: no record needs more than max_size
    void read(llama_io_read_i & io, size_t max_size) {
        const uint64_t size = kvarn_read<uint64_t>(io);
        const uint64_t sum  = kvarn_read<uint64_t>(io);
        if (size > max_size) {
            kvarn_state_fail("it is damaged, or needs a larger n_ctx");
        }
        bytes.resize(size);
        io.read(bytes.data(), size);
        if (sum != hash()) {
            kvarn_state_fail("it is damaged");
        }
    }

private:
    uint64_t hash() const {
        kvarn_hash res;
        res.add(bytes.data(), bytes.size());
        return res.get();
    }

    std::vector<uint8_t> bytes;
    size_t pos = 0;
};

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

void llama_kvarn::state_write(llama_io_write_i & io, llama_seq_id seq_id, bool is_on_device) {
    copy_pending();

    kvarn_write(io, KVARN_STATE_MAGIC);
    const std::string text = describe();
    kvarn_write(io, (uint32_t) text.size());
    io.write(text.data(), text.size());

    if (seq_id == -1) {
        kvarn_write(io, kv.n_stream);
        for (uint32_t strm = 0; strm < kv.n_stream; ++strm) {
            write_stream(io, strm, seq_id, is_on_device);
        }
    } else {
        kvarn_write(io, (uint32_t) 1);
        write_stream(io, kv.seq_to_stream[seq_id], seq_id, is_on_device);
    }
}

void llama_kvarn::write_stream(llama_io_write_i & io, uint32_t strm, llama_seq_id seq_id, bool is_on_device) const {
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
            groups[tiles[tile].state != OPEN && !tiles[tile].is_sink].push_back(g);
        }
    }

    std::vector<kvarn_piece> pieces;
    std::vector<uint32_t>    order; // of the cells

    kvarn_record record;
    record.put((uint32_t) groups[1].size());
    record.put((uint32_t) groups[0].size());
    for (int is_sealed : { 1, 0 }) {
        for (const auto & g : groups[is_sealed]) {
            // a sequence may be restored as another one, whose tiles it then shares
            record.put(seq_id == -1 ? tiles[g.tile].owner : 0);
            if (is_sealed) {
                record.put(g.mask);
                pieces.push_back({ true, g.tile, 0, KVARN_G });
            } else {
                record.put(g.n);
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
        record.put(cells.pos_get(cell));
        record.put(cells.get_shift(cell));
        record.put((uint32_t) seq_ids.size());
        if (kv.has_cell_ext()) {
            record.put(cells.ext_get(cell));
        }
        for (llama_seq_id id : seq_ids) {
            record.put(id);
        }
    }

    record.write(io);

    if (is_on_device) {
        for_each_part(pieces, [&](ggml_tensor * tensor, size_t offset, size_t size) { io.write_tensor(tensor, offset, size); });
        kvarn_write(io, (uint64_t) 0);
        return;
    }
    kvarn_hash hash;
    std::vector<uint8_t> data;
    for_each_part(pieces, [&](ggml_tensor * tensor, size_t offset, size_t size) {
        data.resize(size);
        ggml_backend_tensor_get(tensor, data.data(), offset, size);
        hash.add(data.data(), size);
        io.write(data.data(), size);
    });
    kvarn_write(io, hash.get());
}

void llama_kvarn::state_read(llama_io_read_i & io, llama_seq_id seq_id, bool is_on_device) {
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
            read_stream(io, seq_id == -1 ? s : kv.seq_to_stream[seq_id], seq_id, is_on_device);
        }
    } catch (...) {
        io.discard();
        std::fill(used.begin(), used.end(), UINT32_MAX); // look at every tile
        if (seq_id == -1) {
            kv.clear(true);
        } else {
            kv.seq_rm(seq_id, -1, -1);
        }
        throw;
    }
}

void llama_kvarn::read_stream(llama_io_read_i & io, uint32_t strm, llama_seq_id seq_id, bool is_on_device) {
    auto & cells = kv.v_cells[strm];

    kvarn_record record;
    record.read(io, 64 + (size_t) n_tiles*(64 + KVARN_G*(40 + kv.n_seq_max*sizeof(llama_seq_id))));

    const auto no_room = [&]() {
        kvarn_state_fail(format("it needs more room than the %u tokens that are free here; use a larger n_ctx",
                n_user - std::min(n_user, cells.get_used())));
    };

    const uint32_t n_sealed_groups = record.get<uint32_t>();
    const uint32_t n_open_groups   = record.get<uint32_t>();
    if (n_sealed_groups > n_tiles || n_open_groups > n_tiles) {
        no_room();
    }

    std::vector<kvarn_piece> pieces;
    std::vector<uint32_t>    order;
    std::vector<int32_t>     owners; // of the tiles in order

    placer place(*this);
    for (uint32_t i = 0; i < n_sealed_groups + n_open_groups; ++i) {
        const int32_t saved_owner = record.get<int32_t>();
        const int32_t owner = owner_of(strm, seq_id == -1 ? saved_owner & INT32_MAX : seq_id);

        if (i < n_sealed_groups) {
            const int32_t tile = place.next_free(strm);
            if (tile < 0) {
                no_room();
            }
            const uint64_t mask[2] = { record.get<uint64_t>(), record.get<uint64_t>() };
            pieces.push_back({ true, strm*n_tiles + tile, 0, KVARN_G });
            for (uint32_t row = 0; row < KVARN_G; ++row) {
                if (mask[row/64] >> row%64 & 1) {
                    order.push_back(tile*KVARN_G + row);
                    owners.push_back(owner);
                }
            }
        } else {
            const uint32_t n = record.get<uint32_t>();
            for (uint32_t j = 0; j < n; ++j) {
                const int32_t cell = n <= KVARN_G ? place.next(strm, owner) : -1;
                if (cell < 0) {
                    no_room();
                }
                kvarn_add_rows(pieces, tile_index(strm, cell), cell%KVARN_G);
                order.push_back(cell);
                owners.push_back(owner);
            }
        }
    }
    if (cells.get_used() + order.size() > n_user || !place.fits()) {
        no_room();
    }

    struct cell_data { llama_pos pos, shift; llama_kv_cell_ext ext; std::vector<llama_seq_id> seq_ids; };
    std::vector<cell_data> data(order.size());
    for (auto & c : data) {
        c.pos   = record.get<llama_pos>();
        c.shift = record.get<llama_pos>();
        const uint32_t n_seq_id = record.get<uint32_t>();
        const int64_t  pos_key  = (int64_t) c.pos - c.shift; // that its key is turned to
        if (c.pos < 0 || pos_key < 0 || pos_key > INT32_MAX ||
            n_seq_id == 0 || n_seq_id > kv.n_seq_max || (seq_id != -1 && n_seq_id != 1)) {
            kvarn_state_fail("it is damaged");
        }
        if (kv.has_cell_ext()) {
            c.ext = record.get<llama_kv_cell_ext>();
        }
        for (uint32_t j = 0; j < n_seq_id; ++j) {
            const llama_seq_id id = record.get<llama_seq_id>();
            if (seq_id == -1 && (id < 0 || id >= (llama_seq_id) kv.n_seq_max)) {
                kvarn_state_fail(format("sequence %d is out of range [0, %u)", id, kv.n_seq_max));
            }
            c.seq_ids.push_back(seq_id == -1 ? id : seq_id);
        }
    }

    if (!record.is_read()) {
        kvarn_state_fail("it is damaged");
    }

    // all of it is understood: the tiles take the data ..
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
    read_data(io, pieces, is_on_device);

    // .. and the cells make them count
    for (size_t i = 0; i < order.size(); ++i) {
        cells.pos_set(order[i], data[i].pos - data[i].shift);
        if (kv.has_cell_ext()) {
            cells.ext_set(order[i], data[i].ext);
        }
        for (llama_seq_id id : data[i].seq_ids) {
            cells.seq_add(order[i], id);
        }
        if (data[i].shift != 0) {
            cells.pos_add(order[i], data[i].shift);
        }
    }
    used[strm] = cells.get_used();
}

void llama_kvarn::read_data(llama_io_read_i & io, const std::vector<kvarn_piece> & pieces, bool is_on_device) const {
    kvarn_hash hash;
    std::vector<uint8_t> data;
    for_each_part(pieces, [&](ggml_tensor * tensor, size_t offset, size_t size) {
        if (is_on_device) {
            io.read_tensor(tensor, offset, size);
            return;
        }
        data.resize(size);
        io.read(data.data(), size);
        hash.add(data.data(), size);
        ggml_backend_tensor_set(tensor, data.data(), offset, size);
    });
    const uint64_t sum = kvarn_read<uint64_t>(io);
    if (sum != (is_on_device ? 0 : hash.get())) {
        kvarn_state_fail("its data are damaged");
    }
}
