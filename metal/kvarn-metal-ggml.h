// kvarn-metal-ggml.h - what ggml's Metal backend calls for GGML_OP_KVARN.
//
// SPDX-License-Identifier: MIT

#ifndef KVARN_METAL_GGML_H
#define KVARN_METAL_GGML_H

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

// whether the kernels can do this node: its shapes and strides
bool ggml_metal_kvarn_supports(const struct ggml_tensor * op);

struct ggml_metal_op;

// encodes node idx; returns the number of nodes done: 1
int ggml_metal_op_kvarn(struct ggml_metal_op * ctx, int idx);

#ifdef __cplusplus
}
#endif

#endif
