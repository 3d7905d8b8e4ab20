// set-rows.cuh - ggml-cuda's SET_ROWS, which the CPU does not have, by its definition: rows of f32 to a tail.
//
// SPDX-License-Identifier: MIT

#pragma once

#include "common.cuh"

inline void ggml_cuda_op_set_rows(ggml_backend_cuda_context &, ggml_tensor * dst) {
    const ggml_tensor * rows = dst->src[0], * index = dst->src[1];
    GGML_ASSERT(rows->type == GGML_TYPE_F32 && index->type == GGML_TYPE_I64 && dst->type == GGML_TYPE_F16);
    for (int64_t i = 0; i < rows->ne[1]; ++i) {
        ggml_fp32_to_fp16_row((const float *) ((const char *) rows->data + i*rows->nb[1]),
                (ggml_fp16_t *) ((char *) dst->data + ((const int64_t *) index->data)[i]*dst->nb[1]), rows->ne[0]);
    }
}
