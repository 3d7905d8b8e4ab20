// program.cpp - text form and random generation of programs.
//
// SPDX-License-Identifier: MIT

#include "program.h"

#include "faults.h"

#include <cstring>
#include <sstream>
#include <stdexcept>

const char * const op_names[OP_COUNT] = {
    "decode", "abort", "bad", "cut", "rm", "cp", "keep", "clear", "add", "div", "save", "load", "snap", "back", "alien", "fresh",
    "check", "fault",
};

// least number of arguments
static const size_t op_args[OP_COUNT] = { 4, 4, 1, 2, 3, 3, 1, 1, 4, 4, 2, 2, 1, 2, 1, 2, 0, 2 };

struct setting_name { const char * name; int settings::* member; };

static const setting_name setting_names[] = {
    { "n_ctx", &settings::n_ctx }, { "n_ubatch", &settings::n_ubatch }, { "n_seq", &settings::n_seq },
    { "unified", &settings::unified }, { "keys", &settings::keys }, { "values", &settings::values },
    { "exact", &settings::exact }, { "strict", &settings::strict }, { "sink", &settings::sink },
    { "threads", &settings::threads }, { "swa_full", &settings::swa_full },
};

std::string to_string(const operation & op) {
    std::string res = op_names[op.kind];
    for (int arg : op.args) {
        res += " " + std::to_string(arg);
    }
    return res;
}

std::string to_string(const program & p) {
    std::string res = "set";
    for (const auto & s : setting_names) {
        res += std::string(" ") + s.name + "=" + std::to_string(p.set.*s.member);
    }
    for (const auto & op : p.ops) {
        res += "\n" + to_string(op);
    }
    return res + "\n";
}

program parse_program(const std::string & text) {
    program res;
    std::istringstream lines(text);
    std::string line;
    while (std::getline(lines, line)) {
        std::istringstream words(line);
        std::string word;
        if (!(words >> word) || word[0] == '#') {
            continue;
        }
        if (word == "set") {
            while (words >> word) {
                const size_t eq = word.find('=');
                bool known = false;
                for (const auto & s : setting_names) {
                    if (eq != std::string::npos && word.substr(0, eq) == s.name) {
                        res.set.*s.member = atoi(word.c_str() + eq + 1);
                        known = true;
                    }
                }
                if (!known) {
                    throw std::runtime_error("unknown setting: " + word);
                }
            }
            continue;
        }
        int kind = 0;
        while (kind < OP_COUNT && word != op_names[kind]) {
            ++kind;
        }
        operation op = { (op_kind) kind, {} };
        for (int arg; words >> arg;) {
            op.args.push_back(arg);
        }
        if (kind == OP_COUNT || op.args.size() < op_args[kind]) {
            throw std::runtime_error("not an operation: " + line);
        }
        res.ops.push_back(op);
    }
    return res;
}

// ---- random programs

// a program is in one mood for a while
struct mood { int weights[OP_COUNT]; };

static const mood moods[] = {
    //  decode abort bad cut rm cp keep clear add div save load snap back alien fresh check
    { {   60,   3,   1, 10, 6, 4,  1,   1,   4,  1,  3,   3,   1,   1,   1,    0,   10 } }, // chat
    { {   45,   3,   0,  5, 35, 4, 1,   1,   3,  1,  2,   2,   1,   1,   0,    0,   12 } }, // holes
    { {   60,   6,   0, 50, 2, 2,  0,   0,   2,  0,  1,   1,   0,   0,   0,    0,   15 } }, // speculation
    { {   40,   0,   0,  5, 10, 8, 2,   1,   3,  1, 20,  25,   8,  12,   1,    3,   15 } }, // states
    { {   40,   1,   0,  5, 10, 35, 3,  1,   3,  1, 10,  15,   4,   6,   0,    0,   15 } }, // sharing
    { {   50,   0,   0,  5, 5, 4,  0,   1,  25, 10,  4,   4,   1,   1,   0,    0,   15 } }, // shifts
};

static const int sinks[] = { 0, 0, 0, 100, 128, 256 };

static int length(random_numbers & rng, int n_ctx) {
    static const int longest[] = { 1, 1, 1, 1, 2, 5, 40, 128, 129, 256 };
    const int n = rng.one_in(40) ? n_ctx : rng.of(longest);
    return rng.one_in(4) ? n : rng.in(1, n);
}

static operation random_op(random_numbers & rng, const settings & set, const choices & c, const mood & m) {
    int total = 0;
    for (int w : m.weights) {
        total += w;
    }
    int pick = rng.below(total), kind = 0;
    while (pick >= m.weights[kind]) {
        pick -= m.weights[kind++];
    }
    if (!c.any_shift && (kind == OP_ADD || kind == OP_DIV)) {
        kind = OP_DECODE;
    }

    operation op = { (op_kind) kind, {} };
    const int seq = rng.below(set.n_seq), other = rng.below(set.n_seq);
    const auto args = [&](std::vector<int> list) { op.args = std::move(list); };

    switch (kind) {
        case OP_DECODE: {
            const int n_seqs = rng.one_in(3) ? rng.in(1, set.n_seq) : 1;
            const int mode = n_seqs == 1 ? 0 : rng.one_in(set.unified ? 4 : 50) ? 2 : rng.below(2);
            args({ (int) (rng.next() >> 34), mode });
            const int first = rng.below(set.n_seq);
            const int same  = length(rng, set.n_ctx);
            for (int i = 0; i < n_seqs; ++i) {
                op.args.push_back((first + i)%set.n_seq);
                op.args.push_back(rng.one_in(2) ? same : length(rng, set.n_ctx));
            }
            break;
        }
        case OP_ABORT:
            args({ (int) (rng.next() >> 34), rng.in(1, rng.one_in(2) ? 30 : 200), seq, length(rng, set.n_ctx) });
            break;
        case OP_CUT:   args({ seq, rng.in(1, rng.one_in(3) ? 300 : rng.one_in(2) ? 130 : 8) }); break;
        case OP_RM:
            args({ rng.one_in(15) ? -1 : seq, rng.one_in(8) ? -1 : rng.below(1000), rng.one_in(10) ? -1 : length(rng, 300) });
            break;
        case OP_CP:    args({ seq, other, rng.one_in(2) ? 1000 : rng.in(0, 999) }); break;
        case OP_CLEAR: args({ rng.below(2) }); break;
        case OP_ADD:
        case OP_DIV:
            args({ seq, rng.one_in(3) ? 0 : rng.below(1000), rng.one_in(3) ? -1 : length(rng, set.n_ctx),
                   kind == OP_DIV ? rng.in(2, 8) : rng.one_in(3) ? -rng.in(1, 300) : rng.in(-20, 40) });
            break;
        case OP_SAVE:
        case OP_LOAD:  { const int all = rng.one_in(4); args({ all ? -1 : seq, all ? 3 : rng.below(3) }); break; }
        case OP_BACK:  args({ seq, rng.one_in(2) ? seq : other }); break;
        case OP_ALIEN: args({ rng.one_in(3) ? -1 : seq }); break;
        case OP_FRESH: { static const int sizes[] = { 1, 1, 1, 2 }; args({ set.n_ctx*rng.of(sizes), rng.of(sinks) }); break; }
        case OP_CHECK: break;
        default:       args({ seq }); break;
    }
    return op;
}

program random_program(uint64_t seed, int n_ops, const choices & c) {
    random_numbers rng(seed);

    static const int sizes[]    = { 256, 512, 512, 768, 1024 };
    static const int ubatches[] = { 64, 100, 128, 200, 512 };
    static const int n_seqs[]   = { 1, 2, 3, 3, 4, 10, 40 };
    static const int pairs[][2] = { { 2, 2 }, { 4, 2 }, { 3, 3 }, { 4, 4 }, { 2, 4 }, { 4, 16 }, { 16, 3 } };

    program res;
    res.set.n_ctx    = rng.of(sizes);
    res.set.n_ubatch = rng.of(ubatches);
    res.set.n_seq    = rng.of(n_seqs);
    res.set.unified  = res.set.n_seq > 10 || rng.below(2);
    const int pair   = rng.below(sizeof(pairs)/sizeof(pairs[0]));
    res.set.keys     = pairs[pair][0];
    res.set.values   = pairs[pair][1];
    res.set.exact    = c.exact;
    res.set.strict   = rng.one_in(3);
    res.set.sink     = rng.of(sinks);
    res.set.threads  = c.threads;
    res.set.swa_full = 1;

    const mood * m = &moods[0];
    for (int i = 0; i < n_ops; ++i) {
        if (rng.one_in(25)) {
            m = &moods[rng.below(sizeof(moods)/sizeof(moods[0]))];
        }
        if (c.faults && rng.one_in(3)) {
            res.ops.push_back({ OP_FAULT, { rng.one_in(8) ? FAULT_BUFFER : FAULT_HOST, rng.below(rng.one_in(2) ? 2 : 12) } });
        }
        res.ops.push_back(random_op(rng, res.set, c, *m));
    }
    res.ops.push_back({ OP_CHECK, {} });
    return res;
}
