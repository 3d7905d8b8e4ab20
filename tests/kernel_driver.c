// kernel_driver.c - runs the codec and the attention kernels that ship on what it reads: for test_arm.py and test_sanitizers.py.
// One request is a line of words and numbers, then its arrays; the answer is arrays. kernel_requests.py writes and reads both.
//
// SPDX-License-Identifier: MIT
//
//   find   NAME                                    -> one line: the name of the kernels that kvarn_cpu_find() gives, or none
//   seal   SIDE BITS D                  x          -> tile, the same from kvarn_seal_ref and from every set of kernels
//   unseal SIDE BITS D                  tile       -> x
//   attend NAME BITS_K BITS_V DK DV ROWS GQA TILES SOFTCAP(f32 bits)
//          q slope mask, per tile: a byte (1 sealed, 0 rows), keys, values -> out/sum
//
// Every array has a block of its own and exactly its size, so that the address sanitizer sees the first byte beyond.
//   kernel_driver N   answers every request N times at once, one thread each, from the same arrays; all answers must be equal
//   kernel_driver 0   once, with an inaccessible page behind every array: where there is no address sanitizer

#include "kvarn-cpu.h"

#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define G         KVARN_G
#define MAX_TILES 64
#define MAX_ARGS  8
#define MAX_JOBS  8

struct request {
    char      what[16], name[32];
    int       args[MAX_ARGS];
    float   * q, * slope;                              // attend; q is x of a seal
    uint16_t * mask;
    uint8_t * tile;                                    // unseal
    struct kvarn_cpu_source source[2][MAX_TILES];
};

struct job {
    const struct request * request;
    void * answer;
    size_t size;
};

static void fail(const char * why) {
    fprintf(stderr, "kernel_driver: %s\n", why);
    exit(2);
}

#define PAGE 4096

static int has_fences = 0;

static void * block(size_t size) {
    if (!has_fences) {
        void * p = malloc(size);
        if (!p) {
            fail("out of memory");
        }
        return p;
    }
    const size_t used = (size + PAGE - 1)/PAGE*PAGE;
    char * p = mmap(NULL, used + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED || mprotect(p + used, PAGE, PROT_NONE) != 0) {
        fail("out of memory");
    }
    return p + used - size;
}

static void drop(const void * p) {
    if (!has_fences) { // else the few there are stay
        free((void *) p);
    }
}

static void * take(size_t size) {
    void * p = block(size);
    if (fread(p, 1, size, stdin) != size) {
        fail("a request ends too early");
    }
    return p;
}

// "best" is what an unset KVARN_CPU gives
static const struct kvarn_cpu_kernels * kernels_of(const char * name) {
    return kvarn_cpu_find(strcmp(name, "best") == 0 ? NULL : name);
}

static void take_arrays(struct request * r) {
    const int * a = r->args;
    if (strcmp(r->what, "seal") == 0) {
        r->q = take((size_t) (G*a[2])*sizeof(float));
    } else if (strcmp(r->what, "unseal") == 0) {
        r->tile = take((size_t) kvarn_tile_size(a[2], a[1]));
    } else if (strcmp(r->what, "attend") == 0) {
        const int * bits = a, * D = a + 2, n_rows = a[4], n_gqa = a[5], n_tiles = a[6];
        if (n_tiles > MAX_TILES) {
            fail("too many tiles");
        }
        r->q     = take((size_t) (n_rows*n_gqa*D[0])*sizeof(float));
        r->slope = take((size_t) n_gqa*sizeof(float));
        r->mask  = take((size_t) (n_rows*n_tiles*G)*sizeof(uint16_t));
        for (int i = 0; i < n_tiles; ++i) {
            const int is_sealed = getchar();
            for (int side = 0; side < 2; ++side) {
                struct kvarn_cpu_source * s = &r->source[side][i];
                s->stride = D[side];
                s->tile = is_sealed ? take((size_t) kvarn_tile_size(D[side], bits[side])) : NULL;
                s->rows = is_sealed ? NULL : take((size_t) (G*D[side])*sizeof(uint16_t));
            }
        }
    } else {
        fail("unknown request");
    }
}

static void drop_arrays(struct request * r) {
    for (int i = 0; i < MAX_TILES; ++i) {
        for (int side = 0; side < 2; ++side) {
            drop(r->source[side][i].tile);
            drop(r->source[side][i].rows);
        }
    }
    drop(r->q);
    drop(r->slope);
    drop(r->mask);
    drop(r->tile);
}

static void attend(const struct request * r, struct job * job) {
    const int * a = r->args;
    const struct kvarn_cpu_kernels * kernels = kernels_of(r->name);
    struct kvarn_cpu_state state = { .bits = { a[0], a[1] }, .D = { a[2], a[3] }, .n_rows = a[4], .n_gqa = a[5] };
    const int n_q = a[4]*a[5], n_tiles = a[6];
    memcpy(&state.softcap, a + 7, sizeof(float));
    if (!kernels) {
        fail("this processor has no such kernels");
    }

    float * memory = block((size_t) kvarn_cpu_state_size(a[2], a[3], a[4], a[5])*sizeof(float));
    kvarn_cpu_start(&state, memory);
    memcpy(state.q, r->q, (size_t) (n_q*a[2])*sizeof(float));
    memcpy(state.slope, r->slope, (size_t) a[5]*sizeof(float));
    for (int i = 0; i < n_tiles; ++i) {
        const struct kvarn_cpu_source * k = &r->source[0][i], * v = &r->source[1][i];
        const int has_next = i + 1 < n_tiles;
        kvarn_cpu_add(kernels, &state, k, v, has_next ? k[1].tile : NULL, r->mask + i*G, n_tiles*G);
    }
    kvarn_cpu_finish(kernels, &state, NULL);
    job->size = (size_t) (n_q*a[3])*sizeof(float);
    float * out = job->answer = block(job->size);
    for (int i = 0; i < n_q*a[3]; ++i) {
        const float sum = state.sum[i/a[3]];
        out[i] = sum > 0.0f ? state.out[i]/sum : 0.0f;
    }
    drop(memory);
}

static void seal(const struct request * r, struct job * job) {
    static const char * const names[] = { "avx2", "avx512", "neon", "dotprod", "i8mm" };
    const int * a = r->args;
    float * scratch = block((size_t) kvarn_seal_scratch(a[2])*sizeof(float));
    job->size   = (size_t) kvarn_tile_size(a[2], a[1]);
    job->answer = block(job->size);
    kvarn_seal_ref(a[0], a[1], a[2], r->q, job->answer, scratch);
    uint8_t * other = block(job->size);
    for (int i = 0; i < (int) (sizeof(names)/sizeof(names[0])); ++i) {
        const struct kvarn_cpu_kernels * kernels = kvarn_cpu_find(names[i]);
        if (!kernels || kernels->seal == kvarn_seal_ref) {
            continue;
        }
        memset(other, 0xaa, job->size);
        kernels->seal(a[0], a[1], a[2], r->q, other, scratch);
        if (memcmp(other, job->answer, job->size) != 0) {
            fail("a set of kernels does not seal to the bytes of kvarn_seal_ref");
        }
    }
    drop(other);
    drop(scratch);
}

static void * answer(void * p) {
    struct job * job = p;
    const struct request * r = job->request;
    const int * a = r->args;
    if (strcmp(r->what, "seal") == 0) {
        seal(r, job);
    } else if (strcmp(r->what, "unseal") == 0) {
        job->size   = (size_t) (G*a[2])*sizeof(float);
        job->answer = block(job->size);
        kvarn_unseal_ref(a[0], a[1], a[2], r->tile, job->answer);
    } else {
        attend(r, job);
    }
    return NULL;
}

int main(int argc, char ** argv) {
    const int n = argc > 1 ? atoi(argv[1]) : 1;
    const int n_jobs = n > 0 ? n : 1;
    char line[256];
    has_fences = n == 0;
    if (n < 0 || n > MAX_JOBS) {
        fail("0 to 8 threads");
    }
    while (fgets(line, sizeof(line), stdin)) {
        struct request r;
        int * a = r.args;
        memset(&r, 0, sizeof(r));
        if (sscanf(line, "find %31s", r.name) == 1) {
            const struct kvarn_cpu_kernels * kernels = kernels_of(r.name);
            printf("%s\n", kernels ? kernels->name : "none");
            continue;
        }
        if (sscanf(line, "%15s %d %d %d", r.what, a, a + 1, a + 2) != 4 &&
            sscanf(line, "%15s %31s %d %d %d %d %d %d %d %d", r.what, r.name,
                   a, a + 1, a + 2, a + 3, a + 4, a + 5, a + 6, a + 7) != 10) {
            fail("not a request");
        }
        take_arrays(&r);

        struct job jobs[MAX_JOBS];
        pthread_t  threads[MAX_JOBS];
        for (int i = 0; i < n_jobs; ++i) {
            jobs[i].request = &r;
        }
        for (int i = 1; i < n_jobs; ++i) {
            if (pthread_create(&threads[i], NULL, answer, &jobs[i]) != 0) {
                fail("no thread");
            }
        }
        answer(&jobs[0]);
        for (int i = 1; i < n_jobs; ++i) {
            pthread_join(threads[i], NULL);
            if (jobs[i].size != jobs[0].size || memcmp(jobs[i].answer, jobs[0].answer, jobs[0].size) != 0) {
                fail("two threads gave two answers");
            }
            drop(jobs[i].answer);
        }
        fwrite(jobs[0].answer, 1, jobs[0].size, stdout);
        drop(jobs[0].answer);
        drop_arrays(&r);
    }
    return fflush(stdout) == 0 ? 0 : 1;
}
