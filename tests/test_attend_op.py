"""test_attend_op.py - ATTN and REDUCE of GGML_OP_KVARN give softmax attention over the tokens that the plan and the mask name.

A cache of sealed, open and empty tiles is built in numpy and handed to ggml through ctypes. The output is compared with float64
attention over the unsealed tiles, and with flash attention on what GET returns: the two ways a layer can go.
SPDX-License-Identifier: MIT
"""

import ctypes
from dataclasses import dataclass

import numpy as np
import pytest

from kvarn import codec
from kvarn.library import lib_path, library_file, probe

G = 128
KEY, VALUE = 0, 1
SIDE = ("k", "v")
SEALED, EMPTY = -1, -2  # KVARN_MAP_*, ggml-kvarn/kvarn-graph.h
ROWS_MAX = 16  # query rows up to which a head's tiles are shared out in chunks
EXACT = 16  # KVARN_BITS_EXACT
GARBAGE = 3e4  # what stands in rows that hold no token

SETS = ("avx2", "avx2-fast", "avx512", "avx512-fast", "neon", "neon-fast", "dotprod", "dotprod-fast", "i8mm", "i8mm-fast")

# What is allowed: rms error over rms of the float64 output, over a whole case.
# Portable kernels compute in f32. The default ones round q*scale and p*token to 15 bits: less than a hundredth of the quantizer's
# own error. The fast mode rounds them to 8 bits: an error of q grows with the scores, one of p counts where attention is flat.
PORTABLE_ERROR = 1e-5
DEFAULT_ERROR = 5e-4
FAST_ERROR = 4e-2  # times the standard deviation of the scores where that is above 1
# Flash attention rounds q and GET's rows to f16 and sums its output in f16: an error that grows with the number of tokens.
FLASH_ERROR = 1e-2  # up to FLASH_TILES, then with their square root
FLASH_TILES = 16


@dataclass(frozen=True)
class Case:
    bits: tuple = (4, 2)  # keys, values; 0: an f16 cache
    D: tuple = (128, 128)
    H: int = 2  # KV heads
    gqa: int = 4
    rows: int = 2
    tiles: int = 9  # used per stream
    streams: tuple = (1, 0, 1)  # in the cache, first used, used
    mask: str = "causal"
    one_mask: bool = False  # all streams share it
    bias: float = 0.0
    softcap: float = 0.0
    sinks: bool = False
    data: str = "gaussian"
    sharp: float = 1.0  # standard deviation of the scores, about

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in vars(self).items())


# --- ggml ---


class InitParams(ctypes.Structure):
    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


class Shape(ctypes.Structure):
    """struct kvarn_shape"""

    _fields_ = [(name, ctypes.c_int32) for name in ("side", "bits", "D", "H", "n_rows", "n_seal", "n_tiles",
                                                       "is_late")]


P, I64, F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
FUNCTIONS = {  # name -> result, arguments
    "ggml_init": (P, InitParams),
    "ggml_free": (None, P),
    "ggml_new_tensor_4d": (P, P, ctypes.c_int, I64, I64, I64, I64),
    "ggml_view_4d": (P, P, P, I64, I64, I64, I64, *[ctypes.c_size_t] * 4),
    "ggml_permute": (P, P, P, *[ctypes.c_int] * 4),
    "ggml_get_data": (P, P),
    "ggml_nbytes": (ctypes.c_size_t, P),
    "ggml_flash_attn_ext": (P, P, P, P, P, P, F, F, F),
    "ggml_flash_attn_ext_add_sinks": (None, P, P),
    "ggml_kvarn_seal": (P, P, P, P, P, Shape),
    "ggml_kvarn_get": (P, P, P, P, P, Shape, I64, I64, I64),
    "ggml_kvarn_attn": (P, P, P, P, P, P, P, F, F, F),
    "ggml_new_graph": (P, P),
    "ggml_build_forward_expand": (None, P, P),
    "ggml_cpu_init": (None,),
    "ggml_graph_compute_with_ctx": (ctypes.c_int, P, P, ctypes.c_int),
}


class Ggml:
    """The functions above, and tensors that are filled from numpy arrays."""

    def __init__(self, folder):
        probe(folder)
        libraries = [ctypes.CDLL(str(library_file(folder, base))) for base in ("ggml-base", "ggml-cpu")]
        for name, (result, *arguments) in FUNCTIONS.items():
            function = next(getattr(lib, name) for lib in libraries if hasattr(lib, name))
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("ggml_"), function)
        find = libraries[1].kvarn_cpu_find
        find.restype = P
        self.sets = [name for name in SETS if find(name.encode())]  # kernels that this processor can run
        self.type_name = libraries[0].ggml_type_name
        self.type_name.restype = ctypes.c_char_p
        ids = {self.type_name(number): number for number in range(32)}
        self.types = {np.dtype(np_type): ids[name] for np_type, name in
                      ((np.float32, b"f32"), (np.float16, b"f16"), (np.uint8, b"i8"), (np.int64, b"i64"))}
        self.cpu_init()

    def tensor(self, ctx, a: np.ndarray):
        """A tensor with a's data; its dimensions are a's, the last one first."""
        t = self.new_tensor_4d(ctx, self.types[a.dtype], *a.shape[::-1], *[1] * (4 - a.ndim))
        self.array(t, a.dtype, a.shape)[...] = a
        return t

    def array(self, t, dtype, shape) -> np.ndarray:
        """A tensor's memory."""
        count = int(np.prod(shape)) * np.dtype(dtype).itemsize
        assert self.nbytes(t) == count
        return np.frombuffer((ctypes.c_char * count).from_address(self.get_data(t)), dtype).reshape(shape)


@pytest.fixture(scope="module")
def ggml():
    try:
        return Ggml(lib_path())
    except ImportError as error:
        pytest.skip(str(error))


# --- a cache ---


def numbers(rng, kind: str, shape, side: int) -> np.ndarray:
    """Tokens of one KV head, f16: shape [.., G, D]."""
    x = rng.standard_normal(shape)
    D = shape[-1]
    if kind == "planted":  # channels of different size and a mean, two outlier channels, two outlier tokens per tile
        x = x * np.exp(0.4 * rng.standard_normal(D)) + 0.5 * rng.standard_normal(D)
        x[..., rng.choice(D, 2, False)] *= 12
        x[..., rng.choice(G, 2, False), :] *= 4
    elif kind == "zero tiles":
        x[:, ::2] = 0
    elif kind == "largest codes":
        x[...] = 1
    elif kind == "zero":
        x[...] = 0
    elif kind == "tiny":
        x *= 1e-4
    elif kind == "huge":
        x = np.clip(x * 8e3, -6e4, 6e4)
    elif kind == "shared mean" and side == VALUE:
        x += 3 * rng.standard_normal(D)
    return x.astype(np.float16)


def ones(D: int, bits: int) -> np.ndarray:
    """A tile of ones in the largest codes: with equal p and q, the largest sums that the kernels' integers must hold."""
    meta = np.concatenate([np.full(D, 1 / (2**bits - 1)), np.zeros(D), np.ones(G)]).astype("<f2")
    return np.concatenate([np.full(D * G * bits // 8, 0xFF, np.uint8), meta.view(np.uint8)])


def slope(bias: float, head: int, n_head: int) -> float:
    """ALiBi: powers of two; heads beyond a power of two lie between the others."""
    n = 1 << (n_head.bit_length() - 1)
    return 2.0 ** (-bias * (head + 1) / n) if head < n else 2.0 ** (-bias / 2 * (2 * (head - n) + 1) / n)


def make_mask(rng, case: Case, is_token: np.ndarray) -> np.ndarray:
    """f16 [ns, rows, n_kv]: 0 or a distance where row r sees a token, -inf elsewhere."""
    ns, n_kv = is_token.shape
    is_seen = np.broadcast_to(is_token[:, None], (ns, case.rows, n_kv)).copy()
    position = rng.permuted(np.broadcast_to(np.arange(n_kv), (ns, n_kv)), axis=1)  # cells are in no order
    last = position.max() - case.rows + np.arange(case.rows)
    if case.mask != "all":
        is_seen &= position[:, None] <= last[:, None]
    if case.mask == "hidden tiles":
        hidden = np.repeat(rng.random((ns, case.rows, n_kv // G)) < 0.5, G, axis=2)
        hidden |= np.repeat(rng.random(n_kv // G) < 0.3, G)
        is_seen &= ~hidden
    if case.mask == "blind rows":
        is_seen[:, ::2] = False
    if case.mask == "window":
        is_seen &= position[:, None] > last[:, None] - G // 2
    if case.mask == "one token":
        is_seen &= is_seen.cumsum(axis=2) == rng.integers(1, is_seen.sum(axis=2, keepdims=True) + 1)
    distance = -np.abs(position[:, None] - last[:, None]) if case.bias else 0.0
    return np.where(is_seen, distance, -np.inf).astype(np.float16)


class Cache:
    """One layer: tile states, the plan, and for each side its memory and the tokens as attention shall see them."""

    N_ROWS, N_SEAL = 3, 2

    def __init__(self, rng, case: Case):
        self.case = case
        n_stream, self.s0, self.ns = case.streams
        self.n_tiles = case.tiles + 2  # some lie beyond what is read
        state = np.full((n_stream, self.n_tiles), SEALED)
        state[:, case.tiles // 2 :: 5] = EMPTY
        n_open = 0
        self.filled = np.where(state == SEALED, G, 0)
        for s in range(n_stream):
            for i in range(case.tiles - 1, max(-1, case.tiles - 6), -2):
                state[s, i] = n_open = n_open + 1
                self.filled[s, i] = rng.integers(1, G + 1)
        self.state, self.n_slots = state, n_open + 2  # the first one is nobody's, the last one is sealed
        # the first sealed tile is sealed by the graph itself, from the last slot; a pair of slot -1 does nothing
        sealed = np.argwhere(state[self.s0 :, : case.tiles] == SEALED)
        self.to_seal = (self.s0 + sealed[0][0], sealed[0][1]) if len(sealed) else None
        pairs = [-1, -1, -1, -1]
        if self.to_seal is not None:
            pairs[2:] = self.n_slots - 1, self.to_seal[0] * self.n_tiles + self.to_seal[1]
        self.plan = np.array([0] * self.N_ROWS + pairs + list(state.ravel()), np.int64)

        used = self.filled[self.s0 : self.s0 + self.ns, : case.tiles]
        self.is_token = (np.arange(G) < used[..., None]).reshape(self.ns, -1)
        if case.one_mask:
            self.is_token = np.broadcast_to(self.is_token.all(axis=0), self.is_token.shape)
        self.sides = [self._side(rng, side) for side in (KEY, VALUE)]

    def _side(self, rng, side: int):
        """memory (tiles, tail) or an f16 cache; seen: f64 [ns, H, n_kv, D]."""
        case, bits, D = self.case, self.case.bits[side], self.case.D[side]
        n_stream = len(self.state)
        x = numbers(rng, case.data, (n_stream, self.n_tiles, case.H, G, D), side)
        is_token = np.arange(G) < self.filled[..., None]  # [n_stream, n_tiles, G]
        x[~np.broadcast_to(is_token[:, :, None], x.shape[:-1])] = GARBAGE
        window = np.s_[self.s0 : self.s0 + self.ns, : case.tiles]
        if not bits:
            memory = np.ascontiguousarray(x.transpose(0, 1, 3, 2, 4)).reshape(n_stream, self.n_tiles * G, case.H, D)
            seen = x
        else:
            tiles = np.full((n_stream, self.n_tiles, case.H, codec.tile_bytes(D, bits)), 0xFF, np.uint8)  # f16 NaN
            tail = np.full((self.n_slots, G, case.H, D), GARBAGE, np.float16)
            seen = x.astype(np.float32)
            for s, i in np.ndindex(*self.state.shape):
                if self.state[s, i] == SEALED:
                    sealed = codec.seal(x[s, i].astype(np.float32), SIDE[side], bits)
                    if case.data == "largest codes" and (s, i) != self.to_seal:
                        sealed[:] = ones(D, bits)
                    seen[s, i] = codec.unseal(sealed, SIDE[side], bits)
                    if (s, i) == self.to_seal:
                        tail[-1] = x[s, i].transpose(1, 0, 2)
                    else:
                        tiles[s, i] = sealed
                elif self.state[s, i] != EMPTY:
                    tail[self.state[s, i]] = x[s, i].transpose(1, 0, 2)
            memory = tiles, tail
        seen = seen[window].astype(float).transpose(0, 2, 1, 3, 4)
        return memory, seen.reshape(self.ns, case.H, case.tiles * G, D)

    def node(self, ggml, ctx, plan, side: int):
        """What the graph of a layer has as k or v: a permuted view of GET, or of an f16 cache."""
        case, bits, D = self.case, self.case.bits[side], self.case.D[side]
        memory = self.sides[side][0]
        n_kv = case.tiles * G
        if bits:
            tiles, tail = memory
            tiles = ggml.tensor(ctx, tiles.reshape(*tiles.shape[:2], -1))
            tail = ggml.tensor(ctx, tail.reshape(-1, case.H * D))
            shape = Shape(side, bits, D, case.H, self.N_ROWS, self.N_SEAL, self.n_tiles)
            sealed = ggml.kvarn_seal(ctx, tiles, tail, plan, shape)
            t = ggml.kvarn_get(ctx, sealed, tail, plan, shape, n_kv, self.s0, self.ns)
        else:
            row, stream = 2 * D * case.H, 2 * D * case.H * self.n_tiles * G
            t = ggml.view_4d(ctx, ggml.tensor(ctx, memory), D, case.H, n_kv, self.ns, 2 * D, row, stream, self.s0 * stream)
        return ggml.permute(ctx, t, 0, 2, 1, 3)


def expected(cache: Cache, q, mask, sinks, scale: float) -> np.ndarray:
    """float64 [ns, rows, n_head, DV]"""
    case = cache.case
    ns, rows, n_head, _ = q.shape
    out = np.zeros((ns, rows, n_head, case.D[VALUE]))
    for s in range(ns):
        for head in range(n_head):
            K, V = (x[s, head // case.gqa] for _, x in cache.sides)
            score = q[s, :, head].astype(float) @ K.T * scale
            if case.softcap:
                score = case.softcap * np.tanh(score / case.softcap)
            score = score + (slope(case.bias, head, n_head) if case.bias else 1.0) * mask[s].astype(float)
            top = score.max(axis=1, keepdims=True)
            top = np.maximum(top, sinks[head]) if sinks is not None else np.where(np.isneginf(top), 0, top)
            p = np.exp(score - top)
            total = p.sum(axis=1, keepdims=True) + (np.exp(sinks[head] - top) if sinks is not None else 0)
            out[s, :, head] = np.divide(p @ V, total, out=np.zeros((rows, V.shape[1])), where=total > 0)
    return out


def error(out, want) -> float:
    return float(np.sqrt(np.mean((out - want) ** 2)) / max(np.sqrt(np.mean(want**2)), 1e-30))


def check(what: str, case: Case, out, want, limit: float) -> None:
    """Fails with the place of the largest error."""
    found = error(out, want) if np.isfinite(out).all() else np.inf
    if found <= limit:
        return
    bad = np.where(np.isfinite(out), np.abs(out - want), np.inf)
    at = np.unravel_index(bad.argmax(), bad.shape)
    s, row, head, d = at
    pytest.fail(f"{what}: rms error {found:.2e} of the output, allowed {limit:g}; worst at stream {s}, row {row}, head {head}, "
                f"channel {d}: {out[at]:.7g} instead of {want[at]:.7g}; {case}")


def run(ggml, monkeypatch, case: Case, seed: int = 0) -> dict:
    """Outputs of one case: default kernels, portable ones, flash attention, float64."""
    rng = np.random.default_rng(seed)
    cache = Cache(rng, case)
    n_head, (DK, DV) = case.H * case.gqa, case.D
    mask = make_mask(rng, case, cache.is_token)
    if case.one_mask:
        mask = np.broadcast_to(mask[:1], mask.shape)
    K = cache.sides[KEY][1]
    spread = np.sqrt(np.mean(K[np.broadcast_to(cache.is_token[:, None], K.shape[:-1])] ** 2))
    scale = case.sharp / np.sqrt(DK) / (spread if spread > 0 else 1)
    q = rng.standard_normal((cache.ns, case.rows, n_head, DK)).astype(np.float32)
    if case.data == "largest codes":
        q[...] = np.sign(q[..., :1])
    sinks = (np.log(case.tiles * G) + rng.uniform(-2, 2, n_head)).astype(np.float32) if case.sinks else None
    stored_mask = np.full((1 if case.one_mask else cache.ns, 1, case.rows + 1, mask.shape[2]), -np.inf, np.float16)  # a row more
    stored_mask[:, 0, : case.rows] = mask[: len(stored_mask)]

    arrays = [a for memory, _ in cache.sides for a in (memory if isinstance(memory, tuple) else (memory,))]
    gets = sum(seen.size for _, seen in cache.sides) * 2
    outputs = cache.ns * case.rows * n_head * (DV + 2) * 4  # at most 32 partial ones
    inputs = sum(a.nbytes for a in (*arrays, stored_mask, q))
    ctx = ggml.init(InitParams(inputs + gets + 40 * outputs + (16 << 20)))
    try:
        plan = ggml.tensor(ctx, cache.plan)
        tq = ggml.permute(ctx, ggml.tensor(ctx, q), 0, 2, 1, 3)
        tk, tv = (cache.node(ggml, ctx, plan, side) for side in (KEY, VALUE))
        tm = ggml.tensor(ctx, stored_mask)
        ts = ggml.tensor(ctx, sinks) if case.sinks else None
        settings = scale, case.bias, case.softcap
        attn = ggml.kvarn_attn(ctx, tq, tk, tv, tm, ts, *settings)
        assert attn, f"ggml_kvarn_attn does not apply: {case}"
        flash = ggml.flash_attn_ext(ctx, tq, tk, tv, tm, *settings)
        ggml.flash_attn_ext_add_sinks(flash, ts)

        def compute(node, n_threads) -> np.ndarray:
            graph = ggml.new_graph(ctx)
            ggml.build_forward_expand(graph, node)
            shown = ggml.array(node, np.float32, (cache.ns, case.rows, n_head, DV))
            shown[...] = np.nan
            assert ggml.graph_compute_with_ctx(ctx, graph, n_threads) == 0
            return shown.copy()

        outputs = {"default": compute(attn, 1), "two threads": compute(attn, 2), "flash": compute(flash, 2)}
        for name in ("portable", *ggml.sets):
            monkeypatch.setenv("KVARN_CPU", name)
            outputs[name] = compute(attn, 2)
        monkeypatch.delenv("KVARN_CPU")
    finally:
        ggml.free(ctx)
    outputs["float64"] = expected(cache, q, mask, sinks, scale)
    outputs["blind"] = np.isneginf(mask).all(axis=2)
    return outputs


def check_case(ggml, monkeypatch, case: Case, seed: int = 0) -> None:
    found = run(ggml, monkeypatch, case, seed)
    want, seeing = found["float64"], ~found["blind"]
    check("portable kernels", case, found["portable"], want, PORTABLE_ERROR)
    check("default kernels", case, found["default"], want, DEFAULT_ERROR)
    for name in ggml.sets:
        is_fast = name.endswith("fast")
        check(f"{name} kernels", case, found[name], want, FAST_ERROR * max(1, case.sharp) if is_fast else DEFAULT_ERROR)
    assert np.array_equal(found["default"], found["two threads"]), f"one and two threads differ: {case}"
    for name in ("default", "portable", *ggml.sets):
        assert not found[name][~seeing].any(), f"{name} kernels: a row that sees nothing is not 0: {case}"
    if case.data != "huge":  # the f16 sums of flash attention overflow there
        limit = FLASH_ERROR * max(1, case.tiles / FLASH_TILES) ** 0.5
        check("flash attention on GET", case, found["flash"], want, limit)


# --- what is covered ---

CASES = {
    "bits": [Case(bits=(k, v)) for k in (0, 2, 3, 4) for v in (0, 2, 3, 4) if k or v],
    "head size": [Case(bits=(2 + i % 3, 4 - i % 3), D=(D, D), H=1) for i, D in enumerate((16, 64, 80, 96, 112, 192, 256, 512))],
    "head sizes of keys and values": [
        Case(bits=bits, D=D, H=1) for D in ((192, 128), (64, 256)) for bits in ((3, 4), (0, 2), (2, 0))
    ],
    "query heads per KV head": [Case(bits=(3, 3), D=(64, 64), gqa=gqa, rows=1) for gqa in (1, 2, 3, 7, 8, 16)],
    "query rows": [Case(gqa=3, rows=rows) for rows in (1, 5, ROWS_MAX, ROWS_MAX + 1, 70)]
    + [Case(H=1, gqa=16, rows=ROWS_MAX, tiles=3), Case(bits=(0, 3), gqa=1, rows=131, tiles=3)]
    + [Case(H=1, gqa=70, rows=33, tiles=2)],
    "mask": [Case(mask=mask, rows=5, tiles=17, H=1) for mask in ("all", "hidden tiles", "blind rows", "window", "one token")],
    "bias": [Case(bias=8.0, gqa=gqa, H=H, D=(64, 64)) for gqa, H in ((1, 8), (1, 3), (3, 4), (7, 1))],
    "softcap": [Case(softcap=30.0, bits=(2, 3)), Case(softcap=2.0, sharp=4.0), Case(softcap=30.0, bits=(0, 3))],
    "sinks": [Case(sinks=True), Case(sinks=True, mask="blind rows"), Case(sinks=True, mask="hidden tiles", rows=ROWS_MAX, H=1)],
    "streams": [Case(streams=(3, 0, 3), H=1), Case(streams=(3, 1, 2)), Case(streams=(2, 1, 1), bits=(0, 2)),
                Case(streams=(3, 1, 2), bits=(2, 0)), Case(streams=(3, 0, 3), one_mask=True, H=1)],
    "tiles": [Case(tiles=n, H=1, gqa=2, D=(64, 64), rows=1 + n % 2) for n in (1, 2, 3, 4, 5, 33, 127, 129, 300)],
    "data": [Case(bits=bits, rows=5, data=data) for data in ("planted", "zero tiles", "zero", "tiny", "huge", "shared mean")
             for bits in ((2, 2), (3, 4))]
    + [Case(bits=(bits, bits), D=(D, D), data="largest codes", sharp=0.1, H=1) for bits in (2, 3, 4) for D in (64, 512)],
    "sharpness": [Case(bits=(3, 3), sharp=sharp) for sharp in (0.1, 2.0, 4.0, 16.0)],
    "everything": [Case(bits=(4, 2), D=(96, 80), gqa=3, rows=7, tiles=21, streams=(3, 1, 2), mask="hidden tiles", bias=8.0,
                        softcap=20.0, sinks=True, data="planted")],
}


@pytest.mark.parametrize(("axis", "i"), [(axis, i) for axis, cases in CASES.items() for i in range(len(cases))])
def test_attention(ggml, monkeypatch, axis, i):
    check_case(ggml, monkeypatch, CASES[axis][i])


@pytest.mark.parametrize("seed", range(12))
def test_attention_of_any_kind(ggml, monkeypatch, seed):
    pick = np.random.default_rng(100 + seed).choice
    bits = [(k, v) for k in (0, 2, 3, 4) for v in (0, 2, 3, 4) if k or v]
    case = Case(bits=tuple(pick(bits)), D=(16 * pick(12) + 16, 16 * pick(12) + 16), H=pick(3) + 1, gqa=pick(9) + 1,
                rows=pick(ROWS_MAX) + 1, tiles=pick(12) + 1, streams=((1, 0, 1), (3, 1, 2))[pick(2)],
                mask=pick(["all", "causal", "hidden tiles", "blind rows", "window"]), bias=pick([0.0, 8.0]),
                softcap=pick([0.0, 15.0]), sinks=bool(pick(2)), data=pick(["gaussian", "planted", "zero tiles"]),
                sharp=pick([0.5, 1.0, 3.0]))
    check_case(ggml, monkeypatch, case, seed)


@pytest.mark.parametrize(("why", "case"), [
    (None, Case()),
    ("no mask", Case(mask="")),
    (None, Case(rows=512)),
    ("no side has tiles", Case(bits=(0, 0))),
    ("exact tiles must give flash attention's bits", Case(bits=(EXACT, EXACT))),
    ("exact values must give flash attention's bits", Case(bits=(4, EXACT))),
])
def test_other_form_is_asked_for(ggml, why, case):
    """NULL, and so GET and flash attention."""
    ctx = ggml.init(InitParams(1 << 20, None, True))
    plan = ggml.new_tensor_4d(ctx, ggml.types[np.dtype(np.int64)], 2, 1, 1, 1)
    i8, f16, f32 = (ggml.types[np.dtype(name)] for name in ("uint8", "float16", "float32"))

    def view(side):
        bits, D, H = case.bits[side], case.D[side], case.H
        if not bits:
            return ggml.permute(ctx, ggml.new_tensor_4d(ctx, f16, D, H, G, 1), 0, 2, 1, 3)
        tiles = ggml.new_tensor_4d(ctx, i8, (D * G * bits // 8 + 4 * D + 2 * G) * H, 2, 1, 1)
        tail = ggml.new_tensor_4d(ctx, f16, D * H, G, 1, 1)
        return ggml.permute(ctx, ggml.kvarn_get(ctx, tiles, tail, plan, Shape(side, bits, D, H, 0, 0, 2), G, 0, 1), 0, 2, 1, 3)

    q = ggml.new_tensor_4d(ctx, f32, case.D[KEY], case.rows, case.H * case.gqa, 1)
    mask = ggml.new_tensor_4d(ctx, f16, G, case.rows, 1, 1) if case.mask else None
    found = ggml.kvarn_attn(ctx, q, view(KEY), view(VALUE), mask, None, 0.1, 0.0, 0.0)
    ggml.free(ctx)
    assert (found is None) == (why is not None)
