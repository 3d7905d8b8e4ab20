// program.h - a program of calls to llama.cpp's decode, memory and state functions: operations, their text, and random ones.
//
// SPDX-License-Identifier: MIT
//
// An operation names its operands relative to what is there (the last n tokens, the first third of a sequence), so that any part
// of a program is a program, too: that is what shrinking needs.

#pragma once

#include <cstdint>
#include <string>
#include <vector>

enum op_kind : int {
    OP_DECODE, // seed mode (seq n)..   one batch; mode 0: a sequence after the other, 1: in turns, 2: every token in all of them
    OP_ABORT,  // seed after seq n      a decode given up when the library asks for the `after`-th time
    OP_BAD,    // seq                   a batch that leaves a position out: refused
    OP_CUT,    // seq n                 the last n positions
    OP_RM,     // seq from n            n positions from `from` thousandths of the sequence on; seq -1: of all; n -1: to the end
    OP_CP,     // src dst part          the first `part` thousandths; 1000: everything; across streams always everything
    OP_KEEP,   // seq
    OP_CLEAR,  // data
    OP_ADD,    // seq from n delta      positions shifted
    OP_DIV,    // seq from n divisor    positions divided
    OP_SAVE,   // seq slot              state of a sequence, -1: of everything
    OP_LOAD,   // seq slot              restored, perhaps as another sequence
    OP_SNAP,   // seq                   state kept on the device
    OP_BACK,   // seq from              .. of sequence `from`, restored
    OP_ALIEN,  // seq                   the f16 context's state given to the kvarn one: refused
    OP_FRESH,  // n_ctx sink            new contexts; states are kept
    OP_CHECK,  //                       all cells compared
    OP_FAULT,  // kind n                the n-th allocation of a kind fails in the next call that decodes, saves or restores
    OP_COUNT,
};

struct operation {
    op_kind          kind;
    std::vector<int> args;
};

struct settings {
    int n_ctx    = 512; // cells of a stream
    int n_ubatch = 128;
    int n_seq    = 3;
    int unified  = 1;
    int keys     = 2;   // bits, 16: f16
    int values   = 2;
    int exact    = 1;   // KVARN_TEST_EXACT
    int strict   = 0;   // KVARN_STRICT
    int sink     = 0;   // KVARN_SINK
    int threads  = 1;
    int swa_full = 1;
};

struct program {
    settings               set;
    std::vector<operation> ops;
};

extern const char * const op_names[OP_COUNT];

std::string to_string(const program & p);
std::string to_string(const operation & op);
program     parse_program(const std::string & text); // throws std::runtime_error

// what a run of the fuzzer may draw from
struct choices {
    bool exact = true;
    bool any_shift = false; // OP_ADD, OP_DIV
    bool faults    = false; // OP_FAULT
    int  threads   = 1;
};

program random_program(uint64_t seed, int n_ops, const choices & c);

// splitmix64: the same numbers everywhere
class random_numbers {
public:
    explicit random_numbers(uint64_t seed) : state(seed) {}

    uint64_t next() {
        uint64_t z = state += 0x9e3779b97f4a7c15;
        z = (z ^ z >> 30)*0xbf58476d1ce4e5b9;
        z = (z ^ z >> 27)*0x94d049bb133111eb;
        return z ^ z >> 31;
    }
    int below(int n)            { return (int) (next()%(uint64_t) n); }
    int in(int low, int high)   { return low + below(high - low + 1); }
    bool one_in(int n)          { return below(n) == 0; }
    template <typename T, size_t n> T of(const T (&list)[n]) { return list[below(n)]; }

private:
    uint64_t state;
};
