// cpu-kernels.cpp - how fast the CPU kernels are: attention straight from the codes, seal, unseal; checked first, then timed.
// Links the sources that ship, without ggml:
//
//   cc  -O3 -c ggml-kvarn/kvarn-ref.c ggml-kvarn/kvarn-cpu.c ggml-kvarn/kvarn-x86*.c ggml-kvarn/kvarn-arm.c
//   c++ -O3 -std=c++17 -Iggml-kvarn tests/bench/cpu-kernels.cpp kvarn-*.o -o cpu-kernels
//   ./cpu-kernels [--set NAME] [--quick] > cpu-kernels.csv           one thread; pin it: taskset -c 1 ./cpu-kernels
//
// Columns:
//   median_ns  one K tile and one V tile for all query heads that share them (attend), one tile (seal, unseal)
//   best_ns    the same, the shortest of some rounds; what follows is computed from it
//   gcodes     codes per ns, counted once, not per query head
//   gbs        bytes of the tiles per ns; cold: every tile comes from memory, hot: all stay in the L2 cache
//   stream     gbs as a share of what reading memory in order reaches, measured in the same run
//   multiply   products of 8 x 8 bits as a share of what the widest such instruction reaches, measured in the same run;
//              a product of 8 x 16 bits counts as two (f32 kernels: of the f32 multiply-add peak)
//   error      rms over the rms of attention in float64 on the same tiles, worst of plain data and of data with planted outliers
//
// SPDX-License-Identifier: MIT

#include "kvarn-cpu.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <random>
#include <string>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

static const int G = KVARN_G;
static const int D = 128;

// ns of this thread: what others do on the machine does not count
static double now() {
    timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return 1e9*t.tv_sec + t.tv_nsec;
}

struct timing {
    double best, median; // ns per call
};

// rounds of at least a millisecond each
template <typename F> static timing measure(F && f, int n_rounds) {
    int n = 1;
    for (double ns = 0; ns < 1e6; n *= 2) {
        const double t = now();
        for (int i = 0; i < n; ++i) { f(); }
        ns = now() - t;
    }
    std::vector<double> all;
    for (int r = 0; r < n_rounds; ++r) {
        const double t = now();
        for (int i = 0; i < n; ++i) { f(); }
        all.push_back((now() - t)/n);
    }
    std::sort(all.begin(), all.end());
    return { all[0], all[n_rounds/2] };
}

// --- ceilings ---

static volatile uint64_t sink;

static double stream_gbs(const std::vector<uint8_t> & memory) {
    const timing t = measure([&] {
        uint64_t sum[8] = { 0 };
        const uint64_t * p = (const uint64_t *) memory.data();
        for (size_t i = 0; i < memory.size()/8; i += 8) {
            for (int j = 0; j < 8; ++j) { sum[j] += p[i + j]; }
        }
        sink = sum[0] + sum[1] + sum[2] + sum[3] + sum[4] + sum[5] + sum[6] + sum[7];
    }, 9);
    return memory.size()/t.best;
}

static double copy_gbs(std::vector<uint8_t> & memory) {
    const size_t half = memory.size()/2;
    return 2*half/measure([&] { memcpy(memory.data(), memory.data() + half, half); sink = memory[half/3]; }, 9).best;
}

// One kind of multiply over independent accumulators; the values do not matter.
#if defined(__x86_64__)
#define PEAK_ROUNDS 1000
#define PEAK(name, isa, type, load, multiply)                                           \
    __attribute__((target(isa))) static void name() {                                   \
        type acc[12];                                                                   \
        type x = load;                                                                  \
        for (int k = 0; k < 12; ++k) { acc[k] = x; }                                    \
        for (int i = 0; i < PEAK_ROUNDS; ++i) {                                         \
            for (int k = 0; k < 12; ++k) { const type a = acc[k]; acc[k] = multiply; }  \
            __asm__ volatile("" : "+x"(x));                                             \
        }                                                                               \
        for (int k = 0; k < 12; ++k) { __asm__ volatile("" : : "x"(acc[k])); }          \
    }
PEAK(f32_avx2,    "avx2,fma",           __m256,  _mm256_set1_ps(1.0f), _mm256_fmadd_ps(a, x, x))
PEAK(int8_avx2,   "avx2",               __m256i, _mm256_set1_epi8(1),  _mm256_maddubs_epi16(a, x))
PEAK(f32_avx512,  "avx512f",            __m512,  _mm512_set1_ps(1.0f), _mm512_fmadd_ps(a, x, x))
PEAK(int8_avx512, "avx512f,avx512vnni", __m512i, _mm512_set1_epi8(1),  _mm512_dpbusd_epi32(a, x, x))

static double products(void (* f)(), int lanes) { return 12.0*PEAK_ROUNDS*lanes/measure(f, 25).best; }
#endif

struct peaks {
    double f32 = 0, int8 = 0; // 0: not measured on this processor
};

static peaks measure_peaks(const std::string & set) {
    peaks res;
#if defined(__x86_64__)
    if (set.rfind("avx512", 0) == 0) {
        res.f32  = products(f32_avx512, 16);
        res.int8 = products(int8_avx512, 64);
    } else if (__builtin_cpu_supports("avx2")) {
        res.f32  = products(f32_avx2, 8);
        res.int8 = products(int8_avx2, 32);
    }
#else
    (void) set;
#endif
    return res;
}

// --- data ---

// channels of different size and a mean; planted: two outlier channels and two outlier tokens per tile
static std::vector<float> tokens(std::mt19937 & rng, bool planted) {
    std::normal_distribution<float> normal;
    std::vector<float> size(D), mean(D), x(G*D);
    for (int d = 0; d < D; ++d) {
        size[d] = std::exp(0.4f*normal(rng))*(planted && d % 64 == 5 ? 12.0f : 1.0f);
        mean[d] = 0.3f*normal(rng);
    }
    for (int t = 0; t < G; ++t) {
        for (int d = 0; d < D; ++d) {
            x[t*D + d] = (normal(rng)*size[d] + mean[d])*(planted && t % 64 == 9 ? 4.0f : 1.0f);
        }
    }
    return x;
}

// on a cache line, as in a graph; memory has 16 floats more than are needed
static float * on_line(std::vector<float> & memory) { return (float *) (((uintptr_t) memory.data() + 63)/64*64); }

struct tiles {
    int n, bits;
    size_t size;
    std::vector<uint8_t> bytes;
    // on cache lines, as a cache has them
    uint8_t * at(int i) const { return (uint8_t *) (((uintptr_t) bytes.data() + 63)/64*64) + (size_t) i*size; }
};

// n tiles, of which the first few differ
static tiles sealed(int side, int bits, int n, bool planted, unsigned seed) {
    tiles res = { n, bits, (size_t) kvarn_tile_bytes(D, bits), {} };
    res.bytes.resize(res.size*n + 63);
    std::mt19937 rng(seed);
    std::vector<float> scratch(kvarn_seal_scratch(D));
    for (int i = 0; i < n; ++i) {
        if (i < 8) {
            kvarn_seal_ref(side, bits, D, tokens(rng, planted).data(), res.at(i), scratch.data());
        } else {
            memcpy(res.at(i), res.at(i % 8), res.size);
        }
    }
    return res;
}

// --- attention ---

struct attention {
    const kvarn_cpu_kernels * kernels;
    kvarn_cpu_state state;
    std::vector<float> memory;
    std::vector<uint16_t> mask = std::vector<uint16_t>(G, 0);

    attention(const kvarn_cpu_kernels * kernels, int bits_k, int bits_v, int n_q, float sharp, unsigned seed) : kernels(kernels) {
        state = {};
        state.bits[0] = bits_k; state.bits[1] = bits_v;
        state.D[0] = state.D[1] = D;
        state.n_rows = 1;
        state.n_gqa  = n_q;
        memory.resize(kvarn_cpu_state_size(D, D, 1, n_q) + 16);
        start();
        std::mt19937 rng(seed);
        std::normal_distribution<float> normal;
        for (int i = 0; i < n_q*D; ++i) { state.q[i] = normal(rng)*sharp/std::sqrt((float) D); }
        for (int i = 0; i < n_q; ++i)   { state.slope[i] = 1.0f; }
    }
    void start() { kvarn_cpu_start(&state, on_line(memory)); }
    void add(const tiles & k, const tiles & v, int i) {
        const kvarn_cpu_source ks = { k.at(i), nullptr, 0 }, vs = { v.at(i), nullptr, 0 };
        const int next = i + 1 < k.n ? i + 1 : 0;
        kvarn_cpu_add(kernels, &state, &ks, &vs, k.at(next), mask.data(), G);
    }
    void finish() { kvarn_cpu_finish(kernels, &state, nullptr); }
};

static double rms_of(const tiles & k) {
    std::vector<float> x(G*D);
    double sum = 0;
    for (int i = 0; i < k.n; ++i) {
        kvarn_unseal_ref(KVARN_KEY, k.bits, D, k.at(i), x.data());
        for (float v : x) { sum += (double) v*v; }
    }
    return std::sqrt(sum/(k.n*G*D));
}

// flat and sharp attention (standard deviation of the scores, about) over 8 different tiles
static double error_of(const kvarn_cpu_kernels * kernels, int bits_k, int bits_v, int n_q) {
    double worst = 0;
    for (int planted = 0; planted < 2; ++planted) {
        const tiles k = sealed(KVARN_KEY, bits_k, 8, planted, 1), v = sealed(KVARN_VALUE, bits_v, 8, planted, 2);
        for (float sharp : { 0.1f, 1.0f, 3.0f }) {
            attention a(kernels, bits_k, bits_v, n_q, (float) (sharp/rms_of(k)), 3);
            std::vector<float> want(n_q*D);
            kvarn_attend_ref(bits_k, bits_v, D, n_q, k.n, a.state.q, k.at(0), v.at(0), 1.0f, want.data());
            for (int i = 0; i < k.n; ++i) { a.add(k, v, i); }
            a.finish();
            double err = 0, all = 0;
            for (int i = 0; i < n_q*D; ++i) {
                err += std::pow(a.state.out[i]/a.state.sum[i/D] - want[i], 2);
                all += std::pow(want[i], 2);
            }
            worst = std::max(worst, std::sqrt(err/all));
        }
    }
    return worst;
}

int main(int argc, char ** argv) {
    const char * only = nullptr;
    bool quick = false;
    for (int i = 1; i < argc; ++i) {
        if (!strcmp(argv[i], "--quick")) {
            quick = true;
        } else if (!strcmp(argv[i], "--set") && i + 1 < argc) {
            only = argv[++i];
        } else {
            fprintf(stderr, "cpu-kernels: unknown argument %s; use --set NAME and --quick\n", argv[i]);
            return 1;
        }
    }
    if (only && !kvarn_cpu_find(only)) {
        fprintf(stderr, "cpu-kernels: this processor has no kernels '%s'\n", only);
        return 1;
    }
    const int n_rounds = quick ? 3 : 15;
    std::vector<const kvarn_cpu_kernels *> sets;
    for (const char * name : { "avx512", "avx512-fast", "avx2", "avx2-fast", "i8mm", "dotprod", "neon", "portable" }) {
        const kvarn_cpu_kernels * set = kvarn_cpu_find(name);
        if (set && (only ? set == kvarn_cpu_find(only) : !quick || strcmp(name, "portable"))) {
            sets.push_back(set);
        }
    }

    std::vector<uint8_t> memory((size_t) (quick ? 64 : 256) << 20, 1);
    const double stream = stream_gbs(memory), copy = copy_gbs(memory);
    std::vector<uint8_t>().swap(memory);
    fprintf(stderr, "read %.1f GB/s, copy %.1f GB/s (read + write)\n", stream, copy);

    printf("set,op,bits_k,bits_v,heads,where,median_ns,best_ns,gcodes,gbs,stream,multiply,error\n");
    bool good = true;
    for (const kvarn_cpu_kernels * set : sets) {
        const peaks peak = measure_peaks(set->name);
        const bool  fast = strstr(set->name, "fast"), is_f32 = !strcmp(set->name, "portable");
        fprintf(stderr, "%s: %.0f G f32 multiply-adds/s, %.0f G 8-bit ones\n", set->name, peak.f32, peak.int8);

        const int widths[][2] = { { 2, 2 }, { 3, 3 }, { 4, 4 }, { 4, 2 } };
        for (const auto & bits : widths) {
            for (int n_q : { 1, 4, 8 }) {
                const double error = error_of(set, bits[0], bits[1], n_q);
                good = good && (fast || error < 5e-3);
                for (const char * where : { "hot", "cold" }) {
                    const size_t pair = kvarn_tile_bytes(D, bits[0]) + kvarn_tile_bytes(D, bits[1]);
                    const size_t all  = strcmp(where, "hot") ? (size_t) (quick ? 64 : 160) << 20 : 192 << 10;
                    const int    n    = (int) (all/pair);
                    const tiles  k = sealed(KVARN_KEY, bits[0], n, false, 1), v = sealed(KVARN_VALUE, bits[1], n, false, 2);
                    attention a(set, bits[0], bits[1], n_q, 1.0f, 3);
                    int i = 0;
                    const timing t = measure([&] { a.add(k, v, i); i = i + 1 < n ? i + 1 : 0; }, n_rounds);
                    const double top = is_f32 ? peak.f32 : peak.int8, ns = t.best;
                    printf("%s,attend,%d,%d,%d,%s,%.0f,%.0f,%.2f,%.2f,%.3f,%.3f,%.1e\n", set->name, bits[0], bits[1], n_q, where,
                           t.median, ns, 2.0*G*D/ns, pair/ns, pair/ns/stream,
                           top > 0 ? 2.0*G*D*n_q*(fast || is_f32 ? 1 : 2)/ns/top : 0.0, error);
                    fflush(stdout);
                }
            }
        }
    }
    std::mt19937 rng(1);
    const std::vector<float> x = tokens(rng, false);
    std::vector<float> y(G*D), memory_f32(kvarn_seal_scratch(D) + 16);
    float * scratch = on_line(memory_f32);
    const auto report = [](const char * set, const char * op, int side, int bits, const timing & t) {
        printf("%s,%s %s,%d,%d,,hot,%.0f,%.0f,%.2f,%.2f,,,\n", set, op, side == KVARN_KEY ? "keys" : "values", bits, bits,
               t.median, t.best, G*D/t.best, 4.0*G*D/t.best);
    };
    std::vector<const kvarn_cpu_kernels *> seals = { kvarn_cpu_portable() }; // kvarn_seal_ref: what the others must equal
    for (const kvarn_cpu_kernels * set : sets) {
        if (set->seal != seals[0]->seal && set->seal != seals.back()->seal) {
            seals.push_back(set);
        }
    }
    for (int side : { KVARN_KEY, KVARN_VALUE }) {
        for (int bits : { 2, 3, 4 }) {
            std::vector<uint8_t> tile(kvarn_tile_bytes(D, bits)), want(tile.size());
            kvarn_seal_ref(side, bits, D, x.data(), want.data(), scratch);
            for (const kvarn_cpu_kernels * set : seals) {
                report(set->name, "seal", side, bits, measure([&] { set->seal(side, bits, D, x.data(), tile.data(), scratch); },
                                                              n_rounds));
                good = good && tile == want;
            }
            report("portable", "unseal", side, bits, measure([&] { kvarn_unseal_ref(side, bits, D, want.data(), y.data()); },
                                                             n_rounds));
        }
    }
    if (!good) {
        fprintf(stderr, "cpu-kernels: an error is larger than 0.5 %%, or a seal has other bytes\n");
    }
    return good ? 0 : 1;
}
