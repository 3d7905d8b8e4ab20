"""test_codec.py - the C code that ships gives the bytes of reference.py, on any input.

A failure names the tile, the token, the channel and the bits that differ. SPDX-License-Identifier: MIT
"""

import hashlib
import re

import numpy as np
import pytest

from kvarn import codec, reference

G = 128
BITS = (2, 3, 4)
SIDES = ("k", "v")
HEAD_DIMS = (16, 64, 80, 96, 112, 128, 192, 256, 512)
X_MAX = 65504.0  # what a value is clamped to

ATTEND_ERROR = 1e-5  # of the largest output: f32 rounding of q and out, nothing else; the sums are double


def gaussian(D, seed=0):
    return np.random.default_rng(seed).standard_normal((G, D)).astype(np.float32)


def planted(D, seed=0):
    """Channels and tokens of different size, two outliers each."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((G, D)) * np.exp(0.4 * rng.standard_normal(D)) * np.exp(0.3 * rng.standard_normal((G, 1)))
    x[:, rng.choice(D, 2, False)] *= 12
    x[rng.choice(G, 2, False)] *= 8
    return x.astype(np.float32)


def sparse(D):
    return np.where(np.random.default_rng(1).random((G, D)) < 0.9, 0, gaussian(D)).astype(np.float32)


def with_values(D, *places):
    """A gaussian tile with (index, value) put in."""
    x = gaussian(D)
    for index, value in places:
        x[index] = value
    return x


TILES = {
    "gaussian": gaussian,
    "planted outliers": planted,
    "heavy tails": lambda D: gaussian(D) ** 5,
    "channel means 1000 times the spread": lambda D: gaussian(D) + 1000 * gaussian(D, 1)[0],
    "constant": lambda D: np.full((G, D), 3.7, np.float32),
    "constant, negative": lambda D: np.full((G, D), -0.1, np.float32),
    "zero": lambda D: np.zeros((G, D), np.float32),
    "negative zero": lambda D: np.full((G, D), -0.0, np.float32),
    "one value": lambda D: with_values(D, (..., 0), ((9, 9), 5)),
    "small whole numbers": lambda D: np.random.default_rng(2).integers(-2, 3, (G, D)).astype(np.float32),
    "mostly zero": sparse,
    "five tokens": lambda D: with_values(D, (slice(5, None), 0)),
    "huge channel": lambda D: with_values(D, ((slice(None), 3), 6e4)),
    "huge channel, both signs": lambda D: with_values(D, ((slice(None), 3), 6e4 * np.sign(gaussian(D)[:, 3]))),
    "huge token": lambda D: with_values(D, (7, 1e4 * gaussian(D)[7])),
    "everything huge": lambda D: (X_MAX * np.sign(gaussian(D))).astype(np.float32),
    "f16 denormals": lambda D: (gaussian(D) * 6e-8).astype(np.float16).astype(np.float32),
    "f32 denormals": lambda D: gaussian(D) * np.float32(1e-40),
    "too small for f16": lambda D: gaussian(D) * np.float32(1e-11),
    "NaN and infinity": lambda D: with_values(D, ((0, 0), np.nan), ((1, 1), np.inf), ((2, 2), -np.inf), (3, np.nan)),
    "a channel of NaN": lambda D: with_values(D, ((slice(None), 5), np.nan)),
    "all NaN": lambda D: np.full((G, D), np.nan, np.float32),
    "all infinite": lambda D: np.full((G, D), np.inf, np.float32),
}


def differences(mine, theirs, side, bits, D) -> str:
    """Which codes, scales, zeros and tokens of two tiles differ; '' if none."""
    found = []
    for name, a, b in zip(("code", "scale", "zero", "token"), *(reference.unpack(t, side, bits, D) for t in (mine, theirs))):
        for at in np.argwhere(a != b)[:3]:
            axes = {"code": ("token", "channel"), "token": ("token",)}.get(name, ("channel",))
            where = " ".join(f"{axis} {n}" for axis, n in zip(axes, at))
            x, y = a[tuple(at)], b[tuple(at)]
            bits_differ = int(x) ^ int(y) if name == "code" else int(x.view(np.uint16)) ^ int(y.view(np.uint16))
            found.append(f"{name} at {where}: C {x}, numpy {y}, bits {bits_differ:#x}")
        n = np.count_nonzero(a != b)
        if n > 3:
            found.append(f"... {n} {name}s differ")
    if not found and not np.array_equal(mine, theirs):
        at = np.flatnonzero(mine != theirs)[0]
        found.append(f"byte {at}: C {mine[at]:#04x}, numpy {theirs[at]:#04x} (the same value in two encodings)")
    return "; ".join(found)


@pytest.mark.parametrize("D", HEAD_DIMS)
@pytest.mark.parametrize("name", TILES)
def test_c_and_numpy_give_the_same_bytes(name, D):
    x = TILES[name](D)
    for side in SIDES:
        for bits in BITS:
            tile = codec.seal(x, side, bits)
            with np.errstate(divide="raise", invalid="raise", over="raise"):
                expected = reference.seal(x, side, bits)
            assert not (wrong := differences(tile, expected, side, bits, D)), f"{name}, D = {D}, {side}, {bits} bits: {wrong}"
            y, z = codec.unseal(tile, side, bits), reference.unseal(tile, side, bits, D)
            same = y.view(np.uint32) == z.view(np.uint32)
            assert same.all(), (
                f"{name}, D = {D}, {side}, {bits} bits: unseal differs at (token, channel) {np.argwhere(~same)[0]}: "
                f"C {y[~same][0]!r}, numpy {z[~same][0]!r}")


@pytest.mark.parametrize("name", TILES)
def test_a_tile_is_finite_and_its_scales_are_not_negative(name):
    for D in (16, 128, 512):
        for side in SIDES:
            for bits in BITS:
                tile = codec.seal(TILES[name](D), side, bits)
                _, scale, zero, token = reference.unpack(tile, side, bits, D)
                assert np.isfinite(scale).all() and np.isfinite(zero).all() and np.isfinite(token).all()
                assert (scale >= 0).all() and (token >= 0).all()
                assert np.isfinite(codec.unseal(tile, side, bits)).all()


def test_random_tiles_of_any_magnitude():
    rng = np.random.default_rng(3)
    for n in range(60):
        D, side, bits = int(rng.choice(HEAD_DIMS)), SIDES[n % 2], BITS[n % 3]
        x = rng.standard_normal((G, D)) * np.exp(rng.uniform(-9, 9)) + rng.uniform(0, 3) * rng.standard_normal(D)
        x *= np.exp(rng.uniform(0, 1.5) * rng.standard_normal(D)) * np.exp(rng.uniform(0, 1.5) * rng.standard_normal((G, 1)))
        x = x.astype(np.float32)
        wrong = differences(codec.seal(x, side, bits), reference.seal(x, side, bits), side, bits, D)
        assert not wrong, f"tile {n} of this seed, D = {D}, {side}, {bits} bits: {wrong}"


def test_nan_counts_as_zero_and_infinity_as_the_largest_f16():
    x = gaussian(64)
    x[3, 5], x[4, 6], x[5, 7], x[6, 8] = np.nan, np.inf, -np.inf, 1e30
    clean = x.copy()
    clean[3, 5], clean[4, 6], clean[5, 7], clean[6, 8] = 0, X_MAX, -X_MAX, X_MAX
    for side in SIDES:
        for bits in BITS:
            assert np.array_equal(codec.seal(x, side, bits), codec.seal(clean, side, bits))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("side", SIDES)
def test_constant_tile_by_hand(side, bits):
    """x = 3: rms = 3, y = 1. No token has a spread, so tok = 2^-10 and y/tok = 1024 everywhere: scale = 0, mid = 1024.

    tok = 2^-10 = 0.5*2^-9, so 2^-9 moves: zero = 1024*3*2^-9 = 6, all codes 0.
    Token scales: y.v/v.v = y.y/y.v = 1/6, times rms = 0.5.
    """
    D = 16
    expected = bytes(D * G * bits // 8) + D * b"\x00\x00" + D * b"\x00\x46" + G * b"\x00\x38"  # f16 0, 6.0, 0.5
    tile = codec.seal(np.full((G, D), 3, np.float32), side, bits)
    assert tile.tobytes() == expected
    assert (codec.unseal(tile, side, bits) == 3).all()


def test_worked_tile_of_format_md(root):
    """code(t,d) = (t + d) mod 2^bits, scale 1, zero -1, token 0.5; FORMAT.md derives the first words."""
    D = 128
    words = {
        2: ["00 55 aa ff", "55 aa ff 00"],
        3: ["00 09 52 5b", "00 89 12 9b", "00 49 92 db"],
        4: ["00 11 22 33", "11 22 33 44"],
    }
    apart = {2: 4, 3: 64, 4: 4}  # bytes between these words: the next word, or the next plane of 16 words
    text = (root / "ggml-kvarn/FORMAT.md").read_text()
    t, d = np.ogrid[:G, :D]
    for bits in BITS:
        code = (t + d) % 2**bits
        tile = reference.pack(code, np.ones(D), -np.ones(D), np.full(G, 0.5), "k", bits)
        assert np.array_equal(tile, reference.pack(code, np.ones(D), -np.ones(D), np.full(G, 0.5), "v", bits))
        for n, word in enumerate(words[bits]):
            assert tile[apart[bits] * n :][:4].tobytes() == bytes.fromhex(word)
        assert ", ".join(f"`{word}`" for word in words[bits]) in text
        assert tile[D * G * bits // 8 :].tobytes() == D * b"\x00\x3c" + D * b"\x00\xbc" + G * b"\x00\x38"
        for side in SIDES:
            assert np.array_equal(codec.unseal(tile, side, bits), (code - 1).astype(np.float32) / 2)


def golden(D):
    """The tile of FORMAT.md's hashes."""
    n = np.arange(1, G * D + 1, dtype=np.uint64)
    u = n * np.uint64(2654435761) % np.uint64(2**32)
    x = ((u >> np.uint64(8)).astype(np.float32) / np.float32(2**23) - np.float32(1)).reshape(G, D)
    x[:, 3] *= 16
    x[5] *= 8
    return x


def test_golden_tiles(root):
    rows = []
    for D in (64, 80, 128, 256):
        for bits in BITS:
            tiles = [codec.seal(golden(D), side, bits) for side in SIDES]
            for side, tile in zip(SIDES, tiles):
                assert np.array_equal(tile, reference.seal(golden(D), side, bits))
            rows.append(f"| {D} | {bits} | " + " | ".join(f"`{hashlib.sha256(tile).hexdigest()[:16]}`" for tile in tiles) + " |")
    table = "\n".join(["| D | bits | keys | values |", "|---|---|---|---|", *rows])
    text = (root / "ggml-kvarn/FORMAT.md").read_text()
    written = re.search(r"<!-- golden: begin.*?-->\n(.*?)<!-- golden: end", text, re.DOTALL).group(1).strip()
    assert written == table, f"the values of a tile changed; if that is wanted, put this between the marks of FORMAT.md:\n{table}"


@pytest.mark.parametrize("bits_k", BITS)
@pytest.mark.parametrize("bits_v", BITS)
def test_attend_is_attention_over_the_unsealed_tiles(bits_k, bits_v):
    for D, n_tiles, scale in ((64, 3, None), (128, 2, 3.0), (80, 1, 0.0)):
        k = codec.seal(np.stack([planted(D, n) for n in range(n_tiles)]), "k", bits_k)
        v = codec.seal(np.stack([planted(D, n + 50) for n in range(n_tiles)]), "v", bits_v)
        q = gaussian(D, 9)[:5]
        out = codec.attend(q, k, v, bits_k, bits_v, scale)
        expected = reference.attend(q, k, v, bits_k, bits_v, 1 / np.sqrt(D) if scale is None else scale)
        error = abs(out - expected)
        row, d = np.unravel_index(error.argmax(), error.shape)
        assert error.max() <= ATTEND_ERROR * abs(expected).max(), (
            f"D = {D}, {n_tiles} tiles: query {row} channel {d}: C {out[row, d]}, float64 {expected[row, d]}")


def test_batches_are_tiles_one_by_one():
    x = np.stack([[planted(64, 3 * i + j) for j in range(3)] for i in range(2)])
    tiles = codec.seal(x, "v", 3)
    assert tiles.shape == (2, 3, codec.tile_bytes(64, 3)) and tiles.dtype == np.uint8
    y = codec.unseal(tiles, "v", 3)
    assert y.shape == x.shape and y.dtype == np.float32
    for i in range(2):
        for j in range(3):
            assert np.array_equal(tiles[i, j], codec.seal(x[i, j], "v", 3))
            assert np.array_equal(y[i, j], codec.unseal(tiles[i, j], "v", 3))
    assert codec.seal(x[:0], "k", 2).shape == (0, 3, codec.tile_bytes(64, 2))
    assert np.array_equal(codec.seal(x[:, ::2], "k", 2), codec.seal(x, "k", 2)[:, ::2])  # a strided view


def test_wrong_arrays_are_refused_in_one_line():
    x, tile = gaussian(64), codec.seal(gaussian(64), "k", 4)
    wrong = [
        (TypeError, "float32, not float64", lambda: codec.seal(x.astype(float))),
        (ValueError, "at least 2 dimensions", lambda: codec.seal(x[0])),
        (ValueError, "128 tokens", lambda: codec.seal(x[:100])),
        (ValueError, "multiple of 16", lambda: codec.seal(np.ascontiguousarray(x[:, :50]))),
        (ValueError, "'k' or 'v', not 'q'", lambda: codec.seal(x, "q")),
        (ValueError, "2, 3 or 4, not 5", lambda: codec.seal(x, "k", 5)),
        (TypeError, "uint8, not float32", lambda: codec.unseal(x)),
        (ValueError, "wrong bits", lambda: codec.unseal(tile, "k", 2)),
        (ValueError, "wrong bits", lambda: codec.unseal(tile[:-1], "k", 4)),
        (ValueError, "at least 2 dimensions", lambda: codec.attend(x[:2], tile, tile)),
        (ValueError, "128 channels", lambda: codec.attend(gaussian(128)[:2], tile[None], tile[None])),
        (ValueError, "same number of tiles", lambda: codec.attend(x[:2], tile[None], np.stack([tile, tile]))),
        (ValueError, "at least one", lambda: codec.attend(x[:2], tile[None][:0], tile[None][:0])),
    ]
    for kind, words, call in wrong:
        with pytest.raises(kind, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
