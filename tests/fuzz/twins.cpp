// twins.cpp - does what an operation says to both contexts and compares return values, positions, logits and contents.
//
// SPDX-License-Identifier: MIT

#include "twins.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <mutex>

static const int N_BATCH     = 1024;
static const int POS_MAX     = 100000;

// A row of a tile against the f16 row. Real tiles: far below what an empty row (1) or that of another token (2) makes.
// After a shift the twins rounded the same keys to f16 in different ways.
static const float ROW_REAL[5]   = { 0, 0, 0.85f, 0.5f, 0.25f }; // by bits
static const float ROW_SHIFTED   = 1e-5f;
static const float ROW_DEEPER    = 1e-3f;                        // exact tiles, layers after the first: sums in another order
static const float LOGITS_EXACT  = 1e-4f;                        // the same, with V summed in f16

static thread_local std::string log_lines; // warnings and errors of the operation at hand

void keep_log(ggml_log_level level, const char * text, void *) {
    if (level == GGML_LOG_LEVEL_ERROR || level == GGML_LOG_LEVEL_WARN) {
        log_lines += text;
        if (log_lines.size() > 4000) {
            log_lines.erase(0, log_lines.size() - 2000);
        }
    }
}

static ggml_type type_of(int bits) {
    const std::string name = bits == 16 ? "f16" : "kvarn" + std::to_string(bits);
    for (int i = 0; i < GGML_TYPE_COUNT; ++i) {
        if (ggml_type_name((ggml_type) i) && name == ggml_type_name((ggml_type) i)) {
            return (ggml_type) i;
        }
    }
    throw std::runtime_error("no cache type " + name);
}

twins::twins(const tested_model & model, const settings & set) : model(model), set(set) {
    create_both();
}

twins::~twins() {
    free_both();
}

llama_context * twins::try_to_create(bool is_kvarn) const {
    static std::mutex mutex; // two threads share the environment
    std::lock_guard<std::mutex> lock(mutex);
    setenv("KVARN_TEST_EXACT", std::to_string(set.exact).c_str(), 1);
    setenv("KVARN_STRICT", std::to_string(set.strict).c_str(), 1);
    setenv("KVARN_SINK", std::to_string(set.sink).c_str(), 1);
    llama_context_params params = llama_context_default_params();
    params.n_ctx           = set.unified ? set.n_ctx : set.n_ctx*set.n_seq;
    params.n_batch         = N_BATCH;
    params.n_ubatch        = set.n_ubatch;
    params.n_seq_max       = set.n_seq;
    params.n_threads       = set.threads;
    params.n_threads_batch = set.threads;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    params.type_k          = is_kvarn ? type_of(set.keys)   : GGML_TYPE_F16;
    params.type_v          = is_kvarn ? type_of(set.values) : GGML_TYPE_F16;
    params.kv_unified      = set.unified;
    params.swa_full        = set.swa_full;
    return llama_init_from_model(model.model, params);
}

llama_context * twins::create(bool is_kvarn) const {
    llama_context * ctx = try_to_create(is_kvarn);
    if (!ctx) {
        throw mismatch("no context: " + log_lines);
    }
    return ctx;
}

int twins::create_without_memory(fault_kind kind) const {
    for (int n = 0; ; ++n) {
        log_lines.clear();
        arm_fault(kind, n);
        llama_context * ctx = try_to_create(true);
        const bool has_failed = disarm_fault();
        llama_free(ctx);
        if (has_failed && (ctx || log_lines.empty())) {
            throw mismatch("allocation " + std::to_string(n) + " fails, and " + (ctx ? "there is a context" : "no line says so"));
        }
        if (!has_failed) {
            return n;
        }
    }
}

void twins::create_both() {
    f16   = create(false);
    kvarn = create(true);
    is_pending = is_shifted = false;
    on_device.clear();
}

void twins::free_both() {
    llama_free(f16);
    llama_free(kvarn);
}

// ---- decode

std::vector<twins::row> twins::rows_for(const operation & op, size_t first, int mode, random_numbers & rng) const {
    std::vector<std::vector<row>> parts;
    std::vector<int> all;
    for (size_t i = first; i + 1 < op.args.size(); i += 2) {
        const int seq = op.args[i]%set.n_seq;
        if (std::find(all.begin(), all.end(), seq) == all.end()) {
            all.push_back(seq);
        }
    }
    const int    n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model.model));
    const size_t n_batch = llama_n_batch(f16);
    size_t room = n_batch;
    std::vector<bool> seen(set.n_seq, false);
    for (size_t i = first; i + 1 < op.args.size(); i += 2) {
        const int seq = op.args[i]%set.n_seq;
        if (seen[seq] || (mode == 2 && !parts.empty())) {
            continue;
        }
        seen[seq] = true;
        const size_t n = std::min<size_t>(room, std::max(1, op.args[i + 1]));
        int pos = pos_max(seq) + 1;
        if (pos == 0 && rng.one_in(8)) {
            pos = rng.below(500); // a sequence may start anywhere
        }
        std::vector<row> rows;
        for (size_t j = 0; j < n; ++j) {
            rows.push_back({ 3 + rng.below(n_vocab - 4), pos + (int) j, mode == 2 ? all : std::vector<int>{ seq },
                             j + 1 == n || rng.one_in(40) });
        }
        room -= n;
        parts.push_back(rows);
    }
    std::vector<row> res;
    for (size_t i = 0, left = n_batch - room; res.size() < left; ++i) {
        for (const auto & rows : parts) {
            if (mode != 1) {
                if (i == 0) {
                    res.insert(res.end(), rows.begin(), rows.end());
                }
            } else if (i < rows.size()) {
                res.push_back(rows[i]);
            }
        }
    }
    return res;
}

// a call of the library, in which an allocation fails if that was asked for and the context is the kvarn one
template <typename F> auto twins::with_fault(llama_context * ctx, bool is_decode, F && call) -> decltype(call()) {
    has_fired = false;
    if (ctx != kvarn || n_before < 0) {
        return call();
    }
    if (fault == FAULT_BUFFER && !is_decode) { // upstream's own ggml_init() aborts
        n_before = -1;
        return call();
    }
    arm_fault(fault, n_before);
    n_before = -1;
    log_lines.clear();
    try {
        const auto res = call();
        has_fired = disarm_fault();
        stats.n_faults += has_fired;
        return res;
    } catch (const std::exception & error) {
        disarm_fault();
        throw mismatch(std::string("an exception leaves the library: ") + error.what());
    }
}

int twins::decode(llama_context * ctx, const std::vector<row> & rows) {
    llama_batch batch = llama_batch_init(rows.size(), 0, set.n_seq);
    for (const auto & r : rows) {
        const int i = batch.n_tokens++;
        batch.token[i]    = r.token;
        batch.pos[i]      = r.pos;
        batch.n_seq_id[i] = r.seqs.size();
        batch.logits[i]   = r.wanted;
        std::copy(r.seqs.begin(), r.seqs.end(), batch.seq_id[i]);
    }
    const int status = with_fault(ctx, true, [&] { return llama_decode(ctx, batch); });
    llama_batch_free(batch);
    return status;
}

void twins::decode_both(const std::vector<row> & rows) {
    const int found = decode(kvarn, rows);
    if (has_fired && found != 0) {
        if (log_lines.empty()) {
            throw mismatch("no memory, and no line says so");
        }
        follow(rows, found);
        return;
    }
    const int wanted = decode(f16, rows);
    if (wanted >= 0) {
        is_pending = false;
    }
    stats.n_full += wanted == 1;
    if (wanted != found) {
        throw mismatch("decode of " + std::to_string(rows.size()) + " tokens: " + std::to_string(found) +
                ", f16: " + std::to_string(wanted));
    }
    if (wanted != 0) {
        return;
    }
    const int n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model.model));
    for (size_t i = 0; i < rows.size(); ++i) {
        if (!rows[i].wanted) {
            continue;
        }
        const float * a = llama_get_logits_ith(f16,   i);
        const float * b = llama_get_logits_ith(kvarn, i);
        double error = 0, norm = 1e-20;
        for (int j = 0; j < n_vocab; ++j) {
            error += ((double) a[j] - b[j])*((double) a[j] - b[j]);
            norm  += (double) a[j]*a[j];
        }
        error /= norm;
        stats.logits_worst = std::max(stats.logits_worst, error);
        stats.logits_sum  += error;
        stats.n_logits++;
        if (!(error <= (set.exact ? LOGITS_EXACT : 4.0f))) {
            throw mismatch("logits of row " + std::to_string(i) + " (sequence " + std::to_string(rows[i].seqs[0]) +
                    ", position " + std::to_string(rows[i].pos) + ") differ: NMSE " + std::to_string(error));
        }
    }
}

static bool is_time_to_abort(void * left) {
    return --*(int *) left < 0;
}

// gives f16 what the other one kept of a batch that failed: the ubatches before the one given up
void twins::follow(const std::vector<row> & rows, int status) {
    std::vector<row> kept = rows;
    kept.erase(std::remove_if(kept.begin(), kept.end(), [&](const row & r) {
        return r.pos > llama_memory_seq_pos_max(llama_get_memory(kvarn), r.seqs[0]);
    }), kept.end());
    if (kept.empty()) {
        return;
    }
    is_pending = false;
    if (decode(f16, kept) != 0) {
        throw mismatch("decode failed with " + std::to_string(status) + ", and f16 cannot follow");
    }
}

void twins::decode_and_abort(const std::vector<row> & rows, int after) {
    llama_set_abort_callback(kvarn, is_time_to_abort, &after);
    const int status = decode(kvarn, rows);
    const bool has_failed = has_fired && status != 0;
    llama_set_abort_callback(kvarn, nullptr, nullptr);

    if (status == 2 || has_failed) {
        stats.n_aborted += status == 2;
        follow(rows, status);
        return;
    }
    is_pending = false;
    const int wanted = decode(f16, rows);
    if (wanted != status) {
        throw mismatch("decode to be given up: " + std::to_string(status) + ", f16: " + std::to_string(wanted));
    }
}

// ---- states

// Pending copies and shifts are made by the next decode: of a token that is removed again.
void twins::make_updates(llama_context * ctx) {
    const int pos = pos_max(0) + 1;
    decode(ctx, { { 3, pos, { 0 }, false } });
    llama_memory_seq_rm(llama_get_memory(ctx), 0, pos, -1);
}

// Upstream's states leave pending copies and shifts out; ours must not.
bool twins::flush() {
    if (is_pending && model.is_recurrent) {
        return false;
    }
    if (is_pending) {
        make_updates(f16);
        is_pending = false;
    }
    return true;
}

bool twins::save(llama_context * ctx, int seq, uint32_t flags, std::vector<uint8_t> & state) {
    state.resize(seq < 0 ? llama_state_get_size(ctx) : llama_state_seq_get_size_ext(ctx, seq, flags));
    const size_t n = with_fault(ctx, false, [&] {
        return seq < 0 ? llama_state_get_data(ctx, state.data(), state.size())
                       : llama_state_seq_get_data_ext(ctx, state.data(), state.size(), seq, flags);
    });
    return n == state.size() && n > 0;
}

bool twins::load(llama_context * ctx, int seq, uint32_t flags, const std::vector<uint8_t> & state) {
    const size_t n = with_fault(ctx, false, [&] {
        return seq < 0 ? llama_state_set_data(ctx, state.data(), state.size())
                       : llama_state_seq_set_data_ext(ctx, state.data(), state.size(), seq, flags);
    });
    return n == state.size() && n > 0;
}

// false: there was no memory
bool twins::save_both(int seq, uint32_t flags, twin_states & states) {
    const bool wanted = save(f16,   seq, flags, states.f16);
    const bool found  = save(kvarn, seq, flags, states.kvarn);
    if (!wanted || (!found && !has_fired) || (!found && log_lines.empty())) {
        throw mismatch("no state: " + log_lines);
    }
    return found;
}

void twins::load_both(int seq, uint32_t flags, const twin_states & states) {
    log_lines.clear();
    if (seq >= 0) { // upstream keeps what is there when the saved sequence was empty
        llama_memory_seq_rm(llama_get_memory(f16), seq, -1, -1);
    }
    const bool wanted = load(f16, seq, flags, states.f16);
    log_lines.clear();
    const bool found  = load(kvarn, seq, flags, states.kvarn);
    if (wanted && !found && has_fired && !log_lines.empty()) { // what was there is gone, as after any refused state
        if (seq < 0) {
            llama_memory_clear(llama_get_memory(f16), true);
        } else {
            llama_memory_seq_rm(llama_get_memory(f16), seq, -1, -1);
        }
        return;
    }
    if (wanted != found) {
        throw mismatch(std::string("the state is ") + (found ? "taken" : "refused") + ", f16 the other way round: " + log_lines);
    }
    if (!found && log_lines.empty()) {
        throw mismatch("a state is refused without a line");
    }
    stats.n_refused += !found;
    if (!found && seq >= 0 && (model.n_caches > 1 || model.is_recurrent)) { // the second memory still has what it had: upstream's
        llama_memory_seq_rm(llama_get_memory(kvarn), seq, -1, -1);
    }
}

// ---- checks

void twins::check_positions() const {
    for (int seq = 0; seq < set.n_seq; ++seq) {
        const int low  = llama_memory_seq_pos_min(llama_get_memory(kvarn), seq);
        const int high = llama_memory_seq_pos_max(llama_get_memory(kvarn), seq);
        if (low != pos_min(seq) || high != pos_max(seq)) {
            throw mismatch("sequence " + std::to_string(seq) + " has positions " + std::to_string(low) + " to " +
                    std::to_string(high) + ", f16: " + std::to_string(pos_min(seq)) + " to " + std::to_string(pos_max(seq)));
        }
    }
}

void twins::check_contents() {
    std::vector<uint8_t> a, b;
    n_before = -1;
    if (!save(f16, -1, 0, a) || !save(kvarn, -1, 0, b)) {
        throw mismatch("no state: " + log_lines);
    }
    auto found = read_kvarn_state(b, model.n_caches);
    if (std::any_of(found.begin(), found.end(), [](const cache_contents & c) { return c.has_shift; })) {
        make_updates(kvarn);
        save(kvarn, -1, 0, b);
        found = read_kvarn_state(b, model.n_caches);
    }
    row_limits limits = { { is_shifted ? ROW_SHIFTED : 0, 0 }, ROW_DEEPER };
    if (!set.exact) {
        limits.first[0] = set.keys   == 16 ? limits.first[0] : is_shifted ? INFINITY : ROW_REAL[set.keys];
        limits.first[1] = set.values == 16 ? 0 : ROW_REAL[set.values];
        limits.other    = INFINITY; // other layers saw other attention outputs
    }
    row_errors errors;
    const std::string difference = compare(read_f16_state(a, model.n_caches), found, limits, errors);
    stats.n_cells   += errors.n;
    stats.rows_sum  += errors.sum;
    stats.rows_worst = std::max(stats.rows_worst, errors.worst);
    if (!difference.empty()) {
        throw mismatch("contents differ: " + difference);
    }
}

// ---- operations

// positions [p0, p1) of an operation's range; false: the sequence is empty
bool twins::range(int seq, int from, int n, int & p0, int & p1) const {
    int low = pos_min(std::max(seq, 0)), high = pos_max(std::max(seq, 0));
    for (int s = 0; seq < 0 && s < set.n_seq; ++s) {
        if (pos_max(s) >= 0) {
            low  = low < 0 ? pos_min(s) : std::min(low, pos_min(s));
            high = std::max(high, pos_max(s));
        }
    }
    p0 = from < 0 ? -1 : low + (int) ((int64_t) (high - low + 1)*from/1000);
    p1 = n < 0 ? -1 : std::max(p0, 0) + n;
    return high >= 0;
}

void twins::run(const operation & op) {
    const auto & arg = op.args;
    llama_memory_t memory[2] = { llama_get_memory(f16), llama_get_memory(kvarn) };
    const int seq = arg.empty() || op.kind == OP_DECODE || op.kind == OP_ABORT ? 0 : arg[0] < 0 ? -1 : arg[0]%set.n_seq;
    int p0, p1;

    log_lines.clear();
    switch (op.kind) {
        case OP_DECODE:
        case OP_ABORT: {
            random_numbers rng(arg[0]);
            const auto rows = rows_for(op, 2, op.kind == OP_ABORT ? 0 : arg[1], rng);
            if (rows.empty() || rows.back().pos > POS_MAX || (op.kind == OP_ABORT && model.is_recurrent)) {
                return;
            }
            if (op.kind == OP_DECODE) {
                decode_both(rows);
            } else {
                decode_and_abort(rows, arg[1]);
            }
            break;
        }
        case OP_BAD:
            if (pos_max(seq) < 0) {
                return;
            }
            decode_both({ { 3, pos_max(seq) + 2, { seq }, true } });
            break;
        case OP_CUT:
        case OP_RM: {
            if (op.kind == OP_CUT) {
                p0 = std::max(pos_max(seq) + 1 - arg[1], 0);
                p1 = -1;
            } else if (!range(seq, arg[1], arg[2], p0, p1)) {
                return;
            }
            const bool wanted = llama_memory_seq_rm(memory[0], seq, p0, p1);
            const bool found  = llama_memory_seq_rm(memory[1], seq, p0, p1);
            if (wanted != found) {
                throw mismatch(std::string("seq_rm returned ") + (found ? "true" : "false"));
            }
            break;
        }
        case OP_CP: {
            const int dst = arg[1]%set.n_seq;
            if (dst == seq || !range(seq, 0, 0, p0, p1)) {
                return;
            }
            const bool all = !set.unified || arg[2] >= 1000 || model.is_recurrent;
            p1 = all ? -1 : p0 + (int) ((int64_t) (pos_max(seq) + 1 - p0)*arg[2]/1000);
            for (auto & mem : memory) {
                llama_memory_seq_cp(mem, seq, dst, all ? -1 : p0, p1);
            }
            is_pending = is_pending || !set.unified;
            break;
        }
        case OP_KEEP:  for (auto & mem : memory) { llama_memory_seq_keep(mem, seq); } break;
        case OP_CLEAR: for (auto & mem : memory) { llama_memory_clear(mem, arg[0] != 0); } is_shifted = false; break;
        case OP_ADD:
        case OP_DIV:
            if (!llama_memory_can_shift(memory[0]) || !llama_memory_can_shift(memory[1]) || !range(seq, arg[1], arg[2], p0, p1) ||
                    pos_max(seq) + arg[3] > POS_MAX) {
                return;
            }
            for (auto & mem : memory) {
                if (op.kind == OP_ADD) {
                    llama_memory_seq_add(mem, seq, p0, p1, arg[3]);
                } else {
                    llama_memory_seq_div(mem, seq, p0, p1, arg[3]);
                }
            }
            is_pending = is_shifted = true;
            break;
        case OP_SAVE:
            if (!flush()) {
                return;
            }
            if (!save_both(seq, 0, saved[arg[1]])) {
                saved.erase(arg[1]);
            }
            break;
        case OP_LOAD:
            if (!saved.count(arg[1]) || !flush()) {
                return;
            }
            load_both(seq, 0, saved[arg[1]]);
            break;
        case OP_SNAP:
            if (!flush()) {
                return;
            }
            if (!save_both(seq, LLAMA_STATE_SEQ_FLAGS_ON_DEVICE, on_device[seq])) {
                on_device.erase(seq);
            }
            break;
        case OP_BACK:
            if (!on_device.count(arg[1]%set.n_seq) || !flush()) {
                return;
            }
            load_both(seq, LLAMA_STATE_SEQ_FLAGS_ON_DEVICE, on_device[arg[1]%set.n_seq]);
            break;
        case OP_ALIEN: {
            std::vector<uint8_t> state;
            n_before = -1;
            if (!flush() || !save(f16, seq, 0, state)) {
                return;
            }
            if (load(kvarn, seq, 0, state)) {
                throw mismatch("the state of an f16 cache is taken");
            }
            if (log_lines.find("kvarn") == std::string::npos) {
                throw mismatch("the state of an f16 cache is refused without a line of ours: " + log_lines);
            }
            break;
        }
        case OP_FRESH:
            free_both();
            f16 = kvarn = nullptr;
            set.n_ctx = std::min(std::max(arg[0], 256), 2048);
            set.sink  = arg[1];
            create_both();
            break;
        case OP_CHECK:
            if (!flush()) {
                return;
            }
            check_contents();
            break;
        case OP_FAULT:
            fault    = (fault_kind) arg[0];
            n_before = arg[1];
            break;
        case OP_COUNT:
            return;
    }
    stats.done[op.kind]++;
    check_positions();
}
