// bench-attn.cu - checks and times attention without ggml: float64 on the host, cold L2, share of the card's copy bandwidth.
//
// SPDX-License-Identifier: MIT
//
// From the repository's root; the last table is CSV:
//   nvcc -std=c++17 -O3 -arch=native -use_fast_math -Iggml-kvarn -Icuda -Xcompiler -ffp-contract=off -o bench-attn \
//        cuda/bench/bench-attn.cu cuda/kvarn-attn*.cu cuda/kvarn-reduce.cu && ./bench-attn
//   ./bench-attn check     only the checks (for compute-sanitizer)
//   ./bench-attn time 4 2 128 4 131072 8 1     one shape: bits, D, GQA, tokens, KV heads, streams
//
// Times are those of graph replays of both kernels, as two ordinary launches ("plain") and with REDUCE placed while ATTN ends
// ("behind"); every call reads another set of buffers, 600 MB in rotation.

#include "bench.cuh"
#include "kvarn-cuda.h"
#include "kvarn-format.h"
#include "kvarn-mma.cuh"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <random>

static __host__ __device__ uint32_t hash(uint32_t v) {
    v ^= v >> 16; v *= 0x7feb352du; v ^= v >> 15; v *= 0x846ca68bu; v ^= v >> 16;
    return v;
}

static __host__ __device__ float uniform(uint32_t v) { return (hash(v) >> 8)*(1.0f/16777216.0f); }

// random tiles: two channels with scales 8 times the others', one token of a hundred 4 times as large
static __global__ void fill_tiles(uint8_t * tiles, int D, int bits, uint32_t seed) {
    const int size = kvarn_tile_size(D, bits), codes = kvarn_codes_size(D, bits);
    uint8_t * tile = tiles + (int64_t) blockIdx.x*size;
    const uint32_t base = hash(seed + blockIdx.x*7919u);
    for (int at = threadIdx.x; at < codes/4; at += blockDim.x) {
        ((uint32_t *) tile)[at] = hash(base + at);
    }
    const float step = 2.0f/(1 << bits);
    for (int at = threadIdx.x; at < 2*D + KVARN_G; at += blockDim.x) {
        const float u = uniform(base ^ (at*2654435761u));
        float v;
        if (at < D) {
            v = step*(0.5f + u)*(at%61 == 7 ? 8.0f : 1.0f);
        } else if (at < 2*D) {
            v = -step*(0.5f + uniform(base ^ ((at - D)*2654435761u)))*((at - D)%61 == 7 ? 8.0f :
                    1.0f)*((1 << bits) - 1)*0.5f*(0.9f + 0.2f*u);
        } else {
            v = hash(base + at) % 100 == 0 ? 1.0f : 0.15f + 0.2f*u;
        }
        ((half *) (tile + codes))[at] = __float2half(v);
    }
}

static __global__ void fill_half(half * p, int64_t n, uint32_t seed, float range) {
    for (int64_t at = blockIdx.x*(int64_t) blockDim.x + threadIdx.x; at < n; at += (int64_t) gridDim.x*blockDim.x) {
        p[at] = __float2half(range*(2.0f*uniform(seed + (uint32_t) at) - 1.0f));
    }
}

struct shape {
    int bits[2], D[2], gqa, rows, n_used, H, n_stream;
    bool  sinks;
    float max_bias, softcap;
};

// everything one call reads and writes
struct call {
    kvarn_attn_args args;
    float * out, * sinks;
    std::vector<void *> memory;
};

static constexpr int n_slots = 4;

static call make_call(const shape & z, uint32_t seed, bool is_mixed) {
    call c;
    std::mt19937 rng(seed);
    std::normal_distribution<float> normal;
    kvarn_attn_args & a = c.args;
    memset(&a, 0, sizeof(a));
    a.n_tiles = z.n_used + 1;
    for (int side = 0; side < 2; ++side) {
        kvarn_cuda_side & k = a.side[side];
        k.bits = z.bits[side];
        k.D    = z.D[side];
        const int64_t n_rows = k.bits ? n_slots*KVARN_G : (int64_t) a.n_tiles*KVARN_G*z.n_stream;
        uint8_t * tiles = nullptr;
        half    * rows;
        if (k.bits) {
            const int n = a.n_tiles*z.H*z.n_stream;
            ok(cudaMalloc(&tiles, (size_t) n*kvarn_tile_size(k.D, k.bits)), "tiles");
            KVARN_LAUNCH(fill_tiles, n, 128, 0, 0, tiles, k.D, k.bits, seed + side);
            c.memory.push_back(tiles);
        }
        ok(cudaMalloc(&rows, n_rows*k.D*z.H*sizeof(half)), "rows");
        KVARN_LAUNCH(fill_half, 64, 256, 0, 0, rows, n_rows*k.D*z.H, seed + side + 10, 1.0f);
        c.memory.push_back(rows);
        k.tiles = tiles;
        k.rows  = rows;
        k.row_stride    = (int64_t) k.D*z.H;
        k.head_stride   = k.D;
        k.stream_stride = k.bits ? 0 : (int64_t) a.n_tiles*KVARN_G*k.D*z.H;
    }
    const int n_head = z.gqa*z.H;
    std::vector<float> q((size_t) z.D[0]*n_head*z.rows*z.n_stream);
    for (float & v : q) { v = normal(rng); }
    a.q        = on_device(q);
    a.q_head   = z.D[0];                       // [stream][row][head][D]
    a.q_row    = (int64_t) z.D[0]*n_head;
    a.q_stream = a.q_row*z.rows;

    std::vector<int64_t> map((size_t) a.n_tiles*z.n_stream, -1);
    std::vector<half> mask((size_t) z.n_used*KVARN_G*z.rows*z.n_stream, __float2half(0.0f));
    for (size_t i = 0; i < map.size() && is_mixed; ++i) {
        map[i] = i % 5 == 1 ? (int64_t) (i/5 % n_slots) : i % 7 == 3 ? -2 : -1;
    }
    for (size_t i = 0; i < mask.size() && is_mixed; ++i) {
        const int token = i % (z.n_used*KVARN_G), row = i/(z.n_used*KVARN_G) % z.rows, s = i/(z.n_used*KVARN_G)/z.rows;
        const bool is_seen = map[s*a.n_tiles + token/KVARN_G] != -2 && (token + row) % 4 != 0 && (row % 2 == 0 ||
                token >= KVARN_G);
        mask[i] = __float2half(!is_seen ? -INFINITY : z.max_bias > 0.0f ? -1.0f*(token % 61) : 0.0f);
    }
    a.map         = on_device(map);
    a.mask        = on_device(mask);
    a.mask_row    = z.n_used*KVARN_G;
    a.mask_stream = a.mask_row*z.rows;
    a.n_stream = z.n_stream; a.H = z.H; a.n_gqa = z.gqa; a.n_rows = z.rows; a.n_used = z.n_used;
    a.cap      = std::max(5, std::min((z.n_used + 3)/4 + 4, std::max(32, 512/(z.H*z.n_stream))));
    a.scale    = 1.0f/sqrtf((float) z.D[0]);
    a.max_bias = z.max_bias; a.softcap = z.softcap;

    const size_t n_vec = (size_t) n_head*z.rows*z.n_stream;
    std::vector<float> poison(n_vec*a.cap*(z.D[1] + 2), NAN), sinks(n_head);
    for (float & v : sinks) { v = normal(rng); }
    a.part  = on_device(poison);
    poison.resize(n_vec*z.D[1]);
    c.out   = on_device(poison);
    c.sinks = z.sinks ? on_device(sinks) : nullptr;
    for (const void * p : { (const void *) a.q, (const void *) a.map, (const void *) a.mask, (const void *) a.part,
            (const void *) c.out,
                            (const void *) c.sinks }) {
        c.memory.push_back((void *) p);
    }
    ok(kvarn_attn_plan(&a), "plan");
    if (const char * plan = getenv("KVARN_PLAN")) { // splits, warps
        ok(sscanf(plan, "%d,%d", &a.n_split, &a.n_warps) == 2 ? cudaSuccess : cudaErrorInvalidValue,
                "KVARN_PLAN");
    }
    return c;
}

static void drop(call & c) {
    for (void * p : c.memory) { cudaFree(p); }
}

static void launch(const shape & z, const call & c, bool is_behind, cudaStream_t stream) {
    ok(kvarn_attn(c.args, stream), "ATTN");
    ok(kvarn_reduce(c.args.part, c.sinks, c.out, z.D[1], z.gqa*z.H*z.rows*z.n_stream, z.gqa*z.H, c.args.cap,
            c.args.n_split + c.args.n_open, stream, 0, is_behind), "REDUCE");
}

// the outputs without REDUCE, if that is possible
static bool launch_whole(const call & c, float * out) {
    kvarn_attn_args a = c.args;
    return kvarn_attn_make_whole(&a, out, c.sinks, 0) && (ok(kvarn_attn(a, 0), "ATTN, whole"), true);
}

static int code_at(int bits, int F, int r, int f, const uint8_t * tile) {
    int code = 0;
    for (int i = 0; i < bits; ++i) {
        const int at = kvarn_code_bit(bits, F, r, f, i);
        code |= (tile[at/8] >> at%8 & 1) << i;
    }
    return code;
}

// largest |out - ref|/|ref| over the query vectors, ref in float64 from the same bytes
static double check(const shape & z, uint32_t seed) {
    call c = make_call(z, seed, true);
    const kvarn_attn_args & a = c.args;
    launch(z, c, seed % 2, 0);
    ok(cudaDeviceSynchronize(), "kernels");

    const int n_head = z.gqa*z.H;
    const auto q    = from_device(a.q, (size_t) a.q_stream*z.n_stream);
    const auto map  = from_device(a.map, (size_t) a.n_tiles*z.n_stream);
    const auto mask = from_device(a.mask, (size_t) a.mask_stream*z.n_stream);
    const auto out  = from_device(c.out, (size_t) n_head*z.rows*z.n_stream*z.D[1]);
    ok(cudaMemset(c.out, 0xff, out.size()*sizeof(float)), "poison");
    const auto whole = launch_whole(c, c.out) ? from_device(c.out, out.size()) : out;
    std::vector<float> sinks;
    if (c.sinks) { sinks = from_device(c.sinks, n_head); }
    std::vector<uint8_t> tiles[2];
    std::vector<half>    rows [2];
    for (int side = 0; side < 2; ++side) {
        const auto & k = a.side[side];
        if (k.bits) { tiles[side] = from_device(k.tiles, (size_t) a.n_tiles*z.H*z.n_stream*kvarn_tile_size(k.D, k.bits)); }
        rows[side] = from_device(k.rows, (k.bits ? (size_t) n_slots*KVARN_G : (size_t) a.n_tiles*KVARN_G*z.n_stream)*k.D*z.H);
    }
    double worst = 0.0;
    for (int s = 0; s < z.n_stream; ++s) {
        for (int h = 0; h < z.H; ++h) {
            std::vector<double> x[2];
            for (int side = 0; side < 2; ++side) {
                const auto & k = a.side[side];
                x[side].resize((size_t) z.n_used*KVARN_G*k.D);
                for (int t = 0; t < z.n_used; ++t) {
                    const int64_t where = map[s*a.n_tiles + t];
                    const uint8_t * tile = k.bits ? tiles[side].data() + (((size_t) s*a.n_tiles + t)*z.H + h)*kvarn_tile_size(k.D,
                            k.bits) : nullptr;
                    for (int r = 0; r < KVARN_G; ++r) {
                        for (int d = 0; d < k.D; ++d) {
                            double v = 0.0;
                            if (k.bits && where == -1) {
                                const int code = side == 0 ? code_at(k.bits, KVARN_G, d, r, tile) : code_at(k.bits, k.D, r, d,
                                        tile);
                                const half * m = (const half *) (tile + kvarn_codes_size(k.D, k.bits));
                                const double scale = __half2float(m[d]), zero = __half2float(m[k.D + d]);
                                v = (code*scale + zero)*(double) __half2float(m[2*k.D + r]);
                            } else if (where != -2) {
                                const int64_t row = k.bits ? where*KVARN_G + r : ((int64_t) s*a.n_tiles + t)*KVARN_G + r;
                                v = __half2float(rows[side][row*k.row_stride + h*k.D + d]);
                            }
                            x[side][((size_t) t*KVARN_G + r)*k.D + d] = v;
                        }
                    }
                }
            }
            for (int row = 0; row < z.rows; ++row) {
                for (int e = 0; e < z.gqa; ++e) {
                    const int head = h*z.gqa + e, n2 = 1 << (int) floor(log2((double) n_head));
                    const double slope = z.max_bias <= 0 ? 1.0 : head < n2 ? pow(2.0, -z.max_bias*(head + 1)/n2) : pow(2.0,
                            -z.max_bias/2*(2*(head - n2) + 1)/n2);
                    const float * qv = q.data() + s*a.q_stream + row*a.q_row + head*a.q_head;
                    std::vector<double> p((size_t) z.n_used*KVARN_G);
                    double max = z.sinks ? sinks[head] : -INFINITY, sum = 0.0;
                    for (size_t t = 0; t < p.size(); ++t) {
                        double v = 0.0;
                        for (int d = 0; d < z.D[0]; ++d) { v += qv[d]*x[0][t*z.D[0] + d]; }
                        v *= a.scale;
                        v = z.softcap > 0 ? z.softcap*tanh(v/z.softcap) : v;
                        p[t] = v + slope*__half2float(mask[s*a.mask_stream + row*a.mask_row + t]);
                        max  = std::max(max, p[t]);
                    }
                    for (double & v : p) { v = exp(v - max); sum += v; }
                    if (z.sinks) { sum += exp(sinks[head] - max); }
                    double err[2] = { 0.0, 0.0 }, norm = 0.0;
                    for (int d = 0; d < z.D[1]; ++d) {
                        double ref = 0.0;
                        for (size_t t = 0; t < p.size(); ++t) { ref += p[t]*x[1][t*z.D[1] + d]; }
                        ref /= sum;
                        const size_t at = (((size_t) s*z.rows + row)*n_head + head)*z.D[1] + d;
                        err[0] += (out  [at] - ref)*(out  [at] - ref);
                        err[1] += (whole[at] - ref)*(whole[at] - ref);
                        norm += ref*ref;
                    }
                    for (double e : err) {
                        const double e2 = sqrt(e/norm);
                        worst = e2 <= worst ? worst : e2; // NaN stays
                    }
                }
            }
        }
    }
    drop(c);
    return worst;
}

#if !defined(KVARN_ON_CPU) // no times from tests/cuda/on-cpu.h

static double copy_bandwidth(cudaStream_t stream) {
    const size_t size = (size_t) 1 << 30;
    void * a, * b;
    ok(cudaMalloc(&a, size), "cudaMalloc");
    ok(cudaMalloc(&b, size), "cudaMalloc");
    ok(cudaMemset(a, 1, size), "cudaMemset");
    const double ms = median_ms(12, 0, stream, [&] {
        ok(cudaMemcpyAsync(b, a, size, cudaMemcpyDeviceToDevice, stream), "copy");
    });
    cudaFree(a); cudaFree(b);
    return 2.0*size/(ms*1e-3);
}

static void measure(const shape & z, double copy, cudaStream_t stream, const char * card) {
    double bytes = 0.0;
    for (int side = 0; side < 2; ++side) {
        bytes += (double) z.n_used*z.H*z.n_stream*(z.bits[side] ? kvarn_tile_size(z.D[side], z.bits[side]) : 2*KVARN_G*z.D[side]);
    }
    const int n_sets = std::max(3, std::min(24, (int) (600e6/bytes)));
    std::vector<call> calls;
    for (int i = 0; i < n_sets; ++i) { calls.push_back(make_call(z, 100 + i, false)); }
    ok(cudaDeviceSynchronize(), "set up");

    for (bool is_behind : { false, true }) {
        cudaGraph_t graph; cudaGraphExec_t exec;
        const int n_calls = n_sets*std::max(1, 24/n_sets);
        ok(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "capture");
        for (int i = 0; i < n_calls; ++i) { launch(z, calls[i % n_sets], is_behind, stream); }
        ok(cudaStreamEndCapture(stream, &graph), "capture");
        ok(cudaGraphInstantiate(&exec, graph, 0), "instantiate");
        const double us = median_ms(12, 3, stream, [&] { ok(cudaGraphLaunch(exec, stream), "replay"); })*1e3/n_calls;
        const kvarn_attn_args & a = calls[0].args;
        printf("%s,%d,%d,%d,%d,%d,%d,%d,%d,%s,%.2f,%.0f,%.1f,%d,%d\n", card, z.bits[0], z.bits[1], z.D[0], z.H, z.gqa, z.rows,
                z.n_used*KVARN_G, z.n_stream, is_behind ? "behind" : "plain", us, bytes/us*1e-3, 100.0*bytes/(us*1e-6)/copy,
                a.n_split, a.n_warps);
        fflush(stdout);
        cudaGraphExecDestroy(exec);
        cudaGraphDestroy(graph);
    }
    for (call & c : calls) { drop(c); }
}

#endif

int main(int argc, char ** argv) {
    const bool is_all = argc == 1, is_check = is_all || !strcmp(argv[1], "check");

    if (is_check) {
        const double bound = 1e-2;
        std::vector<shape> shapes;
        for (int k : { 0, 2, 3, 4 }) {
            for (int v : { 0, 2, 3, 4 }) {
                if (k || v) { shapes.push_back({ { k, v }, { 128, 128 }, 4, 1, 13, 2, 2, false, 0.0f, 0.0f }); }
            }
        }
        for (int b : { 2, 3, 4 }) {
            for (int D : { 64, 80, 96, 112, 192, 256, 512 }) {
                shapes.push_back({ { b, b }, { D, D }, 4, 1, 13, 2, 1, false, 0.0f, 0.0f });
            }
            for (int gqa : { 1, 2, 3, 5, 7, 8, 12, 16 }) { shapes.push_back({ { b, b }, { 128, 128 }, gqa, 1, 7, 2, 1, false,
                    0.0f, 0.0f }); }
            for (int rows : { 2, 5, 16 })              { shapes.push_back({ { b, b }, { 128, 128 }, 4, rows, 5, 2, 2, false, 0.0f,
                    0.0f }); }
            for (int n : { 1, 2, 33, 77 })             { shapes.push_back({ { b, 2 }, { 64, 64 }, 8, 1, n, 2, 1, false, 0.0f,
                    0.0f }); }
            shapes.push_back({ { b, b }, { 192, 128 }, 2, 3, 5, 2, 1, false, 0.0f, 0.0f });
            shapes.push_back({ { b, b }, { 128, 128 }, 3, 2, 5, 2, 1, true,  0.0f, 0.0f });
            shapes.push_back({ { b, b }, { 128, 128 }, 3, 2, 5, 2, 1, false, 8.0f, 0.0f });
            shapes.push_back({ { b, b }, { 128, 128 }, 3, 2, 5, 2, 1, false, 0.0f, 2.0f });
            shapes.push_back({ { b, b }, { 96,  96  }, 3, 2, 5, 2, 1, true,  8.0f, 2.0f });
            shapes.push_back({ { b, b }, { 128, 128 }, 8, 1, 77, 2, 1, true, 8.0f, 2.0f });
        }
        shapes.push_back({ { 2, 2 }, { 64, 64 }, 1, 1, 600, 1, 1, false, 0.0f, 0.0f }); // the map is looked through in parts
        int n_bad = 0;
        double worst = 0.0;
        for (size_t i = 0; i < shapes.size(); ++i) {
            const shape & z = shapes[i];
            const double err = check(z, 1000 + (uint32_t) i);
            worst = std::max(worst, err);
            if (!(err <= bound)) {
                ++n_bad;
                printf("FAILED bits %d/%d D %d/%d gqa %d rows %d tiles %d sinks %d alibi %g softcap %g: error %g > %g\n",
                        z.bits[0], z.bits[1],
                       z.D[0], z.D[1], z.gqa, z.rows, z.n_used, z.sinks, z.max_bias, z.softcap, err, bound);
            }
        }
        printf("check: %zu shapes, %d failed, largest error %.2e (bound %.0e)\n", shapes.size(), n_bad, worst, bound);
        if (n_bad) { return 1; }
    }
#if !defined(KVARN_ON_CPU)
    if (is_all || !strcmp(argv[1], "time")) {
        cudaDeviceProp prop;
        ok(cudaGetDeviceProperties(&prop, 0), "device");
        cudaStream_t stream;
        cudaStreamCreate(&stream);
        const double copy = copy_bandwidth(stream);
        printf("copy: %.0f GB/s read + write\n", copy*1e-9);
        printf("card,bits_k,bits_v,D,heads,gqa,rows,tokens,streams,launch,us,GB/s,%% of copy,splits,warps\n");
        if (argc > 2) {
            const auto number = [&](int i, int otherwise) { return argc > i ? atoi(argv[i]) : otherwise; };
            const int D = number(4, 128);
            measure({ { number(2, 4), number(3, 2) }, { D, D }, number(5, 4), 1, number(6, 131072)/KVARN_G, number(7, 8),
                    number(8, 1), false, 0.0f, 0.0f }, copy, stream, prop.name);
            return 0;
        }
        const int bits[][2] = { { 4, 4 }, { 4, 2 }, { 3, 3 }, { 2, 2 } };
        for (int n : { 131072, 32768, 8192, 4096, 2048 }) {
            for (int gqa : { 4, 8 }) {
                for (auto & b : bits) {
                    measure({ { b[0], b[1] }, { 128, 128 }, gqa, 1, n/KVARN_G, 8, 1, false, 0.0f, 0.0f }, copy, stream,
                            prop.name);
                }
            }
        }
        for (int gqa : { 4, 8 }) {
            for (auto & b : bits) { measure({ { b[0], b[1] }, {  64,  64 }, gqa, 1, 1024, 8, 1, false, 0.0f, 0.0f }, copy, stream,
                    prop.name); }
            for (int H : { 4, 8 }) {
                for (auto & b : bits) {
                    measure({ { b[0], b[1] }, { 256, 256 }, gqa, 1, 1024, H, 1, false, 0.0f, 0.0f }, copy, stream, prop.name);
                }
            }
        }
        measure({ { 4, 2 }, { 128, 128 }, 4, 4, 1024, 8, 1, false, 0.0f, 0.0f }, copy, stream, prop.name);
        measure({ { 4, 2 }, { 128, 128 }, 16, 1, 1024, 8, 1, false, 0.0f, 0.0f }, copy, stream, prop.name);
        for (int n : { 32768, 8192, 4096, 2048 }) {
            for (auto & b : bits) {
                measure({ { b[0], b[1] }, { 128, 128 }, 4, 1, n/KVARN_G, 8, 4, false, 0.0f, 0.0f }, copy, stream, prop.name);
            }
        }
        measure({ { 4, 0 }, { 128, 128 }, 4, 1, 256, 8, 1, false, 0.0f, 0.0f }, copy, stream, prop.name);
        measure({ { 0, 2 }, { 128, 128 }, 4, 1, 256, 8, 1, false, 0.0f, 0.0f }, copy, stream, prop.name);
        measure({ { 4, 2 }, { 96, 96 }, 4, 1, 256, 8, 1, false, 0.0f, 0.0f }, copy, stream, prop.name);
    }
#endif
    return 0;
}
