// fattn.cuh - ggml-cuda's flash attention, which the CPU does not have, by its definition: for prompt-ggml.cpp.
//
// SPDX-License-Identifier: MIT

#pragma once

#include "common.cuh"

inline bool ggml_cuda_flash_attn_ext_supported(int, const ggml_tensor *) { return true; }

inline void ggml_cuda_flash_attn_ext(ggml_backend_cuda_context &, ggml_tensor * dst) {
    const ggml_tensor * q = dst->src[0], * k = dst->src[1], * v = dst->src[2], * mask = dst->src[3], * sinks = dst->src[4];
    const float scale = ggml_get_op_params_f32(dst, 0), softcap = ggml_get_op_params_f32(dst, 2);
    const auto at = [](const ggml_tensor * t, int64_t i0, int64_t i1, int64_t i2, int64_t i3) {
        return (const char *) t->data + i0*t->nb[0] + i1*t->nb[1] + i2*t->nb[2] + i3*t->nb[3];
    };
    const auto f16 = [](const char * p) { return ggml_fp16_to_fp32(*(const ggml_fp16_t *) p); };
    GGML_ASSERT(ggml_get_op_params_f32(dst, 1) == 0.0f); // no ALiBi

    for (int64_t s = 0; s < q->ne[3]; ++s) {
        for (int64_t h = 0; h < q->ne[2]; ++h) {
            const int64_t hk = h/(q->ne[2]/k->ne[2]);
            for (int64_t row = 0; row < q->ne[1]; ++row) {
                std::vector<float> p(k->ne[1]);
                float max = sinks ? ((const float *) sinks->data)[h] : -INFINITY, sum = 0.0f;
                for (int64_t t = 0; t < k->ne[1]; ++t) {
                    float score = 0.0f;
                    for (int64_t d = 0; d < q->ne[0]; ++d) {
                        score += *(const float *) at(q, d, row, h, s)*f16(at(k, d, t, hk, s));
                    }
                    score *= scale;
                    score  = softcap > 0.0f ? softcap*tanhf(score/softcap) : score;
                    p[t] = score + f16(at(mask, t, row, 0, s%mask->ne[3]));
                    max  = std::max(max, p[t]);
                }
                for (float & w : p) {
                    w = expf(w - max);
                    sum += w;
                }
                sum += sinks ? expf(((const float *) sinks->data)[h] - max) : 0.0f;
                for (int64_t d = 0; d < v->ne[0]; ++d) {
                    float out = 0.0f;
                    for (int64_t t = 0; t < v->ne[1]; ++t) {
                        out += p[t]*f16(at(v, d, t, hk, s));
                    }
                    *(float *) (char *) at(dst, d, h, row, s) = out/sum;
                }
            }
        }
    }
}
