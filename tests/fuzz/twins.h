// twins.h - two contexts on one model, one with a kvarn cache and one with f16, that are given the same calls and must agree.
//
// SPDX-License-Identifier: MIT

#pragma once

#include "contents.h"
#include "faults.h"
#include "program.h"

#include "llama.h"

#include <map>
#include <stdexcept>
#include <string>
#include <vector>

// the twins disagree, or one of them broke a rule
struct mismatch : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct statistics {
    size_t done[OP_COUNT] = {}; // operations that were not skipped
    size_t n_full    = 0;       // decodes for which there was no room
    size_t n_aborted = 0;
    size_t n_refused = 0;       // states refused by both
    size_t n_faults  = 0;       // allocations that failed
    size_t n_cells   = 0;       // compared, rows of the first layer
    double rows_worst = 0, rows_sum = 0;
    size_t n_logits  = 0;
    double logits_worst = 0, logits_sum = 0;
};

// a model and what its states look like
struct tested_model {
    llama_model * model;
    int           n_caches;     // 2: with sliding windows
    bool          is_recurrent; // partly: sequences cannot be cut
};

// to be given to llama_log_set() once
void keep_log(ggml_log_level level, const char * text, void *);

class twins {
public:
    twins(const tested_model & model, const settings & set);
    ~twins();

    void run(const operation & op); // throws mismatch

    // Contexts of which one allocation after the other fails, until none does; how many. Throws mismatch.
    int create_without_memory(fault_kind kind) const;

    statistics stats;

private:
    struct row { int token, pos; std::vector<int> seqs; bool wanted; };
    struct twin_states { std::vector<uint8_t> f16, kvarn; };

    llama_context * try_to_create(bool is_kvarn) const;
    llama_context * create(bool is_kvarn) const;
    void create_both();
    void free_both();

    int  pos_min(int seq) const { return llama_memory_seq_pos_min(llama_get_memory(f16), seq); }
    int  pos_max(int seq) const { return llama_memory_seq_pos_max(llama_get_memory(f16), seq); }
    bool range(int seq, int from, int n, int & p0, int & p1) const;

    std::vector<row> rows_for(const operation & op, size_t first, int mode, random_numbers & rng) const;
    template <typename F> auto with_fault(llama_context * ctx, bool is_decode, F && call) -> decltype(call());
    int  decode(llama_context * ctx, const std::vector<row> & rows);
    void decode_both(const std::vector<row> & rows);
    void decode_and_abort(const std::vector<row> & rows, int after);
    void follow(const std::vector<row> & rows, int status);

    void make_updates(llama_context * ctx);
    bool flush();
    bool save(llama_context * ctx, int seq, uint32_t flags, std::vector<uint8_t> & state);
    bool load(llama_context * ctx, int seq, uint32_t flags, const std::vector<uint8_t> & state);
    bool save_both(int seq, uint32_t flags, twin_states & states);
    void load_both(int seq, uint32_t flags, const twin_states & states);

    void check_positions() const;
    void check_contents();

    const tested_model model;
    settings set;

    llama_context * f16   = nullptr;
    llama_context * kvarn = nullptr;

    bool is_pending = false; // the f16 twin has copies or shifts to make that its states lack; clearing it does not end them
    bool is_shifted = false; // rows were rotated again: the twins round differently

    fault_kind fault = FAULT_HOST; // of the next call
    int  n_before  = -1;           // allocations before it; -1: none
    bool has_fired = false;        // in the call before

    std::map<int, twin_states> saved;   // by slot
    std::map<int, twin_states> on_device; // by sequence
};

