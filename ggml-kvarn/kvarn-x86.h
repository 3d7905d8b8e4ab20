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

// A loop of a few rounds that becomes straight code, so that the arrays it indexes are registers. Compilers do that by themselves
// at some optimization levels only; where they do not, sums live in memory and everything takes twice as long.
#if defined(__clang__)
#define EACH(i, n) _Pragma("unroll") for (int i = 0; i < (n); ++i)
#else
#define EACH(i, n) _Pragma("GCC unroll 16") for (int i = 0; i < (n); ++i)
#endif

#endif

#endif
