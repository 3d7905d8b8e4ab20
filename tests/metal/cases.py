"""cases.py - caches of sealed, open and empty tiles as jobs for the runner, and what the ops must give for them, in float64.

Whatever an op may not look at is NaN: tiles that are not sealed, slots that no tile names, rows that no query sees.
SPDX-License-Identifier: MIT
"""

from dataclasses import dataclass

import numpy as np

from kvarn import reference
from metal.harness import Job

G = 128
SEALED, EMPTY = -1, -2  # KVARN_MAP_*, ggml-kvarn/kvarn-graph.h
SIDE = ("k", "v")
GUARD = 3  # entries of the plan before the map, which ATTN must skip


@dataclass(frozen=True)
class Attn:
    bits: tuple = (4, 2)  # keys, values; 0: an f16 cache
    D: tuple = (128, 128)
    H: int = 2  # KV heads
    gqa: int = 4
    rows: int = 1
    tiles: int = 5  # used per stream
    parts: int = 2  # partial results that there is room for
    streams: tuple = (1, 0, 1)  # in the cache, first used, used
    mask: str = "causal"
    tiny: bool = False  # codes as f16 subnormals
    one_mask: bool = False  # all streams share it
    bias: float = 0.0
    softcap: float = 0.0
    sinks: bool = False
    sharp: float = 2.0  # standard deviation of the scores, about

    def __str__(self) -> str:
        return ",".join(f"{name}={value}".replace(" ", "") for name, value in vars(self).items())


def random_tile(rng, side: str, bits: int, D: int) -> np.ndarray:
    """Any codes, scales of both sides of 1, a zero that does not vanish, token scales down to 0."""
    code = rng.integers(0, 1 << bits, (G, D))
    scale = rng.uniform(0.1, 1.5, D) / (1 << bits) * 4
    token = rng.uniform(0.3, 1.0, G) * (rng.random(G) > 0.05)
    zero = -scale * ((1 << bits) - 1) / 2 * rng.uniform(0.7, 1.3, D)
    return reference.pack(code, scale.astype(np.float16), zero.astype(np.float16), token.astype(np.float16), side, bits)


def make_map(case: Attn, n_tiles: int, slots: int) -> np.ndarray:
    """Mostly sealed; the last used tile is open, and some are empty or open in the middle."""
    turns = [SEALED, SEALED, 1, SEALED, EMPTY, SEALED, SEALED, 0]
    plan = np.array([[turns[(i + 3 * s) % len(turns)] for i in range(n_tiles)] for s in range(case.streams[0])], np.int64)
    plan[:, case.tiles - 1] = np.arange(case.streams[0]) % 2 + slots - 2
    plan[:, case.tiles:] = EMPTY
    return plan


def make_mask(case: Attn, plan: np.ndarray, rng) -> np.ndarray:
    """f16 [streams, rows, tokens]; a row sees nothing of an empty tile."""
    first, used = case.streams[1:]
    n = case.tiles * G
    t, r = np.arange(n), np.arange(case.rows)[:, None]
    if case.mask == "causal":
        seen = t < n - G + 37 - case.rows + r
    elif case.mask == "window":
        seen = (t < n - 90 + r) & (t >= n - 230 + r)
    elif case.mask == "sparse":
        seen = rng.random((case.rows, n)) < 0.03
        seen[:, G:2 * G] = False
    elif case.mask == "nothing":
        seen = (t < n) & (r % 2 == 1)
    else:
        seen = (t >= 0) & (r >= 0)
    value = np.where(seen, -np.abs(t - n)[None] / 64 if case.bias else 0.0, -np.inf).astype(np.float16)
    masks = np.repeat(value[None], 1 if case.one_mask else used, 0)
    for s in range(used):
        where = np.repeat(plan[first + s, :case.tiles] == EMPTY, G)
        masks[s % len(masks)][:, where] = -np.inf
    return masks


def slopes(n_head: int, max_bias: float) -> np.ndarray:
    if max_bias <= 0:
        return np.ones(n_head)
    n = 1 << int(np.floor(np.log2(n_head)))
    head = np.arange(n_head)
    return np.where(head < n, 2.0 ** (-max_bias * (head + 1) / n), 2.0 ** (-max_bias / 2 * (2 * (head - n) + 1) / n))


def attn(case: Attn, seed: int = 0) -> "tuple[Job, dict]":
    """The job, and the arrays it must write: out float64 [streams, rows, heads, D_v]."""
    rng = np.random.default_rng(seed)
    total, first, used = case.streams
    n_head, n_tiles, slots = case.H * case.gqa, case.tiles + 1, 4
    plan = make_map(case, n_tiles, slots)
    mask = make_mask(case, plan, rng)
    seen_by_some = [(mask[s % len(mask)] > -np.inf).any(0) for s in range(used)]
    job = Job("attn", str(case))
    dense = []
    for side in range(2):
        bits, D, name = case.bits[side], case.D[side], SIDE[side]
        x = np.zeros((used, case.tiles * G, case.H, D))
        if bits == 0:
            cache = rng.standard_normal((total, n_tiles * G, case.H, D)).astype(np.float16)
            for s in range(used):
                x[s] = cache[first + s, :case.tiles * G]
                cache[first + s, :case.tiles * G][~seen_by_some[s]] = np.nan
            cache[:, case.tiles * G:] = np.nan
            rows = cache[first:first + used]
            row = 2 * D * case.H
            job.tensor(f"{name}_rows", (D, case.tiles * G, case.H, used), (2, row, 2 * D, row * n_tiles * G))
        else:
            size = reference.tile_size(D, bits)
            tiles = np.full((total, n_tiles, case.H, size), 255, np.uint8)
            tail = rng.standard_normal((slots, G, case.H, D)).astype(np.float16)
            shown = np.zeros((slots, G), bool)
            for s in range(used):
                for i in range(case.tiles):
                    where, part = plan[first + s, i], slice(i * G, (i + 1) * G)
                    if where >= 0:
                        x[s, part] = tail[where]
                        shown[where] |= seen_by_some[s][part]
                    for h in range(case.H if where == SEALED else 0):
                        tile = random_tile(rng, name, bits, D)
                        tiles[first + s, i, h] = tile
                        x[s, part, h] = reference.unseal(tile, name, bits, D)
            tail[~shown] = np.nan
            rows = tail
            job.give(f"{name}_tiles", tiles)
            job.tensor(f"{name}_rows", (D * case.H, slots * G), (2, 2 * D * case.H))
        job.give(f"{name}_rows", rows)
        job.value(f"bits_{name}", bits)
        job.value(f"D_{name}", D)
        dense.append(x)

    q = rng.standard_normal((used, case.rows, n_head, case.D[0])).astype(np.float32)
    sinks = rng.standard_normal(n_head).astype(np.float32) if case.sinks else None
    scale = np.float32(case.sharp / np.sqrt(case.D[0]))
    mask_rows = np.concatenate([mask, np.full((len(mask), 2, mask.shape[2]), np.nan, np.float16)], 1)  # may have more rows

    job.give("q", q)
    job.tensor("q", (case.D[0], case.rows, n_head, used), (4, q.strides[1], q.strides[2], q.strides[0]))
    job.give("plan", np.concatenate([np.full(GUARD, -1, np.int64), plan.ravel()]))
    if case.mask != "none":
        job.give("mask", mask_rows)
        job.tensor("mask", (case.tiles * G, case.rows + 2, 1, len(mask)), (2, *mask_rows.strides[1::-1], mask_rows.strides[0]))
    if case.sinks:
        job.give("sinks", sinks)
    for name, value in (("H", case.H), ("map_off", GUARD), ("n_tiles", n_tiles), ("s0", first), ("n_used", case.tiles),
                        ("tiny", int(case.tiny)), ("scale", float(scale)), ("max_bias", case.bias), ("softcap", case.softcap)):
        job.value(name, value)
    part, out = (used, case.rows * n_head, case.parts, case.D[1] + 2), (used, case.rows, n_head, case.D[1])
    job.scratch.append(("part", 4 * int(np.prod(part))))
    job.take("out", np.float32, out)
    for name, shape in (("part", part), ("out", out)):
        strides = 4 * np.cumprod([1, *shape[:0:-1]])
        job.tensor(name, shape[::-1], strides)
    return job, {"out": attend(case, q, dense, mask, sinks, scale)}


def attend(case: Attn, q, dense, mask, sinks, scale) -> np.ndarray:
    used, n_head = q.shape[0], q.shape[2]
    out = np.zeros((used, case.rows, n_head, case.D[1]))
    slope = slopes(n_head, case.bias)
    for s in range(used):
        for hd in range(n_head):
            k, v = (x[s, :, hd // case.gqa].astype(np.float64) for x in dense)
            score = q[s, :, hd].astype(np.float64) @ k.T * float(scale)
            if case.softcap:
                score = case.softcap * np.tanh(score / case.softcap)
            score = score + slope[hd] * mask[s % len(mask)].astype(np.float64)
            top = score.max(1, keepdims=True)
            if sinks is not None:
                top = np.maximum(top, float(sinks[hd]))
            p = np.exp(score - np.where(np.isfinite(top), top, 0.0))
            total = p.sum(1, keepdims=True) + (np.exp(float(sinks[hd]) - top) if sinks is not None else 0.0)
            out[s, :, hd] = p @ v / np.where(total > 0, total, 1.0)
    return out


# --- SEAL and GET


@dataclass(frozen=True)
class Tiles:
    side: int = 0
    bits: int = 4
    D: int = 64
    H: int = 2
    data: str = "gaussian"

    def __str__(self) -> str:
        return Attn.__str__(self)


EXACT, XOR = 16, 0x5A5A  # KVARN_BITS_EXACT: tiles that keep their rows
SLOTS, TILES, STREAMS, ROWS = 3, 3, 2, 5


def rows_of(case: Tiles, rng, slots: int) -> np.ndarray:
    """f16 [slots, 128, H, D]"""
    x = rng.standard_normal((slots, G, case.H, case.D)) * np.exp(0.5 * rng.standard_normal((slots, G, case.H, 1)))
    x *= np.exp(0.5 * rng.standard_normal((slots, 1, case.H, case.D)))
    if case.data == "wild":  # everything a codec must survive
        x[0, :, 0] = 0.0
        x[0, :, -1] = 7.0
        x[2, 3] = np.nan
        x[2, :, :, 5] = np.inf
        x[2, 7] *= 300
        x[2, 8] *= 1e-6
        x[2, ::3, -1] = -np.inf
        x[2, 1::3, -1, ::2] = 0.0
    return x.astype(np.float16)


def plan_of(case: Tiles) -> "tuple[np.ndarray, np.ndarray, np.ndarray]":
    """The whole plan, its seal list (-1: nothing) and its map."""
    pairs = np.array([[2, 1], [-1, -1], [0, TILES]], np.int64)
    where = np.full(TILES * STREAMS, EMPTY, np.int64)
    where[pairs[pairs[:, 0] >= 0, 1]] = SEALED
    where[0], where[TILES + 1], where[TILES + 2] = 1, EMPTY, 2
    return np.concatenate([np.full(ROWS, 9, np.int64), pairs.ravel(), where]), pairs, where


def tile_bytes(case: Tiles, rows: np.ndarray) -> np.ndarray:
    """What a tile holds for f16 [128, D]."""
    if case.bits == EXACT:
        tile = np.full(case.D * G * 2 + 4 * case.D + 2 * G, 0xA5, np.uint8)
        tile[:case.D * G * 2] = (np.ascontiguousarray(rows).view(np.uint16) ^ XOR).view(np.uint8).ravel()
        return tile
    with np.errstate(all="ignore"):
        return reference.seal(rows.astype(np.float32), SIDE[case.side], case.bits)


def tiles(case: Tiles, op: str, seed: int = 0) -> "tuple[Job, dict]":
    """SEAL: the job and all tiles afterwards; GET: the job and the rows of the second stream, sealed, empty and open."""
    rng = np.random.default_rng(seed)
    rows = rows_of(case, rng, SLOTS)
    plan, pairs, where = plan_of(case)
    size = len(tile_bytes(Tiles(case.side, case.bits, case.D), np.zeros((G, case.D), np.float16)))
    data = np.full((STREAMS * TILES, case.H, size), 0xA5, np.uint8)
    job = Job(op, f"{op},{case}")
    job.give("plan", plan)
    for name, value in (("side", case.side), ("bits", case.bits), ("D", case.D), ("H", case.H), ("n_rows", ROWS),
                        ("n_seal", len(pairs)), ("n_tiles", TILES), ("s0", 1 if op == "get" else 0)):
        job.value(name, value)
    job.tensor("tail", (case.D * case.H, SLOTS * G), (2, 2 * case.D * case.H))
    if op == "seal":
        job.give("tail", rows)
        job.give("tiles", data.copy(), is_written=True)
        for slot, tile in pairs[pairs[:, 0] >= 0]:
            for h in range(case.H):
                data[tile, h] = tile_bytes(case, rows[slot, :, h])
        return job, {"tiles": data}

    used = TILES
    out = np.zeros((1, used * G, case.H, case.D), np.float16)
    for i in range(used):
        tile, part = TILES + i, slice(i * G, (i + 1) * G)
        if where[tile] == SEALED:
            for h in range(case.H):
                if case.bits == EXACT:
                    data[tile, h] = tile_bytes(case, rows[2, :, h])
                    out[0, part, h] = rows[2, :, h]
                else:
                    data[tile, h] = random_tile(rng, SIDE[case.side], case.bits, case.D)
                    out[0, part, h] = reference.unseal(data[tile, h], SIDE[case.side], case.bits, case.D)
        elif where[tile] >= 0:
            out[0, part] = rows[where[tile]]
    job.give("tail", rows)
    job.give("tiles", data)
    job.take("out", np.float16, out.shape)
    job.tensor("out", out.shape[::-1], out.strides[::-1])
    return job, {"out": out}
