"""test_format.py - where every bit of a tile lies: the header, numpy and FORMAT.md say the same.

The functions of kvarn-format.h are compiled as C on the spot. SPDX-License-Identifier: MIT
"""

import ctypes
import os
import re
import shutil
import subprocess

import numpy as np
import pytest

from kvarn import codec, reference

BITS = (2, 3, 4)
HEAD_DIMS = range(16, 513, 16)

PROBE = r"""
#include "kvarn-format.h"
int is_valid(int D, int bits) { return kvarn_is_valid(D, bits); }
void sizes(int D, int bits, int * out) {
    out[0] = kvarn_codes_size(D, bits);
    out[1] = kvarn_scale_off(D, bits);
    out[2] = kvarn_zero_off(D, bits);
    out[3] = kvarn_token_off(D, bits);
    out[4] = kvarn_tile_size(D, bits);
}
void code_bits(int bits, int F, int n_r, int * out) {
    for (int r = 0; r < n_r; ++r) {
        for (int f = 0; f < F; ++f) {
            for (int i = 0; i < bits; ++i) {
                *out++ = kvarn_code_bit(bits, F, r, f, i);
            }
        }
    }
}
"""


class Header:
    """kvarn-format.h, compiled."""

    def __init__(self, root, folder):
        names = [name for name in (os.environ.get("CC"), "cc", "gcc", "clang") if name]
        compiler = next(filter(None, map(shutil.which, names)), None)
        assert compiler, "no C compiler (cc, gcc, clang or $CC) to compile kvarn-format.h with"
        (folder / "probe.c").write_text(PROBE)
        flags = ["-std=c11", "-O1", "-Wall", "-Wextra", "-pedantic", "-Werror", "-shared", "-fPIC"]
        subprocess.run([compiler, *flags, f"-I{root / 'ggml-kvarn'}", folder / "probe.c", "-o", folder / "probe.so"], check=True)
        self.lib = ctypes.CDLL(str(folder / "probe.so"))

    def sizes(self, D, bits):
        out = (ctypes.c_int * 5)()
        self.lib.sizes(D, bits, out)
        return list(out)

    def code_bits(self, bits, F, n_r):
        out = np.empty((n_r, F, bits), np.int32)
        self.lib.code_bits(bits, F, n_r, out.ctypes.data_as(ctypes.c_void_p))
        return out


@pytest.fixture(scope="module")
def header(root, tmp_path_factory):
    return Header(root, tmp_path_factory.mktemp("header"))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("side", ["k", "v"])
def test_codes_fill_every_bit_exactly_once(header, side, bits):
    for D in HEAD_DIMS:
        F, n_r = (128, D) if side == "k" else (D, 128)
        where = header.code_bits(bits, F, n_r)
        assert np.array_equal(np.sort(where, axis=None), np.arange(D * 128 * bits)), f"D = {D}: the codes do not tile their bytes"
        r, f, i = np.ogrid[:n_r, :F, :bits]
        assert np.array_equal(where, reference.code_bit(bits, F, r, f, i)), f"D = {D}: header and reference.py differ"


@pytest.mark.parametrize("bits", BITS)
def test_a_word_holds_four_contracted_indices_one_per_byte(header, bits):
    where = header.code_bits(bits, 128, 16)
    byte, word = where // 8, where // 32
    for k in range(4):
        assert (byte[k::4] % 4 == k).all()
    assert (word[0::4] == word[1::4]).all() and (word[0::4] == word[3::4]).all()


def test_sizes_and_offsets(header):
    for D in HEAD_DIMS:
        for bits in BITS:
            codes, scale, zero, token, size = header.sizes(D, bits)
            assert codes == scale == D * 128 * bits // 8
            assert (zero, token, size) == (scale + 2 * D, zero + 2 * D, token + 256)
            assert size % 64 == 0, f"D = {D}, {bits} bits: {size} bytes are no multiple of 64"
            assert size == codec.tile_bytes(D, bits) == reference.tile_size(D, bits)


def test_only_valid_shapes_have_tiles(header):
    for D in (-16, 0, 8, 24, 100, 528, 1024):
        assert not header.lib.is_valid(D, 4)
        with pytest.raises(ValueError, match="multiple of 16"):
            codec.tile_bytes(D, 4)
    for bits in (0, 1, 5, 8, "4", None):
        with pytest.raises(ValueError, match="2, 3 or 4"):
            codec.tile_bytes(128, bits)


def test_format_version(header, root):
    text = (root / "ggml-kvarn/kvarn-format.h").read_text()
    version = int(re.search(r"#define KVARN_FORMAT_VERSION (\d+)", text).group(1))
    assert codec.FORMAT_VERSION == version, "the installed library is of another format: install again"
    assert f"Format version {version}:" in (root / "ggml-kvarn/FORMAT.md").read_text()


def drawing(header, bits) -> str:
    """Byte k of word x, bit 7 to bit 0, for keys: one line per plane."""
    F = 128
    X = F // 8 if bits == 3 else F * bits // 8
    owner = {}
    for f, row in enumerate(header.code_bits(bits, F, 1)[0]):
        for i, at in enumerate(row):
            if at // 8 % (4 * X) == 0:
                owner[at // 8 // (4 * X), at % 8] = f"x+{f}.{i}" if f else f"x.{i}"
    lines = [f"{bits} bits, F = 128, X = {X}", "", "bit    " + "".join(f"{bit:<9}" for bit in range(7, -1, -1))]
    for plane in range(3 if bits == 3 else 1):
        name = f"{'ABC'[plane]}[x]" if bits == 3 else "[x]"
        lines.append(f"{name:<7}" + "".join(f"{owner[plane, bit]:<9}" for bit in range(7, -1, -1)))
    return "\n".join("    " + line.rstrip() if line else "" for line in lines)


def test_drawings(header, root):
    text = (root / "ggml-kvarn/FORMAT.md").read_text()
    drawn = text.split("<!-- drawings: begin")[1].split("-->\n", 1)[1].split("<!-- drawings: end")[0].strip("\n")
    expected = "\n\n".join(drawing(header, bits) for bits in BITS)
    assert drawn == expected, f"put this between the drawing marks of FORMAT.md:\n{expected}"


def test_table_of_sizes(root):
    text = (root / "ggml-kvarn/FORMAT.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (\d+) \| (\d+) \| ([\d., ]+) \|$", text, re.MULTILINE)
    assert rows
    for D, *sizes, per_value in rows:
        assert [int(size) for size in sizes] == [reference.tile_size(int(D), bits) for bits in BITS]
        assert [float(v) for v in per_value.split(", ")] == [reference.tile_size(int(D), bits) / int(D) / 16 for bits in BITS]
