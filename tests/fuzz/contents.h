// contents.h - what a cache holds, read out of a whole-context state: positions, sequences, key and value rows of every cell.
//
// SPDX-License-Identifier: MIT

#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

struct cell {
    int                pos;
    uint64_t           seqs; // bit s: belongs to sequence s
    std::vector<float> rows; // of all parts
};

// one side of one layer, as a range of cell::rows
struct part {
    int    side, layer;
    size_t begin, size;
};

struct cache_contents {
    std::vector<part>              parts;
    std::vector<std::vector<cell>> streams;
    bool                           has_shift = false; // keys that were not yet turned to the positions of their cells

    size_t row_size() const { return parts.empty() ? 0 : parts.back().begin + parts.back().size; }
};

// A model with sliding windows has two caches. Both throw std::runtime_error where the bytes are not what they should be.
std::vector<cache_contents> read_f16_state  (const std::vector<uint8_t> & state, int n_caches);
std::vector<cache_contents> read_kvarn_state(const std::vector<uint8_t> & state, int n_caches);

// how much a row may differ from the same row of the other cache: |a - b|^2 over |a|^2. Rows of different tokens make about 2,
// an empty row makes 1.
struct row_limits {
    float first[2]; // keys and values of the first layer, which depend on token and position alone; 0: the same bits
    float other;
};

struct row_errors {
    double worst = 0, sum = 0;
    size_t n = 0;
};

// "" if they hold the same; otherwise the first difference
std::string compare(const std::vector<cache_contents> & wanted, const std::vector<cache_contents> & found,
                    const row_limits & limits, row_errors & errors);
