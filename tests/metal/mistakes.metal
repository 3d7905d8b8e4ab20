// mistakes.metal - one mistake per kernel, each of a kind that the harness must catch, and controls that it must let pass.
// 64 threads, in[65] and out[64] of floats, threadgroup memory for 64 floats, unless a kernel says otherwise. out must be in.
//
// SPDX-License-Identifier: MIT

#include <metal_stdlib>

using namespace metal;

#define ARGUMENTS                                                     \
        device const float * in   [[buffer(1)]],                      \
        device       float * out  [[buffer(2)]],                      \
        threadgroup  float * smem [[threadgroup(0)]],                 \
        uint3  group [[threadgroup_position_in_grid]],                \
        ushort lane  [[thread_index_in_simdgroup]],                   \
        uint   i     [[thread_index_in_threadgroup]]

// ---- controls

kernel void control_threadgroup(ARGUMENTS) {
    smem[i] = in[i];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const float x = smem[63 - i];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    smem[i] = x;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    out[i] = smem[63 - i];
}

kernel void control_simdgroup(ARGUMENTS) {
    smem[i] = in[i];
    for (short n = 0; n < 5; ++n) {
        simdgroup_barrier(mem_flags::mem_threadgroup);
        const float x = smem[i ^ 1];
        simdgroup_barrier(mem_flags::mem_threadgroup);
        smem[i] = x;
    }
    out[i ^ 1] = smem[i];
}

kernel void control_collectives(ARGUMENTS) {
    const float x = simd_shuffle_xor(in[i], 5);
    const float sum = simd_sum(lane == 3 ? 1.0f : 0.0f);
    out[i] = simd_any(lane == 7) ? simd_shuffle(x, ushort(lane ^ 5))*sum : 0.0f;
}

// ---- what order shows, or TSan

kernel void missing_threadgroup_barrier(ARGUMENTS) {
    smem[63 - i] = in[i];
    out[i] = smem[63 - i ^ 32];
}

kernel void simdgroup_barrier_too_weak(ARGUMENTS) {
    smem[i ^ 32] = in[i];
    simdgroup_barrier(mem_flags::mem_threadgroup);
    out[i ^ 32] = smem[i];
}

kernel void barrier_without_memory(ARGUMENTS) {
    smem[i ^ 32] = in[i];
    threadgroup_barrier(mem_flags::mem_none);
    out[i ^ 32] = smem[i];
}

kernel void missing_simdgroup_barrier(ARGUMENTS) {
    smem[i ^ 1] = in[i];
    out[i ^ 1] = smem[i];
}

kernel void missing_barrier_before_overwrite(ARGUMENTS) {
    smem[i] = in[i];
    simdgroup_barrier(mem_flags::mem_threadgroup);
    const float x = smem[i ^ 1];
    smem[i] = x;
    simdgroup_barrier(mem_flags::mem_threadgroup);
    out[i ^ 1] = smem[i];
}

kernel void collective_as_barrier(ARGUMENTS) {
    smem[i ^ 1] = in[i];
    const float one = simd_sum(lane == 0 ? 1.0f : 0.0f);
    out[i ^ 1] = smem[i]*one;
}

kernel void two_groups_one_word(ARGUMENTS) { // 2 threadgroups of 32
    out[group.x*32 + lane] = in[group.x*32 + lane];
    if (lane == 0) {
        out[32] = in[32];
    }
}

kernel void two_groups_one_word_after_barriers(ARGUMENTS) { // a barrier orders nothing between groups
    smem[lane] = in[group.x*32 + lane];
    simdgroup_barrier(mem_flags::mem_threadgroup);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    out[group.x*32 + lane] = smem[lane];
    if (lane == 0) {
        out[32] = in[32];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
}

// ---- memory that was never written

kernel void reads_before_writing(ARGUMENTS) {
    out[i] = smem[i] + in[i];
    smem[i] = in[i];
}

kernel void reads_before_writing_hidden(ARGUMENTS) { // max(x, NaN) is x
    out[i] = max(in[i], smem[i]);
}

kernel void leaves_a_hole(ARGUMENTS) {
    if (i != 42) {
        out[i] = in[i];
    }
}

// ---- bounds and alignment

kernel void reads_past_a_buffer(ARGUMENTS) { // in[64]
    out[i] = in[i + 4] > 1e30f ? 0.0f : in[i];
}

kernel void writes_past_memory(ARGUMENTS) {
    smem[i + 4] = in[i];
    simdgroup_barrier(mem_flags::mem_threadgroup);
    out[i] = smem[i + 4];
}

kernel void writes_its_input(ARGUMENTS) {
    out[i] = in[i];
    ((device float *) in)[64] = 1.0f;
}

kernel void misaligned_vector(ARGUMENTS) {
    out[i] = i > 0 && i < 60 ? ((device const float4 *) (in + i))->x : in[i];
}

kernel void shifts_by_32(ARGUMENTS) {
    out[i] = (1u << (i == 9 ? 32u : 0u)) > 7u ? 0.0f : in[i];
}

// ---- divergent flow

kernel void barrier_in_divergent_flow(ARGUMENTS) {
    if (i < 48) {
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    out[i] = in[i];
}

kernel void barrier_after_return(ARGUMENTS) {
    out[i] = in[i];
    if (i == 3) {
        return;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
}

kernel void collective_in_divergent_flow(ARGUMENTS) {
    out[i] = in[i];
    if (lane < 7) {
        out[i] = simd_max(in[i]);
    } else {
        out[i] = simd_max(in[i]);
    }
}

// ---- fast math: an infinity as the sign for "nothing yet"; in[] is -infinity, out must be 0

kernel void infinity_as_a_sign(ARGUMENTS) {
    const float top = in[i];
    out[i] = top == as_type<float>(0xff800000u) ? 0.0f : exp(top - top);
}
