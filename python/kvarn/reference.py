"""The KVarN tile in numpy: what is stored, how it is chosen, and the paper's recipe to compare with.

This is the second, independent definition of the format; the first is ggml-kvarn/kvarn-ref.c. Both must give the same bytes, so
seal() computes in float32 and adds in a fixed order. It imports numpy only.

Notation: x [128, D] one tile, t token, d channel, b bits, L = 2^b - 1 the largest code, h = L/2.

    (1)  x[t,d] ~ (code[t,d]*scale[d] + zero[d])*token[t]        code 0 .. L; scale, zero, token are f16

seal() chooses them in these steps; y is x in units of its own root mean square, tok the token scales so far:

    (2)  y = x/rms,  rms = sqrt(mean x^2)
    (3)  tok[t] = std_d y[t,:],  c[d] = std_t y[:,d]/tok,  tok[t] = std_d y[t,:]/c         each at least 2^-10
    (4)  code = round(clip((y/tok - mid)/scale + h, 0, L)),  mid = zero + h*scale
    (5)  scale, mid = argmin sum_t (y - tok*((code - h)*scale + mid))^2                     for each channel
    (6)  tok[t] = argmin sum_d (y - tok*v)^2 = y.v/v.v,  v[d] = (code - h)*scale + mid
    (7)  keys: scale = var(y)/cov(y, c),  values: scale = sqrt(var(y)/var(c)),  c = tok*(code - h), for each channel
    (8)  keys: token = y.y/y.v,  values: token = |y|/|v|,  v[d] = code*scale + zero

Scale and mid begin with a share of [min, max] of y/tok; then (4), (6), (5) four times; (4) and (6) once more give the codes;
scale and zero for them follow from (7), become f16, and (8) is for exactly these. Least squares makes channels and rows smaller
than the true ones by the share of the noise, and what is rare in a channel loses most: the token a query looks for has its score
lowered against all others. So (7) and (8) give it back: keys are right along themselves, values keep their size.

SPDX-License-Identifier: MIT
"""

import numpy as np

Array = np.ndarray

G = 128  # tokens per tile
F32 = np.float32

X_MAX = F32(65504.0)  # largest finite f16
RMS_MIN = F32(2.0**-40)  # a tile below this is all zero
STD_MIN = F32(2.0**-10)  # floor of the scales of (3)
TINY = F32(2.0**-60)  # steps and token scales below this count as 0
FIT_MIN = F32(1e-5)  # share of its second moment below which a variance is rounding noise
AGREE = F32(2.0)  # (7) and (8) only where cos^2 of y and its codes is at least 1/2, else (5) and (6)
RANGE = {2: 0.64, 3: 0.80, 4: 0.92}  # share of [min, max] to begin with
ROUNDS = 4  # of (4), (6), (5)

PAPER_LOG_SCALE = (-0.3, 10.0)  # clamp of a log scale
PAPER_STD = (1e-3, 1e3)  # clamp of one std


# --- bytes ---


def tile_size(D: int, bits: int) -> int:
    """Bytes of one tile: codes, scale[D], zero[D], token[128]."""
    return D * G * bits // 8 + 4 * D + 2 * G


def code_bit(bits: int, F: int, r: "Array | int", f: "Array | int", i: "Array | int") -> Array:
    """Bit offset of bit i (0 = lowest) of the code of contracted index r and free index f. Integers or integer arrays.

    keys: r = channel, f = token, F = 128; values: r = token, f = channel, F = D.
    Four r make the bytes of a word, X words make a row, the fields of a byte lie X words apart in f.
    """
    r, f, i = np.broadcast_arrays(r, f, i)
    row, byte = r // 4, r % 4
    if bits in (2, 4):
        X = F * bits // 8
        return 32 * (row * X + f % X) + 8 * byte + bits * (f // X) + i
    X = F // 8
    slot = f // X
    # (plane, bit) of bits 0, 1, 2 of the code in each slot: two slots to a plane, the last two in the planes' top bits
    place = np.array(
        [[(0, 0), (0, 1), (0, 2)], [(0, 3), (0, 4), (0, 5)], [(1, 0), (1, 1), (1, 2)], [(1, 3), (1, 4), (1, 5)]]
        + [[(2, 0), (2, 1), (2, 2)], [(2, 3), (2, 4), (2, 5)], [(1, 7), (0, 6), (0, 7)], [(2, 6), (2, 7), (1, 6)]]
    )
    plane, bit = place[slot, i, 0], place[slot, i, 1]
    return 32 * ((3 * row + plane) * X + f % X) + 8 * byte + bit


def _code_bits(side: str, bits: int, D: int) -> Array:
    """Bit offsets of all codes: int [128, D, bits]."""
    t, d, i = np.ogrid[:G, :D, :bits]
    return code_bit(bits, G, d, t, i) if side == "k" else code_bit(bits, D, t, d, i)


def pack(code: Array, scale: Array, zero: Array, token: Array, side: str, bits: int) -> Array:
    """code int [128, D], scale and zero f16 [D], token f16 [128] -> the tile, uint8 [tile_size]."""
    D = code.shape[1]
    stream = np.zeros(D * G * bits, np.uint8)
    stream[_code_bits(side, bits, D)] = code[:, :, None] >> np.arange(bits) & 1
    meta = np.concatenate([scale, zero, token]).astype("<f2")
    return np.concatenate([np.packbits(stream, bitorder="little"), meta.view(np.uint8)])


def unpack(tile: Array, side: str, bits: int, D: int) -> "tuple[Array, Array, Array, Array]":
    """The tile, uint8 [tile_size] -> code int [128, D], scale and zero f16 [D], token f16 [128]."""
    n = D * G * bits // 8
    stream = np.unpackbits(np.asarray(tile[:n]), bitorder="little").astype(int)
    code = (stream[_code_bits(side, bits, D)] << np.arange(bits)).sum(axis=2)
    meta = np.asarray(tile[n:]).view("<f2").astype(np.float16)
    return code, meta[:D], meta[D : 2 * D], meta[2 * D :]


def unseal(tile: Array, side: str, bits: int, D: int) -> Array:
    """(1): the tile, uint8 [tile_size] -> x, f32 [128, D]."""
    code, scale, zero, token = (a.astype(F32) for a in unpack(tile, side, bits, D))
    return (code * scale + zero) * token[:, None]


# --- sums in the fixed order ---


def _over_tokens(a: Array) -> Array:
    """Sum of f32 [128, ..] over t = 0, 1, .. 127, one after the other (cumsum does that, sum need not)."""
    return np.cumsum(a, axis=0, dtype=F32)[-1]


def _over_channels(a: Array) -> Array:
    """Sum of f32 [.., D] over d: 16 lanes, lane j adds d = j, j + 16, ..; then the upper half of the lanes onto the lower."""
    lanes = np.cumsum(a.reshape(*a.shape[:-1], -1, 16), axis=-2, dtype=F32)[..., -1, :]
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., 0]


def _std(total: Array, total2: Array, n: int) -> Array:
    """Sample standard deviation from the sum and the sum of squares of n values, at least STD_MIN."""
    var = (total2 - total * (total / F32(n))) / F32(n - 1)
    return np.maximum(np.sqrt(np.maximum(var, F32(0))), STD_MIN)


def _reciprocal(a: Array) -> Array:
    """1/a, and 0 where a is (nearly) 0."""
    return np.divide(F32(1), a, out=np.zeros_like(a), where=a > TINY)


def _f16(a: Array) -> Array:
    """Nearest f16 as f32, saturated."""
    return np.clip(a, -X_MAX, X_MAX).astype(np.float16).astype(F32)


# --- seal ---


def _normalize(y: Array) -> Array:
    """(3): y f32 [128, D] -> tok f32 [128]."""
    D = y.shape[1]
    mean = _over_tokens(y * F32(1.0 / G))
    tok = _std(_over_channels(y), _over_channels(y * y), D)
    v = y * (F32(1) / tok)[:, None] - mean  # about the mean: keeps the squares small
    c = _std(_over_tokens(v), _over_tokens(v * v), G)
    v = y * (F32(1) / c)
    return _std(_over_channels(v), _over_channels(v * v), D)


def _codes(y: Array, tok: Array, scale: Array, mid: Array, L: np.float32) -> Array:
    """(4): f32 [128, D], whole numbers 0 .. L; scale 0 has code 0."""
    inv = _reciprocal(scale)
    off = np.where(inv > 0, F32(0.5) * L - mid * inv, F32(0))
    return np.rint(np.clip(y * _reciprocal(tok)[:, None] * inv + off, F32(0), L))


class _Fit:
    """Sums over the tokens for q = code - h, f32 [D] each (ww: one number)."""

    def __init__(self, y: Array, tok: Array, q: Array):
        w = tok[:, None]
        c = q * w
        self.cc, self.cw, self.cy, self.wy = (_over_tokens(a) for a in (c * c, c * w, c * y, w * y))
        ww = _over_tokens(tok * tok)
        self.ww = ww if ww > 0 else F32(1)
        m = self.cw / self.ww
        self.cov = self.cy - m * self.wy
        self.var = self.cc - m * self.cw

    def scale(self) -> Array:
        """(5)"""
        ok = (self.cov > 0) & (self.var > FIT_MIN * self.cc)
        return np.divide(self.cov, self.var, out=np.zeros_like(self.cov), where=ok)

    def mid(self, scale: Array) -> Array:
        """(5) for a given scale."""
        return (self.wy - scale * self.cw) / self.ww

    def restored(self, y: Array, tok: Array, mid: Array, side: str) -> Array:
        """(7)"""
        u = y - tok[:, None] * mid
        b = self.wy - mid * self.ww
        own = _over_tokens(u * u) - b * (b / self.ww)
        scale = self.scale()
        ok = (scale > 0) & (AGREE * self.cov * self.cov >= own * self.var)
        if side == "k":
            return np.divide(own, self.cov, out=scale, where=ok)
        return np.where(ok, np.sqrt(np.divide(own, self.var, out=np.zeros_like(own), where=ok)), scale)


def _least_squares(y: Array, v: Array) -> "tuple[Array, Array, Array]":
    """(6): y, v f32 [128, D] -> y.v, v.v and their ratio (0 where y.v <= 0), f32 [128] each."""
    yv, vv = _over_channels(y * v), _over_channels(v * v)
    return yv, vv, np.divide(yv, vv, out=np.zeros_like(yv), where=(yv > 0) & (vv > 0))


def _walk(y: Array, tok: Array, scale: Array, mid: Array, L: np.float32) -> "tuple[Array, _Fit]":
    """(4) and (6): the token scales for the codes, and the sums for both."""
    q = _codes(y, tok, scale, mid, L) - F32(0.5) * L
    tok = np.minimum(_least_squares(y, q * scale + mid)[2], X_MAX)
    return tok, _Fit(y, tok, q)


def seal(x: Array, side: str, bits: int) -> Array:
    """x f32 [128, D], rotated; side "k" or "v" -> the tile, uint8 [tile_size]. NaN counts as 0, values are clamped to +-65504."""
    x = np.asarray(x, F32)
    D = x.shape[1]
    L = F32(2**bits - 1)
    h = F32(0.5) * L

    y = np.clip(np.where(np.isnan(x), F32(0), x), -X_MAX, X_MAX)
    rms = np.sqrt(_over_channels(_over_tokens(y * y)) / F32(G * D))
    if not rms >= RMS_MIN:
        return np.zeros(tile_size(D, bits), np.uint8)
    y = y * (F32(1) / rms)
    tok = _normalize(y)

    v = y * _reciprocal(tok)[:, None]
    lo, hi = v.min(axis=0), v.max(axis=0)
    scale, mid = (hi - lo) * (F32(RANGE[bits]) / L), (hi + lo) * F32(0.5)
    for _ in range(ROUNDS):
        tok, fit = _walk(y, tok, scale, mid, L)
        scale = fit.scale()
        mid = fit.mid(scale)
    tok, fit = _walk(y, tok, scale, mid, L)
    stored = fit.restored(y, tok, mid, side)

    # a power of two moves from token to scale and zero, so that token is 1 at most, unless scale or zero would leave f16
    f = F32(2.0 ** int(np.frexp(tok.max())[1]))
    largest = np.maximum(stored, abs(fit.mid(stored) - h * stored)).max()
    while largest * rms * f > X_MAX:
        f = f * F32(0.5)
    unit = rms * f
    stored = _f16(stored * unit)
    zero = _f16(fit.mid(stored / unit) * unit - h * stored)
    code = _codes(y, tok, scale, mid, L)

    yv, vv, token = _least_squares(y, code * stored + zero)
    yy = _over_channels(y * y)
    agree = (token > 0) & (AGREE * yv * yv >= yy * vv)
    if side == "k":
        token = np.divide(yy, yv, out=token, where=agree)
    else:
        token = np.where(agree, np.sqrt(np.divide(yy, vv, out=np.zeros_like(yy), where=agree)), token)
    token = token * rms
    f, largest = F32(1), np.maximum(stored, abs(zero)).max()
    while token.max() > f and F32(2) * f * largest <= X_MAX:
        f = f * F32(2)
    return pack(code.astype(int), _f16(stored * f), _f16(zero * f), _f16(token / f), side, bits)


# --- attention ---


def attend(q: Array, k: Array, v: Array, bits_k: int, bits_v: int, scale: float) -> Array:
    """Softmax attention in float64 over unsealed tiles: q [n_q, D], k and v uint8 [n_tiles, tile_size] -> float64 [n_q, D]."""
    D = q.shape[1]
    K = np.concatenate([unseal(tile, "k", bits_k, D) for tile in k]).astype(float)
    V = np.concatenate([unseal(tile, "v", bits_v, D) for tile in v]).astype(float)
    s = q.astype(float) @ K.T * scale
    p = np.exp(s - s.max(axis=1, keepdims=True))
    return p @ V / p.sum(axis=1, keepdims=True)


# --- rotation ---


def hadamard(n: int) -> Array:
    """The normalised Sylvester-Hadamard matrix, float64 [n, n]: orthonormal, symmetric, its own inverse. n is a power of two."""
    if n < 1 or n & (n - 1):
        raise ValueError(f"hadamard: {n} is not a power of two")
    H = np.ones((1, 1))
    while len(H) < n:
        H = np.block([[H, H], [H, -H]])
    return H / np.sqrt(n)


# --- the paper's recipe ---


def paper_quantize(x: Array, side: str, bits: int, iterations: int = 16) -> Array:
    """arXiv 2606.03458 as published, the baseline of every ablation: x [128, D], rotated -> dequantised, float64 [128, D].

    A tile X is [channels, tokens] for keys and [tokens, channels] for values. Both axes are balanced,
        (P1)  W = X/e^Lc/e^Lr,  Lc += ln std of each column of W,  then Lr likewise over rows; L clamped to [-0.3, 10]
        (P2)  imbalance = max std/min std over columns + the same over rows; the pair with the least, (0, 0) included, stays
    and each row is rounded between its minimum and maximum:
        (P3)  code = round((W - lo)/s),  s = (hi - lo)/(2^b - 1)
    Row scale and offset e^Lr*s, e^Lr*lo and the column scale e^Lc are stored as f16.
    """
    X = np.asarray(x, float).T if side == "k" else np.asarray(x, float)

    def imbalance(W: Array) -> float:
        return sum(s.max() / max(s.min(), 1e-8) for s in (W.std(axis=0, ddof=1), W.std(axis=1, ddof=1)))

    def step(log_scale: Array, std: Array) -> Array:
        return np.clip(log_scale + np.log(np.clip(std, *PAPER_STD)), *PAPER_LOG_SCALE)

    W, cols, rows = X, np.zeros(X.shape[1]), np.zeros(X.shape[0])
    best = imbalance(W), cols, rows
    for _ in range(iterations):
        cols = step(cols, W.std(axis=0, ddof=1))
        W = X / np.exp(cols) / np.exp(rows)[:, None]
        rows = step(rows, W.std(axis=1, ddof=1))
        W = X / np.exp(cols) / np.exp(rows)[:, None]
        if imbalance(W) <= best[0]:
            best = imbalance(W), cols, rows
    _, cols, rows = best
    W = X / np.exp(cols) / np.exp(rows)[:, None]
    lo, hi = W.min(axis=1), W.max(axis=1)
    s = np.maximum((hi - lo) / (2**bits - 1), 1e-10)
    code = np.clip(np.rint((W - lo[:, None]) / s[:, None]), 0, 2**bits - 1)
    stored = np.exp(rows) * s, np.exp(rows) * lo, np.exp(cols)
    row_scale, row_zero, col_scale = (a.astype(np.float16).astype(float) for a in stored)
    out = (code * row_scale[:, None] + row_zero[:, None]) * col_scale
    return out.T if side == "k" else out
