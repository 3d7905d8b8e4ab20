// kvarn_tiles.metal - tiles and rows of GGML_OP_KVARN on Apple GPUs: SEAL and GET. Attention is in kvarn.metal.
// The arithmetic of kvarn-ref.c, sum by sum in its order, so that a tile has the same bytes: f32, one rounding per operation.
// That needs safe math, which a source can ask for since Metal 3.2; before, metal/README.md says what may differ.
//
// SPDX-License-Identifier: MIT

#include <metal_stdlib>

#if __METAL_VERSION__ >= 320
#pragma METAL fp math_mode(safe)
#pragma METAL fp contract(off)
#endif

using namespace metal;

#ifndef KVARN_CODES_H // an embedded source has them before it
#include "kvarn-format.h"
#include "kvarn-metal-args.h"
#include "kvarn_codes.h"
#endif

constant int fc_bits [[function_constant(KVARN_FC_BITS_K)]];
constant int fc_D    [[function_constant(KVARN_FC_D_K)]];
constant int fc_side [[function_constant(KVARN_FC_SIDE)]];

#define G KVARN_G

// ---------------------------------------------------------------------------------------------------- GET
//
// A threadgroup per tile and head. Threads next to each other write next to each other: keys go by four channels of one token,
// values by channels. Bound by writing the rows.

static inline void kvarn_get_tile(int D, int bits, int side, device const char * tile, device char * rows, uint64_t row_size,
                                  uint i, uint n_threads) {
    const int n_R = (side == KVARN_KEY ? D : G)/4;
    const int F   = side == KVARN_KEY ? G : D;
    device const half * scale = (device const half *) (tile + kvarn_scale_off(D, bits));
    device const half * zero  = scale + D;
    device const half * token = zero  + D;
    const float4 weight = kvarn_weight(bits, false);

    for (int n = i; n < n_R*(F/4); n += n_threads) {
        const int R = side == KVARN_KEY ? n % n_R : n/(F/4);
        const int u = side == KVARN_KEY ? n/n_R   : n % (F/4);
        half4 code[4];
        kvarn_unpack(bits, false, kvarn_words(bits, F, u, R, (device const uint *) tile), code);
        for (short s = 0; s < 4; ++s) {
            const int f = kvarn_free(bits, F, u, s);
            half4 x;
            for (short k = 0; k < 4; ++k) {
                const int d = side == KVARN_KEY ? 4*R + k : f;
                const int t = side == KVARN_KEY ? f : 4*R + k;
                x[k] = half((float(code[k][s])*weight[s]*float(scale[d]) + float(zero[d]))*float(token[t]));
            }
            if (side == KVARN_KEY) {
                ((device half4 *) (rows + f*row_size))[R] = x;
            } else {
                for (short k = 0; k < 4; ++k) {
                    ((device half *) (rows + (4*R + k)*row_size))[f] = x[k];
                }
            }
        }
    }
}

kernel void kernel_kvarn_get(
        constant kvarn_metal_tiles_args & args   [[buffer(KVARN_BUF_ARGS)]],
        device const char               * tail   [[buffer(KVARN_BUF_TAIL)]],
        device const int64_t            * plan   [[buffer(KVARN_BUF_PLAN)]],
        device const char               * tiles  [[buffer(KVARN_BUF_TILES)]],
        device       char               * result [[buffer(KVARN_BUF_RESULT)]],
        uint3 tgpig [[threadgroup_position_in_grid]],
        uint3 tptg  [[threads_per_threadgroup]],
        uint  i     [[thread_index_in_threadgroup]]) {
    const int D    = fc_D;
    const int bits = fc_bits;
    const int h    = tgpig.y;

    const int64_t tile  = int64_t(args.s0 + int(tgpig.z))*args.n_tiles + tgpig.x;
    const int     where = int(plan[args.list_off + tile]);
    device char * rows  = result + tgpig.z*args.out_stream + tgpig.x*G*args.out_row + h*D*2;
    device const char * data = tiles + (tile*args.H + h)*kvarn_tile_size(D, bits);

    if (where == KVARN_METAL_SEALED && bits != KVARN_METAL_EXACT) {
        kvarn_get_tile(D, bits, fc_side, data, rows, args.out_row, i, tptg.x);
        return;
    }
    for (int n = i; n < G*D/4; n += tptg.x) {
        const int t = n/(D/4);
        const int c = n%(D/4);
        ushort4 x = ushort4(ushort(0));
        if (where == KVARN_METAL_SEALED) {
            x = ((device const ushort4 *) data)[n];
            x = ushort4(x.x ^ KVARN_METAL_XOR, x.y ^ KVARN_METAL_XOR, x.z ^ KVARN_METAL_XOR, x.w ^ KVARN_METAL_XOR);
        } else if (where >= 0) {
            x = ((device const ushort4 *) (tail + (int64_t(where)*G + t)*args.tail_row + h*D*2))[c];
        }
        ((device ushort4 *) (rows + t*args.out_row))[c] = x;
    }
}

// ---------------------------------------------------------------------------------------------------- SEAL
//
// A threadgroup per entry of the seal list and head. Steps go over the tile in two ways by turns, with a barrier between:
//
//   channel steps   thread = channel, t = 0, 1, .. 127              sums over tokens, in a register
//   token steps     16 lanes = token, lane j takes d = j, j+16, ..  sums over channels, then lanes 8, 4, 2, 1 apart
//
// The tile is never stored: f16 rows are read again by each step, 32 KB for 128 channels, out of the cache. Threadgroup memory:
// six numbers per channel, three per token. Runs once per 128 tokens; bound by arithmetic.

// the constants of kvarn-ref.c
#define X_MAX   65504.0f
#define RMS_MIN 9.094947017729282e-13f // 2^-40
#define STD_MIN 0.0009765625f
#define TINY    8.673617379884035e-19f // 2^-60
#define FIT_MIN 1e-5f
#define AGREE   2.0f
#define ROUNDS  4

static inline float kvarn_range(int bits) { return bits == 2 ? 0.64f : bits == 3 ? 0.80f : 0.92f; }

static inline float kvarn_div(float a, float b) { return precise::divide(a, b); }

static inline float kvarn_reciprocal(float v) { return v > TINY ? kvarn_div(1.0f, v) : 0.0f; }

static inline float kvarn_variance(float sum, float sum2, float n) {
    const float v = kvarn_div(sum2 - sum*kvarn_div(sum, n), n - 1.0f);
    return v > 0.0f ? v : 0.0f;
}

static inline float kvarn_std(float sum, float sum2, float n) {
    const float v = precise::sqrt(kvarn_variance(sum, sum2, n));
    return v > STD_MIN ? v : STD_MIN;
}

static inline uint kvarn_f16_bits(float v) {
    const uint sign = as_type<uint>(v) >> 16 & 0x8000;
    const uint u    = as_type<uint>(v) & 0x7fffffff;
    if (u >= 0x477ff000) {
        return sign | 0x7bff;
    }
    if (u < 0x38800000) {
        return sign | (as_type<uint>(as_type<float>(u) + 0.5f) - 0x3f000000);
    }
    return sign | (((u + 0xfff + (u >> 13 & 1)) >> 13) - (112 << 10));
}

static inline float kvarn_f16_value(uint h) {
    const uint sign = (h & 0x8000) << 16;
    const uint tiny = as_type<uint>(float(h & 0x03ff)*5.9604644775390625e-8f);
    return as_type<float>(sign | ((h & 0x7c00) != 0 ? ((h & 0x7fff) << 13) + (112u << 23) : tiny));
}

// sum over the 16 lanes of a token; the same in all of them
static inline float kvarn_sum16(float s) {
    s += simd_shuffle_xor(s, 8);
    s += simd_shuffle_xor(s, 4);
    s += simd_shuffle_xor(s, 2);
    s += simd_shuffle_xor(s, 1);
    return s;
}

// NaN as 0, the rest clamped to what f16 holds
static inline float kvarn_value(device const char * rows, uint64_t row_size, int t, int d) {
    const uint h = ((device const ushort *) (rows + t*row_size))[d];
    const uint u = h & 0x7fff;
    return kvarn_f16_value((h & 0x8000) | (u > 0x7c00 ? 0u : u == 0x7c00 ? 0x7bffu : u));
}

// code of y: r = 1/token, inv = 1/scale, off = -zero/scale
static inline float kvarn_code(float y, float r, float inv, float off, float L) {
    float v = y*r*inv + off;
    v = v > 0.0f ? v : 0.0f;
    v = v < L ? v : L;
    return rint(v);
}

// what a sealing threadgroup shares: D numbers each, then 128 each
struct kvarn_shared {
    threadgroup float * scale;
    threadgroup float * mid;   // zero, in the end
    threadgroup float * inv;
    threadgroup float * off;
    threadgroup float * cw;    // of the last walk, as in kvarn-ref.c
    threadgroup float * wy;
    threadgroup float * tok;   // token scales
    threadgroup float * rec;   // reciprocals of those that the codes are for
    threadgroup float * next;  // reciprocals of those that the walk in progress finds
};

struct kvarn_job {
    device const char * rows;
    uint64_t row_size;
    float    r;                // 1/rms
    int      D, i, n;          // channels, thread, threads
    short    lane;
};

static inline float kvarn_y(kvarn_job job, int t, int d) { return kvarn_value(job.rows, job.row_size, t, d)*job.r; }

// Step 2: token scales so that tokens and channels have the same spread, nearly. Only their reciprocals are needed.
static inline void kvarn_normalize(kvarn_job job, kvarn_shared m) {
    for (int d = job.i; d < job.D; d += job.n) {
        float ref = 0.0f;
        for (int t = 0; t < G; ++t) {
            ref += kvarn_y(job, t, d)*(1.0f/G);
        }
        m.mid[d] = ref;
    }
    for (int t = job.i/16; t < G; t += job.n/16) {
        float sum  = 0.0f;
        float sum2 = 0.0f;
        for (int d = job.i % 16; d < job.D; d += 16) {
            const float y = kvarn_y(job, t, d);
            sum  += y;
            sum2 += y*y;
        }
        sum  = kvarn_sum16(sum);
        sum2 = kvarn_sum16(sum2);
        if (job.i % 16 == 0) {
            m.rec[t] = kvarn_div(1.0f, kvarn_std(sum, sum2, float(job.D)));
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int d = job.i; d < job.D; d += job.n) {
        float sum  = 0.0f;
        float sum2 = 0.0f;
        for (int t = 0; t < G; ++t) {
            const float c = kvarn_y(job, t, d)*m.rec[t] - m.mid[d];
            sum  += c;
            sum2 += c*c;
        }
        m.inv[d] = kvarn_div(1.0f, kvarn_std(sum, sum2, float(G)));
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int t = job.i/16; t < G; t += job.n/16) {
        float sum  = 0.0f;
        float sum2 = 0.0f;
        for (int d = job.i % 16; d < job.D; d += 16) {
            const float v = kvarn_y(job, t, d)*m.inv[d];
            sum  += v;
            sum2 += v*v;
        }
        sum  = kvarn_sum16(sum);
        sum2 = kvarn_sum16(sum2);
        if (job.i % 16 == 0) {
            m.rec[t] = kvarn_div(1.0f, kvarn_std(sum, sum2, float(job.D)));
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
}

// What turns y/tok into codes; a scale of 0 has code 0.
static inline void kvarn_code_line(kvarn_shared m, int d, float h) {
    m.inv[d] = kvarn_reciprocal(m.scale[d]);
    m.off[d] = m.inv[d] > 0.0f ? h - m.mid[d]*m.inv[d] : 0.0f;
}

// Step 3: codes for scale and mid, the least-squares token scale for these codes, and for both the next scale and mid. The last
// walk keeps the codes and finds the scale to store for them (step 5): larger than least squares, it restores a channel's size.
// Returns the sum of the squares of the token scales.
static inline float kvarn_walk(kvarn_job job, kvarn_shared m, float L, int side, bool is_last) {
    const float h = 0.5f*L;
    for (int t = job.i/16; t < G; t += job.n/16) {
        const float r = m.rec[t];
        float yv = 0.0f;
        float vv = 0.0f;
        for (int d = job.i % 16; d < job.D; d += 16) {
            const float y = kvarn_y(job, t, d);
            const float v = (kvarn_code(y, r, m.inv[d], m.off[d], L) - h)*m.scale[d] + m.mid[d];
            yv += y*v;
            vv += v*v;
        }
        yv = kvarn_sum16(yv);
        vv = kvarn_sum16(vv);
        if (job.i % 16 == 0) {
            float w = yv > 0.0f && vv > 0.0f ? kvarn_div(yv, vv) : 0.0f;
            w = w < X_MAX ? w : X_MAX;
            m.tok [t] = w;
            m.next[t] = kvarn_reciprocal(w);
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float ww = 0.0f;
    for (int t = 0; t < G; ++t) {
        ww += m.tok[t]*m.tok[t];
    }
    ww = ww > 0.0f ? ww : 1.0f;
    for (int d = job.i; d < job.D; d += job.n) {
        const float inv = m.inv[d];
        const float off = m.off[d];
        float cc = 0.0f;
        float cw = 0.0f;
        float cy = 0.0f;
        float wy = 0.0f;
        float spread = 0.0f;
        for (int t = 0; t < G; ++t) {
            const float y = kvarn_y(job, t, d);
            const float w = m.tok[t];
            const float c = (kvarn_code(y, m.rec[t], inv, off, L) - h)*w;
            cc += c*c;
            cw += c*w;
            cy += c*y;
            wy += w*y;
            const float u = y - w*m.mid[d];
            spread += u*u;
        }
        const float mean  = kvarn_div(cw, ww);
        const float cov   = cy - mean*wy;
        const float var   = cc - mean*cw;
        float scale = cov > 0.0f && var > FIT_MIN*cc ? kvarn_div(cov, var) : 0.0f;
        if (is_last) {
            const float b   = wy - m.mid[d]*ww;
            const float own = spread - b*kvarn_div(b, ww);
            if (scale > 0.0f && AGREE*cov*cov >= own*var) {
                scale = side == KVARN_KEY ? kvarn_div(own, cov) : precise::sqrt(kvarn_div(own, var));
            }
        }
        m.scale[d] = scale;
        m.mid  [d] = kvarn_div(wy - scale*cw, ww);
        if (!is_last) {
            kvarn_code_line(m, d, h);
        }
        m.cw   [d] = cw;
        m.wy   [d] = wy;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    return ww;
}

// Step 4: scale and mid from a range of y/tok, then by rounds of alternating least squares, and one more walk for the codes.
static inline float kvarn_fit(kvarn_job job, thread kvarn_shared & m, int bits, int side) {
    const float L = float((1 << bits) - 1);
    for (int d = job.i; d < job.D; d += job.n) {
        float lo =  FLT_MAX;
        float hi = -FLT_MAX;
        for (int t = 0; t < G; ++t) {
            const float v = kvarn_y(job, t, d)*m.rec[t];
            lo = lo < v ? lo : v;
            hi = hi > v ? hi : v;
        }
        m.scale[d] = (hi - lo)*kvarn_div(kvarn_range(bits), L);
        m.mid  [d] = (hi + lo)*0.5f;
        kvarn_code_line(m, d, 0.5f*L);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float ww = 1.0f;
    for (short k = 0; k <= ROUNDS; ++k) {
        ww = kvarn_walk(job, m, L, side, k == ROUNDS);
        threadgroup float * rec = m.rec;
        m.rec  = m.next;
        m.next = rec;
    }
    return ww;
}

// the largest of 128 token scales; of scales and zeros: the same in every simdgroup
static inline float kvarn_max_token(threadgroup const float * tok, short lane) {
    float top = 0.0f;
    for (int t = lane; t < G; t += 32) {
        top = top > tok[t] ? top : tok[t];
    }
    return simd_max(top);
}

static inline float kvarn_max_channel(kvarn_job job, kvarn_shared m, float h) {
    float top = 0.0f;
    for (int d = job.lane; d < job.D; d += 32) {
        const float zero = fabs(m.mid[d] - h*m.scale[d]);
        const float c    = m.scale[d] > zero ? m.scale[d] : zero;
        top = top > c ? top : c;
    }
    return simd_max(top);
}

// Step 6: scale and zero to f16, token scales for exactly these.
static inline void kvarn_round(kvarn_job job, kvarn_shared m, int bits, int side, float rms, float ww, device char * tile) {
    const float L = float((1 << bits) - 1);
    const float h = 0.5f*L;
    const uint  e = as_type<uint>(kvarn_max_token(m.tok, job.lane)) >> 23;
    float c_max = kvarn_max_channel(job, m, h);
    float f = e > 0 ? as_type<float>((e + 1) << 23) : 1.0f;  // the power of two above the largest token scale
    while (c_max*rms*f > X_MAX) {
        f *= 0.5f;
    }
    const float unit = rms*f;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int d = job.i; d < job.D; d += job.n) {
        const float scale = kvarn_f16_value(kvarn_f16_bits(m.scale[d]*unit));
        const float mid   = kvarn_div(m.wy[d] - kvarn_div(scale, unit)*m.cw[d], ww);
        const float zero  = kvarn_f16_value(kvarn_f16_bits(mid*unit - h*scale));
        m.scale[d] = scale;
        m.mid  [d] = zero;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    c_max = kvarn_max_channel(job, m, 0.0f);
    for (int t = job.i/16; t < G; t += job.n/16) {
        const float r = m.rec[t];
        float yc = 0.0f;
        float cc = 0.0f;
        float yy = 0.0f;
        for (int d = job.i % 16; d < job.D; d += 16) {
            const float y = kvarn_y(job, t, d);
            const float v = kvarn_code(y, r, m.inv[d], m.off[d], L)*m.scale[d] + m.mid[d];
            yc += y*v;
            cc += v*v;
            yy += y*y;
        }
        yc = kvarn_sum16(yc);
        cc = kvarn_sum16(cc);
        yy = kvarn_sum16(yy);
        if (job.i % 16 == 0) {
            float w = yc > 0.0f && cc > 0.0f ? kvarn_div(yc, cc) : 0.0f;
            if (w > 0.0f && AGREE*yc*yc >= yy*cc) {
                w = side == KVARN_KEY ? kvarn_div(yy, yc) : precise::sqrt(kvarn_div(yy, cc));
            }
            m.tok[t] = w*rms;
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const float t_max = kvarn_max_token(m.tok, job.lane);
    f = 1.0f;
    while (t_max > f && 2.0f*f*c_max <= X_MAX) {
        f *= 2.0f;
    }
    device ushort * scale = (device ushort *) (tile + kvarn_scale_off(job.D, bits));
    for (int d = job.i; d < job.D; d += job.n) {
        scale[d]         = ushort(kvarn_f16_bits(m.scale[d]*f));
        scale[job.D + d] = ushort(kvarn_f16_bits(m.mid[d]*f));
    }
    for (int t = job.i; t < G; t += job.n) {
        scale[2*job.D + t] = ushort(kvarn_f16_bits(kvarn_div(m.tok[t], f)));
    }
}

// the four codes of one free index and r = 4R .. 4R+3, one per byte
static inline uint kvarn_four(kvarn_job job, kvarn_shared m, int side, float L, int R, int f) {
    uint w = 0;
    for (short k = 0; k < 4; ++k) {
        const int d = side == KVARN_KEY ? 4*R + k : f;
        const int t = side == KVARN_KEY ? f : 4*R + k;
        w |= uint(kvarn_code(kvarn_y(job, t, d), m.rec[t], m.inv[d], m.off[d], L)) << 8*k;
    }
    return w;
}

// Step 7: codes to words. A thread makes what lies at one x: a word, with 3 bits one of each plane.
static inline void kvarn_pack(kvarn_job job, kvarn_shared m, int bits, int side, device uint * codes) {
    const float L   = float((1 << bits) - 1);
    const int   n_R = (side == KVARN_KEY ? job.D : G)/4;
    const int   F   = side == KVARN_KEY ? G : job.D;
    const int   X   = bits == 3 ? F/8 : F*bits/8;
    for (int n = job.i; n < n_R*X; n += job.n) {
        const int R = side == KVARN_KEY ? n % n_R : n/X;  // threads next to each other read next to each other
        const int x = side == KVARN_KEY ? n/n_R   : n % X;
        if (bits != 3) {
            uint w = 0;
            for (short s = 0; s < 8/bits; ++s) {
                w |= kvarn_four(job, m, side, L, R, x + s*X) << s*bits;
            }
            codes[R*X + x] = w;
        } else {
            uint slot[8];
            for (short s = 0; s < 8; ++s) {
                slot[s] = kvarn_four(job, m, side, L, R, x + s*X);
            }
            device uint * plane = codes + R*3*X + x;
            plane[0]   = slot[0] | slot[1] << 3 | (slot[6] & 0x06060606u) << 5;
            plane[X]   = slot[2] | slot[3] << 3 | (slot[6] & 0x01010101u) << 7 | (slot[7] & 0x04040404u) << 4;
            plane[2*X] = slot[4] | slot[5] << 3 | (slot[7] & 0x03030303u) << 6;
        }
    }
}

kernel void kernel_kvarn_seal(
        constant kvarn_metal_tiles_args & args   [[buffer(KVARN_BUF_ARGS)]],
        device const char               * tail   [[buffer(KVARN_BUF_TAIL)]],
        device const int64_t            * plan   [[buffer(KVARN_BUF_PLAN)]],
        device       char               * result [[buffer(KVARN_BUF_RESULT)]],
        threadgroup  float              * smem   [[threadgroup(0)]],
        uint3  tgpig [[threadgroup_position_in_grid]],
        uint3  tptg  [[threads_per_threadgroup]],
        uint   i     [[thread_index_in_threadgroup]],
        ushort lane  [[thread_index_in_simdgroup]]) {
    const int D    = fc_D;
    const int bits = fc_bits;
    const int h    = tgpig.y;

    device const int64_t * entry = plan + args.list_off + 2*tgpig.x;
    const int64_t slot = entry[0];
    if (slot < 0) { // all threads agree: nothing to seal
        return;
    }
    device const char * rows = tail + slot*G*args.tail_row + h*D*2;
    device       char * tile = result + (entry[1]*args.H + h)*kvarn_tile_size(D, bits);

    if (bits == KVARN_METAL_EXACT) {
        for (int n = i; n < G*D; n += tptg.x) {
            ((device ushort *) tile)[n] = ((device const ushort *) (rows + n/D*args.tail_row))[n % D] ^ ushort(KVARN_METAL_XOR);
        }
        return;
    }

    kvarn_shared m;
    m.scale = smem;
    m.mid   = m.scale + D;
    m.inv   = m.mid   + D;
    m.off   = m.inv   + D;
    m.cw    = m.off   + D;
    m.wy    = m.cw    + D;
    m.tok   = m.wy    + D;
    m.rec   = m.tok   + G;
    m.next  = m.rec   + G;

    // Step 1: y = x/rms
    for (int d = i; d < D; d += tptg.x) {
        float sum2 = 0.0f;
        for (int t = 0; t < G; ++t) {
            const float v = kvarn_value(rows, args.tail_row, t, d);
            sum2 += v*v;
        }
        m.wy[d] = sum2;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float sum2 = 0.0f;
    for (int d = lane % 16; d < D; d += 16) {
        sum2 += m.wy[d];
    }
    const float rms = precise::sqrt(kvarn_div(kvarn_sum16(sum2), float(G*D)));
    if (!(rms >= RMS_MIN)) {
        for (int n = i; n < kvarn_tile_size(D, bits)/4; n += tptg.x) {
            ((device uint *) tile)[n] = 0;
        }
        return;
    }

    kvarn_job job;
    job.rows     = rows;
    job.row_size = args.tail_row;
    job.r        = kvarn_div(1.0f, rms);
    job.D        = D;
    job.i        = i;
    job.n        = tptg.x;
    job.lane     = lane;

    kvarn_normalize(job, m);
    const float ww = kvarn_fit(job, m, bits, fc_side);
    kvarn_round(job, m, bits, fc_side, rms, ww, tile);
    kvarn_pack(job, m, bits, fc_side, (device uint *) tile);
}
