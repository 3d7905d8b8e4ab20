// runner.cpp - runs jobs on the kernels it is linked with: plans an op (kvarn-metal-plan.h), hands each launch to the executor.
//   runner JOBS INPUT OUTPUT        without arguments: lists the kernels
//
// JOBS has a line per fact; `run` ends a job. A job runs once per schedule, and every schedule must give the same bytes. Prints
// the name of every kernel it launches.
//   op attn|get|seal|kernel    int NAME VALUE    float NAME VALUE    tensor NAME ne0..ne3 nb0..nb3    schedule KIND SEED
//   in NAME OFFSET SIZE        bytes of INPUT, not to be changed      inout NAME OFFSET SIZE    written to OUTPUT in the end
//   out NAME SIZE              written to OUTPUT in the end, 0xff before    scratch NAME SIZE    the same, not written to OUTPUT
//
// SPDX-License-Identifier: MIT

#include "executor.h"
#include "kvarn-metal-plan.h"

#include <stdlib.h>
#include <unistd.h>

#include <fstream>
#include <iterator>
#include <map>
#include <sstream>
#include <string>
#include <vector>

extern "C" __attribute__((weak)) void __msan_scoped_disable_interceptor_checks(void);

typedef std::vector<char> bytes;

struct buffer {
    size_t offset   = 0;
    size_t size     = 0;
    bool   is_in    = false;
    bool   is_out   = false;
    void * memory   = nullptr;
};

struct run {
    std::string op, name;
    std::map<std::string, int>                i;
    std::map<std::string, float>              f;
    std::map<std::string, kvarn_metal_tensor> t;
    std::map<std::string, buffer>             b;
    std::vector<msl_schedule>                 schedules;
    std::vector<std::string>                  schedule_names;
};

static void fail(const std::string & what) {
    fprintf(stderr, "runner: %s\n", what.c_str());
    _exit(2);
}

// Launches one dispatch; sources by name, in the order of the node's sources, then the result. The arguments lie in guarded
// memory, too: a kernel may not read beyond them either.
static void launch(const kvarn_metal_dispatch & d, run & r, const std::vector<std::string> & names, const msl_schedule & order) {
    msl_dispatch m = {};
    m.kernel = d.name;
    m.buffer[KVARN_BUF_ARGS] = msl_memory(d.args_size, true);
    msl_fill(m.buffer[KVARN_BUF_ARGS], d.args, d.args_size);
    for (uint32_t n = 0; n <= d.n_src; ++n) {
        const auto found = r.b.find(names[n]);
        m.buffer[n + 1] = found != r.b.end() ? found->second.memory : nullptr;
    }
    for (int c = 0; c < KVARN_FC_COUNT; ++c) {
        msl_set_constant(KVARN_FC_FIRST + c, d.constant[c]);
    }
    memcpy(m.groups, d.groups, sizeof(m.groups));
    m.threads  = d.threads;
    m.memory   = d.memory;
    m.schedule = order;
    printf("%s\n", d.name);
    msl_run(m);
    msl_free(m.buffer[KVARN_BUF_ARGS], d.args_size);
}

// of 8 KV heads, one stream: 32, 64, 256 threadgroups at 1k, 4k, 32k tokens; many streams; less room than that
static_assert(kvarn_metal_chunk(8, 8, 6) == 2 && kvarn_metal_chunk(32, 8, 12) == 4 && kvarn_metal_chunk(256, 8, 68) == 8, "");
static_assert(kvarn_metal_chunk(32, 300, 8) == 32 && kvarn_metal_chunk(5, 1, 2) == 3 && kvarn_metal_chunk(1, 1, 5) == 1, "");

static void run_attn(run & r, const msl_schedule & schedule) {
    kvarn_metal_attn_op op = {};
    for (int side = 0; side < 2; ++side) {
        op.bits[side] = r.i[side ? "bits_v" : "bits_k"];
        op.D   [side] = r.i[side ? "D_v" : "D_k"];
        op.rows[side] = r.t[side ? "v_rows" : "k_rows"];
    }
    op.H        = r.i["H"];
    op.map_off  = r.i["map_off"];
    op.n_tiles  = r.i["n_tiles"];
    op.s0       = r.i["s0"];
    op.n_used   = r.i["n_used"];
    op.tiny     = r.i["tiny"];
    op.has_mask = r.b.count("mask");
    op.scale    = r.f["scale"];
    op.max_bias = r.f["max_bias"];
    op.softcap  = r.f["softcap"];
    op.q        = r.t["q"];
    op.mask     = r.t["mask"];
    op.part     = r.t["part"];
    if (const char * refused = kvarn_metal_refuses_attn(op)) {
        fail(r.name + ": " + refused);
    }
    const kvarn_metal_dispatch d = kvarn_metal_plan_attn(op);
    if (d.memory > KVARN_METAL_MEMORY) {
        fail(r.name + ": " + std::to_string(d.memory) + " bytes of threadgroup memory");
    }
    launch(d, r, { "q", "plan", "k_tiles", "k_rows", "v_tiles", "v_rows", "mask", "part" }, schedule);

    kvarn_metal_reduce_op reduce = {};
    reduce.has_sinks = r.b.count("sinks");
    reduce.part      = op.part;
    reduce.out       = r.t["out"];
    launch(kvarn_metal_plan_reduce(reduce), r, { "part", "sinks", "out" }, schedule);
}

static void run_tiles(run & r, const msl_schedule & schedule) {
    kvarn_metal_tiles_op op = {};
    op.side    = r.i["side"];
    op.bits    = r.i["bits"];
    op.D       = r.i["D"];
    op.H       = r.i["H"];
    op.n_rows  = r.i["n_rows"];
    op.n_seal  = r.i["n_seal"];
    op.n_tiles = r.i["n_tiles"];
    op.s0      = r.i["s0"];
    op.tail    = r.t["tail"];
    op.out     = r.t["out"];
    if (r.op == "seal") {
        launch(kvarn_metal_plan_seal(op), r, { "tail", "plan", "", "tiles" }, schedule);
    } else {
        launch(kvarn_metal_plan_get(op), r, { "tail", "plan", "tiles", "out" }, schedule);
    }
}

// a kernel by itself: buffers b0, b1, ..
static void run_kernel(run & r, const msl_schedule & schedule) {
    msl_dispatch m = {};
    const std::string kernel = r.name;
    m.kernel    = kernel.c_str();
    m.groups[0] = (uint32_t) r.i["groups"];
    m.groups[1] = m.groups[2] = 1;
    m.threads   = (uint32_t) r.i["threads"];
    m.memory    = (size_t) r.i["memory"];
    m.schedule  = schedule;
    for (auto & named : r.b) {
        m.buffer[atoi(named.first.c_str() + 1)] = named.second.memory;
    }
    msl_run(m);
}

static void run_job(run & r, const bytes & input, std::ofstream & output) {
    std::map<std::string, bytes> first;
    for (size_t n = 0; n < r.schedules.size(); ++n) {
        for (auto & named : r.b) {
            buffer & b = named.second;
            b.memory = msl_memory(b.size, b.is_in);
            if (b.is_in) {
                if (b.offset + b.size > input.size()) {
                    fail(r.name + ": input is too short for " + named.first);
                }
                msl_fill(b.memory, input.data() + b.offset, b.size);
            }
        }
        if (r.op == "attn") {
            run_attn(r, r.schedules[n]);
        } else if (r.op == "seal" || r.op == "get") {
            run_tiles(r, r.schedules[n]);
        } else if (r.op == "kernel") {
            run_kernel(r, r.schedules[n]);
        } else {
            fail("unknown op " + r.op);
        }
        for (auto & named : r.b) {
            buffer & b = named.second;
            const std::string where = r.name + ", " + r.schedule_names[n] + ": " + named.first;
            const char * data = (const char *) b.memory;
            if (b.is_out) {
                const ptrdiff_t unwritten = b.is_in ? -1 : msl_unwritten(data, b.size);
                if (unwritten >= 0) {
                    fail(where + " is not written, or not from known values, at byte " + std::to_string(unwritten));
                }
                if (n == 0) {
                    first[named.first].assign(data, data + b.size);
                } else if (memcmp(first[named.first].data(), data, b.size) != 0) {
                    size_t at = 0;
                    while (first[named.first][at] == data[at]) {
                        ++at;
                    }
                    fail(where + " differs from " + r.schedule_names[0] + " at byte " + std::to_string(at));
                }
            } else if (b.is_in && memcmp(input.data() + b.offset, data, b.size) != 0) {
                fail(where + " was written to");
            }
            msl_free(b.memory, b.size);
        }
    }
    for (auto & named : first) {
        output.write(named.second.data(), (std::streamsize) named.second.size());
    }
}

static msl_schedule schedule_of(const std::string & kind, uint64_t seed) {
    return { kind == "forward" ? msl_schedule::FORWARD : kind == "reverse" ? msl_schedule::REVERSE
             : kind == "random" ? msl_schedule::RANDOM : msl_schedule::DEPTH_FIRST, seed };
}

int main(int argc, char ** argv) {
    if (__msan_scoped_disable_interceptor_checks) {
        __msan_scoped_disable_interceptor_checks();
    }
    if (argc != 4) {
        for (int k = 0; k < msl_kernel_count(); ++k) {
            printf("%s\n", msl_kernel_name(k));
        }
        return argc == 1 ? 0 : 2;
    }
    std::ifstream jobs(argv[1]), data(argv[2], std::ios::binary);
    std::ofstream output(argv[3], std::ios::binary | std::ios::trunc);
    const bytes input((std::istreambuf_iterator<char>(data)), std::istreambuf_iterator<char>());
    if (!jobs || !output) {
        fail("cannot open the job or the output file");
    }
    run r;
    for (std::string line; std::getline(jobs, line); ) {
        std::istringstream words(line);
        std::string what, name;
        words >> what >> name;
        if (what == "op") {
            r.op = name;
        } else if (what == "case") {
            r.name = name;
        } else if (what == "int") {
            words >> r.i[name];
        } else if (what == "float") {
            words >> r.f[name];
        } else if (what == "tensor") {
            kvarn_metal_tensor & t = r.t[name];
            words >> t.ne[0] >> t.ne[1] >> t.ne[2] >> t.ne[3] >> t.nb[0] >> t.nb[1] >> t.nb[2] >> t.nb[3];
        } else if (what == "in" || what == "inout" || what == "out" || what == "scratch") {
            buffer & b = r.b[name];
            b.is_in  = what == "in"  || what == "inout";
            b.is_out = what == "out" || what == "inout";
            if (b.is_in) {
                words >> b.offset;
            }
            words >> b.size;
        } else if (what == "schedule") {
            uint64_t seed = 0;
            words >> seed;
            r.schedules.push_back(schedule_of(name, seed));
            r.schedule_names.push_back(name + " " + std::to_string(seed));
        } else if (what == "run") {
            run_job(r, input, output);
            r = run();
        } else {
            fail("unknown line: " + line);
        }
        if (what != "run" && words.fail()) {
            fail("cannot read: " + line);
        }
    }
    return 0;
}
