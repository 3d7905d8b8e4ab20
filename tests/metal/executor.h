// executor.h - runs one Metal dispatch on the CPU, a fiber per thread, under a schedule that is chosen.
//
// SPDX-License-Identifier: MIT

#ifndef MSL_EXECUTOR_H
#define MSL_EXECUTOR_H

#include <stddef.h>
#include <stdint.h>

struct msl_schedule {
    enum kind { FORWARD, REVERSE, RANDOM, DEPTH_FIRST } kind; // depth first: one simdgroup runs as far as it can
    uint64_t seed;
};

struct msl_dispatch {
    const char * kernel;
    void       * buffer[32];
    uint32_t     groups[3];
    uint32_t     threads;     // per threadgroup, a multiple of 32
    size_t       memory;      // bytes of threadgroup memory
    msl_schedule schedule;
};

// Runs it to the end. What the language forbids ends the process with one line: collectives in divergent flow, a barrier that
// not all threads reach, threadgroup memory beyond 32 KB, an unknown kernel.
void msl_run(const msl_dispatch & dispatch);

void         msl_set_constant(int number, int32_t value);
int          msl_kernel_count(void);
const char * msl_kernel_name(int index);

// Memory that ends at a page nobody may touch; size is rounded up to 16 bytes.
//   is_input  false: 0xff bytes, and not initialized as far as MSan is concerned
void * msl_memory(size_t size, bool is_input);
void   msl_free(void * memory, size_t size);
void   msl_fill(void * memory, const void * from, size_t size); // from now on these bytes count as initialized

// first byte that was never written, -1 if there is none or this is no MSan build
ptrdiff_t msl_unwritten(const void * memory, size_t size);

#endif
