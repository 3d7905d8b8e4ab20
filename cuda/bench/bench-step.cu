// bench-step.cu - decodes tokens as the cache does, without ggml: PREP, ATTN and REDUCE of some layers, one behind the other,
// then SEAL of all.
//
// SPDX-License-Identifier: MIT
//
// From the repository's root; the table is CSV:
//   nvcc -std=c++17 -O3 -arch=native -use_fast_math -Iggml-kvarn -Icuda -o bench-step cuda/bench/bench-step.cu \
//        cuda/kvarn-attn*.cu cuda/kvarn-reduce.cu cuda/kvarn-prep.cu cuda/kvarn-seal.cu && ./bench-step
//   ./bench-step check     only the checks
//   ./bench-step check 1   with one token on either side of a sealed tile and short chains, for compute-sanitizer
//
// Checked is what launches that overlap could get wrong. The same tokens run as ordinary launches, and as launches one behind
// the other, which a graph holds where there are graphs: outputs, tiles and tails have to be the same bits. FEED stands for the
// kernels of a model: it lets the next kernel start at once, waits, makes keys, values and queries out of the layer before and
// poisons whatever PREP and ATTN are about to write.

#include "bench.cuh"
#include "kvarn-cuda.h"
#include "kvarn-format.h"
#include "kvarn-mma.cuh"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <string>

struct setup {
    int bits[2], D, H, gqa, n_layers, n_tiles;
    bool is_whole; // REDUCE's work in ATTN, where there are few tiles
};

enum { N_SEAL = 1, N_SLOTS = 2 };

static __host__ __device__ uint32_t hash(uint32_t v) {
    v ^= v >> 16; v *= 0x7feb352du; v ^= v >> 15; v *= 0x846ca68bu; v ^= v >> 16;
    return v;
}

// what FEED writes: cur, K and V of a token and its queries behind them
struct feed {
    float         * cur;
    int             n_cur;
    const float   * out;   // of the layer before
    int             n_out;
    float           share; // of out in cur
    const int64_t * token;
    int             layer;
    float         * poison[3];
    int             n_poison[3];
};

static __global__ void feed_kernel(const feed f) {
    kvarn_let_kernel_behind_start();
    kvarn_wait_for_kernel_before();
    const int at = blockIdx.x*blockDim.x + threadIdx.x, n = gridDim.x*blockDim.x;
    for (int i = at; i < f.n_cur; i += n) {
        const float u = hash((uint32_t) *f.token*7919u + f.layer*104729u + i)*(1.0f/4294967296.0f);
        f.cur[i] = (2.0f*u - 1.0f)*(i % 61 == 7 ? 8.0f : 1.0f) + (f.layer > 0 ? f.share*f.out[i % f.n_out] : 0.0f);
    }
    for (int k = 0; k < 3; ++k) {
        for (int i = at; i < f.n_poison[k]; i += n) {
            f.poison[k][i] = NAN;
        }
    }
}

// a cache of some layers and a graph of what a token is
struct decoder {
    setup z;
    float share;
    int   n_q, n_kv;
    struct layer { half * tail[2]; uint8_t * tiles[2]; float * out; };
    std::vector<layer> layers;
    float * cur, * q, * part;
    half  * mask;
    int64_t * plan;  // row, list, map, number of the token
    int32_t * pos;
    std::vector<void *> memory;

    template <typename T> T * get(size_t n, int byte) {
        T * p = on_device(std::vector<T>(n));
        memory.push_back(p);
        ok(cudaMemset(p, byte, n*sizeof(T)), "cudaMemset");
        return p;
    }

    decoder(const setup & z, float share) : z(z), share(share), n_q(z.H*z.gqa*z.D), n_kv(z.H*z.D) {
        for (int l = 0; l < z.n_layers; ++l) {
            layer y;
            for (int side = 0; side < 2; ++side) {
                y.tail [side] = get<half>((size_t) N_SLOTS*KVARN_G*n_kv, 0);
                y.tiles[side] = get<uint8_t>((size_t) z.n_tiles*z.H*kvarn_tile_size(z.D, z.bits[side]), 0);
            }
            y.out = get<float>(n_q, 0xff);
            layers.push_back(y);
        }
        cur  = get<float>(2*n_kv + n_q, 0xff);
        q    = get<float>(n_q, 0xff);
        part = get<float>((size_t) z.H*z.gqa*cap()*(z.D + 2), 0xff);
        mask = get<half>((size_t) z.n_tiles*KVARN_G, 0);
        plan = get<int64_t>(n_plan(), 0);
        pos  = get<int32_t>(1, 0);
    }
    ~decoder() {
        for (void * p : memory) { cudaFree(p); }
    }
    decoder(const decoder &) = delete;

    int    cap()    const { return std::max(5, std::min((z.n_tiles + 3)/4 + 4, std::max(32, 512/z.H))); }
    size_t n_plan() const { return 1 + 2*N_SEAL + z.n_tiles + 1; }

    // plan and mask of a token; it fills its tile where it is the last of 128
    void place(int token, std::vector<int64_t> & p, std::vector<half> & m) const {
        const int tile = token/KVARN_G, slot = tile % N_SLOTS;
        p.assign(n_plan(), -1);
        p[0] = slot*KVARN_G + token%KVARN_G;
        if (token%KVARN_G == KVARN_G - 1) {
            p[1] = slot;
            p[2] = tile;
        }
        for (int i = 0; i < z.n_tiles; ++i) {
            p[1 + 2*N_SEAL + i] = i > tile ? -2 : i == tile ? slot : -1; // what is sealed now is read from its slot
        }
        p[n_plan() - 1] = token;
        m.assign((size_t) z.n_tiles*KVARN_G, __float2half(0.0f));
        std::fill(m.begin() + token + 1, m.end(), __float2half(-INFINITY));
    }

    void launch(int n_used, bool is_behind, cudaStream_t stream) const {
        const int n_rot = z.D & -z.D;
        std::vector<kvarn_seal_side> sides;
        for (int l = 0; l < z.n_layers; ++l) {
            const layer & y = layers[l];
            feed f = { cur, 2*n_kv + n_q, layers[l ? l - 1 : 0].out, n_q, share, plan + n_plan() - 1, l, { q, part, y.out },
                       { n_q, z.H*z.gqa*cap()*(z.D + 2), n_q } };
            f.n_poison[1] = std::min(f.n_poison[1], 1 << 16);
            if (is_behind) {
                ok(kvarn_launch_behind(feed_kernel, dim3(16), 128, 0, stream, f), "FEED");
            } else {
                KVARN_LAUNCH(feed_kernel, 16, 128, 0, stream, f);
            }

            kvarn_prep_args p = {};
            kvarn_attn_args a = {};
            for (int side = 0; side < 2; ++side) {
                p.part[side] = { z.D, z.H, n_rot, side == 0, cur + side*n_kv, n_kv, z.D, plan, y.tail[side], nullptr };
                sides.push_back({ side, z.bits[side], z.D, z.H, y.tail[side], y.tiles[side] });
                a.side[side] = { z.bits[side], z.D, y.tiles[side], y.tail[side], n_kv, z.D, 0 };
            }
            p.part[2]  = { z.D, z.H*z.gqa, n_rot, true, cur + 2*n_kv, n_q, z.D, nullptr, nullptr, q };
            p.rope     = { pos, nullptr, z.D, l % 2 == 1, powf(10000.0f, -2.0f/z.D), 1.0f, 0.0f, 1.0f, 0.0f, 0.0f };
            p.n_tokens = 1;
            ok(kvarn_prep(p, stream, is_behind), "PREP");

            a.q = q; a.q_head = z.D; a.q_row = a.q_stream = n_q;
            a.map = plan + 1 + 2*N_SEAL; a.mask = mask;
            a.part = part; a.n_stream = 1; a.H = z.H; a.n_gqa = z.gqa; a.n_rows = 1;
            a.n_used = n_used; a.n_tiles = z.n_tiles; a.cap = cap();
            a.scale = 1.0f/sqrtf((float) z.D);
            ok(kvarn_attn_plan(&a), "plan");
            a.is_behind = is_behind;
            const bool is_whole = z.is_whole && kvarn_attn_make_whole(&a, y.out, nullptr, n_rot);
            ok(kvarn_attn(a, stream), "ATTN");
            if (!is_whole) {
                ok(kvarn_reduce(part, nullptr, y.out, z.D, z.H*z.gqa, z.H*z.gqa, a.cap, a.n_split + a.n_open, stream, n_rot,
                        is_behind), "REDUCE");
            }
        }
        ok(kvarn_seal(sides.data(), sides.size(), plan + 1, N_SEAL, stream, is_behind), "SEAL");
    }

    void put(int token) const {
        std::vector<int64_t> p;
        std::vector<half>    m;
        place(token, p, m);
        ok(cudaMemcpy(plan, p.data(), p.size()*sizeof(int64_t), cudaMemcpyHostToDevice), "cudaMemcpy");
        ok(cudaMemcpy(pos, &token, sizeof(int32_t), cudaMemcpyHostToDevice), "cudaMemcpy");
        ok(cudaMemcpy(mask, m.data(), m.size()*sizeof(half), cudaMemcpyHostToDevice), "cudaMemcpy");
    }
};

#if defined(KVARN_ON_CPU) // no graphs from tests/cuda/on-cpu.h
struct replay {
    const decoder & d;
    const int n_used;
    replay(const decoder & d, int n_used, cudaStream_t) : d(d), n_used(n_used) {}
    void run(cudaStream_t stream) const { d.launch(n_used, true, stream); }
};
#else
struct replay {
    cudaGraphExec_t exec;
    replay(const decoder & d, int n_used, cudaStream_t stream, bool is_behind = true) {
        cudaGraph_t graph;
        ok(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "capture");
        d.launch(n_used, is_behind, stream);
        ok(cudaStreamEndCapture(stream, &graph), "capture");
        ok(cudaGraphInstantiate(&exec, graph, 0), "instantiate");
        cudaGraphDestroy(graph);
    }
    ~replay() { cudaGraphExecDestroy(exec); }
    void run(cudaStream_t stream) const { ok(cudaGraphLaunch(exec, stream), "replay"); }
};
#endif

// The same tokens twice; returns how many numbers differ, or for another division of the work the largest difference.
//   is_whole  of the second
static double compare(setup z, bool is_whole, int first, int last, bool is_cut, cudaStream_t stream) {
    z.is_whole = false;
    const float share = is_whole ? 0.0f : 0.01f; // outputs that differ must not come back as keys
    const decoder a(z, share);
    z.is_whole = is_whole;
    const decoder b(z, share);
    std::unique_ptr<replay> r;
    double worst = 0.0;
    for (int token = first, before = 0; token <= last; ++token) {
        const int n_used = std::min(is_cut ? (token/KVARN_G + 2)/2*2 : z.n_tiles, z.n_tiles);
        if (!r || n_used != before) {
            r.reset(new replay(b, n_used, stream));
            before = n_used;
        }
        a.put(token);
        b.put(token);
        a.launch(n_used, false, stream);
        r->run(stream);
        ok(cudaDeviceSynchronize(), "kernels");
        for (int l = 0; l < z.n_layers; ++l) {
            const auto x = from_device(a.layers[l].out, a.n_q), y = from_device(b.layers[l].out, b.n_q);
            double most = 0.0, off = 0.0;
            for (int i = 0; i < a.n_q; ++i) {
                most = std::max(most, (double) fabsf(x[i]));
                const double d = fabs((double) x[i] - y[i]);
                off = d <= off ? off : d; // NaN stays
                worst += !is_whole && memcmp(&x[i], &y[i], sizeof(float)) != 0;
            }
            if (is_whole) { worst = off/most <= worst ? worst : off/most; }
        }
    }
    for (int l = 0; l < z.n_layers; ++l) {
        for (int side = 0; side < 2; ++side) {
            const size_t n_tail = (size_t) N_SLOTS*KVARN_G*a.n_kv;
            const size_t n_tiles = (size_t) z.n_tiles*z.H*kvarn_tile_size(z.D, z.bits[side]);
            const auto t = from_device(a.layers[l].tail [side], n_tail),  u = from_device(b.layers[l].tail [side], n_tail);
            const auto x = from_device(a.layers[l].tiles[side], n_tiles), y = from_device(b.layers[l].tiles[side], n_tiles);
            worst += memcmp(t.data(), u.data(), n_tail*sizeof(half)) != 0 || memcmp(x.data(), y.data(), n_tiles) != 0;
        }
    }
    return worst;
}

#if !defined(KVARN_ON_CPU)

// us per layer of chains of ordinary launches, of overlapping ones, and of those where ATTN does REDUCE's work
static void measure(setup z, int n_used, cudaStream_t stream, const char * card) {
    z.n_tiles = n_used;
    const double bytes = (double) n_used*z.H*(kvarn_tile_size(z.D, z.bits[0]) + kvarn_tile_size(z.D, z.bits[1]));
    z.n_layers = std::max(8, std::min(24, (int) (600e6/bytes)));
    double us[3];
    for (int n = 0; n < 3; ++n) {
        z.is_whole = n == 2;
        const decoder d(z, 0.0f);
        d.put(n_used*KVARN_G - KVARN_G - 30);
        const replay r(d, n_used, stream, n > 0);
        us[n] = median_ms(30, 5, stream, [&] { r.run(stream); })*1e3/z.n_layers;
    }
    printf("%s,%d,%d,%d,%d,%d,%d,%.2f,%.2f,%.2f\n", card, z.bits[0], z.bits[1], z.D, z.H, z.gqa, n_used*KVARN_G,
            us[0], us[1], us[2]);
    fflush(stdout);
}

#endif

int main(int argc, char ** argv) {
    const bool is_all = argc == 1, is_check = is_all || !strcmp(argv[1], "check");
    cudaStream_t stream = 0;
#if !defined(KVARN_ON_CPU)
    cudaStreamCreate(&stream);
    const int n_more = argc > 2 ? atoi(argv[2]) : 40, n_layers = n_more > 1 ? 6 : 2;
#else
    const int n_layers = 2, n_more = 1;
#endif
    if (is_check) {
        int n_bad = 0, n = 0;
        const auto report = [&](const char * what, const setup & z, double off, double bound) {
            ++n;
            if (!(off <= bound)) {
                ++n_bad;
                printf("FAILED %s: bits %d/%d D %d heads %d gqa %d tiles %d: %g > %g\n", what, z.bits[0], z.bits[1], z.D, z.H,
                        z.gqa, z.n_tiles, off, bound);
            }
        };
        const setup shapes[] = { { { 4, 2 }, 128, 2, 4, n_layers, 4 }, { { 2, 2 }, 64, 2, 2, n_layers, 4 }, { { 3, 4 }, 256, 1, 8,
                n_layers, 4 }, { { 4, 3 }, 80, 2, 3, n_layers, 4 } };
        for (const setup & z : shapes) {
            const int end = 2*KVARN_G - 1; // a tile is sealed
            report("another bit behind",    z, compare(z, false, end - n_more, end + n_more, true,  stream), 0.0);
            report("another output whole",  z, compare(z, true,  end - n_more, end + n_more, true,  stream), 1e-4);
        }
#if !defined(KVARN_ON_CPU)
        const setup z = { { 4, 2 }, 128, 8, 4, n_layers, n_more > 1 ? 256 : 16 };
        const int end = (z.n_tiles - 1)*KVARN_G - 1;
        report("another bit behind", z, compare(z, false, end - n_more/2, end + n_more/2, false, stream), 0.0);
#endif
        printf("check: %d chains, %d failed, launches one behind the other against ordinary ones, bit for bit\n", n, n_bad);
        if (n_bad) { return 1; }
    }
#if !defined(KVARN_ON_CPU)
    if (is_all || !strcmp(argv[1], "time")) {
        cudaDeviceProp prop;
        ok(cudaGetDeviceProperties(&prop, 0), "device");
        printf("card,bits_k,bits_v,D,heads,gqa,tokens,us per layer plain,behind,whole\n");
        for (int tokens : { 256, 512, 1024, 2048, 4096, 8192, 32768, 131072 }) {
            for (int bits : { 4, 2 }) { measure({ { bits, 2 }, 128, 8, 4 }, tokens/KVARN_G, stream, prop.name); }
        }
        measure({ { 4, 2 },  64, 8, 4 },    2, stream, prop.name);
        measure({ { 4, 2 }, 256, 4, 4 },    2, stream, prop.name);
    }
#endif
    return 0;
}
