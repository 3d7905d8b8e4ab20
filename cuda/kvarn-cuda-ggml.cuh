// kvarn-cuda-ggml.cuh - GGML_OP_KVARN on the CUDA backend: what the hooks in ggml-cuda.cu call.
//
// SPDX-License-Identifier: MIT

#pragma once

#include "common.cuh"

bool ggml_cuda_kvarn_supported(int device, const ggml_tensor * op);
bool ggml_cuda_op_kvarn(ggml_backend_cuda_context & ctx, ggml_tensor * dst);

// ATTN, right behind a PREP or anything else, and if out is not NULL and tiles are few, what REDUCE computes from it into out;
// returns whether it did.
bool ggml_cuda_kvarn_attn(ggml_backend_cuda_context & ctx, ggml_tensor * attn, bool is_behind, const ggml_tensor * sinks,
        ggml_tensor * out);

// REDUCE into out, rotated as out says; out is the node itself if it is not rotated
void ggml_cuda_kvarn_reduce(ggml_backend_cuda_context & ctx, ggml_tensor * reduce, ggml_tensor * out);

// ATTN of a prompt: the whole attention, see kvarn-prompt-ggml.cu
bool ggml_cuda_kvarn_prompt_supported(int device, const ggml_tensor * node);
void ggml_cuda_kvarn_prompt(ggml_backend_cuda_context & ctx, ggml_tensor * node);

// Before memory is given out: tensors that have to be kept until a later node, so that nodes can be fused.
typedef void (*kvarn_keep_t)(void * data, ggml_tensor * tensor, ggml_tensor * until);
void ggml_cuda_kvarn_keep(ggml_cgraph * graph, kvarn_keep_t keep, void * data);

// Computes node i and the ones behind it in one launch; returns how many behind it are done, 0 if node i is not.
int ggml_cuda_kvarn_fuse(ggml_backend_cuda_context & ctx, ggml_cgraph * graph, int i);
