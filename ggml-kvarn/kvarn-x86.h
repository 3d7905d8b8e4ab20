// kvarn-x86.h - what the x86 kernels begin with.
//
// SPDX-License-Identifier: MIT

#ifndef KVARN_X86_H
#define KVARN_X86_H

#include "kvarn-cpu.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>
#include <math.h>
#include <string.h>

#define G     KVARN_G
#define D_MAX KVARN_D_MAX
#define NV    4 // vectors multiplied at a time

// Vectors as long as a cache line that do not lie on one take twice as long, and wait where they have just been written.
#define ON_LINE __attribute__((aligned(64)))

// A loop of a few rounds that becomes straight code, so that the arrays it indexes are registers. Compilers do that by themselves
// at some optimization levels only; where they do not, sums live in memory and everything takes twice as long.
#if defined(__clang__)
#define EACH(i, n) _Pragma("unroll") for (int i = 0; i < (n); ++i)
#else
#define EACH(i, n) _Pragma("GCC unroll 16") for (int i = 0; i < (n); ++i)
#endif

// Lowest bits of slots 2*pass and 2*pass + 1 in the bytes of a word.
static inline __attribute__((always_inline)) void places_of(const int bits, const int pass, int place[2]) {
    place[0] = bits == 2 ? 4*pass : bits == 4 ? 0 : pass < 3 ? 0 : 5;
    place[1] = bits == 2 ? 4*pass + 2 : bits == 4 ? 4 : pass < 3 ? 3 : 2;
}

// The next tile is asked for while this one is multiplied: row R of a strip asks for N_FETCH lines behind `ahead` in every fourth
// round, all strips of a tile together for all its lines. More often, and the loop is slower than without.
#define N_FETCH(bits) (W/8*((bits) == 2 ? 1 : 2))

static inline __attribute__((always_inline)) void fetch(const int n_lines, int R, const uint8_t * ahead) {
    if (R % 4 == 0) {
        EACH(j, n_lines) {
            _mm_prefetch((const char *) ahead + (R/4*n_lines + j)*64, _MM_HINT_T1);
        }
    }
}

#endif

#endif
