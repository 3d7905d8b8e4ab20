// kvarn.metal - attention of GGML_OP_KVARN on Apple GPUs: ATTN and REDUCE. SEAL and GET are in kvarn_tiles.metal.
// Written for simdgroups of 32 lanes. kvarn-metal-args.h names what is bound, kvarn-metal-plan.h says how a kernel is launched.
// Collectives and barriers stand in uniform flow only, masked tokens are told by their bits, and no result depends on infinities:
// the kernels give the same numbers with and without fast math.
//
// SPDX-License-Identifier: MIT

#include <metal_stdlib>

using namespace metal;

#ifndef KVARN_CODES_H // an embedded source has them before it
#include "kvarn-format.h"
#include "kvarn-metal-args.h"
#include "kvarn_codes.h"
#endif

constant int  fc_bits_k  [[function_constant(KVARN_FC_BITS_K)]];
constant int  fc_bits_v  [[function_constant(KVARN_FC_BITS_V)]];
constant int  fc_D_k     [[function_constant(KVARN_FC_D_K)]];
constant int  fc_D_v     [[function_constant(KVARN_FC_D_V)]];
constant int  fc_bias    [[function_constant(KVARN_FC_BIAS)]];
constant int  fc_softcap [[function_constant(KVARN_FC_SOFTCAP)]];
constant int  fc_sinks   [[function_constant(KVARN_FC_SINKS)]];
constant int  fc_mask    [[function_constant(KVARN_FC_MASK)]];
constant int  fc_tiny    [[function_constant(KVARN_FC_TINY)]];

#define LANES 32

// stands for "no token yet": finite, so that fast math may not reason about infinities
#define NO_MAX (-FLT_MAX/2.0f)

#define NEG_INF_F16 0xfc00
#define NEG_INF_F32 0xff800000u

// ---------------------------------------------------------------------------------------------------- contraction

// acc[j][s] = sum over r of vec[r][j]*code(r, f(s)) for one unit; R = R0, R0 + step, ..
//   vec  [n_R][NQ] float4: four r of each of NQ vectors, the same address for all lanes of a row
template<short NQ>
static inline void kvarn_contract(int bits, int F, int u, int R0, int step, int n_R, device const uint * codes,
                                  threadgroup const float4 * vec, thread float4 * acc) {
    for (short j = 0; j < NQ; ++j) {
        acc[j] = float4(0.0f);
    }
#pragma clang loop unroll_count(4)
    for (int R = R0; R < n_R; R += step) {
        half4 code[4];
        kvarn_unpack(bits, fc_tiny != 0, kvarn_words(bits, F, u, R, codes), code);
        for (short j = 0; j < NQ; ++j) {
            const float4 x = vec[R*NQ + j];
            acc[j] += x.x*float4(code[0]);
            acc[j] += x.y*float4(code[1]);
            acc[j] += x.z*float4(code[2]);
            acc[j] += x.w*float4(code[3]);
        }
    }
    const float4 weight = kvarn_weight(bits, fc_tiny != 0);
    for (short j = 0; j < NQ; ++j) {
        acc[j] *= weight;
    }
}

// ---------------------------------------------------------------------------------------------------- rows of f16
//
// Scores: 8 lanes share a row, each lane has 4 rows at a time; a lane keeps the tokens 4*R .. 4*R+3, R = 4*(lane % 8) + lane/8.
//   steps  bit st: some token of 16*st .. 16*st+15 is seen
template<short NQ>
static inline void kvarn_score_rows(int D, device const half * rows, int stride, uint steps, short lane,
                                    threadgroup const float4 * vec, thread float4 * acc) {
    const short sub = lane % 8;
    for (short j = 0; j < NQ; ++j) {
        acc[j] = float4(0.0f);
    }
    for (short st = 0; st < 8; ++st) {
        if ((steps >> st & 1) == 0) {
            continue;
        }
        float4 part[NQ];
        for (short j = 0; j < NQ; ++j) {
            part[j] = float4(0.0f);
        }
        device const half * row = rows + (16*st + 4*(lane/8))*stride;
        for (int c = sub; c < D/4; c += 8) {
            const float4 r0 = float4(*(device const half4 *) (row + 4*c));
            const float4 r1 = float4(*(device const half4 *) (row + stride + 4*c));
            const float4 r2 = float4(*(device const half4 *) (row + 2*stride + 4*c));
            const float4 r3 = float4(*(device const half4 *) (row + 3*stride + 4*c));
            for (short j = 0; j < NQ; ++j) {
                const float4 x = vec[c*NQ + j];
                part[j] += float4(dot(x, r0), dot(x, r1), dot(x, r2), dot(x, r3));
            }
        }
        for (short j = 0; j < NQ; ++j) {
            part[j] += simd_shuffle_xor(part[j], 1);
            part[j] += simd_shuffle_xor(part[j], 2);
            part[j] += simd_shuffle_xor(part[j], 4);
            acc[j] = sub == st ? part[j] : acc[j];
        }
    }
}

// Adds p*rows of the seen tokens to out for one unit.
//   seen  bit R of seen[k]: token 4*R+k
template<short NQ>
static inline void kvarn_value_rows(int bits, int D, int u, int R0, int step, device const half * rows, int stride, uint4 seen,
                                    threadgroup const float4 * vec, thread float4 * out) {
    const int f0 = kvarn_free(bits, D, u, 0);
    const int f1 = kvarn_free(bits, D, u, 1);
    const int f2 = kvarn_free(bits, D, u, 2);
    const int f3 = kvarn_free(bits, D, u, 3);
    for (int R = R0; R < KVARN_G/4; R += step) {
        for (short k = 0; k < 4; ++k) {
            if ((seen[k] >> R & 1) == 0) {
                continue; // what stands in such a row may be anything
            }
            device const half * row = rows + (4*R + k)*stride;
            const float4 v = float4(row[f0], row[f1], row[f2], row[f3]);
            for (short j = 0; j < NQ; ++j) {
                out[j] += vec[R*NQ + j][k]*v;
            }
        }
    }
}

static inline float4 kvarn_gather(int bits, int D, int u, device const half * x) {
    return float4(x[kvarn_free(bits, D, u, 0)], x[kvarn_free(bits, D, u, 1)],
                  x[kvarn_free(bits, D, u, 2)], x[kvarn_free(bits, D, u, 3)]);
}

// ---------------------------------------------------------------------------------------------------- ATTN
//
// A threadgroup owns NQ query vectors of one KV head and one chunk of tiles; simdgroup sg takes tiles sg, sg + nsg, .. of the
// chunk, with a softmax of its own, and simdgroup 0 joins them at the end. One tile, one simdgroup:
//
//   keys     vec = q*scale      lane = 4 tokens,   32 steps over channels (D = 128)  -> scores  -> vec
//   softmax  vec = p*token      lane = tokens 4*lane .. 4*lane+3
//   values   out += vec . codes lane = 4 channels, 32 steps over tokens; heads above 128 channels in NV passes, below 128 the
//                               idle lanes take every second, fourth, .. row
//
// Registers: the output, 4*NV*NQ, and 4*NQ sums; threadgroup memory: vec, one float4 per 4 channels or tokens and query.
// Each code is read once per NQ queries, 16 of them per lane and step; bound by arithmetic (metal/README.md counts it).

// the mask at four tokens
static inline half4 kvarn_mask(device const char * row, int t) {
    half4 m = half4(half(0.0f));
    if (fc_mask) {
        m = *(device const half4 *) (row + 2*t);
    }
    return m;
}

// bit k: token k of four is seen
static inline uint kvarn_seen(half4 m) {
    const ushort4 b = as_type<ushort4>(m);
    return (b.x != NEG_INF_F16 ? 1u : 0u) | (b.y != NEG_INF_F16 ? 2u : 0u) | (b.z != NEG_INF_F16 ? 4u : 0u) |
           (b.w != NEG_INF_F16 ? 8u : 0u);
}

static inline float kvarn_slope(int head, float max_bias, int n_pow2) {
    const float up = max_bias/float(n_pow2);
    return head < n_pow2 ? exp2(-up*float(head + 1)) : exp2(-0.5f*up*float(2*(head - n_pow2) + 1));
}

template<short NQ, short NV>
kernel void kernel_kvarn_attn(
        constant kvarn_metal_attn_args & args    [[buffer(KVARN_BUF_ARGS)]],
        device const char              * q       [[buffer(KVARN_BUF_Q)]],
        device const int64_t           * plan    [[buffer(KVARN_BUF_PLAN)]],
        device const char              * k_tiles [[buffer(KVARN_BUF_K_TILES)]],
        device const char              * k_rows  [[buffer(KVARN_BUF_K_ROWS)]],
        device const char              * v_tiles [[buffer(KVARN_BUF_V_TILES)]],
        device const char              * v_rows  [[buffer(KVARN_BUF_V_ROWS)]],
        device const char              * mask    [[buffer(KVARN_BUF_MASK)]],
        device       char              * part    [[buffer(KVARN_BUF_PART)]],
        threadgroup  float4            * smem    [[threadgroup(0)]],
        uint3  tgpig [[threadgroup_position_in_grid]],
        ushort lane  [[thread_index_in_simdgroup]],
        ushort sg    [[simdgroup_index_in_threadgroup]],
        ushort nsg   [[simdgroups_per_threadgroup]]) {
    const int DK    = fc_D_k;
    const int DV    = fc_D_v;
    const int chunk = tgpig.x;
    const int h     = tgpig.y;
    const int s     = tgpig.z/args.n_groups;
    const int n_gqa = args.n_head/args.H;
    const int n_q   = args.n_rows*n_gqa;
    const int j0    = tgpig.z%args.n_groups*NQ;

    // units of the values' channels, and how many groups of lanes share them
    const int  U       = DV/4;
    const int  n_share = U < LANES ? LANES/U : 1;
    const int  share   = U < LANES ? lane/U : 0;
    const int  unit    = U < LANES ? lane%U : lane;

    device const int64_t * map = plan + args.map_off + int64_t(args.s0 + s)*args.n_tiles;
    device const char    * mask_s = mask + (s % args.mask_streams)*args.mask_stream;

    threadgroup float4 * vec = smem + sg*args.region;

    float4 out[NV][NQ];
    float  top[NQ];
    float  sum[NQ];
    for (short j = 0; j < NQ; ++j) {
        top[j] = NO_MAX;
        sum[j] = 0.0f;
        for (short v = 0; v < NV; ++v) {
            out[v][j] = float4(0.0f);
        }
    }

    const int i_end = min((chunk + 1)*args.chunk, args.n_used);
    for (int i = chunk*args.chunk + sg; i < i_end; i += nsg) {
        const int where = int(map[i]);

        uint any = 0; // tokens that some of the query vectors see
        for (short j = 0; j < NQ; ++j) {
            if (j0 + j < n_q) {
                any |= kvarn_seen(kvarn_mask(mask_s + (j0 + j)/n_gqa*args.mask_row, i*KVARN_G + 4*lane));
            }
        }
        if (where == KVARN_METAL_EMPTY || !simd_any(any != 0)) {
            continue;
        }
        const bool is_k_tile = fc_bits_k != 0 && where == KVARN_METAL_SEALED;
        const bool is_v_tile = fc_bits_v != 0 && where == KVARN_METAL_SEALED;

        // --- keys

        const int64_t tile = (int64_t(args.s0 + s)*args.n_tiles + i)*args.H + h;
        device const char * kt = k_tiles + (is_k_tile ? tile*kvarn_tile_size(DK, fc_bits_k) : 0);
        device const char * vt = v_tiles + (is_v_tile ? tile*kvarn_tile_size(DV, fc_bits_v) : 0);

        float qz[NQ];
        for (short j = 0; j < NQ; ++j) {
            qz[j] = 0.0f;
        }
        for (int R = lane; R < DK/4; R += LANES) {
            float4 scale = float4(1.0f);
            float4 zero  = float4(0.0f);
            if (is_k_tile) {
                scale = float4(((device const half4 *) (kt + kvarn_scale_off(DK, fc_bits_k)))[R]);
                zero  = float4(((device const half4 *) (kt + kvarn_zero_off (DK, fc_bits_k)))[R]);
            }
            for (short j = 0; j < NQ; ++j) {
                const int jq = min(j0 + j, n_q - 1);
                const float4 x = args.scale*((device const float4 *) (q + jq/n_gqa*args.q_row + (h*n_gqa + jq%n_gqa)*args.q_head +
                                                                      s*args.q_stream))[R];
                qz[j] += dot(x, zero);
                vec[R*NQ + j] = x*scale;
            }
        }
        simdgroup_barrier(mem_flags::mem_threadgroup);

        float4 acc[NQ];
        if (is_k_tile) {
            kvarn_contract<NQ>(fc_bits_k, KVARN_G, lane, 0, 1, DK/4, (device const uint *) kt, vec, acc);
            device const half * tokens = (device const half *) (kt + kvarn_token_off(DK, fc_bits_k));
            const float4 token = kvarn_gather(fc_bits_k, KVARN_G, lane, tokens);
            for (short j = 0; j < NQ; ++j) {
                acc[j] = (acc[j] + simd_sum(qz[j]))*token;
            }
            simdgroup_barrier(mem_flags::mem_threadgroup);
            for (short c = 0; c < 4; ++c) {
                const int t = kvarn_free(fc_bits_k, KVARN_G, lane, c);
                for (short j = 0; j < NQ; ++j) {
                    ((threadgroup float *) vec)[(t/4*NQ + j)*4 + t%4] = acc[j][c];
                }
            }
        } else {
            device const char * rows = k_rows + (fc_bits_k == 0 ? s*args.k_stream + h*args.k_head + i*KVARN_G*args.k_row
                                                                : where*KVARN_G*args.k_row + h*DK*2);
            const uint steps = simd_or(any != 0 ? 1u << lane/4 : 0u);
            kvarn_score_rows<NQ>(DK, (device const half *) rows, args.k_row/2, steps, lane, vec, acc);
            simdgroup_barrier(mem_flags::mem_threadgroup);
            const short R = 4*(lane % 8) + lane/8;
            for (short j = 0; j < NQ; ++j) {
                vec[R*NQ + j] = acc[j];
            }
        }
        simdgroup_barrier(mem_flags::mem_threadgroup);

        // --- softmax

        float pz[NQ];
        float4 token = float4(1.0f);
        if (is_v_tile) {
            token = float4(((device const half4 *) (vt + kvarn_token_off(DV, fc_bits_v)))[lane]);
        }
        for (short j = 0; j < NQ; ++j) {
            const int    jq   = min(j0 + j, n_q - 1);
            const half4  m    = kvarn_mask(mask_s + jq/n_gqa*args.mask_row, i*KVARN_G + 4*lane);
            const uint   seen = kvarn_seen(m);
            float4       x    = vec[lane*NQ + j];
            if (fc_softcap) {
                x = args.softcap*precise::tanh(x);
            }
            x += fc_bias ? kvarn_slope(h*n_gqa + jq%n_gqa, args.max_bias, args.n_pow2)*float4(m) : float4(m);
            x.x = (seen & 1) != 0 ? x.x : NO_MAX;
            x.y = (seen & 2) != 0 ? x.y : NO_MAX;
            x.z = (seen & 4) != 0 ? x.z : NO_MAX;
            x.w = (seen & 8) != 0 ? x.w : NO_MAX;
            const float max_j  = max(top[j], simd_max(max(max(x.x, x.y), max(x.z, x.w))));
            const float shrink = exp(top[j] - max_j);
            float4 p = exp(x - max_j);
            p.x = (seen & 1) != 0 ? p.x : 0.0f;
            p.y = (seen & 2) != 0 ? p.y : 0.0f;
            p.z = (seen & 4) != 0 ? p.z : 0.0f;
            p.w = (seen & 8) != 0 ? p.w : 0.0f;
            top[j] = max_j;
            sum[j] = sum[j]*shrink + ((p.x + p.y) + (p.z + p.w));
            for (short v = 0; v < NV; ++v) {
                out[v][j] *= shrink;
            }
            p *= token;
            pz[j] = is_v_tile ? simd_sum((p.x + p.y) + (p.z + p.w)) : 0.0f;
            vec[lane*NQ + j] = p;
        }
        simdgroup_barrier(mem_flags::mem_threadgroup);

        // --- values

        if (is_v_tile) {
            for (short v = 0; v < NV; ++v) {
                const int u = unit + v*LANES;
                if (u < U && share < n_share) {
                    kvarn_contract<NQ>(fc_bits_v, DV, u, share, n_share, KVARN_G/4, (device const uint *) vt, vec, acc);
                    device const half * factors = (device const half *) (vt + kvarn_scale_off(DV, fc_bits_v));
                    const float4 scale = kvarn_gather(fc_bits_v, DV, u, factors);
                    const float4 zero  = kvarn_gather(fc_bits_v, DV, u, factors + DV);
                    for (short j = 0; j < NQ; ++j) {
                        out[v][j] += acc[j]*scale + (share == 0 ? pz[j] : 0.0f)*zero;
                    }
                }
            }
        } else {
            device const char * rows = v_rows + (fc_bits_v == 0 ? s*args.v_stream + h*args.v_head + i*KVARN_G*args.v_row
                                                                : where*KVARN_G*args.v_row + h*DV*2);
            const uint4 seen = uint4(simd_or((any & 1) << lane), simd_or((any >> 1 & 1) << lane),
                                     simd_or((any >> 2 & 1) << lane), simd_or((any >> 3 & 1) << lane));
            for (short v = 0; v < NV; ++v) {
                const int u = unit + v*LANES;
                if (u < U && share < n_share) {
                    kvarn_value_rows<NQ>(fc_bits_v, DV, u, share, n_share, (device const half *) rows, args.v_row/2, seen, vec,
                                         out[v]);
                }
            }
        }
        simdgroup_barrier(mem_flags::mem_threadgroup);
    }

    // --- join: lanes that share a unit, then simdgroups

    for (short j = 0; j < NQ; ++j) {
        sum[j] = simd_sum(sum[j]);
        if (n_share > 1) { // NV is 1 here
            float4 total = float4(0.0f);
            for (int g = 0; g < n_share; ++g) {
                total += simd_shuffle(out[0][j], ushort(unit + g*U));
            }
            out[0][j] = total;
        }
    }
    if (sg != 0) {
        for (short j = 0; j < NQ; ++j) {
            for (short v = 0; v < NV; ++v) {
                vec[(v*NQ + j)*LANES + lane] = out[v][j];
            }
        }
    }
    // simdgroup 0 has its output in registers: its memory is free for everyone's maxima and sums
    threadgroup_barrier(mem_flags::mem_threadgroup);
    threadgroup float * stat = (threadgroup float *) smem;
    if (lane == 0) {
        for (short j = 0; j < NQ; ++j) {
            stat[(sg*NQ + j)*2 + 0] = top[j];
            stat[(sg*NQ + j)*2 + 1] = sum[j];
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (short j = 0; sg == 0 && j < min(int(NQ), n_q - j0); ++j) {
        float max_j = top[j];
        for (int g = 1; g < nsg; ++g) {
            max_j = max(max_j, stat[(g*NQ + j)*2]);
        }
        const float w = exp(top[j] - max_j);
        float sum_j = sum[j]*w;
        for (short v = 0; v < NV; ++v) {
            out[v][j] *= w;
        }
        for (int g = 1; g < nsg; ++g) {
            const float wg = exp(stat[(g*NQ + j)*2] - max_j);
            sum_j += stat[(g*NQ + j)*2 + 1]*wg;
            for (short v = 0; v < NV; ++v) {
                out[v][j] += wg*smem[g*args.region + (v*NQ + j)*LANES + lane];
            }
        }
        const int jq = j0 + j;
        device char  * own = part + s*args.part_stream + (jq/n_gqa*args.n_head + h*n_gqa + jq%n_gqa)*args.part_q;
        device float * dst = (device float *) (own + chunk*args.part_chunk);
        for (int c = args.n_chunks + lane; chunk == 0 && c < args.n_parts; c += LANES) { // not used
            ((device float *) (own + c*args.part_chunk))[0] = as_type<float>(NEG_INF_F32);
            ((device float *) (own + c*args.part_chunk))[1] = 0.0f;
        }
        if (lane == 0) {
            dst[0] = max_j > NO_MAX ? max_j : as_type<float>(NEG_INF_F32);
            dst[1] = sum_j;
        }
        for (short v = 0; v < NV; ++v) {
            const int u = unit + v*LANES;
            if (u < U && share == 0) {
                for (short c = 0; c < 4; ++c) {
                    dst[2 + kvarn_free(fc_bits_v, DV, u, c)] = out[v][j][c];
                }
            }
        }
    }
}

// kernel_kvarn_attn_q<query vectors>_v<passes over the values' channels>
typedef decltype(kernel_kvarn_attn<1, 1>) kvarn_attn_t;

template [[host_name("kernel_kvarn_attn_q1_v1")]] kernel kvarn_attn_t kernel_kvarn_attn<1, 1>;
template [[host_name("kernel_kvarn_attn_q2_v1")]] kernel kvarn_attn_t kernel_kvarn_attn<2, 1>;
template [[host_name("kernel_kvarn_attn_q4_v1")]] kernel kvarn_attn_t kernel_kvarn_attn<4, 1>;
template [[host_name("kernel_kvarn_attn_q8_v1")]] kernel kvarn_attn_t kernel_kvarn_attn<8, 1>;
template [[host_name("kernel_kvarn_attn_q1_v2")]] kernel kvarn_attn_t kernel_kvarn_attn<1, 2>;
template [[host_name("kernel_kvarn_attn_q2_v2")]] kernel kvarn_attn_t kernel_kvarn_attn<2, 2>;
template [[host_name("kernel_kvarn_attn_q4_v2")]] kernel kvarn_attn_t kernel_kvarn_attn<4, 2>;
template [[host_name("kernel_kvarn_attn_q1_v4")]] kernel kvarn_attn_t kernel_kvarn_attn<1, 4>;
template [[host_name("kernel_kvarn_attn_q2_v4")]] kernel kvarn_attn_t kernel_kvarn_attn<2, 4>;
template [[host_name("kernel_kvarn_attn_q4_v4")]] kernel kvarn_attn_t kernel_kvarn_attn<4, 4>;

// ---------------------------------------------------------------------------------------------------- REDUCE
//
// One simdgroup per query vector and 64 channels, two of a lane: joins the partial results of all chunks and divides by the sum.
// Their maxima and sums are read by a lane each. The sum tells whether a partial result holds anything; if not, its output is not
// read. Bound by reading them.

kernel void kernel_kvarn_reduce(
        constant kvarn_metal_reduce_args & args  [[buffer(KVARN_BUF_ARGS)]],
        device const char                * parts [[buffer(KVARN_BUF_PARTS)]],
        device const float               * sinks [[buffer(KVARN_BUF_SINKS)]],
        device       char                * out   [[buffer(KVARN_BUF_OUT)]],
        uint3  tgpig [[threadgroup_position_in_grid]],
        ushort lane  [[thread_index_in_simdgroup]]) {
    const int  jq     = tgpig.x;
    const int  s      = tgpig.y;
    const int  d      = 2*(LANES*int(tgpig.z) + lane);
    const bool has_d  = d < fc_D_v;
    device const char * part = parts + jq*args.part_q + s*args.part_stream;

    const float sink = fc_sinks ? sinks[jq % args.n_head] : NO_MAX;
    float top = sink;
    for (int c = lane; c < args.n_parts; c += LANES) {
        device const float * x = (device const float *) (part + c*args.part_chunk);
        top = x[1] > 0.0f ? max(top, x[0]) : top;
    }
    top = simd_max(top);
    float  sum = 0.0f;
    float2 y   = float2(0.0f);
    for (int c0 = 0; c0 < args.n_parts; c0 += LANES) {
        float w = 0.0f;
        if (c0 + lane < args.n_parts) {
            device const float * x = (device const float *) (part + (c0 + lane)*args.part_chunk);
            w = x[1] > 0.0f ? exp(x[0] - top) : 0.0f;
            sum += x[1]*w;
        }
        const short n = min(LANES, args.n_parts - c0);
#pragma clang loop unroll_count(4)
        for (short k = 0; k < n; ++k) {
            const float w_k = simd_broadcast(w, ushort(k));
            if (has_d && w_k > 0.0f) {
                y += w_k*float2(*(device const float2 *) (part + (c0 + k)*args.part_chunk + 4*(2 + d)));
            }
        }
    }
    sum = simd_sum(sum) + (fc_sinks ? exp(sink - top) : 0.0f);
    if (has_d) {
        *(device float2 *) (out + jq*args.out_q + s*args.out_stream + 4*d) = y*(sum > 0.0f ? 1.0f/sum : 0.0f);
    }
}
