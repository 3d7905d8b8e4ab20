// kvarn-fuse-ggml.cu - nodes around GGML_OP_KVARN that are one launch on CUDA when few tokens are decoded.
// Finds them in the graph as llama.cpp builds it; what does not look exactly like that is computed node by node.
//
// SPDX-License-Identifier: MIT
//
//   queries ---> rotation ------------------------------+                          rotations: MUL_MAT with a Hadamard matrix
//   keys   ---> rotation ---> SET_ROWS ---> SEAL ---+---+---> ATTN ---> REDUCE ---> rotation back
//   values ---> rotation ---> SET_ROWS ---> SEAL ---+
//               '------------- PREP ------------'                       '------- REDUCE -------'
//
// PREP runs where the last SET_ROWS stands; what comes before it is skipped, so what the rotations read has to live until then.
// ATTN is launched right behind it, so that it starts while PREP runs, and does the work of REDUCE where there are few tiles.

#include "kvarn-cuda-ggml.cuh"

#if defined(GGML_USE_HIP) || defined(GGML_USE_MUSA)

void ggml_cuda_kvarn_keep(ggml_cgraph *, kvarn_keep_t, void *) {}
int  ggml_cuda_kvarn_fuse(ggml_backend_cuda_context &, ggml_cgraph *, int) { return 0; }

#else

#include "kvarn-cuda.h"
#include "kvarn-graph.h"

#define TOKENS_MAX 64 // of one PREP: a block does all of a head
#define SEALS_MAX  8
#define NODES_MAX  64 // between a layer's first rotation and its ATTN

// the nodes of one layer; null where there is none
struct kvarn_layer {
    ggml_tensor * attn;
    ggml_tensor * rot [3]; // keys, values, queries
    ggml_tensor * rows[2]; // SET_ROWS
    ggml_tensor * seal[2];
    int start, prep;       // nodes: where to look from, the last SET_ROWS
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
            ggml_nelements(rows->src[1]) != cur->ne[1] || ggml_kvarn_get_shape(seal).n_seal > SEALS_MAX) {
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
        l.rot[2] = q;
    }

    for (int side = 0; side < 2; ++side) {
        const ggml_tensor * a = l.rows[side];
        if (a && l.rows[!side] && (a->src[0]->ne[1] != l.rows[!side]->src[0]->ne[1] || l.seal[0]->src[1] != l.seal[1]->src[1])) {
            return false;
        }
    }
    for (int n = 0; n < 3; ++n) {
        if (l.rot[n]) {
            const int i = kvarn_index(graph, l.rot[n], start, l.prep);
            if (i < 0 || !kvarn_is_noop(graph->nodes[i + 1])) {
                return false; // what PREP reads is not there yet
            }
        }
    }
    return true;
}

static bool kvarn_is_part(const kvarn_layer & l, const ggml_tensor * t) {
    return t == l.rot[0] || t == l.rot[1] || t == l.rot[2] || t == l.rows[0] || t == l.rows[1];
}

// nothing that is computed between a rotation's place and PREP writes over what the rotation reads
static bool kvarn_is_kept(const ggml_cgraph * graph, const kvarn_layer & l) {
    for (int n = 0; n < 3; ++n) {
        if (!l.rot[n]) {
            continue;
        }
        for (int i = kvarn_index(graph, l.rot[n], l.start, l.prep) + 1; i < l.prep; ++i) {
            const ggml_tensor * t = graph->nodes[i];
            if (!kvarn_is_noop(t) && !kvarn_is_part(l, t) && kvarn_overlap(t, l.rot[n]->src[1])) {
                return false;
            }
        }
        // PREP's own output
        if (l.rot[2] && n != 2 && kvarn_overlap(l.rot[2], l.rot[n]->src[1])) {
            return false;
        }
    }
    return !l.rot[2] || !kvarn_overlap(l.rot[2], l.rot[2]->src[1]);
}

static kvarn_prep_args kvarn_prep_args_of(const kvarn_layer & l) {
    kvarn_prep_args a = {};
    for (int side = 0; side < 2; ++side) {
        if (!l.seal[side]) {
            continue;
        }
        const kvarn_shape shape = ggml_kvarn_get_shape(l.seal[side]);
        kvarn_prep_side & s = a.side[side];
        s.bits  = shape.bits;
        s.D     = shape.D;
        s.n_rot = l.rot[side]->ne[0];
        s.cur   = (const float *) l.rot[side]->src[1]->data;
        s.rows  = (const int64_t *) l.rows[side]->src[1]->data;
        s.tail  = (half *) l.rows[side]->data;
        s.tiles = (uint8_t *) l.seal[side]->data;
        a.H        = shape.H;
        a.n_tokens = l.rows[side]->src[0]->ne[1];
        a.list     = (const int64_t *) l.seal[side]->src[1]->data + shape.n_rows;
        a.n_list   = shape.n_seal;
    }
    if (l.rot[2]) {
        a.q      = (const float *) l.rot[2]->src[1]->data;
        a.q_out  = (float *) l.rot[2]->data;
        a.q_size = a.q_rot = l.rot[2]->ne[0];
        a.n_q    = ggml_nelements(l.rot[2])/a.q_size;
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

// Runs PREP, and ATTN if it comes next; with REDUCE and the rotation back if ATTN does them. Returns the last node that is done.
static int kvarn_run_layer(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, const kvarn_layer & l) {
    const kvarn_prep_args prep = kvarn_prep_args_of(l);
    CUDA_CHECK(kvarn_prep(prep, ctx.stream()));
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
        ggml_cuda_kvarn_attn(ctx, l.attn, prep.list, prep.n_list, nullptr, nullptr);
        return i;
    }
    const int back = kvarn_find_back(graph, i + 1), last = back < 0 ? i + 1 : back;
    ggml_tensor * out = graph->nodes[last];
    for (const ggml_tensor * src : l.attn->src) {
        out = out && src && kvarn_overlap(out, src) ? nullptr : out; // one block writes while another still reads
    }
    return ggml_cuda_kvarn_attn(ctx, l.attn, prep.list, prep.n_list, reduce->src[1], out) ? last : i;
}

void ggml_cuda_kvarn_keep(ggml_cgraph * graph, kvarn_keep_t keep, void * data) {
    for (int i = 0; i < graph->n_nodes; ++i) {
        ggml_tensor * t = graph->nodes[i];
        kvarn_layer l;
        if (kvarn_is_op(t, KVARN_OP_ATTN) && kvarn_find_layer(graph, i, l)) {
            for (ggml_tensor * rot : l.rot) {
                if (rot) {
                    keep(data, rot->src[1], graph->nodes[l.prep]);
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
    if (t->op != GGML_OP_SET_ROWS && !kvarn_is_rotation(t)) {
        return 0;
    }
    int i_attn = i;
    while (i_attn < graph->n_nodes && i_attn < i + NODES_MAX && graph->nodes[i_attn]->op != GGML_OP_KVARN) {
        i_attn++;
    }
    while (i_attn < graph->n_nodes && i_attn < i + NODES_MAX && !kvarn_is_op(graph->nodes[i_attn], KVARN_OP_ATTN)) {
        i_attn++;
    }
    kvarn_layer l;
    if (i_attn >= graph->n_nodes || !kvarn_is_op(graph->nodes[i_attn], KVARN_OP_ATTN) || !kvarn_find_layer(graph, i_attn, l) ||
        !kvarn_is_part(l, t) || !kvarn_is_kept(graph, l)) {
        return 0;
    }
    if (i == l.prep) {
        return kvarn_run_layer(ctx, graph, l) - i;
    }
    return 1; // a rotation and the view of it, or SET_ROWS and its SEAL
}

#endif
