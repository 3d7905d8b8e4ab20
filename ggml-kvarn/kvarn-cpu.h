// kvarn-cpu.h - attention kernels of the CPU: one tile, or G rows of f16, against all query vectors that share it.
// Raw pointers only; kvarn-cpu-ggml.cpp walks the tiles. kvarn-cpu.c is the portable version and picks at run time.
//
// SPDX-License-Identifier: MIT

#ifndef KVARN_CPU_H
#define KVARN_CPU_H

#include "kvarn.h"

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

//   n_q      query vectors: the query heads of one KV head, for every query row
//   q        f32 [n_q][D]         s, p   f32 [n_q][G]         o   f32 [n_q][D], added to
//   t0, t1   the rows of the tile that matter; s is written and p read there only
//   rows     f16, stride elements apart
//   next     the tile of this side that will be read next: a hint to fetch it while this one is computed; tile itself if none
//   scratch  kvarn_cpu_scratch(D) floats
struct kvarn_cpu_kernels {
    const char * name;

    // s[i][t] = sum_d q[i][d]*x[t][d]
    void (*score_tile)(int bits, int D, int n_q, const uint8_t * tile, const uint8_t * next, const float * q, float * s,
                       float * scratch);
    void (*score_rows)(int D, int n_q, int t0, int t1, const uint16_t * rows, int64_t stride, const float * q, float * s,
                       float * scratch);

    // f16 to f32 for all G rows; widens [*t0, *t1) so that it holds every row that is not -inf
    void (*read_mask)(const uint16_t * mask, float * f32, int * t0, int * t1);

    // s[i][t] += slope[i]*mask[t], t < G, of n vectors; max[i]: the largest
    void (*mask)(int n, const float * slope, const float * mask, float * s, float * max);

    // s[i][t] = exp(s[i][t] - max[i]), t < G, of n vectors; sum[i]: their sum
    void (*soften)(int n, const float * max, float * s, float * sum);

    // o[i][d] += sum_t p[i][t]*x[t][d], p >= 0
    void (*value_tile)(int bits, int D, int n_q, const uint8_t * tile, const uint8_t * next, const float * p, float * o,
                       float * scratch);
    void (*value_rows)(int D, int n_q, int t0, int t1, const uint16_t * rows, int64_t stride, const float * p, float * o,
                       float * scratch);

    // kvarn_seal_ref, or a faster way to the same bytes
    void (*seal)(int side, int bits, int D, const float * x, uint8_t * tile, float * scratch);
};

// The kernels by the name in KVARN_CPU (the environment), or the best of this processor where it is not set:
// "portable", "avx2", .. pick one set, "fast" the best one in its fast mode. NULL if this processor has no such kernels.
const struct kvarn_cpu_kernels * kvarn_cpu_find(const char * name);

// One function per instruction set; NULL where the processor lacks it. The fast mode rounds q and p to 8 bits instead of 16.
const struct kvarn_cpu_kernels * kvarn_cpu_portable(void);
const struct kvarn_cpu_kernels * kvarn_cpu_avx2(int fast);    // AVX2, FMA, F16C
const struct kvarn_cpu_kernels * kvarn_cpu_avx512(int fast);  // AVX-512 with F, BW, DQ, VL and VNNI
const struct kvarn_cpu_kernels * kvarn_cpu_neon(int fast);    // any 64-bit ARM
const struct kvarn_cpu_kernels * kvarn_cpu_dotprod(int fast); // FEAT_DotProd
const struct kvarn_cpu_kernels * kvarn_cpu_i8mm(int fast);    // FEAT_I8MM

int kvarn_cpu_scratch(int D);

// One side of one tile for one KV head: a sealed tile, or G rows of f16.
struct kvarn_cpu_source {
    const uint8_t  * tile; // NULL: rows
    const uint16_t * rows;
    int64_t          stride;
};

// An online softmax: attention of n_rows query rows x n_gqa heads of one KV head, over the tiles added so far.
// Query vectors lie row by row, the heads of a row side by side. What attention returns is out/sum.
struct kvarn_cpu_state {
    int     bits[2], D[2]; // keys, values
    int     n_rows, n_gqa;
    float   softcap;       // 0: none; else q is divided by it
    float * q;             // [n_q][D[0]], times the factor of the scores
    float * slope;         // [n_gqa], what the mask is multiplied by
    float * max, * sum;    // [n_q]
    float * tile_max, * tile_sum; // [n_gqa], of one tile and query row
    float * out;           // [n_q][D[1]]
    float * p, * p_before; // [n_q][G], of the tile that is being added and of the one before it
    float * mask;          // [n_rows][G]
    float * scratch;       // kvarn_cpu_scratch() of the larger D
    // The values of a tile are added one tile later, beside the softmax of the next one: neither waits for the other, so a
    // processor that looks far enough ahead computes both at once.
    struct kvarn_cpu_source values; // neither tile nor rows: there are none
    int     t0, t1;                 // their tokens that some query row sees
};

// floats of memory that kvarn_cpu_start shares out among the state's pointers
int64_t kvarn_cpu_state_size(int DK, int DV, int n_rows, int n_gqa);

// sets the pointers and forgets all tiles; bits, D, n_rows and n_gqa are set by the caller, q and slope afterwards
void kvarn_cpu_start(struct kvarn_cpu_state * state, float * memory);

// Adds one tile; its values are read when the next tile is added, or by kvarn_cpu_finish.
//   next_k  the tile of keys that will be added next, as a hint; NULL if there is none
//   mask    f16 [n_rows][G], rows stride elements apart
void kvarn_cpu_add(const struct kvarn_cpu_kernels * kernels, struct kvarn_cpu_state * state, const struct kvarn_cpu_source * k,
                   const struct kvarn_cpu_source * v, const uint8_t * next_k, const uint16_t * mask, int64_t stride);

// Adds the last tile's values: after it, and not before, out and sum are those of all tiles.
//   next_v  the tile of values that will be read next, as a hint; NULL if there is none
void kvarn_cpu_finish(const struct kvarn_cpu_kernels * kernels, struct kvarn_cpu_state * state, const uint8_t * next_v);

#ifdef __cplusplus
}
#endif

#endif
