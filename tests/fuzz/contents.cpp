// contents.cpp - reads the states of f16 and kvarn caches (llama_kv_cache::state_write, kvarn-cache-state.cpp) and compares them.
//
// SPDX-License-Identifier: MIT

#include "contents.h"

#include "kvarn-graph.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

namespace {

class reader {
public:
    explicit reader(const std::vector<uint8_t> & bytes) : pos(bytes.data()), end(bytes.data() + bytes.size()) {}

    const uint8_t * take(size_t n) {
        if ((size_t) (end - pos) < n) {
            throw std::runtime_error("the state ends early");
        }
        pos += n;
        return pos - n;
    }
    template <typename T> T get() {
        T value;
        memcpy(&value, take(sizeof(T)), sizeof(T));
        return value;
    }
    // n values, aligned as the state's bytes are not
    template <typename T> std::vector<T> get(size_t n) {
        std::vector<T> values(n);
        const uint8_t * src = take(n*sizeof(T));
        if (n > 0) {
            memcpy(values.data(), src, n*sizeof(T));
        }
        return values;
    }
    void skip_string() { take(get<uint32_t>()); }

private:
    const uint8_t * pos;
    const uint8_t * end;
};

void check(bool ok, const char * what) {
    if (!ok) {
        throw std::runtime_error(what);
    }
}

cell read_cell(reader & in, bool * has_shift = nullptr) {
    cell c = { in.get<int32_t>(), 0, {} };
    if (has_shift) {
        *has_shift = in.get<int32_t>() != 0 || *has_shift;
    }
    const uint32_t n = in.get<uint32_t>();
    for (uint32_t i = 0; i < n; ++i) {
        const int32_t seq = in.get<int32_t>();
        check(seq >= 0 && seq < 64, "a sequence is out of range");
        c.seqs |= (uint64_t) 1 << seq;
    }
    return c;
}

void add_rows(std::vector<cell> & cells, size_t i, const ggml_fp16_t * row, size_t n) {
    auto & rows = cells[i].rows;
    rows.resize(rows.size() + n);
    for (size_t j = 0; j < n; ++j) {
        rows[rows.size() - n + j] = ggml_fp16_to_fp32(row[j]);
    }
}

// multiplies blocks of n channels by the Hadamard matrix over sqrt(n), which is its own inverse
void rotate(float * x, size_t size, size_t n) {
    for (size_t b = 0; n > 1 && b < size; b += n) {
        for (size_t half = 1; half < n; half *= 2) {
            for (size_t i = b; i < b + n; ++i) {
                if (((i - b) & half) == 0) {
                    const float u = x[i], v = x[i + half];
                    x[i] = u + v;
                    x[i + half] = u - v;
                }
            }
        }
        for (size_t i = b; i < b + n; ++i) {
            x[i] /= sqrtf(n);
        }
    }
}

cache_contents read_f16_cache(reader & in) {
    cache_contents res;
    const uint32_t n_stream = in.get<uint32_t>();
    check(n_stream <= 64, "too many streams");
    res.streams.resize(n_stream);
    for (auto & cells : res.streams) {
        cells.resize(in.get<uint32_t>());
        if (cells.empty()) {
            continue;
        }
        for (auto & c : cells) {
            c = read_cell(in);
        }
        check(in.get<uint32_t>() == 0, "values are transposed");
        const uint32_t n_layer = in.get<uint32_t>();
        res.parts.clear();
        for (int side = 0; side < 2; ++side) {
            for (uint32_t il = 0; il < n_layer; ++il) {
                check(in.get<int32_t>() == GGML_TYPE_F16, "rows are not f16");
                const size_t n = in.get<uint64_t>()/sizeof(ggml_fp16_t);
                res.parts.push_back({ side, (int) il, res.row_size(), n });
                const auto rows = in.get<ggml_fp16_t>(cells.size()*n);
                for (size_t i = 0; i < cells.size(); ++i) {
                    add_rows(cells, i, rows.data() + i*n, n);
                }
            }
        }
    }
    return res;
}

// one side as the state's text describes it: "keys kvarn2 (2 bits, rotated by 16) 2x16 2x16"
struct side_text {
    int bits = 0, n_rot = 0;
    std::vector<std::pair<int, int>> layers; // heads, channels
};

side_text read_side(const std::string & text, const char * name) {
    side_text res;
    size_t at = text.find(std::string("; ") + name + " ");
    check(at != std::string::npos, "a side is missing in the state's description");
    const std::string part = text.substr(at + 2, text.find(';', at + 2) - at - 2);
    at = part.find(" (");
    if (at != std::string::npos) {
        const int n = sscanf(part.c_str() + at, " (%d bits, rotated by %d)", &res.bits, &res.n_rot);
        check(n == 2, "a side is described unclearly");
        at = part.find(')');
    } else {
        check(part.find(" f16") != std::string::npos, "a side is neither kvarn nor f16");
        at = part.find(" f16") + 3;
    }
    int heads, channels, n = 0;
    for (const char * p = part.c_str() + at + 1; sscanf(p, " %dx%d%n", &heads, &channels, &n) == 2; p += n) {
        res.layers.push_back({ heads, channels });
    }
    return res;
}

cache_contents read_kvarn_cache(reader & in) {
    check(in.get<uint32_t>() == 0x4e52564b, "not a kvarn cache");
    const uint32_t n_text = in.get<uint32_t>();
    const std::string text((const char *) in.take(n_text), n_text);
    const side_text sides[2] = { read_side(text, "keys"), read_side(text, "values") };

    cache_contents res;
    res.streams.resize(in.get<uint32_t>());
    for (auto & cells : res.streams) {
        in.get<uint64_t>();
        in.get<uint64_t>();
        std::vector<int> sealed_rows; // per cell of a sealed tile: tile*G + row
        const uint32_t n_sealed = in.get<uint32_t>(), n_open = in.get<uint32_t>();
        for (uint32_t i = 0; i < n_sealed; ++i) {
            in.get<int32_t>();
            const uint64_t mask[2] = { in.get<uint64_t>(), in.get<uint64_t>() };
            for (int row = 0; row < KVARN_G; ++row) {
                if (mask[row/64] >> row%64 & 1) {
                    sealed_rows.push_back(i*KVARN_G + row);
                }
            }
        }
        size_t n_rows = 0;
        for (uint32_t i = 0; i < n_open; ++i) {
            in.get<int32_t>();
            n_rows += in.get<uint32_t>();
        }
        for (size_t i = 0; i < sealed_rows.size() + n_rows; ++i) {
            cells.push_back(read_cell(in, &res.has_shift));
        }

        res.parts.clear();
        for (int side = 0; side < 2; ++side) {
            const auto & s = sides[side];
            for (size_t il = 0; il < s.layers.size(); ++il) {
                const int H = s.layers[il].first, D = s.layers[il].second;
                const size_t n = (size_t) H*D;
                res.parts.push_back({ side, (int) il, res.row_size(), n });

                std::vector<ggml_fp16_t> rows(n_sealed*KVARN_G*n);
                if (s.bits == 0) {
                    rows = in.get<ggml_fp16_t>(rows.size());
                } else {
                    const kvarn_shape shape = { side, s.bits, D, H, 0, 0, 0, 0 };
                    const size_t size = kvarn_tile_size(D, s.bits);
                    std::vector<float> scratch(KVARN_G*D + kvarn_seal_scratch(D));
                    for (uint32_t i = 0; i < n_sealed; ++i) {
                        const auto tile = in.get<uint8_t>(size*H);
                        for (int h = 0; h < H; ++h) {
                            kvarn_unseal_rows(&shape, tile.data() + h*size, rows.data() + i*KVARN_G*n + h*D, scratch.data(),
                                    ggml_fp32_to_fp16_row);
                        }
                    }
                }
                for (size_t i = 0; i < sealed_rows.size(); ++i) {
                    add_rows(cells, i, rows.data() + sealed_rows[i]*n, n);
                }
                const auto open_rows = in.get<ggml_fp16_t>(n_rows*n);
                for (size_t i = 0; i < n_rows; ++i) {
                    add_rows(cells, sealed_rows.size() + i, open_rows.data() + i*n, n);
                }
                for (auto & c : cells) {
                    rotate(c.rows.data() + res.parts.back().begin, n, s.n_rot);
                }
            }
        }
        in.get<uint64_t>(); // hash
    }
    return res;
}

std::string describe(const cell & c) {
    std::string res = "position " + std::to_string(c.pos) + " of sequences";
    for (int s = 0; s < 64; ++s) {
        if (c.seqs >> s & 1) {
            res += " " + std::to_string(s);
        }
    }
    return res;
}

bool goes_before(const cell & a, const cell & b) {
    return a.pos != b.pos ? a.pos < b.pos : a.seqs < b.seqs;
}

double distance(const cell & a, const cell & b, const part & p) {
    double error = 0, norm = 1e-20;
    for (size_t i = p.begin; i < p.begin + p.size; ++i) {
        error += ((double) a.rows[i] - b.rows[i])*((double) a.rows[i] - b.rows[i]);
        norm  += (double) a.rows[i]*a.rows[i];
    }
    return error/norm;
}

} // namespace

template <typename F> static std::vector<cache_contents> read_state(const std::vector<uint8_t> & state, int n_caches, F && read) {
    reader in(state);
    in.skip_string(); // architecture
    std::vector<cache_contents> res;
    for (int i = 0; i < n_caches; ++i) {
        res.push_back(read(in));
    }
    return res;
}

std::vector<cache_contents> read_f16_state(const std::vector<uint8_t> & state, int n_caches) {
    return read_state(state, n_caches, read_f16_cache);
}

std::vector<cache_contents> read_kvarn_state(const std::vector<uint8_t> & state, int n_caches) {
    return read_state(state, n_caches, read_kvarn_cache);
}

std::string compare(const std::vector<cache_contents> & wanted, const std::vector<cache_contents> & found,
                    const row_limits & limits, row_errors & errors) {
    for (size_t i = 0; i < wanted.size(); ++i) {
        const std::string where = wanted.size() > 1 ? "cache " + std::to_string(i) + ": " : "";
        if (wanted[i].streams.size() != found[i].streams.size()) {
            return where + "different numbers of streams";
        }
        for (size_t strm = 0; strm < wanted[i].streams.size(); ++strm) {
            auto a = wanted[i].streams[strm], b = found[i].streams[strm];
            std::sort(a.begin(), a.end(), goes_before);
            std::sort(b.begin(), b.end(), goes_before);
            for (size_t j = 0; j < std::max(a.size(), b.size()); ++j) {
                if (j >= b.size() || (j < a.size() && goes_before(a[j], b[j]))) {
                    return where + "no cell for " + describe(a[j]);
                }
                if (j >= a.size() || goes_before(b[j], a[j])) {
                    return where + "one cell too many: " + describe(b[j]);
                }
                // cells that agree in all of this are told apart by their rows
                const part all = { 0, 0, 0, wanted[i].row_size() };
                size_t best = j;
                for (size_t k = j + 1; k < b.size() && !goes_before(a[j], b[k]); ++k) {
                    if (distance(a[j], b[k], all) < distance(a[j], b[best], all)) {
                        best = k;
                    }
                }
                std::swap(b[j], b[best]);
                for (const auto & p : wanted[i].parts) {
                    const double error = distance(a[j], b[j], p);
                    const bool   is_first = i + 1 == wanted.size() && p.layer == 0; // windows come last, and have the first layer
                    const float  limit = is_first ? limits.first[p.side] : limits.other;
                    if (is_first) {
                        errors.worst = std::max(errors.worst, error);
                        errors.sum  += error;
                        errors.n++;
                    }
                    if (!(error <= limit)) {
                        return where + (p.side == KVARN_KEY ? "key" : "value") + " row of " + describe(a[j]) + " in layer " +
                            std::to_string(p.layer) + " is another one: error " + std::to_string(error);
                    }
                }
            }
        }
    }
    return "";
}
