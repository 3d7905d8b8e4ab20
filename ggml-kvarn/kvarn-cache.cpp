// kvarn-cache.cpp - which tile is where: construction, and the life of a tile from FREE to SEALED.
//
// SPDX-License-Identifier: MIT

#include "kvarn-cache.h"

#include "llama-cparams.h"
#include "llama-hparams.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

// slots kept for tiles that are sealed already: a rollback of up to G tokens then finds its f16 rows
static const uint32_t KVARN_SLOTS_KEPT = 1;

// sequences of a unified cache that get tiles of their own: each costs two slots. Further ones share owners
static const uint32_t KVARN_OWNERS_MAX = 32;

// set by begin(), read by the constructor
struct kvarn_context_params {
    uint32_t n_ubatch  = 512;
    uint32_t n_ctx_seq = 0;
};
static thread_local kvarn_context_params kvarn_params;

static bool kvarn_env(const char * name) {
    const char * value = getenv(name);
    return value && atoi(value) != 0;
}

// tokens of the sink, from the environment: no parameter of a context is free for it
static uint32_t kvarn_env_sink() {
    const char * value = getenv("KVARN_SINK");
    if (!value || !*value) {
        return 0;
    }
    char * end = nullptr;
    const long n = strtol(value, &end, 10);
    if (*end || n < 0 || n > (1 << 20)) {
        throw std::runtime_error(format("kvarn: KVARN_SINK=%s is not a number of tokens; use 0 (no sink) or 128, say", value));
    }
    return n;
}

void llama_kvarn::begin(const llama_cparams & cparams) {
    kvarn_params = { cparams.n_ubatch, cparams.n_ctx_seq };
}

llama_kvarn::llama_kvarn(llama_kv_cache & kv, bool offload) : kv(kv), offload(offload) {}

llama_kvarn::~llama_kvarn() = default;

std::unique_ptr<llama_kvarn> llama_kvarn::create(
        llama_kv_cache & kv, ggml_type & type_k, ggml_type & type_v, uint32_t & kv_size, bool offload, bool is_shared) {
    if (!kvarn_type_bits(type_k) && !kvarn_type_bits(type_v)) {
        return nullptr;
    }

    // the window of a sliding window cache is recycled cell by cell, which tiles cannot follow
    if (kv.swa_type != LLAMA_SWA_TYPE_NONE && kv.n_swa > 0 && kv_size < kvarn_params.n_ctx_seq) {
        for (ggml_type * type : { &type_k, &type_v }) {
            if (kvarn_type_bits(*type)) {
                LLAMA_LOG_INFO("kvarn: %s is not for a sliding window of %u tokens: f16 there\n", ggml_type_name(*type), kv.n_swa);
                *type = GGML_TYPE_F16;
            }
        }
        return nullptr;
    }

    const auto refuse = [](const std::string & what, const std::string & instead) {
        throw std::runtime_error("kvarn: " + what + "; " + instead);
    };

    switch (kv.model.arch) {
        case LLM_ARCH_MINIMAX_M3:
        case LLM_ARCH_GLM_DSA:
        case LLM_ARCH_DEEPSEEK32:
        case LLM_ARCH_DEEPSEEK4:
        case LLM_ARCH_HY_V4:
        case LLM_ARCH_DOTS3NOTE:
        case LLM_ARCH_QWEN4EXP:
            refuse("the sparse attention of this model reads its cache row by row", "use cache type f16 or q8_0");
            break;
        default:
            break;
    }
    if (kv.hparams.is_mla()) {
        refuse("this model compresses keys and values itself (MLA)", "use cache type f16 or q8_0");
    }
    if (is_shared) {
        refuse("this context shares the cache of another one", "use cache type f16 for the draft (--cache-type-k-draft f16)");
    }
    if (kv.v_trans) {
        refuse("flash attention is off", "switch it on (-fa on, flash_attn=True)");
    }

    std::unique_ptr<llama_kvarn> res(new llama_kvarn(kv, offload));

    const bool is_exact = kvarn_env("KVARN_TEST_EXACT");

    res->types[KVARN_KEY]   = type_k;
    res->types[KVARN_VALUE] = type_v;
    for (int side : { KVARN_KEY, KVARN_VALUE }) {
        const int b = kvarn_type_bits(res->types[side]);
        res->bits [side] = b && is_exact ? KVARN_BITS_EXACT : b;
        res->n_rot[side] = b && !is_exact ? KVARN_D_MAX : 0;
    }
    res->is_strict = kvarn_env("KVARN_STRICT");

    // an owner opens at most one tile per G tokens of a ubatch, and one more where it crosses a border
    const uint32_t n_ubatch = kvarn_params.n_ubatch;
    const uint32_t n_per_stream = kv.n_stream > 1 ? 1 : std::min(kv.n_seq_max, KVARN_OWNERS_MAX);
    res->n_owners = kv.n_stream*n_per_stream;
    res->n_sink   = kvarn_env_sink();
    res->n_slots  = 2*res->n_owners + n_ubatch/KVARN_G + KVARN_SLOTS_KEPT + res->n_owners*res->n_sink_tiles();

    // every owner's last tile is partly empty, and a cut leaves a hole: spare tiles, so that the user's cells can all be used
    res->n_user = kv_size;
    kv_size = GGML_PAD(kv_size + KVARN_G*(n_per_stream + 1), 2*KVARN_G);
    res->n_tiles = kv_size/KVARN_G;

    res->tiles.resize(kv.n_stream*res->n_tiles);
    res->slot_tile.resize(res->n_slots, -1);
    res->slot_time.resize(res->n_slots, 0);
    res->used.resize(kv.n_stream, 0);

    return res;
}

ggml_tensor * llama_kvarn::new_side(ggml_context * ctx, int side, uint32_t il) {
    const auto & hparams = kv.hparams;

    const int32_t D = side == KVARN_KEY ? hparams.n_embd_head_k(il) : hparams.n_embd_head_v(il);
    const int32_t H = hparams.n_head_kv(il);

    if (D % KVARN_D_STEP != 0 || D > KVARN_D_MAX) {
        throw std::runtime_error(format("kvarn: head size %d of layer %u (%s) is not a multiple of %d up to %d; use cache type f16",
                D, il, side == KVARN_KEY ? "keys" : "values", KVARN_D_STEP, KVARN_D_MAX));
    }
    while (n_rot[side] && D % n_rot[side] != 0) {
        n_rot[side] /= 2;
    }

    side_layer layer;
    layer.shape = { side, bits[side], D, H, 0, 0, (int32_t) n_tiles, !is_strict };
    layer.tiles = ggml_new_tensor_3d(ctx, GGML_TYPE_I8,  (int64_t) kvarn_tile_size(D, bits[side])*H, n_tiles, kv.n_stream);
    layer.tail  = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, (int64_t) D*H, (int64_t) KVARN_G*n_slots);
    ggml_format_name(layer.tail, "cache_tail_%s_l%u", side == KVARN_KEY ? "k" : "v", il);

    if (offload && layers[side].empty()) {
        check_device(kv.model.dev_layer(il), layer);
    }

    layers[side].push_back(layer);

    return layer.tiles;
}

// An op that writes into a device's memory cannot run elsewhere: the scheduler would abort the process, so ask before.
void llama_kvarn::check_device(ggml_backend_dev_t dev, const side_layer & layer) const {
    const std::string instead = "keep the cache in main memory (--no-kv-offload, offload_kqv=False) or use cache type f16";

    ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(dev);
    if ((reg && strcmp(ggml_backend_reg_name(reg), "RPC") == 0) || ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_META) {
        throw std::runtime_error(format("kvarn: device %s (remote, or split by rows) cannot hold the cache; %s",
                ggml_backend_dev_name(dev), instead.c_str()));
    }

    ggml_init_params params = { 8*ggml_tensor_overhead(), nullptr, true };
    ggml_context_ptr ctx { ggml_init(params) };

    kvarn_shape shape = layer.shape;
    shape.n_rows = 1;
    shape.n_seal = 1;

    ggml_tensor * tiles = ggml_dup_tensor(ctx.get(), layer.tiles);
    ggml_tensor * tail  = ggml_dup_tensor(ctx.get(), layer.tail);
    ggml_tensor * plan  = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I64, 3 + n_tiles*kv.n_stream);
    ggml_tensor * seal  = ggml_kvarn_seal(ctx.get(), tiles, tail, plan, shape);
    ggml_tensor * get   = ggml_kvarn_get (ctx.get(), tiles, tail, plan, shape, KVARN_G, 0, 1);

    if (!ggml_backend_dev_supports_op(dev, seal) || !ggml_backend_dev_supports_op(dev, get)) {
        throw std::runtime_error(format("kvarn: device %s has no kernels for %s yet; %s",
                ggml_backend_dev_name(dev), ggml_type_name(types[layer.shape.side]), instead.c_str()));
    }
}

void llama_kvarn::place_rotations(const std::unordered_map<int64_t, std::vector<float>> & hadamard) {
    std::vector<ggml_backend_buffer_type_t> bufts;
    for (int side : { KVARN_KEY, KVARN_VALUE }) {
        for (const auto & layer : layers[side]) {
            ggml_backend_buffer_type_t buft = ggml_backend_buffer_get_type(layer.tiles->buffer);
            if (std::find(bufts.begin(), bufts.end(), buft) == bufts.end()) {
                bufts.push_back(buft);
            }
        }
    }
    for (ggml_backend_buffer_type_t buft : bufts) {
        rot_ctx.emplace_back(ggml_init({ 2*ggml_tensor_overhead(), nullptr, true }));
        ggml_tensor * copy[2] = { nullptr, nullptr };
        for (int side : { KVARN_KEY, KVARN_VALUE }) {
            if (n_rot[side] && !layers[side].empty()) {
                copy[side] = side == KVARN_VALUE && copy[KVARN_KEY] && n_rot[KVARN_KEY] == n_rot[side] ? copy[KVARN_KEY] :
                    ggml_new_tensor_2d(rot_ctx.back().get(), GGML_TYPE_F32, n_rot[side], n_rot[side]);
                rot_copies[side].push_back(copy[side]);
            }
        }
        if (!copy[KVARN_KEY] && !copy[KVARN_VALUE]) {
            return;
        }
        rot_buf.emplace_back(ggml_backend_alloc_ctx_tensors_from_buft(rot_ctx.back().get(), buft));
        if (!rot_buf.back()) {
            throw std::runtime_error("kvarn: no memory for the rotation matrix; use a smaller n_ctx");
        }
        for (ggml_tensor * t : copy) {
            if (t) {
                ggml_backend_tensor_set(t, hadamard.at(t->ne[0]).data(), 0, ggml_nbytes(t));
            }
        }
    }
    for (int side : { KVARN_KEY, KVARN_VALUE }) {
        rot[side] = rot_copies[side].empty() ? nullptr : rot_copies[side][0];
        if (rot_copies[side].size() > 1) {
            rot_copies[side].push_back(nullptr);
            rot[side]->extra = rot_copies[side].data(); // for ggml_kvarn_near()
        }
    }
}

void llama_kvarn::finish(std::unordered_map<int64_t, std::vector<float>> & hadamard) {
    for (int side : { KVARN_KEY, KVARN_VALUE }) {
        const int n = n_rot[side];
        if (n == 0 || hadamard.count(n)) {
            continue;
        }
        auto & h = hadamard[n];
        h.resize(n*n);
        for (int i = 0; i < n; ++i) {
            for (int j = 0; j < n; ++j) { // Sylvester: the sign is the parity of the common bits
                int parity = 0;
                for (int common = i & j; common; common &= common - 1) {
                    parity ^= 1;
                }
                h[i*n + j] = (parity ? -1.0f : 1.0f)/sqrtf(n);
            }
        }
    }

    if (!kv.hparams.no_alloc) {
        place_rotations(hadamard);
    }

    size_t tail_size = 0;
    for (int side : { KVARN_KEY, KVARN_VALUE }) {
        if (has(side) && !layers[side].empty()) {
            const kvarn_shape & shape = layers[side][0].shape;
            LLAMA_LOG_INFO("kvarn: %s %s: %.3f bits per value, %u tiles of %d tokens per stream (%u asked for), head size %d, rotated by %d\n",
                    side == KVARN_KEY ? "keys" : "values", ggml_type_name(types[side]),
                    8.0*kvarn_tile_size(shape.D, shape.bits)/(KVARN_G*shape.D), n_tiles, KVARN_G, n_user/KVARN_G, shape.D, n_rot[side]);
        }
        for (const auto & layer : layers[side]) {
            tail_size += ggml_nbytes(layer.tail);
        }
    }
    LLAMA_LOG_INFO("kvarn: tail = %7.2f MiB (%u slots of %d tokens in f16)\n", tail_size/1024.0/1024.0, n_slots, KVARN_G);

    size_t unpacked = 0; // keys and values of one layer, when a device attends a prompt
    for (int side : { KVARN_KEY, KVARN_VALUE }) {
        size_t most = 0;
        for (const auto & layer : layers[side]) {
            const bool is_host = ggml_backend_buffer_is_host(layer.tiles->buffer);
            most = std::max(most, is_host ? 0 : sizeof(ggml_fp16_t)*layer.shape.D*layer.shape.H*n_tiles*KVARN_G*kv.n_stream);
        }
        unpacked += most;
    }
    if (unpacked > 0) {
        LLAMA_LOG_INFO("kvarn: a prompt unpacks one layer at a time: up to %.2f MiB of f16 (CUDA: %.0f MiB at once, KVARN_WINDOW)\n",
                unpacked/1024.0/1024.0, kvarn_window_size()/1024.0/1024.0);
    }
    if (n_sink > 0) {
        LLAMA_LOG_INFO("kvarn: the first %u tokens of every sequence stay in the tail (KVARN_SINK)\n", n_sink_tiles()*KVARN_G);
    }
    if (kv.n_stream == 1 && kv.n_seq_max > n_owners) {
        LLAMA_LOG_WARN("kvarn: %u sequences share the tiles of %u; without a unified cache each would have its own\n", kv.n_seq_max, n_owners);
    }
}

//
// cells
//

int32_t llama_kvarn::owner_of(uint32_t strm, llama_seq_id seq_id) const {
    return kv.n_stream > 1 ? (int32_t) strm : seq_id % (int32_t) n_owners;
}

uint32_t llama_kvarn::n_used(uint32_t tile) const {
    const auto & cells = kv.v_cells[tile/n_tiles];
    const uint32_t i0 = tile%n_tiles*KVARN_G;

    uint32_t n = 0;
    for (uint32_t i = i0; i < i0 + KVARN_G; ++i) {
        n += !cells.is_empty(i);
    }
    return n;
}

uint32_t llama_kvarn::n_open() const {
    return std::count_if(tiles.begin(), tiles.end(), [](const tile_info & t) { return t.state == OPEN; });
}

// tiles that a ubatch can fill, at most: every sequence in it may come with a tile that lacks one token
uint32_t llama_kvarn::n_seal(const llama_ubatch & ubatch) const {
    return ubatch.n_tokens/KVARN_G + std::min(ubatch.n_tokens, ubatch.n_seqs_unq);
}

llama_kvarn::slot_info llama_kvarn::find_slot(const llama_ubatch & ubatch) const {
    const uint32_t n_seqs   = kv.n_stream > 1 ? ubatch.n_seqs_unq : 1;
    const uint32_t n_tokens = ubatch.n_tokens/n_seqs;

    slot_info res = { LLAMA_MAX_SEQ, 0, {}, {} };
    res.resize(n_seqs);

    placer place(*this);

    for (uint32_t s = 0; s < n_seqs; ++s) {
        const uint32_t strm = kv.seq_to_stream[ubatch.seq_id_unq[s]];

        res.s0 = std::min<uint32_t>(res.s0, strm);
        res.s1 = std::max<uint32_t>(res.s1, strm);
        res.strm[s] = strm;
        res.idxs[s].reserve(n_tokens);

        if (kv.v_cells[strm].get_used() + n_tokens > n_user) {
            return {};
        }
        for (uint32_t i = 0; i < n_tokens; ++i) {
            const int32_t cell = place.next(strm, owner_of(strm, ubatch.seq_id[s*n_tokens + i][0]));
            if (cell < 0) {
                return {};
            }
            res.idxs[s].push_back(cell);
        }
    }

    return place.fits() ? res : slot_info();
}

void llama_kvarn::apply(const slot_info & sinfo, const llama_ubatch & ubatch) {
    std::vector<uint32_t> touched;

    // first every tile that gets rows takes its slot, then full ones become CACHED: a slot sealed here is not taken here
    for (uint32_t s = 0; s < sinfo.n_stream(); ++s) {
        for (uint32_t i = 0; i < sinfo.size(); ++i) {
            const uint32_t tile = tile_index(sinfo.strm[s], sinfo.idxs[s][i]);
            if (tiles[tile].state == FREE) {
                open(tile, owner_of(sinfo.strm[s], ubatch.seq_id[s*sinfo.size() + i][0]));
            }
            if (touched.empty() || touched.back() != tile) {
                touched.push_back(tile);
            }
        }
        used[sinfo.strm[s]] = kv.v_cells[sinfo.strm[s]].get_used();
    }

    // A restore can leave an owner with two tiles to fill. One more than the graph has entries for stays open until save().
    const size_t n_max = n_seal(ubatch);
    seal_list.clear();
    for (uint32_t tile : touched) {
        if (tiles[tile].state == OPEN && n_used(tile) == KVARN_G && seal_list.size() < n_max) {
            mark_sealed(tile);
            seal_list.push_back(tile);
        }
    }
}

void llama_kvarn::open(uint32_t tile, int32_t owner) {
    tiles[tile].slot  = take_slot(tile);
    tiles[tile].state = OPEN;
    tiles[tile].owner = owner;
}

void llama_kvarn::mark_sealed(uint32_t tile) {
    tiles[tile].state   = CACHED;
    tiles[tile].is_sink = is_sink(tile);
    slot_time[tiles[tile].slot] = ++n_sealed;
}

bool llama_kvarn::is_sink(uint32_t tile) const {
    if (n_sink == 0) {
        return false;
    }
    const uint32_t n_has = std::count_if(tiles.begin(), tiles.end(), [&](const tile_info & t) {
        return t.is_sink && t.owner == tiles[tile].owner;
    });
    const auto & cells = kv.v_cells[tile/n_tiles];
    llama_pos first = cells.pos_get(tile%n_tiles*KVARN_G);
    for (uint32_t i = 1; i < KVARN_G; ++i) {
        first = std::min(first, cells.pos_get(tile%n_tiles*KVARN_G + i));
    }
    return n_has < n_sink_tiles() && first < (llama_pos) n_sink;
}

uint32_t llama_kvarn::n_pinned() const {
    return std::count_if(tiles.begin(), tiles.end(), [](const tile_info & t) { return t.is_sink; });
}

void llama_kvarn::free_tile(uint32_t tile) {
    if (tiles[tile].slot >= 0) {
        slot_tile[tiles[tile].slot] = -1;
    }
    tiles[tile] = {};
}

// a slot that is empty, or else the one sealed longest ago
int32_t llama_kvarn::take_slot(uint32_t tile) {
    int32_t slot = -1;
    for (uint32_t i = 0; i < n_slots; ++i) {
        if (slot_tile[i] < 0) {
            slot = i;
            break;
        }
        const auto & t = tiles[slot_tile[i]];
        if (t.state == CACHED && !t.is_sink && (slot < 0 || slot_time[i] < slot_time[slot])) {
            slot = i;
        }
    }
    GGML_ASSERT(slot >= 0 && "placer::fits() counts the slots");

    if (slot_tile[slot] >= 0) {
        tiles[slot_tile[slot]].state = SEALED;
        tiles[slot_tile[slot]].slot  = -1;
    }
    slot_tile[slot] = tile;
    return slot;
}

void llama_kvarn::sync() {
    for (uint32_t strm = 0; strm < kv.n_stream; ++strm) {
        if (kv.v_cells[strm].get_used() == used[strm]) {
            continue;
        }
        used[strm] = kv.v_cells[strm].get_used();

        // first free what is empty: a tile sealed by a graph that failed is followed by one that the rollback emptied
        std::vector<uint32_t> holes;
        std::vector<bool>     is_open(n_owners, false);
        for (uint32_t tile = strm*n_tiles; tile < (strm + 1)*n_tiles; ++tile) {
            if (tiles[tile].state == FREE) {
                continue;
            }
            const uint32_t n = n_used(tile);
            if (n == 0) {
                free_tile(tile);
            } else if (tiles[tile].state == OPEN) {
                is_open[tiles[tile].owner] = true;
            } else if (tiles[tile].state == CACHED && n < KVARN_G) {
                holes.push_back(tile);
            }
        }
        // latest first: that is where the sequence goes on
        std::sort(holes.begin(), holes.end(), [&](uint32_t a, uint32_t b) { return slot_time[tiles[a].slot] > slot_time[tiles[b].slot]; });
        for (uint32_t tile : holes) {
            if (!is_open[tiles[tile].owner]) {
                is_open[tiles[tile].owner] = true;
                tiles[tile].state   = OPEN;
                tiles[tile].is_sink = false;
            }
        }
    }
}

void llama_kvarn::copy_stream(uint32_t src, uint32_t dst) {
    for (uint32_t i = 0; i < n_tiles; ++i) {
        free_tile(dst*n_tiles + i);
    }
    for (uint32_t i = 0; i < n_tiles; ++i) {
        const uint32_t from = src*n_tiles + i;
        const uint32_t to   = dst*n_tiles + i;

        if (n_used(to) == 0) {
            continue;
        }
        const bool has_tile = tiles[from].state != OPEN;
        const bool has_slot = tiles[from].state == OPEN || tiles[from].is_sink;
        if (has_slot) {
            open(to, owner_of(dst, 0));
            copies.push_back({ (uint32_t) tiles[from].slot, (uint32_t) tiles[to].slot, true });
        }
        if (has_tile) {
            copies.push_back({ from, to, false });
        }
        tiles[to].state   = !has_tile ? OPEN : has_slot ? CACHED : SEALED;
        tiles[to].owner   = owner_of(dst, 0);
        tiles[to].is_sink = tiles[from].is_sink;
    }
    used[dst] = kv.v_cells[dst].get_used();
}

//
// prepare()
//

std::unique_ptr<kvarn_placement> llama_kvarn::save() {
    // what a restore left full but unsealed; its data are in memory by now
    for (uint32_t tile = 0; tile < tiles.size(); ++tile) {
        if (tiles[tile].state == OPEN && n_used(tile) == KVARN_G) {
            seal_on_host(tile);
        }
    }
    return std::unique_ptr<kvarn_placement>(new kvarn_placement(*this)); // the base is private: not for make_unique
}

void llama_kvarn::restore(const kvarn_placement & saved) {
    static_cast<kvarn_placement &>(*this) = saved;
}
