// executor.cpp - fibers, schedules and release rules behind the shim's collectives and barriers.
// Built without sanitizers and linked into every build: it tells them about fibers and barriers through their weak symbols.
//
// A thread is READY, waits at a SIMD place (collective or simdgroup barrier), waits at a GROUP barrier, or is DONE. A simdgroup
// without ready threads goes on when all 32 wait at the same SIMD place; the threadgroup when all threads wait at the same GROUP.
// Everything else is an error of the kernel. To TSan only barriers order memory: a collective does not.
//
// SPDX-License-Identifier: MIT

#include "executor.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <string>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

extern "C" {
#define WEAK __attribute__((weak))
WEAK void * __tsan_create_fiber(unsigned flags);
WEAK void   __tsan_switch_to_fiber(void * fiber, unsigned flags);
WEAK void * __tsan_get_current_fiber(void);
WEAK void   __tsan_acquire(void * p);
WEAK void   __tsan_release(void * p);
WEAK void   __msan_poison(const volatile void * p, size_t n);
WEAK void   __msan_unpoison(const volatile void * p, size_t n);
WEAK void   __msan_copy_shadow(const volatile void * to, const volatile void * from, size_t n);
WEAK ptrdiff_t __msan_test_shadow(const volatile void * p, size_t n);
WEAK void   __asan_poison_memory_region(void const volatile * p, size_t n);
WEAK void   __asan_unpoison_memory_region(void const volatile * p, size_t n);

struct msl_uint3 { uint32_t x, y, z; };
struct msl_call { // as in the shim
    void    * buffer[32];
    void    * memory;
    msl_uint3 group, thread_in_group, groups, threads;
    uint16_t  lane, simdgroup;
    uint32_t  thread_index;
};
msl_call msl_current;
}

enum { LANES = 32, SLOT = 64, STACK = 256*1024, FIBERS = 241, THREADS_MAX = 1024, MEMORY_MAX = 32*1024, MEM_NONE = 0 };

static const uint32_t ALL_LANES = 0xffffffffu;

struct kernel_entry { std::string name; void (*entry)(void); };
struct constant_entry { int number; int32_t * place; };

// inside functions: registration happens before main, in any order
static std::vector<kernel_entry>   & kernels()   { static std::vector<kernel_entry>   list; return list; }
static std::vector<constant_entry> & constants() { static std::vector<constant_entry> list; return list; }

extern "C" void msl_add_kernel  (const char * name, void (*entry)(void)) { kernels().push_back({ name, entry }); }
extern "C" void msl_add_constant(int number, void * place) { constants().push_back({ number, (int32_t *) place }); }

int          msl_kernel_count(void)       { return (int) kernels().size(); }
const char * msl_kernel_name (int index)  { return kernels()[index].name.c_str(); }

void msl_set_constant(int number, int32_t value) {
    for (const constant_entry & c : constants()) {
        if (c.number == number) {
            *c.place = value;
        }
    }
}

// ---- memory

static const size_t PAGE = 4096;

static size_t padded(size_t n, size_t to) { return (n + to - 1)/to*to; }

void * msl_memory(size_t size, bool is_input) {
    const size_t used  = padded(size, 16);
    const size_t pages = padded(used, PAGE);
    char * base = (char *) mmap(NULL, pages + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED || mprotect(base + pages, PAGE, PROT_NONE) != 0) {
        fprintf(stderr, "executor: no memory\n");
        _exit(4);
    }
    char * p = base + pages - used;
    memset(p, 0xff, used);
    if (!is_input && __msan_poison) {
        __msan_poison(p, used);
    }
    if (__asan_poison_memory_region) {
        __asan_poison_memory_region(base, pages - used);
        __asan_poison_memory_region(p + size, used - size);
    }
    return p;
}

void msl_free(void * memory, size_t size) {
    const size_t used  = padded(size, 16);
    const size_t pages = padded(used, PAGE);
    char * base = (char *) memory + used - pages;
    if (__asan_unpoison_memory_region) {
        __asan_unpoison_memory_region(base, pages);
    }
    if (__msan_unpoison) {
        __msan_unpoison(base, pages);
    }
    munmap(base, pages + PAGE);
}

void msl_fill(void * memory, const void * from, size_t size) {
    memcpy(memory, from, size);
    if (__msan_unpoison) {
        __msan_unpoison(memory, size);
    }
}

ptrdiff_t msl_unwritten(const void * memory, size_t size) {
    return __msan_test_shadow ? __msan_test_shadow(memory, size) : -1;
}

static void copy(char * to, const char * from, size_t n) { // memcpy would be intercepted
    for (volatile size_t i = 0; i < n; i = i + 1) {
        to[i] = from[i];
    }
    if (__msan_copy_shadow) {
        __msan_copy_shadow(to, from, n);
    }
}

// ---- fibers

enum state { READY, SIMD, GROUP, DONE };

struct fiber {
    char * stack      = nullptr;
    void * tsan       = nullptr;
    state  is         = READY;
    int    line       = 0;
    int    column     = 0;
    int    flags      = 0;
    int    passed[2]  = { 0 }; // barriers of simdgroup and threadgroup: two sync objects take turns
    int    exchanges  = 0;
#if defined(__x86_64__)
    void * sp         = nullptr;
#else
    ucontext_t context;
#endif
};

struct simdgroup {
    alignas(SLOT) char slots[2][LANES*SLOT]; // what lanes publish; two, for a lane may be one collective ahead of another
    uint32_t lanes[4]; // by state: bit of a lane
};

static const msl_dispatch    * job;
static void                 (* job_entry)(void);
static std::vector<fiber>      fibers;
static simdgroup               simdgroups[THREADS_MAX/LANES]; // not on the heap: lanes read slots, and TSan sees who frees
static uint64_t                start_sync, end_sync;

// TSan's names for barriers, of odd and even phases: of a simdgroup, last those of the threadgroup. Threadgroups have their own,
// for a barrier of one does not order what another does.
enum { SYNC_GROUPS = 64 };
static uint64_t                syncs[SYNC_GROUPS][THREADS_MAX/LANES + 1][2];
static uint32_t                groups_run;

static uint64_t * sync_of(int simdgroup) { return syncs[groups_run % SYNC_GROUPS][simdgroup]; }
static uint32_t                group_at[3];
static int                     current = -1;
static void                  * main_tsan;
static uint64_t                random_state;

static void fail(const char * what, const fiber & f, int index) {
    fprintf(stderr, "executor: %s: %s at %d:%d, threadgroup (%u, %u, %u), thread %d\n", job->kernel, what, f.line, f.column,
            group_at[0], group_at[1], group_at[2], index);
    _exit(3);
}

static uint32_t random_below(uint32_t n) {
    random_state = random_state*6364136223846793005u + 1442695040888963407u;
    return (uint32_t) ((random_state >> 33)*n >> 31);
}

static void seed_random(uint64_t seed) { // near seeds must not give near orders
    uint64_t z = seed + 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30)*0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27)*0x94d049bb133111ebu;
    random_state = z ^ z >> 31;
}

#if defined(__x86_64__)
static void * main_sp;

extern "C" void msl_switch(void ** from, void * to);
__asm__(".text\n.globl msl_switch\nmsl_switch:\n"
        "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\n"
        "mov %rsp, (%rdi)\nmov %rsi, %rsp\n"
        "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n");

static void fiber_main(void);

static void fiber_start(fiber & f) {
    void ** top = (void **) (f.stack + STACK) - 1;
    *--top = (void *) fiber_main;                     // "returns" into it with the stack as after a call
    f.sp = top - 6;
}

static void to_fiber(fiber & f) { msl_switch(&main_sp, f.sp); }
static void to_main (fiber & f) { msl_switch(&f.sp, main_sp); }
#else
static ucontext_t main_context;

static void fiber_main(void);

static void fiber_start(fiber & f) {
    getcontext(&f.context);
    f.context.uc_stack.ss_sp   = f.stack;
    f.context.uc_stack.ss_size = STACK;
    f.context.uc_link          = NULL;
    makecontext(&f.context, fiber_main, 0);
}

static void to_fiber(fiber & f) { swapcontext(&main_context, &f.context); }
static void to_main (fiber & f) { swapcontext(&f.context, &main_context); }
#endif

static void set_state(int index, state is) {
    simdgroup & group = simdgroups[index/LANES];
    group.lanes[fibers[index].is] &= ~(1u << index%LANES);
    group.lanes[is]               |=   1u << index%LANES;
    fibers[index].is = is;
}

static void yield_to_main(void) {
    if (__tsan_switch_to_fiber) {
        __tsan_switch_to_fiber(main_tsan, 1);
    }
    to_main(fibers[current]);
}

static void fiber_main(void) {
    if (__tsan_acquire) {
        __tsan_acquire(&start_sync);
    }
    job_entry();
    if (__tsan_release) {
        __tsan_release(&end_sync);
    }
    set_state(current, DONE);
    yield_to_main();
    abort();
}

static void resume(int index) {
    fiber & f = fibers[index];
    current = index;
    if (f.line == 0) { // not started: what the entry function reads first
        msl_current.group           = { group_at[0], group_at[1], group_at[2] };
        msl_current.thread_in_group = { (uint32_t) index, 0, 0 };
        msl_current.groups          = { job->groups[0], job->groups[1], job->groups[2] };
        msl_current.threads         = { job->threads, 1, 1 };
        msl_current.lane            = (uint16_t) (index % LANES);
        msl_current.simdgroup       = (uint16_t) (index / LANES);
        msl_current.thread_index    = (uint32_t) index;
        f.line = -1;
    }
    if (__tsan_switch_to_fiber) {
        __tsan_switch_to_fiber(f.tsan, 1);
    }
    to_fiber(f);
}

// ---- what kernels call

static void wait_at(state is, int line, int column, int flags) {
    fiber & f = fibers[current];
    set_state(current, is);
    f.line   = line;
    f.column = column;
    f.flags  = flags;
    yield_to_main();
}

// MSL_WITHOUT_BARRIER=LINE: the barrier there does nothing, to see whether its absence is noticed
static bool is_left_out(int line) {
    static const int without = getenv("MSL_WITHOUT_BARRIER") ? atoi(getenv("MSL_WITHOUT_BARRIER")) : 0;
    return line == without;
}

static void barrier(state is, uint64_t * sync, int line, int column, int flags) {
    if (is_left_out(line)) {
        return;
    }
    const int phase = fibers[current].passed[is == GROUP]++ % 2;
    if (flags != MEM_NONE && __tsan_release) {
        __tsan_release(sync + phase);
    }
    wait_at(is, line, column, flags);
    if (flags != MEM_NONE && __tsan_acquire) {
        __tsan_acquire(sync + phase);
    }
}

extern "C" void msl_exchange(int line, int column, const void * mine, int size, const void ** all) {
    char * slots = simdgroups[current/LANES].slots[fibers[current].exchanges++ % 2];
    copy(slots + current%LANES*SLOT, (const char *) mine, size);
    wait_at(SIMD, line, column, size);
    *all = slots;
}

extern "C" void msl_simdgroup_barrier(int line, int column, int flags) {
    barrier(SIMD, sync_of(current/LANES), line, column, flags);
}

extern "C" void msl_threadgroup_barrier(int line, int column, int flags) {
    barrier(GROUP, sync_of(THREADS_MAX/LANES), line, column, flags);
}

extern "C" int msl_lane(void) { return current % LANES; }

// ---- scheduling

static bool all_at_the_same_place(int begin, int end, state is) {
    for (int i = begin; i < end; ++i) {
        if (fibers[i].is != is || fibers[i].line != fibers[begin].line || fibers[i].column != fibers[begin].column) {
            return false;
        }
    }
    return true;
}

static void release(int begin, int end) {
    for (int i = begin; i < end; ++i) {
        set_state(i, READY);
    }
}

// called when thread `index` has stopped
static void settle(int index) {
    const simdgroup & group = simdgroups[index/LANES];
    if (group.lanes[READY] != 0 || group.lanes[DONE] == ALL_LANES) {
        return;
    }
    const int begin = index/LANES*LANES;
    const int end   = begin + LANES;
    const int n     = (int) fibers.size();
    if (all_at_the_same_place(begin, end, SIMD)) {
        release(begin, end);
        return;
    }
    if (!all_at_the_same_place(begin, end, GROUP)) {
        int at = begin;
        while (fibers[at].is == DONE) {
            ++at;
        }
        fail(group.lanes[DONE] != 0 ? "threads have returned while others wait"
                                    : "divergent flow: the lanes of a simdgroup wait at different places", fibers[at], at);
    }
    for (int g = 0; g < n/LANES; ++g) {
        if ((simdgroups[g].lanes[READY] | simdgroups[g].lanes[SIMD]) != 0) {
            return;
        }
    }
    if (!all_at_the_same_place(0, n, GROUP)) {
        fail("not all threads reach this threadgroup_barrier", fibers[index], index);
    }
    release(0, n);
}

// the lane of the which-th bit
static int lane_of(uint32_t lanes, uint32_t which) {
    while (which-- > 0) {
        lanes &= lanes - 1;
    }
    return __builtin_ctz(lanes);
}

// the thread to run next, -1 if none is ready
static int pick(int last) {
    const int n = (int) fibers.size()/LANES;
    int first = 0;
    int end   = n;
    if (job->schedule.kind == msl_schedule::DEPTH_FIRST && last >= 0 && simdgroups[last/LANES].lanes[READY] != 0) {
        first = last/LANES;
        end   = first + 1;
    }
    uint32_t n_ready = 0;
    for (int g = first; g < end; ++g) {
        n_ready += __builtin_popcount(simdgroups[g].lanes[READY]);
    }
    if (n_ready == 0) {
        return -1;
    }
    uint32_t which = 0;
    switch (job->schedule.kind) {
        case msl_schedule::FORWARD: break;
        case msl_schedule::REVERSE: which = n_ready - 1; break;
        default:                    which = random_below(n_ready);
    }
    int g = first;
    for (uint32_t here; which >= (here = __builtin_popcount(simdgroups[g].lanes[READY])); ++g) {
        which -= here;
    }
    return g*LANES + lane_of(simdgroups[g].lanes[READY], which);
}

// A stack, and the fiber that TSan takes for its owner: threads of different groups that use one after the other are the same
// thread to TSan. In a ring, so that these are not the ones with the same index in neighbouring groups.
struct owned_stack {
    char * stack;
    void * tsan;
};

static const owned_stack & next_stack(int n_threads) {
    static std::vector<owned_stack> ring;
    static size_t at = 0;
    while (ring.size() < (size_t) std::max<int>(FIBERS, n_threads + 1)) {
        void * stack = mmap(NULL, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (stack == MAP_FAILED) {
            fprintf(stderr, "executor: no memory for stacks\n");
            _exit(4);
        }
        ring.push_back({ (char *) stack, __tsan_create_fiber ? __tsan_create_fiber(0) : NULL });
    }
    at = (at + 1)%ring.size();
    return ring[at];
}

static void run_group(void) {
    const int n = (int) job->threads;
    fibers.assign(n, fiber());
    for (int g = 0; g < n/LANES; ++g) {
        memset(simdgroups[g].lanes, 0, sizeof(simdgroups[g].lanes));
        simdgroups[g].lanes[READY] = ALL_LANES;
    }
    msl_current.memory = job->memory ? msl_memory(job->memory, false) : NULL;
    for (fiber & f : fibers) {
        const owned_stack & own = next_stack(n);
        f.stack = own.stack;
        f.tsan  = own.tsan;
        fiber_start(f);
    }
    if (__tsan_release) {
        __tsan_release(&start_sync);
    }
    for (int last = pick(-1); last >= 0; last = pick(last)) {
        resume(last);
        settle(last);
    }
    for (int i = 0; i < n; ++i) {
        if (fibers[i].is != DONE) {
            fail("deadlock", fibers[i], i);
        }
    }
    groups_run++;
    if (msl_current.memory) {
        msl_free(msl_current.memory, job->memory);
    }
}

void msl_run(const msl_dispatch & dispatch) {
    job = &dispatch;
    job_entry = NULL;
    for (const kernel_entry & k : kernels()) {
        if (k.name == dispatch.kernel) {
            job_entry = k.entry;
        }
    }
    const bool fits = dispatch.threads > 0 && dispatch.threads % LANES == 0 && dispatch.threads <= THREADS_MAX;
    if (!job_entry || !fits || dispatch.memory > MEMORY_MAX || dispatch.memory % 16 != 0) {
        fprintf(stderr, "executor: %s: %s\n", dispatch.kernel, !job_entry ? "no such kernel"
                : !fits ? "threads must be a multiple of 32, 1024 at most"
                        : "threadgroup memory must be a multiple of 16 bytes, 32768 at most");
        _exit(3);
    }
    copy((char *) msl_current.buffer, (const char *) dispatch.buffer, sizeof(msl_current.buffer));
    seed_random(dispatch.schedule.seed);
    main_tsan = __tsan_get_current_fiber ? __tsan_get_current_fiber() : NULL;

    const uint32_t n = dispatch.groups[0]*dispatch.groups[1]*dispatch.groups[2];
    std::vector<uint32_t> order(n);
    for (uint32_t i = 0; i < n; ++i) {
        order[i] = dispatch.schedule.kind == msl_schedule::REVERSE ? n - 1 - i : i;
    }
    for (uint32_t i = n; i > 1 && dispatch.schedule.kind >= msl_schedule::RANDOM; --i) {
        std::swap(order[i - 1], order[random_below(i)]);
    }
    for (uint32_t at : order) {
        group_at[0] = at % dispatch.groups[0];
        group_at[1] = at / dispatch.groups[0] % dispatch.groups[1];
        group_at[2] = at / dispatch.groups[0] / dispatch.groups[1];
        run_group();
    }
    if (__tsan_acquire) {
        __tsan_acquire(&end_sync);
    }
}
