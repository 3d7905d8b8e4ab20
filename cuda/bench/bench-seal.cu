// bench-seal.cu - checks SEAL and GET byte for byte against kvarn-ref.c and times them, without ggml.
//
// SPDX-License-Identifier: MIT
//
// From the repository's root; the table is CSV:
//   nvcc -std=c++17 -O3 -arch=native -use_fast_math -Iggml-kvarn -Icuda -Xcompiler -ffp-contract=off -o bench-seal \
//        cuda/bench/bench-seal.cu cuda/kvarn-seal.cu cuda/kvarn-get.cu ggml-kvarn/kvarn-ref.c && ./bench-seal
//   ./bench-seal check     only the checks (for compute-sanitizer)

#include "bench.cuh"
#include "kvarn-cuda.h"
#include "kvarn.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>

enum { H = 2, N_SLOTS = 8, N_TILES = 8 };

// what a slot holds: gaussian rows with outliers, and what sealing must survive
static void fill(std::vector<half> & tail, int D, uint32_t seed) {
    std::mt19937 rng(seed);
    std::normal_distribution<float> normal;
    for (int slot = 0; slot < N_SLOTS; ++slot) {
        const float range = slot == 3 ? 1e-6f : slot == 4 ? 2e4f : 1.0f;
        for (int t = 0; t < KVARN_G; ++t) {
            for (int c = 0; c < D*H; ++c) {
                float v = normal(rng)*range*(c % 37 == 3 ? 16.0f : 1.0f)*(t % 29 == 5 ? 8.0f : 1.0f) + (c % 11 == 2 ? 3.0f*range :
                        0.0f);
                v = slot == 1 ? 0.0f : slot == 2 ? 0.5f : slot == 5 && (c + t) % 97 == 0 ? (c % 2 ? NAN : INFINITY) : v;
                tail[((size_t) slot*KVARN_G + t)*D*H + c] = __float2half(v);
            }
        }
    }
}

// n_layers of them in one launch, all of the same rows
static int check(int side, int bits, int D, int n_layers) {
    const int size = kvarn_tile_size(D, bits);
    std::vector<half> tail((size_t) N_SLOTS*KVARN_G*D*H);
    fill(tail, D, 77*D + 5*bits + side);
    std::vector<int64_t> list, map;
    for (int slot = 0; slot < N_SLOTS; ++slot) {
        list.push_back(slot == 6 ? -1 : slot);
        list.push_back(slot == 6 ? -1 : (slot*3 + 1) % N_TILES);
        map .push_back(slot < 5 ? -1 : slot == 5 ? -2 : slot == 6 ? 3 : -1);
    }
    std::vector<uint8_t> want((size_t) N_TILES*H*size, 0xaa), got(n_layers*want.size());
    std::vector<float> x((size_t) KVARN_G*D), scratch(kvarn_seal_scratch(D));
    for (int slot = 0; slot < N_SLOTS; ++slot) {
        for (int h = 0; h < H && list[2*slot] >= 0; ++h) {
            for (int i = 0; i < KVARN_G*D; ++i) {
                x[i] = __half2float(tail[((size_t) slot*KVARN_G + i/D)*D*H + h*D + i%D]);
            }
            kvarn_seal_ref(side, bits, D, x.data(), want.data() + (list[2*slot + 1]*H + h)*size, scratch.data());
        }
    }
    half    * d_tail  = on_device(tail);
    int64_t * d_list  = on_device(list), * d_map = on_device(map);
    uint8_t * d_tiles = on_device(std::vector<uint8_t>(got.size(), 0xaa));
    std::vector<half> out((size_t) N_TILES*KVARN_G*D*H, __float2half(NAN));
    half    * d_out   = on_device(out);
    std::vector<kvarn_seal_side> sides;
    for (int l = 0; l < n_layers; ++l) {
        sides.push_back({ side, bits, D, H, d_tail, d_tiles + l*want.size() });
    }
    ok(kvarn_seal(sides.data(), n_layers, d_list, N_SLOTS, 0), "SEAL");
    ok(kvarn_get(side, bits, D, H, d_tiles, d_tail, d_map, d_out, N_TILES, N_TILES, 0, 1, 0), "GET");
    ok(cudaMemcpy(got.data(), d_tiles, got.size(), cudaMemcpyDeviceToHost), "cudaMemcpy");
    ok(cudaMemcpy(out.data(), d_out, out.size()*sizeof(half), cudaMemcpyDeviceToHost), "cudaMemcpy");
    for (void * p : { (void *) d_tail, (void *) d_list, (void *) d_map, (void *) d_tiles, (void *) d_out }) { cudaFree(p); }

    int n_bad = 0;
    for (size_t i = 0; i < got.size(); ++i) {
        const size_t at = i % want.size();
        if (got[i] != want[at] && n_bad++ == 0) {
            printf("FAILED SEAL side %d bits %d D %d: layer %zu tile %zu head %zu byte %zu: %02x, reference %02x\n", side, bits,
                    D, i/want.size(), at/size/H, at/size%H, at%size, got[i], want[at]);
        }
    }
    int n_rows = 0;
    for (int i = 0; i < N_TILES; ++i) {
        for (int h = 0; h < H; ++h) {
            kvarn_unseal_ref(side, bits, D, want.data() + ((size_t) i*H + h)*size, x.data());
            for (int e = 0; e < KVARN_G*D; ++e) {
                const half y = map[i] == -1 ? __float2half(x[e]) : map[i] == -2 ? __float2half(0.0f) :
                               tail[((size_t) map[i]*KVARN_G + e/D)*D*H + h*D + e%D];
                const half v = out[((size_t) i*KVARN_G + e/D)*D*H + h*D + e%D];
                n_rows += __half_as_ushort(y) != __half_as_ushort(v);
            }
        }
    }
    if (n_rows) { printf("FAILED GET side %d bits %d D %d: %d values differ\n", side, bits, D, n_rows); }
    return n_bad || n_rows;
}

#if !defined(KVARN_ON_CPU) // no times from tests/cuda/on-cpu.h

// of a GET, or a SEAL of keys and values of n_layers in one launch
static double time_us(cudaStream_t stream, const std::vector<std::pair<half *, uint8_t *>> & sets, int n_layers, int bits, int D,
        int n, int heads, const int64_t * list, const int64_t * map, half * out) {
    cudaEvent_t e0, e1;
    cudaEventCreate(&e0); cudaEventCreate(&e1);
    std::vector<float> times;
    for (int i = 0; i < 20; ++i) {
        const auto & set = sets[i % sets.size()];
        std::vector<kvarn_seal_side> sides; // layers share what they read, and what they write
        for (int l = 0; l < 2*n_layers; ++l) {
            const auto & s = sets[l % sets.size()];
            sides.push_back({ l % 2 ? KVARN_VALUE : KVARN_KEY, bits, D, heads, s.first, s.second });
        }
        float ms;
        cudaEventRecord(e0, stream);
        ok(n_layers > 0 ? kvarn_seal(sides.data(), sides.size(), list, n, stream)
                   : kvarn_get (KVARN_KEY, bits, D, heads, set.second, set.first, map, out, n, n, 0, 1, stream), "kernel");
        cudaEventRecord(e1, stream);
        ok(cudaEventSynchronize(e1), "kernel");
        cudaEventElapsedTime(&ms, e0, e1);
        times.push_back(ms);
    }
    std::sort(times.begin(), times.end());
    return times[times.size()/2]*1e3;
}

#endif

int main(int argc, char **) {
    int n_bad = 0, n = 0;
    for (int side : { KVARN_KEY, KVARN_VALUE }) {
        for (int bits : { 2, 3, 4 }) {
            for (int D : { 16, 64, 80, 96, 112, 128, 192, 256, 512 }) {
                n_bad += check(side, bits, D, D == 16 && bits == 4 ? 66 : 1); // more than one launch takes
                ++n;
            }
        }
    }
    printf("check: %d shapes, %d failed, tiles and rows byte for byte\n", n, n_bad);
    if (n_bad || argc > 1) { return n_bad != 0; }
#if !defined(KVARN_ON_CPU)
    cudaDeviceProp prop;
    ok(cudaGetDeviceProperties(&prop, 0), "device");

    cudaStream_t stream;
    cudaStreamCreate(&stream);
    printf("card,op,bits,D,heads,tiles,layers,us,us per tile and head\n");
    for (int n_tiles : { 1, 16, 256 }) {
        const int D = 128, heads = 8;
        std::vector<int64_t> list, map(n_tiles, -1);
        for (int i = 0; i < n_tiles; ++i) { list.push_back(i); list.push_back(i); }
        std::vector<half> tail((size_t) n_tiles*KVARN_G*D*heads);
        std::mt19937 rng(1);
        std::normal_distribution<float> normal;
        for (half & v : tail) { v = __float2half(normal(rng)); }
        std::vector<std::pair<half *, uint8_t *>> sets;
        for (int i = 0; i < 4; ++i) {
            sets.push_back({ on_device(tail), on_device(std::vector<uint8_t>((size_t) n_tiles*heads*kvarn_tile_size(D, 4))) });
        }
        const int64_t * d_list = on_device(list), * d_map = on_device(map);
        std::vector<int64_t> none(list.size(), -1);
        const int64_t * d_none = on_device(none);
        half * out = on_device(tail);
        for (int bits : { 2, 3, 4 }) {
            const double get = time_us(stream, sets, 0, bits, D, n_tiles, heads, d_list, d_map, out);
            printf("%s,GET,%d,%d,%d,%d,1,%.1f,%.3f\n",  prop.name, bits, D, heads, n_tiles, get,  get/n_tiles/heads);
            for (int n_layers : { 1, 4, 32 }) {
                const double seal = time_us(stream, sets, n_layers, bits, D, n_tiles, heads, d_list, d_map, out);
                printf("%s,SEAL,%d,%d,%d,%d,%d,%.1f,%.3f\n", prop.name, bits, D, heads, n_tiles, n_layers, seal,
                        seal/n_tiles/heads/n_layers/2);
            }
        }
        for (int n_layers : { 4, 32 }) {
            const double none = time_us(stream, sets, n_layers, 4, D, n_tiles, heads, d_none, d_map, out);
            printf("%s,SEAL of an empty list,4,%d,%d,%d,%d,%.1f,0\n", prop.name, D, heads, n_tiles, n_layers, none);
        }
    }
#endif
    return 0;
}
