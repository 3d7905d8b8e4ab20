// kvarn-fuse-ggml.cu - nodes around GGML_OP_KVARN that are one launch on CUDA: around attention when few tokens are decoded, and
// SEAL of all layers. Finds them in the graph as llama.cpp builds it; what does not look exactly like that is computed node by
// node.
//
// SPDX-License-Identifier: MIT
//
//   queries ---> ROPE ---> rotation ---------------------------+                   rotations: MUL_MAT with a Hadamard matrix
//   keys    ---> ROPE ---> rotation ---> SET_ROWS ---> SEAL ---+---> ATTN ---> REDUCE ---> rotation back
//   values  -------------> rotation ---> SET_ROWS ---> SEAL ---+
//                '-------------- PREP --------------'                        '------- REDUCE -------'
//
// PREP runs where the last SET_ROWS stands; what comes before it is skipped, so what that reads has to live until then. ATTN is
// launched right behind it, so that it starts while PREP runs, and does the work of REDUCE where there are few tiles.
// SEAL nodes of the whole graph run where the last of them stands, unless a graph reads what they seal (kvarn_shape::is_late).

#include "kvarn-cuda-ggml.cuh"

#if defined(GGML_USE_HIP) || defined(GGML_USE_MUSA)

void ggml_cuda_kvarn_keep(ggml_cgraph *, kvarn_keep_t, void *) {}
int  ggml_cuda_kvarn_fuse(ggml_backend_cuda_context &, ggml_cgraph *, int) { return 0; }

#else

#include "kvarn-cuda.h"
#include "kvarn-graph.h"
#include "set-rows.cuh"

#include <vector>

#define TOKENS_MAX 64 // of one PREP: more keep rotations as matrix products busy
#define NODES_MAX  64 // between a layer's first rotation and its ATTN

enum { QUERIES = 2 }; // beside KVARN_KEY and KVARN_VALUE

// the nodes of one layer; null where there is none
struct kvarn_layer {
    ggml_tensor * attn;
    ggml_tensor * rope[3]; // keys, values, queries
    ggml_tensor * rot [3];
    ggml_tensor * rows[2]; // SET_ROWS
    ggml_tensor * seal[2];
    int start, prep;       // nodes: where to look from, the last SET_ROWS

    // where PREP's work on one of three begins: this node's sources are read when it runs
    ggml_tensor * first(int n) const { return rope[n] ? rope[n] : rot[n]; }
};

static bool kvarn_is_noop(const ggml_tensor * t) {
    return t->op == GGML_OP_NONE || t->op == GGML_OP_RESHAPE || t->op == GGML_OP_VIEW || t->op == GGML_OP_PERMUTE;
}

// what a view shows all of
static ggml_tensor * kvarn_behind(ggml_tensor * t) {
    while (t && (t->op == GGML_OP_RESHAPE || t->op == GGML_OP_PERMUTE || t->op == GGML_OP_VIEW) && t->src[0] &&
           t->data == t->src[0]->data && ggml_nelements(t) == ggml_nelements(t->src[0])) {
        t = t->src[0];
    }
    return t;
}

static bool kvarn_is_rotation(const ggml_tensor * t) {
    return t && t->op == GGML_OP_MUL_MAT && ggml_get_op_params_i32(t, 1) == GGML_HINT_SRC0_IS_HADAMARD &&
        t->type == GGML_TYPE_F32 && t->src[1]->type == GGML_TYPE_F32 && ggml_is_contiguous(t->src[1]) && ggml_is_contiguous(t) &&
        t->src[0]->ne[0] == t->src[0]->ne[1] && t->ne[0] <= KVARN_D_MAX && (t->ne[0] & (t->ne[0] - 1)) == 0;
}

static bool kvarn_is_op(const ggml_tensor * t, kvarn_op op) { return t && t->op == GGML_OP_KVARN && ggml_kvarn_get_op(t) == op; }

// whether t writes to these tiles: GET names them, not the node
static bool kvarn_seals(const ggml_tensor * t, const ggml_tensor * tiles) {
    return kvarn_is_op(t, KVARN_OP_SEAL) && t->view_src == (tiles->view_src ? tiles->view_src : tiles);
}

static int kvarn_index(const ggml_cgraph * graph, const ggml_tensor * t, int from, int to) {
    for (int i = from; i < to; ++i) {
        if (graph->nodes[i] == t) {
            return i;
        }
    }
    return -1;
}

static bool kvarn_overlap(const ggml_tensor * a, const ggml_tensor * b) {
    const char * p = (const char *) a->data, * q = (const char *) b->data;
    return p < q + ggml_nbytes(b) && q < p + ggml_nbytes(a);
}

// t is from, seen through views, and nothing else reads any of them
static bool kvarn_is_private(const ggml_cgraph * graph, const ggml_tensor * t, const ggml_tensor * from, int start, int end) {
    for (;; t = t->src[0]) {
        const int i = kvarn_index(graph, t, start, end);
        if (i < 0 || ggml_node_get_use_count(graph, i) != 1 || (t->flags & GGML_TENSOR_FLAG_OUTPUT)) {
            return false;
        }
        if (t == from) {
            return true;
        }
    }
}

// The ROPE in front of a rotation that PREP can do; null where there is none. Behind a norm upstream does it with that.
static ggml_tensor * kvarn_find_rope(const ggml_cgraph * graph, const ggml_tensor * rot, int start, int end) {
    ggml_tensor * t = rot ? kvarn_behind(rot->src[1]) : nullptr;
    if (!t || t->op != GGML_OP_ROPE || t->type != GGML_TYPE_F32 || t->view_src || t->ne[3] != 1 || !ggml_is_contiguous(t)) {
        return nullptr;
    }
    const ggml_tensor * x = t->src[0];
    const int mode = ggml_get_op_params_i32(t, 2), n_dims = ggml_get_op_params_i32(t, 1), first = ggml_get_op_params_i32(t, 15);
    if (x->type != GGML_TYPE_F32 || x->nb[0] != sizeof(float) || x->op == GGML_OP_MUL || first != 0 || n_dims > t->ne[0] ||
        (mode != GGML_ROPE_TYPE_NORMAL && mode != GGML_ROPE_TYPE_NEOX) || !kvarn_is_private(graph, rot->src[1], t, start, end)) {
        return nullptr;
    }
    const int i = kvarn_index(graph, t, start, end);
    return kvarn_is_noop(graph->nodes[i + 1]) ? t : nullptr;
}

static bool kvarn_is_same_rope(const ggml_tensor * a, const ggml_tensor * b) {
    return a->src[1] == b->src[1] && a->src[2] == b->src[2] && memcmp(a->op_params, b->op_params, sizeof(a->op_params)) == 0;
}

// The layer whose ATTN is node i_attn; false if it does not look as above. Says nothing about memory: that comes later.
static bool kvarn_find_layer(const ggml_cgraph * graph, int i_attn, kvarn_layer & l) {
    l = {};
    l.attn = graph->nodes[i_attn];
    const int start = l.start = i_attn > NODES_MAX ? i_attn - NODES_MAX : 0;

    for (int side = 0; side < 2; ++side) {
        const ggml_tensor * tiles = l.attn->src[side == KVARN_KEY ? KVARN_SRC_K_TILES : KVARN_SRC_V_TILES];
        if (!tiles) {
            continue;
        }
        int at = i_attn - 1;
        while (at > start && !kvarn_seals(graph->nodes[at], tiles)) {
            at--;
        }
        ggml_tensor * seal = graph->nodes[at];
        ggml_tensor * rows = at > start ? seal->src[0] : nullptr;
        if (!rows || graph->nodes[at - 1] != rows || rows->op != GGML_OP_SET_ROWS || ggml_kvarn_get_shape(seal).bits > 4) {
            return false;
        }
        ggml_tensor * cur = rows->src[0], * from = kvarn_behind(cur);
        if (cur->type != GGML_TYPE_F32 || !ggml_is_contiguous(cur) || cur->ne[2]*cur->ne[3] != 1 || cur->ne[1] > TOKENS_MAX ||
            rows->src[1]->type != GGML_TYPE_I64 || !ggml_is_contiguous(rows->src[1]) ||
            ggml_nelements(rows->src[1]) != cur->ne[1]) {
            return false;
        }
        if (!kvarn_is_rotation(from) || !kvarn_is_private(graph, cur, from, start, at)) {
            return false;
        }
        l.seal[side] = seal;
        l.rows[side] = rows;
        l.rot [side] = from;
        l.prep = at - 1 > l.prep ? at - 1 : l.prep;
    }
    ggml_tensor * q = kvarn_behind(l.attn->src[KVARN_SRC_Q]);
    if (kvarn_is_rotation(q) && kvarn_is_private(graph, l.attn->src[KVARN_SRC_Q], q, start, i_attn)) {
        l.rot[QUERIES] = q;
    }

    for (int side = 0; side < 2; ++side) {
        const ggml_tensor * a = l.rows[side];
        if (a && l.rows[!side] && (a->src[0]->ne[1] != l.rows[!side]->src[0]->ne[1] || l.seal[0]->src[1] != l.seal[1]->src[1])) {
            return false;
        }
    }
    const int64_t n_tokens = l.rows[l.rows[0] ? 0 : 1]->src[0]->ne[1];
    for (int n = 0; n < 3; ++n) {
        if (l.rot[n]) {
            const int i = kvarn_index(graph, l.rot[n], start, l.prep);
            if (i < 0 || !kvarn_is_noop(graph->nodes[i + 1])) {
                return false; // what PREP reads is not there yet
            }
            l.rope[n] = kvarn_find_rope(graph, l.rot[n], start, i);
            l.rope[n] = l.rope[n] && l.rope[n]->ne[2] == n_tokens ? l.rope[n] : nullptr;
        }
    }
    if (l.rope[KVARN_KEY] && l.rope[QUERIES] && !kvarn_is_same_rope(l.rope[KVARN_KEY], l.rope[QUERIES])) {
        l.rope[KVARN_KEY] = l.rope[QUERIES] = nullptr;
    }
    l.rope[KVARN_VALUE] = nullptr;
    return true;
}

static bool kvarn_is_part(const kvarn_layer & l, const ggml_tensor * t) {
    for (int n = 0; n < 3; ++n) {
        if (t == l.rope[n] || t == l.rot[n] || (n < 2 && t == l.rows[n])) {
            return true;
        }
    }
    return false;
}

// what PREP reads instead of this node
template <typename F> static void kvarn_for_inputs(const ggml_tensor * first, F && f) {
    if (first->op != GGML_OP_ROPE) {
        f(first->src[1]);
        return;
    }
    for (int k = 0; k < 3; ++k) {
        if (first->src[k]) {
            f(first->src[k]);
        }
    }
}

// nothing that is computed between a skipped node's place and PREP writes over what the node reads, nor do PREP's queries
static bool kvarn_is_kept(const ggml_cgraph * graph, const kvarn_layer & l) {
    bool is_kept = true;
    for (int n = 0; n < 3; ++n) {
        if (!l.rot[n]) {
            continue;
        }
        for (int i = kvarn_index(graph, l.first(n), l.start, l.prep) + 1; i <= l.prep; ++i) {
            const ggml_tensor * t = i < l.prep ? graph->nodes[i] : l.rot[QUERIES];
            if (t && !kvarn_is_noop(t) && (i == l.prep || !kvarn_is_part(l, t))) {
                kvarn_for_inputs(l.first(n), [&](const ggml_tensor * in) { is_kept = is_kept && !kvarn_overlap(t, in); });
            }
        }
    }
    return is_kept;
}

static kvarn_rope kvarn_rope_of(const ggml_tensor * t) {
    const auto f32 = [&](int i) { return ggml_get_op_params_f32(t, i); };
    kvarn_rope r = {};
    r.pos     = (const int32_t *) t->src[1]->data;
    r.factors = t->src[2] ? (const float *) t->src[2]->data : nullptr;
    r.n_dims  = ggml_get_op_params_i32(t, 1);
    r.is_neox = ggml_get_op_params_i32(t, 2) == GGML_ROPE_TYPE_NEOX;
    r.theta_scale = powf(f32(5), -2.0f/r.n_dims);
    r.freq_scale  = f32(6);
    r.ext_factor  = f32(7);
    r.attn_factor = f32(8);
    float ends[2];
    ggml_rope_yarn_corr_dims(r.n_dims, ggml_get_op_params_i32(t, 4), f32(5), f32(9), f32(10), ends);
    r.low  = ends[0];
    r.high = ends[1];
    return r;
}

static kvarn_seal_side kvarn_seal_side_of(const ggml_tensor * seal) {
    const kvarn_shape s = ggml_kvarn_get_shape(seal);
    return { s.side, s.bits, s.D, s.H, (const half *) seal->src[0]->data, (uint8_t *) seal->data };
}

static const int64_t * kvarn_seal_list(const ggml_tensor * seal) {
    return (const int64_t *) seal->src[1]->data + ggml_kvarn_get_shape(seal).n_rows;
}

static kvarn_prep_args kvarn_prep_args_of(const kvarn_layer & l) {
    kvarn_prep_args a = {};
    a.n_tokens = l.rows[l.rows[0] ? 0 : 1]->src[0]->ne[1];
    for (int n = 0; n < 3; ++n) {
        const ggml_tensor * rot = l.rot[n], * rope = l.rope[n];
        if (!rot) {
            continue;
        }
        kvarn_prep_part & p = a.part[n];
        p.n_rot = rot->ne[0];
        p.D     = n < 2 ? ggml_kvarn_get_shape(l.seal[n]).D : rope ? rope->ne[0] : rot->ne[0];
        p.H     = ggml_nelements(rot)/a.n_tokens/p.D;
        p.x     = (const float *) l.first(n)->src[rope ? 0 : 1]->data;
        p.x_head    = rope ? rope->src[0]->nb[1]/sizeof(float) : p.D;
        p.x_token   = rope ? rope->src[0]->nb[2]/sizeof(float) : (int64_t) p.D*p.H;
        p.is_turned = rope != nullptr;
        if (rope) {
            a.rope = kvarn_rope_of(rope);
        }
        if (n < 2) {
            p.rows = (const int64_t *) l.rows[n]->src[1]->data;
            p.tail = (half *) l.rows[n]->data;
        } else {
            p.out = (float *) rot->data;
        }
    }
    return a;
}

// the rotation back that follows a REDUCE and is all that reads it; -1: none
static int kvarn_find_back(const ggml_cgraph * graph, int i) {
    const ggml_tensor * reduce = graph->nodes[i];
    if (ggml_node_get_use_count(graph, i) != 1 || (reduce->flags & GGML_TENSOR_FLAG_OUTPUT)) {
        return -1;
    }
    for (int n = i + 1; n < graph->n_nodes; ++n) {
        ggml_tensor * t = graph->nodes[n];
        if (kvarn_is_noop(t)) {
            if (ggml_node_get_use_count(graph, n) != 1 || kvarn_behind(t) != reduce) {
                return -1;
            }
            continue;
        }
        return kvarn_is_rotation(t) && kvarn_behind(t->src[1]) == reduce && reduce->ne[0] % t->ne[0] == 0 ? n : -1;
    }
    return -1;
}

static bool kvarn_is_late(const ggml_tensor * t) {
    return kvarn_is_op(t, KVARN_OP_SEAL) && (t->flags & GGML_TENSOR_FLAG_COMPUTE) && ggml_kvarn_get_shape(t).is_late;
}

static bool kvarn_is_last_seal(const ggml_cgraph * graph, int i) {
    if (!kvarn_is_late(graph->nodes[i])) {
        return false;
    }
    do {
        i++;
    } while (i < graph->n_nodes && !kvarn_is_late(graph->nodes[i]));
    return i == graph->n_nodes;
}

// SEAL of all layers
static void kvarn_seal_late(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph) {
    std::vector<kvarn_seal_side> sides;
    const ggml_tensor * before = nullptr;
    const auto flush = [&] {
        if (before) {
            CUDA_CHECK(kvarn_seal(sides.data(), sides.size(), kvarn_seal_list(before), ggml_kvarn_get_shape(before).n_seal,
                    ctx.stream()));
        }
        sides.clear();
    };
    for (int i = 0; i < graph->n_nodes; ++i) {
        const ggml_tensor * t = graph->nodes[i];
        if (kvarn_is_late(t)) {
            if (before && before->src[1] != t->src[1]) { // of another cache
                flush();
            }
            before = t;
            sides.push_back(kvarn_seal_side_of(t));
        }
    }
    flush();
}

// Runs PREP, and ATTN if it comes next; with REDUCE and the rotation back if ATTN does them. Returns the last node that is done.
static int kvarn_run_layer(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, const kvarn_layer & l) {
    CUDA_CHECK(kvarn_prep(kvarn_prep_args_of(l), ctx.stream()));

    std::vector<kvarn_seal_side> sides; // to be sealed at once
    const ggml_tensor * seal = nullptr;
    for (const ggml_tensor * t : l.seal) {
        if (t && !kvarn_is_late(t)) {
            sides.push_back(kvarn_seal_side_of(t));
            seal = t;
        }
    }
    if (seal) {
        const int n_seal = ggml_kvarn_get_shape(seal).n_seal;
        CUDA_CHECK(kvarn_seal(sides.data(), sides.size(), kvarn_seal_list(seal), n_seal, ctx.stream()));
    }
    if (ggml_kvarn_get_attn_shape(l.attn).chunk == 0) {
        return l.prep + 1; // more rows than ATTN takes: a prompt's node
    }

    int i = l.prep + 1;
    while (graph->nodes[i] != l.attn) {
        if (!kvarn_is_noop(graph->nodes[i]) && graph->nodes[i] != l.seal[0] && graph->nodes[i] != l.seal[1]) {
            return l.prep + 1; // ATTN reads what this computes
        }
        i++;
    }
    ggml_tensor * reduce = i + 1 < graph->n_nodes ? graph->nodes[i + 1] : nullptr;
    if (!kvarn_is_op(reduce, KVARN_OP_REDUCE) || reduce->src[0] != l.attn) {
        ggml_cuda_kvarn_attn(ctx, l.attn, !seal, nullptr, nullptr);
        return i;
    }
    const int back = kvarn_find_back(graph, i + 1), last = back < 0 ? i + 1 : back;
    ggml_tensor * out = graph->nodes[last];
    for (const ggml_tensor * src : l.attn->src) {
        out = out && src && kvarn_overlap(out, src) ? nullptr : out; // one block writes while another still reads
    }
    return ggml_cuda_kvarn_attn(ctx, l.attn, !seal, reduce->src[1], out) ? last : i;
}

void ggml_cuda_kvarn_keep(ggml_cgraph * graph, kvarn_keep_t keep, void * data) {
    for (int i = 0; i < graph->n_nodes; ++i) {
        ggml_tensor * t = graph->nodes[i];
        kvarn_layer l;
        if (kvarn_is_op(t, KVARN_OP_ATTN) && kvarn_find_layer(graph, i, l)) {
            for (int n = 0; n < 3; ++n) {
                if (l.rot[n]) {
                    kvarn_for_inputs(l.first(n), [&](ggml_tensor * in) { keep(data, in, graph->nodes[l.prep]); });
                }
            }
        } else if (kvarn_is_op(t, KVARN_OP_REDUCE)) {
            const int back = kvarn_find_back(graph, i);
            if (back >= 0) {
                keep(data, t->src[0], graph->nodes[back]);
                keep(data, kvarn_behind(t->src[0]->src[KVARN_SRC_Q]), graph->nodes[back]);
            }
        }
    }
}

// The layer that node i is a part of; false where it is none that is one launch.
static bool kvarn_find_layer_of(const ggml_cgraph * graph, int i, kvarn_layer & l) {
    int i_attn = i;
    while (i_attn < graph->n_nodes && i_attn < i + NODES_MAX && graph->nodes[i_attn]->op != GGML_OP_KVARN) {
        i_attn++;
    }
    while (i_attn < graph->n_nodes && i_attn < i + NODES_MAX && !kvarn_is_op(graph->nodes[i_attn], KVARN_OP_ATTN)) {
        i_attn++;
    }
    return i_attn < graph->n_nodes && kvarn_is_op(graph->nodes[i_attn], KVARN_OP_ATTN) && kvarn_find_layer(graph, i_attn, l) &&
        kvarn_is_part(l, graph->nodes[i]) && kvarn_is_kept(graph, l);
}

int ggml_cuda_kvarn_fuse(ggml_backend_cuda_context & ctx, ggml_cgraph * graph, int i) {
    ggml_tensor * t = graph->nodes[i];

    if (kvarn_is_op(t, KVARN_OP_REDUCE)) {
        const int back = kvarn_find_back(graph, i);
        if (back < 0 || kvarn_overlap(graph->nodes[back], t->src[0])) {
            return 0;
        }
        ggml_cuda_kvarn_reduce(ctx, t, graph->nodes[back]);
        return back - i;
    }
    int last = i; // of what is done here
    kvarn_layer l;
    if (t->op == GGML_OP_ROPE || t->op == GGML_OP_SET_ROWS || kvarn_is_rotation(t)) {
        if (kvarn_find_layer_of(graph, i, l)) {
            // what PREP does is skipped with the view of it, SET_ROWS with its SEAL
            last = i == l.prep ? kvarn_run_layer(ctx, graph, l) : i + 1;
        } else if (t->op == GGML_OP_SET_ROWS && i + 1 < graph->n_nodes && graph->nodes[i + 1]->src[0] == t &&
                   kvarn_is_late(graph->nodes[i + 1])) {
            ggml_cuda_op_set_rows(ctx, t);
            last = i + 1;
        }
    }
    for (int n = i; n <= last; ++n) {
        if (kvarn_is_last_seal(graph, n)) {
            kvarn_seal_late(ctx, graph);
        }
    }
    return last - i;
}

#endif
