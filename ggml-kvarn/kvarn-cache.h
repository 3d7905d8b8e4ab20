// kvarn-cache.h - the tiles behind a llama_kv_cache whose keys or values are of a kvarn type.
// A delegate: llama_kv_cache keeps its cells, masks, positions and sequences and asks here for everything that touches data.
//
// SPDX-License-Identifier: MIT
//
// Tile i of a stream holds the cells [G*i, G*i + G). Its data are f16 rows in a slot of the tail, or a sealed tile, or both:
//
//            first token                 last cell filled: SEAL                 slot needed elsewhere
//   FREE ------------------> OPEN ------------------------------> CACHED ------------------------------> SEALED
//    ^                         ^                                     |                                      |
//    |  no cell in use         +------- a cell removed: no loss -----+                                      |
//    +-- (any state)                                                                                        |
//    ^                                                                                                      |
//    +-------------- compact(), when cells run out: tiles with holes are rebuilt as fewer full ones --------+
//
// Every tile has one owner (a sequence, or a stream where each sequence has its own), so that what a sequence computes does not depend
// on its neighbours. The first KVARN_SINK tokens of an owner, rounded up to tiles, keep their slot and are read from it: its sink.
// Which tail row a token goes to, which tiles a graph seals and where each tile is read from are entries of the plan (kvarn-graph.h),
// an input: the graph itself never changes, and is reused as often as with any other cache.

#pragma once

#include "kvarn-graph.h"
#include "llama-kv-cache.h"

#include <map>
#include <memory>
#include <string>
#include <vector>

struct llama_cparams;
struct kvarn_piece;

// which tile is where
struct kvarn_placement {
    enum tile_state : uint8_t { FREE, OPEN, CACHED, SEALED };

    struct tile_info {
        tile_state state = FREE;
        int32_t    slot  = -1; // OPEN, CACHED
        int32_t    owner = -1;
        bool       is_sink = false; // CACHED for good, and read from its slot
    };

    std::vector<tile_info> tiles;     // [n_stream*n_tiles]
    std::vector<int32_t>   slot_tile; // [n_slots] tile in it, -1: none
    std::vector<uint64_t>  slot_time; // [n_slots] when it was sealed, in seals
    std::vector<uint32_t>  used;      // [n_stream] cells in use when last looked at
    uint64_t               n_sealed = 0;
};

class llama_kvarn : kvarn_placement {
public:
    using slot_info = llama_kv_cache::slot_info;

    // what llama_kv_cache's constructor is not given; called before a context creates its memory, on the same thread
    static void begin(const llama_cparams & cparams);

    // nullptr if neither type is kvarn. Replaces the types of a sliding window cache by f16, adds spare tiles to kv_size.
    // Throws std::runtime_error with one line if the model or the settings cannot work.
    static std::unique_ptr<llama_kvarn> create(
            llama_kv_cache & kv, ggml_type & type_k, ggml_type & type_v, uint32_t & kv_size, bool offload, bool is_shared);

    ~llama_kvarn();

    // true if this side (KVARN_KEY, KVARN_VALUE) is stored in tiles; the other side may be of any row-wise type
    bool has(int side) const { return bits[side] > 0; }

    ggml_type type(int side) const { return types[side]; }

    // tensors of the next layer; returns its tiles
    ggml_tensor * new_side(ggml_context * ctx, int side, uint32_t il);

    // Hadamard matrices for the rotations in use; then prints sizes
    void finish(std::unordered_map<int64_t, std::vector<float>> & hadamard);

    //
    // cells
    //

    slot_info find_slot(const llama_ubatch & ubatch) const;
    void      apply    (const slot_info & sinfo, const llama_ubatch & ubatch);

    // after cells were removed, or moved out of the positions there are
    void sync();

    // the cells of stream dst were just made those of stream src: their data follow in the next update()
    void copy_stream(uint32_t src, uint32_t dst);

    // true if update() has something to do besides the shift; with optimize, also if it could make room
    bool has_update(bool optimize);

    // copies, K-shift of keys in tiles, compaction; true if keys in rows have a shift left, which is the cache's own work
    bool update(llama_context * lctx);

    // false, and one line, if this model's positions cannot be changed
    bool can_shift(const char * func) const;

    // llama_kv_cache::prepare() simulates a batch and takes it back
    std::unique_ptr<kvarn_placement> save();
    void restore(const kvarn_placement & saved);

    //
    // graph
    //

    ggml_tensor * build_plan (ggml_context * ctx, const llama_ubatch & ubatch); // the v_idxs input
    ggml_tensor * build_rows () const { return plan_rows; }                     // its rows, for ggml_set_rows of the values
    ggml_tensor * build_store(ggml_context * ctx, int side, int32_t ikv, ggml_tensor * cur, ggml_tensor * rows);
    ggml_tensor * build_get  (ggml_context * ctx, int side, int32_t ikv, uint32_t n_kv, const slot_info & sinfo) const;
    ggml_tensor * build_rot  (ggml_context * ctx, int side) const;              // nullptr: no rotation

    void set_input_rows(int64_t * data, const slot_info & sinfo) const;
    void set_input_plan(int64_t * data, const llama_ubatch & ubatch, const slot_info & sinfo) const;
    bool set_input_mask(ggml_tensor * dst, const llama_ubatch & ubatch, bool causal) const; // false: not a simple one, nothing written

    //
    // state
    //

    // is_on_device: the data stay on the device, where nothing can damage them
    void state_write(llama_io_write_i & io, llama_seq_id seq_id, bool is_on_device);
    void state_read (llama_io_read_i  & io, llama_seq_id seq_id, bool is_on_device);

private:
    struct side_layer {
        ggml_tensor * tiles;
        ggml_tensor * tail;
        kvarn_shape   shape; // without the plan's partition
    };

    struct copy { uint32_t src, dst; bool is_slot; }; // slot -> slot, or tile -> tile

    class placer;

    llama_kvarn(llama_kv_cache & kv, bool offload);

    // where things are
    uint32_t tile_index(uint32_t strm, uint32_t cell) const { return strm*n_tiles + cell/KVARN_G; }
    int32_t  owner_of  (uint32_t strm, llama_seq_id seq_id) const;
    uint32_t n_used    (uint32_t tile) const; // cells in use
    uint32_t n_open    () const;
    uint32_t n_seal    (const llama_ubatch & ubatch) const;

    // tile transitions
    void    open       (uint32_t tile, int32_t owner);
    void    mark_sealed(uint32_t tile); // OPEN -> CACHED
    void    free_tile  (uint32_t tile);
    int32_t take_slot  (uint32_t tile);

    // sink
    uint32_t n_sink_tiles() const { return (n_sink + KVARN_G - 1)/KVARN_G; } // of an owner
    bool     is_sink (uint32_t tile) const; // whether a tile that is full becomes one
    uint32_t n_pinned() const;              // slots of all sinks

    // between graphs, on the host
    class host_rows;
    void seal_on_host(uint32_t tile); // a full tile that a restore left open
    void copy_data   (const copy & c) const;
    void copy_pending();
    bool compact     (uint32_t strm, int32_t owner, bool is_trial); // true if it frees a tile

    // K-shift: keys turned to the positions that their cells have by now
    class shifter;
    void shift_keys(llama_context * lctx);

    void place_rotations(const std::unordered_map<int64_t, std::vector<float>> & hadamard);
    void check_device(ggml_backend_dev_t dev, const side_layer & layer) const;

    // state
    void write_stream(llama_io_write_i & io, uint32_t strm, llama_seq_id seq_id, bool is_on_device) const;
    void read_stream (llama_io_read_i  & io, uint32_t strm, llama_seq_id seq_id, bool is_on_device);
    void read_data   (llama_io_read_i  & io, const std::vector<kvarn_piece> & pieces, bool is_on_device) const;
    std::string describe() const;

    template <typename F> void for_each_part(const std::vector<kvarn_piece> & pieces, F && f) const;

    llama_kv_cache & kv;

    const bool offload;

    ggml_type types[2];
    int32_t   bits [2] = { 0, 0 }; // 0: row-wise
    int32_t   n_rot[2] = { 0, 0 }; // channels rotated together: the largest power of two that divides every head; 0: none

    uint32_t n_user   = 0; // cells per stream that the user asked for
    uint32_t n_tiles  = 0; // per stream
    uint32_t n_owners = 0; // in all
    uint32_t n_slots  = 0;
    uint32_t n_sink   = 0; // tokens at the start of an owner that stay exact

    bool is_strict = false; // tokens of the current ubatch are read from the tile as soon as it is sealed

    std::vector<side_layer> layers[2];

    // Hadamard matrices beside the tiles: as an input each would be copied for every token. A copy on every device that has tiles
    std::vector<ggml_context_ptr>        rot_ctx;
    std::vector<ggml_backend_buffer_ptr> rot_buf;
    std::vector<ggml_tensor *>           rot_copies[2]; // nullptr at the end
    ggml_tensor                        * rot[2] = { nullptr, nullptr };

    std::vector<uint32_t> seal_list;   // tiles that the current ubatch fills
    std::vector<copy>     copies;      // pending
    bool                  is_full = false; // compact() was asked for

    // of the graph being built
    ggml_tensor * plan      = nullptr;
    ggml_tensor * plan_rows = nullptr;
    uint32_t      plan_size = 0; // its rows
    uint32_t      plan_seal = 0;
};

// Hands out cells to owners without changing anything: open tiles first, then free ones, lowest first.
class llama_kvarn::placer {
public:
    placer(const llama_kvarn & kvarn) : kvarn(kvarn), is_taken(kvarn.tiles.size(), false) {}

    // the owner's next cell in stream strm, -1 if there is none
    int32_t next(uint32_t strm, int32_t owner) {
        auto & cur = cursors[{ strm, owner }];

        const auto & cells = kvarn.kv.v_cells[strm];
        while (true) {
            while (cur.tile >= 0 && cur.row < KVARN_G) {
                const uint32_t cell = cur.tile*KVARN_G + cur.row++;
                if (cells.is_empty(cell)) {
                    return cell;
                }
            }
            if (!next_tile(strm, owner, cur)) {
                return -1;
            }
        }
    }

    // a free tile of stream strm (index inside the stream), -1 if there is none
    int32_t next_free(uint32_t strm) {
        for (uint32_t i = 0; i < kvarn.n_tiles; ++i) {
            const uint32_t tile = strm*kvarn.n_tiles + i;
            if (kvarn.tiles[tile].state == FREE && !is_taken[tile]) {
                is_taken[tile] = true;
                return i;
            }
        }
        return -1;
    }

    // true if there are slots for the tiles that were handed out by next()
    bool fits() const { return n_new + kvarn.n_open() + kvarn.n_pinned() <= kvarn.n_slots; }

private:
    struct cursor {
        int32_t  tile   = -1; // index inside the stream
        int32_t  row    = 0;
        uint32_t n_seen = 0;  // tiles of the stream that were looked at for open ones
    };

    bool next_tile(uint32_t strm, int32_t owner, cursor & cur) {
        cur.row = 0;
        while (cur.n_seen < kvarn.n_tiles) {
            const uint32_t i = cur.n_seen++;
            const auto & t = kvarn.tiles[strm*kvarn.n_tiles + i];
            if (t.state == OPEN && t.owner == owner) {
                cur.tile = i;
                return true;
            }
        }
        cur.tile = next_free(strm);
        n_new   += cur.tile >= 0;
        return cur.tile >= 0;
    }

    const llama_kvarn & kvarn;

    std::vector<bool> is_taken;
    std::map<std::pair<uint32_t, int32_t>, cursor> cursors;
    uint32_t n_new = 0;
};
