// states.cpp - libFuzzer target: any bytes as a saved state. Nothing may crash, and a refused state leaves a context that works.
//
//   KVARN_FUZZ_MODEL=MODEL states [libFuzzer's options] CORPUS
//
// An input is one byte (which call, which sequence) and a state. Hashes are put right after most mutations: what lies behind them
// is what needs the test. This file includes the source it tests, which gives it the hash, and takes the place of the library's.
//
// SPDX-License-Identifier: MIT

#include "kvarn-cache-state.cpp"

#include "llama.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

extern "C" size_t LLVMFuzzerMutate(uint8_t * data, size_t size, size_t max_size);

static const int N_TOKENS[2] = { 150, 40 }; // of the two sequences: a sealed tile and an open one; an open one

static llama_model   * model = nullptr;
static llama_context * ctx   = nullptr;

static std::vector<uint8_t> whole;            // the state that every input finds
static std::vector<float>   expected[2];      // logits after one more token of each sequence
static std::vector<float>   expected_fresh;   // logits of a first token

static void fail(const char * what) {
    fprintf(stderr, "states: %s\n", what);
    abort();
}

// logits after one token, {} if it could not be decoded
static std::vector<float> decode(int seq, int n_tokens = 1) {
    llama_batch batch = llama_batch_init(n_tokens, 0, 1);
    const int pos = llama_memory_seq_pos_max(llama_get_memory(ctx), seq) + 1;
    for (int i = 0; i < n_tokens; ++i) {
        batch.token[i]     = 3 + (i*7 + seq)%250;
        batch.pos[i]       = pos + i;
        batch.n_seq_id[i]  = 1;
        batch.seq_id[i][0] = seq;
        batch.logits[i]    = i + 1 == n_tokens;
    }
    batch.n_tokens = n_tokens;
    const int status = llama_decode(ctx, batch);
    llama_batch_free(batch);
    if (status != 0) {
        return {};
    }
    const float * logits = llama_get_logits_ith(ctx, -1);
    return std::vector<float>(logits, logits + llama_vocab_n_tokens(llama_model_get_vocab(model)));
}

static bool is_close(const std::vector<float> & a, const std::vector<float> & b) {
    double error = 0, norm = 0;
    for (size_t i = 0; i < a.size() && i < b.size(); ++i) {
        error += (a[i] - b[i])*(a[i] - b[i]);
        norm  += a[i]*a[i];
    }
    return a.size() == b.size() && error <= 1e-4*norm;
}

static void save(uint8_t first, int seq) {
    const char * folder = getenv("KVARN_FUZZ_SEEDS"); // the states proper are written there
    if (!folder) {
        return;
    }
    std::vector<uint8_t> state(1 + (seq < 0 ? llama_state_get_size(ctx) : llama_state_seq_get_size(ctx, seq)), first);
    if (seq < 0) {
        llama_state_get_data(ctx, state.data() + 1, state.size() - 1);
    } else {
        llama_state_seq_get_data(ctx, state.data() + 1, state.size() - 1, seq);
    }
    FILE * file = fopen((std::string(folder) + "/state-" + std::to_string(first)).c_str(), "wb");
    if (!file || fwrite(state.data(), 1, state.size(), file) != state.size() || fclose(file) != 0) {
        fail("cannot write a state to KVARN_FUZZ_SEEDS");
    }
}

extern "C" int LLVMFuzzerInitialize(int *, char ***) {
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    llama_backend_init();
    model = llama_model_load_from_file(getenv("KVARN_FUZZ_MODEL"), llama_model_default_params());
    llama_context_params params = llama_context_default_params();
    params.n_ctx           = 512;
    params.n_ubatch        = 128;
    params.n_seq_max       = 2;
    params.n_threads       = 1;
    params.n_threads_batch = 1;
    params.kv_unified      = true;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    params.type_k          = GGML_TYPE_KVARN2;
    params.type_v          = GGML_TYPE_KVARN3;
    ctx = model ? llama_init_from_model(model, params) : nullptr;
    if (!ctx) {
        fail("no model in KVARN_FUZZ_MODEL, or no context");
    }
    expected_fresh = decode(0);
    llama_memory_clear(llama_get_memory(ctx), true);
    for (int seq = 0; seq < 2; ++seq) {
        decode(seq, N_TOKENS[seq]);
    }
    whole.resize(llama_state_get_size(ctx));
    llama_state_get_data(ctx, whole.data(), whole.size());
    save(0, -1);
    save(2, 0);
    save(3, 1);
    for (int seq = 0; seq < 2; ++seq) {
        expected[seq] = decode(seq);
    }
    return 0;
}

// bit 1 of the first byte: a sequence's state (bit 0: which) or everything
extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    if (size == 0) {
        return 0;
    }
    if (llama_state_set_data(ctx, whole.data(), whole.size()) != whole.size()) {
        fail("the context does not take its own state any more");
    }
    const int seq = data[0] & 2 ? data[0] & 1 : -1;
    uint32_t n_arch = 0;
    memcpy(&n_arch, data + 1, std::min<size_t>(size - 1, sizeof(n_arch)));
    if (seq < 0 && n_arch > size) {
        return 0; // upstream takes that much memory before it notices
    }
    std::vector<uint8_t> state(data + 1, data + size); // of its own, so that a byte too far is noticed
    const size_t n = seq < 0 ? llama_state_set_data(ctx, state.data(), state.size())
                             : llama_state_seq_set_data(ctx, state.data(), state.size(), seq);
    if (n > state.size()) {
        fail("more bytes were read than there are");
    }
    if (seq >= 0 && !is_close(expected[1 - seq], decode(1 - seq))) {
        fail("the other sequence has changed");
    }
    if (n != 0) {
        decode(0); // whatever it says
        decode(1, 100);
    } else if (seq < 0) {
        llama_memory_clear(llama_get_memory(ctx), false); // a state refused by its head leaves what was there
        if (!is_close(expected_fresh, decode(0))) {
            fail("after a refused state the context does not decode as a new one");
        }
    }
    return 0;
}

// ---- mutations

static uint64_t hash_of(const uint8_t * data, size_t size) {
    kvarn_hash hash;
    hash.add(data, size);
    return hash.get();
}

// puts the two hashes of a state with one stream right, if its parts can be found
static void mend(uint8_t * data, size_t size) {
    const auto u32 = [&](size_t at) {
        uint32_t value = 0;
        if (at + sizeof(value) <= size) {
            memcpy(&value, data + at, sizeof(value));
        }
        return (size_t) value;
    };
    size_t at = 1;
    at += data[0] & 2 ? 8 : 4 + u32(at); // upstream's magic and sequence, or the architecture
    at += 4;                             // our magic
    at += 4 + u32(at);                   // description
    at += 4;                             // streams
    const size_t n_record = u32(at);
    if (at > size || at + 16 + n_record + 8 > size) {
        return;
    }
    const uint64_t record = hash_of(data + at + 16, n_record);
    memcpy(data + at + 8, &record, sizeof(record));
    at += 16 + n_record;

    // parts of the data are hashed one by one, as they are read: only where their sizes are multiples of 32 this is the same
    const uint64_t rest = hash_of(data + at, size - at - 8);
    memcpy(data + size - 8, &rest, sizeof(rest));
}

// Half of the time a few bytes of the head, the record or the end: the rest are rows and tiles, which mean nothing to a reader.
extern "C" size_t LLVMFuzzerCustomMutator(uint8_t * data, size_t size, size_t max_size, unsigned seed) {
    if (seed%2 == 0 && size > 600) {
        const size_t n  = 1 + seed/2%32;
        const size_t at = seed/64%8 == 0 ? size - n : seed/512%std::min<size_t>(size - n, 4500);
        LLVMFuzzerMutate(data + at, n, n);
    } else {
        size = LLVMFuzzerMutate(data, size, max_size);
    }
    if (size > 0 && seed/7%8 != 0) {
        mend(data, size);
    }
    return size;
}
