"""recipes.py - every way to quantize a tile that the ablation compares, on whole batches of tiles, with numpy or cupy.

A recipe turns X [n, G, D] (n tiles of G tokens x D channels of one head) into what attention would read back, same shape.
The shipping encoder is Recipe(bits): a test compares it with the C code. The others differ from it in one field each, or are
the published method (paper) and llama.cpp's block formats (q4_0, q8_0).

Notation as in kvarn.reference: y tile/rms, tok token scales, code 0 .. L, mid = value of the middle code.

SPDX-License-Identifier: MIT
"""

from dataclasses import dataclass

import numpy as np

try:
    import cupy as xp
except ImportError:
    xp = np

SHARE = {2: 0.64, 3: 0.80, 4: 0.92}
THREE = {2: (0.80, 0.68, 0.55), 3: (0.90, 0.78, 0.65), 4: (1.00, 0.92, 0.82)}
SWEEP = tuple(float(s) for s in np.linspace(1.0, 0.4, 13))


@dataclass(frozen=True)
class Recipe:
    """How one side, keys or values, is quantized."""

    bits: int
    kind: str = "kvarn"       # kvarn, paper, q4_0, q8_0, exact
    rotate: bool = True
    normalize: str = "both"   # both, token, none; a channel's own std is lost in its scale and zero, so there is no "channel"
    iterations: int = 1       # of the normalization; paper: 16
    search: str = "share"     # ranges tried per channel: minmax, share of it, best of three, best of thirteen
    rounds: int = 4           # of alternating least squares
    channel: str = ""         # stored scales: least (squares), unbiased, spread; "" = unbiased for keys, spread for values
    token: str = ""           # none, least, unbiased, length; "" = unbiased for keys, length for values
    axis: str = "channel"     # what scale and zero belong to; paper: "token" for values
    weighted: bool = True     # least squares over what the tile holds; else over rows divided by their token scale
    G: int = 128
    meta: str = "f16"         # f16; e8 = scale and zero with 8 bits (5 exponent, 3 mantissa)
    centre: bool = False      # store mid instead of the value of code 0

    @property
    def rotated(self) -> bool:
        return self.rotate and self.kind != "exact"

    def bits_per_value(self, D: int) -> float:
        if self.kind == "exact":
            return 16.0
        if self.kind in ("q4_0", "q8_0"):
            return self.bits + 0.5
        meta = 8 if self.meta == "e8" else 16
        n_own, n_cross = (D, self.G) if self.axis == "channel" else (self.G, D)
        return self.bits + (2*meta*n_own + 16*n_cross)/(D*self.G)


def f16(a):
    return a.clip(-65504, 65504).astype(xp.float16).astype(xp.float32)


def few_bits(a):
    """To 3 mantissa bits, exponents as f16 has them."""
    mantissa, exponent = xp.frexp(a)
    return xp.ldexp(xp.rint(mantissa*16)/16, exponent)


def std(a, axis):
    return xp.maximum(a.std(axis=axis, ddof=1, keepdims=True), 2.0**-10)


def ratio(a, b):
    """a/b, 0 where either is not positive."""
    ok = (a > 0) & (b > 0)
    return xp.where(ok, a/xp.where(ok, b, 1), 0)


def token_scales(y, normalize, iterations):
    """Scales of the tokens from alternating normalization of both axes; y [n, G, D] -> [n, G, 1]."""
    if normalize == "none":
        return xp.ones_like(y[:, :, :1])
    tok = std(y, 2)
    for _ in range(iterations if normalize == "both" else 0):
        tok = std(y/std(y/tok, 1), 2)
    return tok


def codes(y, tok, scale, mid, L):
    ok = (tok > 0) & (scale > 0)
    return xp.where(ok, xp.rint(((y/xp.where(tok > 0, tok, 1) - mid)/xp.where(scale > 0, scale, 1) + L/2).clip(0, L)), 0)


def fit(y, tok, q, weighted=True):
    """Least squares over tokens for q = code - L/2: scale, mid [n, 1, D] and what the scale takes off the squared error."""
    if not weighted:
        y, tok = y/xp.where(tok > 0, tok, 1), (tok > 0).astype(y.dtype)
    c = q*tok
    cc, cw, cy, wy = (a.sum(1, keepdims=True) for a in (c*c, c*tok, c*y, tok*y))
    ww = (tok*tok).sum(1, keepdims=True)
    m = cw/xp.where(ww > 0, ww, 1)
    cov, var = cy - m*wy, cc - m*cw
    scale = xp.where((cov > 0) & (var > 1e-5*cc), cov/xp.where(var > 0, var, 1), 0)
    return scale, (wy - scale*cw)/xp.where(ww > 0, ww, 1), cov*scale


def restored(y, tok, q, mid, how):
    """Scale and mid to store for the codes q + L/2: least squares, or what gives a channel back what that took from it."""
    c, u = q*tok, y - tok*mid
    cc, cw, cy, wy, uu = (a.sum(1, keepdims=True) for a in (c*c, c*tok, c*y, tok*y, u*u))
    ww = (tok*tok).sum(1, keepdims=True)
    m = cw/ww
    cov, var, own = cy - m*wy, cc - m*cw, uu - (wy - mid*ww)**2/ww
    scale = xp.where((cov > 0) & (var > 1e-5*cc), ratio(cov, var), 0)
    if how != "least":
        wanted = ratio(own, cov) if how == "unbiased" else xp.sqrt(ratio(own, var))
        scale = xp.where((scale > 0) & (2*cov*cov >= own*var), wanted, scale)
    return scale, (wy - scale*cw)/ww


def seal(x, r: Recipe, side: str):
    """The kvarn family: x [n, G, D] -> what is read back."""
    if r.axis == "token":
        x = x.transpose(0, 2, 1)
    L = 2**r.bits - 1
    rms = xp.sqrt((x*x).mean((1, 2), keepdims=True))
    y = x/xp.where(rms > 0, rms, 1)
    tok = token_scales(y, r.normalize, r.iterations)
    v = y/tok
    lo, hi = v.min(1, keepdims=True), v.max(1, keepdims=True)
    scale, mid = (hi - lo)*((SHARE[r.bits] if r.search == "share" else 1)/L), (hi + lo)/2
    if r.search in ("three", "thirteen"):
        best = xp.full_like(lo, -1)
        for share in THREE[r.bits] if r.search == "three" else SWEEP:
            q = codes(y, tok, (hi - lo)*(share/L), (hi + lo)/2, L) - L/2
            s, m, gain = fit(y, tok, q, r.weighted)
            better = gain > best
            best, scale, mid = xp.where(better, gain, best), xp.where(better, s, scale), xp.where(better, m, mid)
    for _ in range(r.rounds):
        q = codes(y, tok, scale, mid, L) - L/2
        v = q*scale + mid
        tok = ratio((y*v).sum(2, keepdims=True), (v*v).sum(2, keepdims=True))
        scale, mid, _ = fit(y, tok, q, r.weighted)
    stored, inner = scale, mid
    if r.rounds:
        q = codes(y, tok, scale, mid, L) - L/2
        v = q*scale + mid
        tok = ratio((y*v).sum(2, keepdims=True), (v*v).sum(2, keepdims=True))
        stored, inner = restored(y, tok, q, mid, r.channel or ("unbiased" if side == "k" else "spread"))
    q = codes(y, tok, scale, mid, L)
    peak = xp.exp2(xp.ceil(xp.log2(xp.maximum(tok.max(1, keepdims=True), 1e-20))))*rms
    tok = tok/peak*rms
    store = few_bits if r.meta == "e8" else f16
    scale = store(stored*peak)
    zero = store(inner*peak) - L/2*scale if r.centre or r.meta == "e8" else store(inner*peak - L/2*scale)
    v = q*scale + zero
    return_axis = (lambda a: a.transpose(0, 2, 1)) if r.axis == "token" else (lambda a: a)
    refit = r.token or ("unbiased" if side == "k" else "length")
    if refit != "none":
        xv, vv, xx = ((a*b).sum(2, keepdims=True) for a, b in ((x, v), (v, v), (x, x)))
        least = ratio(xv, vv)
        agree = 2*xv*xv >= xx*vv
        unbiased, length = ratio(xx, xv), xp.sqrt(ratio(xx, vv))
        tok = least if refit == "least" else xp.where(agree & (xv > 0), unbiased if refit == "unbiased" else length, least)
    return return_axis(v*f16(tok))


def paper(x, r: Recipe, side: str):
    """arXiv 2606.03458 as published, equations (P1) to (P3) of kvarn.reference.paper_quantize, for a batch of tiles."""
    X = x.transpose(0, 2, 1) if side == "k" else x
    lowest, highest = -0.3, 10.0

    def imbalance(W):
        spreads = (W.std(axis, ddof=1, keepdims=True) for axis in (1, 2))
        return sum(s.max((1, 2))/xp.maximum(s.min((1, 2)), 1e-8) for s in spreads)

    def step(log_scale, s):
        return (log_scale + xp.log(s.clip(1e-3, 1e3))).clip(lowest, highest)

    cols, rows = xp.zeros_like(X[:, :1, :]), xp.zeros_like(X[:, :, :1])
    W, best = X, imbalance(X)
    best_cols, best_rows = cols, rows
    for _ in range(r.iterations):
        cols = step(cols, W.std(1, ddof=1, keepdims=True))
        W = X/xp.exp(cols)/xp.exp(rows)
        rows = step(rows, W.std(2, ddof=1, keepdims=True))
        W = X/xp.exp(cols)/xp.exp(rows)
        now = imbalance(W)
        better = (now <= best)[:, None, None]
        best_cols, best_rows = xp.where(better, cols, best_cols), xp.where(better, rows, best_rows)
        best = xp.minimum(best, now)
    W = X/xp.exp(best_cols)/xp.exp(best_rows)
    lo, hi = W.min(2, keepdims=True), W.max(2, keepdims=True)
    s = xp.maximum((hi - lo)/(2**r.bits - 1), 1e-10)
    code = xp.rint((W - lo)/s).clip(0, 2**r.bits - 1)
    out = (code*f16(xp.exp(best_rows)*s) + f16(xp.exp(best_rows)*lo))*f16(xp.exp(best_cols))
    return out.transpose(0, 2, 1) if side == "k" else out


def blocks_of_32(x, bits):
    """llama.cpp's q4_0 (scale = value of largest magnitude/-8) and q8_0 (scale = largest magnitude/127)."""
    b = x.reshape(*x.shape[:-1], -1, 32)
    at = xp.abs(b).argmax(-1)[..., None]
    if bits == 4:
        d = f16(xp.take_along_axis(b, at, -1)/-8)
        q = xp.floor(b/xp.where(d == 0, 1, d) + 8.5).clip(0, 15) - 8
    else:
        d = f16(xp.abs(xp.take_along_axis(b, at, -1))/127)
        q = xp.rint(b/xp.where(d == 0, 1, d))
    return (q*d).reshape(x.shape)


def quantize(x, r: Recipe, side: str):
    """x [n, tokens, D], rotated if the recipe wants it; tokens is a multiple of r.G."""
    if r.kind == "exact":
        return x
    if r.kind in ("q4_0", "q8_0"):
        return blocks_of_32(x, r.bits)
    n, tokens, D = x.shape
    tiles = x.reshape(n*tokens//r.G, r.G, D)
    return {"kvarn": seal, "paper": paper}[r.kind](tiles, r, side).reshape(x.shape)
