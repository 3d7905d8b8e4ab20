// kvarn-sums.h - sums over the channels of one token, in the order that the definition prescribes (kvarn-ref.c):
// 16 lanes, lane j adds d = j, j + 16, ..; then lanes j and j + 8, j and j + 4, j and j + 2, 0 and 1.
// Included by kvarn-ref.c, after it has told the compiler not to contract a*b + c.
//
// SPDX-License-Identifier: MIT

#ifndef KVARN_SUMS_H
#define KVARN_SUMS_H

#include "kvarn-f16.h"

#define LANES 16

#if defined(__GNUC__)
#if defined(__x86_64__)
enum { WIDE = 8 };
typedef float f32xw __attribute__((vector_size(32), aligned(4), may_alias));
#else
enum { WIDE = 4 };
typedef float f32xw __attribute__((vector_size(16), aligned(4), may_alias));
#endif
typedef float f32x4 __attribute__((vector_size(16), aligned(4), may_alias));

// the sum of all lanes, in the order above
KVARN_INLINE float lanes_sum(const f32xw * s) {
    f32x4 x[LANES/4];
    memcpy(x, s, sizeof(x));
    x[0] = (x[0] + x[2]) + (x[1] + x[3]);
    return (x[0][0] + x[0][2]) + (x[0][1] + x[0][3]);
}

// sums over the channels of a[d]*b[d] and of a[d]*a[d]: two chains of additions at a time
KVARN_INLINE void row_dots(int D, const float * a, const float * b, float * ab, float * aa) {
    f32xw s[LANES/WIDE], q[LANES/WIDE];
    for (int j = 0; j < LANES/WIDE; ++j) {
        s[j] = q[j] = (f32xw) { 0 };
    }
    for (int d = 0; d < D; d += LANES) {
        const f32xw * va = (const f32xw *) (a + d);
        const f32xw * vb = (const f32xw *) (b + d);
        for (int j = 0; j < LANES/WIDE; ++j) {
            s[j] += va[j]*vb[j];
            q[j] += va[j]*va[j];
        }
    }
    *ab = lanes_sum(s);
    *aa = lanes_sum(q);
}
#else
KVARN_INLINE void row_dots(int D, const float * a, const float * b, float * ab, float * aa) {
    float s[LANES] = { 0 }, q[LANES] = { 0 };
    for (int d = 0; d < D; d += LANES) {
        for (int j = 0; j < LANES; ++j) {
            s[j] += a[d + j]*b[d + j];
            q[j] += a[d + j]*a[d + j];
        }
    }
    for (int n = LANES/2; n > 0; n /= 2) {
        for (int j = 0; j < n; ++j) {
            s[j] += s[j + n];
            q[j] += q[j + n];
        }
    }
    *ab = s[0];
    *aa = q[0];
}
#endif

#endif
