"""blockwise.py - a llama-architecture GGUF decoded in blocks of 128 tokens through a quantized cache, with numpy or cupy.

    exact = Blockwise("model.gguf").run(tokens)                            # tokens int [B, T]
    other = Blockwise("model.gguf").run(tokens, keys=Recipe(4), values=Recipe(2), like=exact)

Each block attends to all earlier blocks through the cache and to itself exactly; then its keys and values are quantized. So
errors pile up over layers and positions as they do in a decode, and every type has the same exact tail, 0 to 127 tokens or more.
Weights and sums are f32.

SPDX-License-Identifier: MIT
"""

from dataclasses import dataclass, field

import gguf
import numpy as np
from recipes import Recipe, quantize, xp

BLOCK = 128


def _shifted_exp(s, most):
    return xp.exp(s - most)


shifted_exp = xp.fuse(_shifted_exp) if hasattr(xp, "fuse") else _shifted_exp


@dataclass
class Outcome:
    logits: "xp.ndarray"                              # f32 [B, T, vocabulary]
    attention: list = field(default_factory=list)     # per block: f16 [layers, probed sequences, BLOCK, heads*D]
    error: dict = field(default_factory=dict)         # "k", "v": [squared error, squared sum] over all tiles
    drift: list = field(default_factory=list)         # per block: relative squared error of the attention output, [probed]


class Blockwise:
    def __init__(self, path):
        reader = gguf.GGUFReader(str(path))
        arch = reader.fields["general.architecture"].contents()
        if arch != "llama":
            raise ValueError(f"{path} is of architecture {arch}: the block-wise model knows llama only")
        self.w = {t.name.removesuffix(".weight"): xp.asarray(gguf.dequantize(t.data, t.tensor_type).astype(np.float32))
                  for t in reader.tensors}

        def meta(key, default=None):
            entry = reader.fields.get(f"llama.{key}")
            return entry.contents() if entry else default

        self.n_layer = meta("block_count")
        self.H = meta("attention.head_count_kv")
        self.heads = meta("attention.head_count")
        self.D = meta("attention.key_length", meta("embedding_length")//self.heads)
        self.eps = meta("attention.layer_norm_rms_epsilon")
        base = meta("rope.freq_base", 10000.0)
        self.freq = base**(-np.arange(0, self.D, 2)/self.D)
        self.hadamard = self._hadamard(self.D)

    @staticmethod
    def _hadamard(D):
        """The largest power of two that divides D, repeated along the diagonal."""
        n = D & -D
        H = np.ones((1, 1))
        while len(H) < n:
            H = np.block([[H, H], [H, -H]])
        return xp.asarray(np.kron(np.eye(D//n), H/np.sqrt(n)).astype(np.float32))

    def _norm(self, x, name):
        return x*(1/xp.sqrt((x*x).mean(-1, keepdims=True) + self.eps))*self.w[name]

    def _rope(self, x, cos, sin):
        out = xp.empty_like(x)
        a, b = x[..., ::2], x[..., 1::2]
        out[..., ::2] = a*cos - b*sin
        out[..., 1::2] = a*sin + b*cos
        return out

    def run(self, tokens, keys=Recipe(16, "exact"), values=Recipe(16, "exact"), sink=0, tail=0, like=None, probe=()) -> Outcome:
        """tokens int [B, T], T a multiple of 128.

        probe: sequences whose attention outputs are kept, or compared with those of like.
        """
        B, T = tokens.shape
        tokens, probe = xp.asarray(tokens), list(probe)
        D, H, group = self.D, self.H, self.heads//self.H
        shape = (self.n_layer, B, H, T, D)
        K, V = xp.empty(shape, xp.float32), xp.empty(shape, xp.float32)
        turn = {side: self.hadamard if r.rotated else None for side, r in (("k", keys), ("v", values))}
        error = {"k": np.zeros(2), "v": np.zeros(2)}
        out = Outcome(xp.empty((B, T, self.w["output"].shape[0]), xp.float32), error=error)
        angle = np.arange(T)[:, None]*self.freq
        cos, sin = xp.asarray(np.cos(angle).astype(np.float32)), xp.asarray(np.sin(angle).astype(np.float32))
        causal = xp.asarray(np.where(np.arange(BLOCK)[None, :] > np.arange(BLOCK)[:, None], -np.inf, 0).astype(np.float32))
        step = max(BLOCK, keys.G, values.G)
        for start in range(0, T, BLOCK):
            end = start + BLOCK
            x = self.w["token_embd"][tokens[:, start:end]]
            kept = []
            for layer in range(self.n_layer):
                b = f"blk.{layer}."
                h = self._norm(x, b + "attn_norm")
                q, k, v = (h @ self.w[b + name].T for name in ("attn_q", "attn_k", "attn_v"))
                q = self._rope(q.reshape(B, BLOCK, H, group, D).transpose(0, 2, 3, 1, 4), cos[start:end], sin[start:end])
                k = self._rope(k.reshape(B, BLOCK, H, D).transpose(0, 2, 1, 3), cos[start:end], sin[start:end])
                v = v.reshape(B, BLOCK, H, D).transpose(0, 2, 1, 3)
                if turn["k"] is not None:
                    q, k = q @ turn["k"], k @ turn["k"]
                if turn["v"] is not None:
                    v = v @ turn["v"]
                K[layer, :, :, start:end], V[layer, :, :, start:end] = k, v
                q *= np.float32(D**-0.5)
                s = (q.reshape(B, H, group*BLOCK, D) @ K[layer, :, :, :end].swapaxes(-1, -2)).reshape(B, H, group, BLOCK, end)
                s[..., start:end] += causal
                p = shifted_exp(s, s.max(-1, keepdims=True)).reshape(B, H, group*BLOCK, end)
                o = (p @ V[layer, :, :, :end]/p.sum(-1, keepdims=True)).reshape(B, H, group, BLOCK, D)
                if turn["v"] is not None:
                    o = o @ turn["v"]
                o = o.transpose(0, 3, 1, 2, 4).reshape(B, BLOCK, -1)
                kept.append(o[probe])
                x = x + o @ self.w[b + "attn_output"].T
                h = self._norm(x, b + "ffn_norm")
                gate = h @ self.w[b + "ffn_gate"].T
                x = x + (gate/(1 + xp.exp(-gate))*(h @ self.w[b + "ffn_up"].T)) @ self.w[b + "ffn_down"].T
            out.logits[:, start:end] = self._norm(x, "output_norm") @ self.w["output"].T
            self._compare(out, xp.stack(kept), start//BLOCK, like)
            if end % step == 0:
                self._quantize(K, V, end - step - tail, end - tail, keys, values, sink, error)
        return out

    @staticmethod
    def _compare(out, attention, block, like):
        if like is None:
            out.attention.append(attention.astype(xp.float16))
        else:
            other = like.attention[block].astype(xp.float32)
            out.drift.append(((attention - other)**2).sum((0, 2, 3))/(other**2).sum((0, 2, 3)))

    def _quantize(self, K, V, lo, hi, keys, values, sink, error):
        if lo < 0:
            return
        for side, cache, r in (("k", K, keys), ("v", V, values)):
            if r.kind == "exact":
                continue
            first = max(lo, min(sink, hi)) if lo < sink else lo
            x = cache[:, :, :, lo:hi]
            y = quantize(x.reshape(-1, hi - lo, self.D), r, side).reshape(x.shape)
            error[side] += float(((y - x)**2).sum()), float((x**2).sum())
            cache[:, :, :, first:hi] = y[:, :, :, first - lo:]
