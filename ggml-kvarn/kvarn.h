// kvarn.h - the public C API: seal, unseal and attend on tiles in plain memory.
// The lines between the two cffi marks are also the Python binding's declarations: keep them plain C, no macros.
//
// SPDX-License-Identifier: MIT

#ifndef KVARN_H
#define KVARN_H

#include <stdint.h>
#include "kvarn-format.h"

#ifdef __cplusplus
extern "C" {
#endif

// cffi: begin

// KVARN_FORMAT_VERSION of the compiled library
int kvarn_format_version(void);

// bytes of one tile of D channels; 0 if there is no such tile
int kvarn_tile_bytes(int D, int bits);

// floats of scratch memory kvarn_seal_ref needs for D channels
int kvarn_seal_scratch(int D);

// Quantizes 128 tokens into one tile.
//   side     0 = keys (token scales unbiased), 1 = values (token scales by least squares)
//   x        f32 [128][D], rotated; NaN counts as 0, values are clamped to +-65504
//   tile     kvarn_tile_bytes(D, bits) bytes, written
//   scratch  kvarn_seal_scratch(D) floats
void kvarn_seal_ref(int side, int bits, int D, const float * x, uint8_t * tile, float * scratch);

// Rebuilds the 128 tokens of a tile: x f32 [128][D], written.
void kvarn_unseal_ref(int side, int bits, int D, const uint8_t * tile, float * x);

// Softmax attention of n_q query rows over n_tiles sealed tiles of one KV head, straight from the codes.
//   q      f32 [n_q][D], rotated like the keys        out   f32 [n_q][D], rotated like the values
//   k, v   n_tiles tiles each, one after the other    scale multiplies the scores (1/sqrt(D) as a rule)
void kvarn_attend_ref(int bits_k, int bits_v, int D, int n_q, int n_tiles, const float * q,
                      const uint8_t * k, const uint8_t * v, float scale, float * out);

// cffi: end

#ifdef __cplusplus
}
#endif

#endif
