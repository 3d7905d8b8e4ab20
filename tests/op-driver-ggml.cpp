// op-driver-ggml.cpp - the nodes SEAL, GET, ATTN and REDUCE with one thread and with several, without the backend's other ops.
// test_sanitizers.py and test_arm.py compile it in seconds, with our sources and what they need of ggml.
// Every number of threads must give the same bits. Prints, for each case, the rms error against the portable kernels.
//
// SPDX-License-Identifier: MIT

#include "ggml-backend.h"
#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "ggml.h"
#include "kvarn-graph.h"

#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

// what kvarn-cpu-ggml.cpp takes from ggml-cpu
void ggml_cpu_fp16_to_fp32(const ggml_fp16_t * x, float * y, int64_t n) { ggml_fp16_to_fp32_row(x, y, n); }
void ggml_cpu_fp32_to_fp16(const float * x, ggml_fp16_t * y, int64_t n) { ggml_fp32_to_fp16_row(x, y, n); }

// what ggml.c would take from ggml-backend, for things that do not happen here
void ggml_backend_tensor_memset(ggml_tensor *, uint8_t, size_t, size_t) { abort(); }
void ggml_backend_tensor_set(ggml_tensor *, const void *, size_t, size_t) { abort(); }
ggml_backend_buffer_usage ggml_backend_buffer_get_usage(ggml_backend_buffer_t) { abort(); }
bool ggml_backend_buffer_is_host(ggml_backend_buffer_t) { abort(); }
ggml_backend_buffer_type_t ggml_backend_buffer_get_type(ggml_backend_buffer_t) { abort(); }
ggml_backend_dev_t ggml_backend_buft_get_device(ggml_backend_buffer_type_t) { abort(); }
bool ggml_backend_dev_supports_op(ggml_backend_dev_t, const ggml_tensor *) { abort(); }

// a thread pool's barrier and counter, without its threads
struct ggml_threadpool {
    int n_threads, n_waiting = 0, n_passed = 0;
    std::atomic<int> chunk{0};
    std::mutex mutex;
    std::condition_variable all_here;

    explicit ggml_threadpool(int n) : n_threads(n) {}
};

void ggml_barrier(ggml_threadpool * pool) {
    std::unique_lock<std::mutex> lock(pool->mutex);
    const int passed = pool->n_passed;
    if (++pool->n_waiting == pool->n_threads) {
        pool->n_waiting = 0;
        pool->n_passed++;
        pool->all_here.notify_all();
    } else {
        pool->all_here.wait(lock, [&] { return pool->n_passed != passed; });
    }
}

// relaxed as there: the order of memory is the barrier's business
static const std::memory_order relaxed = std::memory_order_relaxed;

void ggml_threadpool_chunk_set(ggml_threadpool * pool, int value) { pool->chunk.store(value, relaxed); }
int  ggml_threadpool_chunk_add(ggml_threadpool * pool, int value) { return pool->chunk.fetch_add(value, relaxed); }

static const int64_t G = KVARN_G;

// --- memory: a block of its own for every tensor, so that the address sanitizer sees the first byte beyond ---

static std::vector<void *> g_blocks;

static void * new_block(size_t size) {
    g_blocks.push_back(aligned_alloc(64, (size + 63)/64*64));
    memset(g_blocks.back(), 0xff, size);
    return g_blocks.back();
}

static ggml_tensor * with_data(ggml_tensor * t) {
    t->data = new_block(ggml_nbytes(t));
    return t;
}

static uint32_t g_random = 1;

static float uniform() { // -1 .. 1
    g_random = g_random*1664525u + 1013904223u;
    return (float) (g_random >> 8)/8388608.0f - 1.0f;
}

// --- a layer: some tiles sealed before, one sealed now, one open, one empty ---

struct layer_case {
    int bits[2], D, H, gqa, rows, n_tiles;
};

struct layer {
    ggml_tensor * seal[2] = {}, * get[2] = {}, * part = nullptr, * out = nullptr;
};

static const int n_rows = 3, n_slots = 3; // slot 0 is nobody's, 1 is open, 2 gets sealed

static layer make_layer(ggml_context * ctx, const layer_case & c) {
    ggml_tensor * plan = with_data(ggml_new_tensor_1d(ctx, GGML_TYPE_I64, n_rows + 4 + c.n_tiles));
    int64_t     * map  = (int64_t *) plan->data + n_rows + 4;
    for (int i = 0; i < n_rows; ++i) {
        ((int64_t *) plan->data)[i] = 0;
    }
    for (int i = 0; i < c.n_tiles; ++i) {
        map[i] = KVARN_MAP_SEALED;
    }
    map[c.n_tiles/2] = KVARN_MAP_EMPTY;
    map[c.n_tiles - 1] = 1;
    const int64_t pairs[4] = { -1, -1, 2, 0 };
    memcpy(map - 4, pairs, sizeof(pairs));

    layer res;
    ggml_tensor * view[2];
    for (int side = 0; side < 2; ++side) {
        const kvarn_shape shape = { side, c.bits[side], c.D, c.H, n_rows, 2, c.n_tiles };
        const int64_t size = kvarn_tile_size(c.D, c.bits[side]);
        ggml_tensor * tail  = with_data(ggml_new_tensor_2d(ctx, GGML_TYPE_F16, c.D*c.H, G*n_slots));
        ggml_tensor * tiles = with_data(ggml_new_tensor_3d(ctx, GGML_TYPE_I8, size*c.H, c.n_tiles, 1));
        for (int64_t i = 0; i < ggml_nelements(tail); ++i) {
            ((ggml_fp16_t *) tail->data)[i] = ggml_fp32_to_fp16(uniform() + uniform());
        }
        std::vector<float> x(G*c.D), scratch(kvarn_seal_scratch(c.D));
        for (int64_t i = 1; i < (int64_t) c.n_tiles*c.H; ++i) {
            for (float & v : x) {
                v = uniform() + uniform();
            }
            kvarn_seal_ref(side, c.bits[side], c.D, x.data(), (uint8_t *) tiles->data + i*size, scratch.data());
        }
        res.seal[side] = ggml_kvarn_seal(ctx, tiles, tail, plan, shape);
        res.get [side] = with_data(ggml_kvarn_get(ctx, res.seal[side], tail, plan, shape, G*c.n_tiles, 0, 1));
        view[side] = ggml_permute(ctx, res.get[side], 0, 2, 1, 3);
    }

    ggml_tensor * q    = with_data(ggml_new_tensor_4d(ctx, GGML_TYPE_F32, c.D, c.H*c.gqa, c.rows, 1));
    ggml_tensor * mask = with_data(ggml_new_tensor_4d(ctx, GGML_TYPE_F16, G*c.n_tiles, c.rows, 1, 1));
    for (int64_t i = 0; i < ggml_nelements(q); ++i) {
        ((float *) q->data)[i] = uniform();
    }
    for (int64_t i = 0; i < ggml_nelements(mask); ++i) {
        const int64_t t = i % mask->ne[0];
        const bool is_seen = t/G != c.n_tiles/2 && uniform() < 0.8f && (t/G != c.n_tiles - 1 || t % G < 70);
        ((ggml_fp16_t *) mask->data)[i] = ggml_fp32_to_fp16(is_seen ? 0.0f : -INFINITY);
    }
    q = ggml_permute(ctx, q, 0, 2, 1, 3);
    res.out = with_data(ggml_kvarn_attn(ctx, q, view[0], view[1], mask, nullptr, 1.0f/sqrtf((float) c.D), 0.0f, 0.0f));
    res.part = with_data(res.out->src[0]);
    return res;
}

static void run(ggml_tensor * node, int n_threads, bool use_ref) {
    const size_t size = ggml_kvarn_work_size(node, n_threads);
    void * work = size ? new_block(size) : nullptr;
    ggml_threadpool pool(n_threads);
    std::vector<std::thread> threads;
    for (int i = 0; i < n_threads; ++i) {
        threads.emplace_back([=, &pool] {
            ggml_compute_params params = {};
            params.ith        = i;
            params.nth        = n_threads;
            params.wsize      = size;
            params.wdata      = work;
            params.threadpool = &pool;
            params.use_ref    = use_ref;
            ggml_compute_forward_kvarn(&params, node);
        });
    }
    for (std::thread & thread : threads) {
        thread.join();
    }
}

static std::string bytes_of(const ggml_tensor * t) { return std::string((const char *) t->data, ggml_nbytes(t)); }

// everything the nodes write
static std::string run_all(const layer & l, int n_threads, bool use_ref) {
    std::string res;
    for (ggml_tensor * node : { l.seal[0], l.seal[1], l.get[0], l.get[1], l.part, l.out }) {
        run(node, n_threads, use_ref);
        res += node == l.part ? "" : bytes_of(node);
    }
    return res;
}

int main() {
    const layer_case cases[] = {
        { { 4, 2 }, 128, 2, 4,  1, 9 },
        { { 3, 3 },  80, 3, 3,  5, 6 },
        { { 2, 4 },  16, 2, 2, 16, 5 },
        { { 2, 3 }, 256, 1, 8,  2, 4 },
    };
    for (const layer_case & c : cases) {
        ggml_context * ctx = ggml_init({ 64*ggml_tensor_overhead(), nullptr, true });
        const layer l = make_layer(ctx, c);

        run_all(l, 1, true);
        const std::vector<float> want((const float *) l.out->data, (const float *) l.out->data + ggml_nelements(l.out));
        const std::string one = run_all(l, 1, false);
        double error = 0.0, total = 0.0;
        for (size_t i = 0; i < want.size(); ++i) {
            const double out = ((const float *) l.out->data)[i];
            error += (out - want[i])*(out - want[i]);
            total += (double) want[i]*want[i];
        }
        for (int n_threads : { 2, 3, 8 }) {
            if (run_all(l, n_threads, false) != one) {
                fprintf(stderr, "op-driver-ggml: %d threads give other bits than one, %d channels\n", n_threads, c.D);
                return 1;
            }
        }
        printf("%d %d %d %.9f\n", c.bits[0], c.bits[1], c.D, sqrt(error/total));
        ggml_free(ctx);
        for (void * block : g_blocks) {
            free(block);
        }
        g_blocks.clear();
    }
    return 0;
}
