"""test_bench.py - kvarn bench: a cache filled without prefilling is as good as another, and the report says what was measured.

SPDX-License-Identifier: MIT
"""

import csv
import json

import pytest

pytestmark = pytest.mark.llama

DEPTH = 700
QUICK = ["--caches", "f16,kvarn4/kvarn2", "--threads", "1", "--tokens", "2", "--rounds", "2", "--prompt", "64",
         "--prompt-rounds", "1"]


def open_context(path: str, cache: str, depth: int):
    from kvarn.context import Model
    from kvarn.depth import FilledContext

    return FilledContext(Model(path), cache, depth, 64, 128)


@pytest.mark.parametrize("cache", ["f16", "q8_0", "kvarn2", "kvarn4/kvarn3", "kvarn4/f16", "q8_0/kvarn2"])
def test_grown_state_is_what_the_library_saves(tiny, cache):
    """The library takes the state, counts its tokens, saves the same bytes again, and decodes on."""
    import llama_session
    from kvarn.depth import TAIL, G, filled_depth

    depth = filled_depth(20*G)
    assert depth == 19*G + TAIL
    context = open_context(tiny(), cache, depth)
    llama_cpp = llama_session.llama_cpp
    assert llama_cpp.llama_memory_seq_pos_max(context.memory, 0) == depth - 1
    size = llama_cpp.llama_state_seq_get_size(context.handle, 0)
    data = (llama_session.ctypes.c_uint8*size)()
    assert llama_cpp.llama_state_seq_get_data(context.handle, data, size, 0) == size
    assert bytes(data) == context.state
    context.run(40)
    assert llama_cpp.llama_memory_seq_pos_max(context.memory, 0) == depth + 39
    context.close()


def test_grown_tiles_hold_the_repeated_prompt(tiny):
    """Growing to the length it already has changes nothing; a longer one has whole tiles more."""
    from kvarn.depth import SEED_TILES, TAIL, G, grow

    seed = SEED_TILES*G + TAIL
    context = open_context(tiny(), "kvarn3", seed)
    assert grow(context.state, seed) == context.state
    tile = 2*2*2*(128*128*3//8 + 4*128 + 2*128)  # two layers, sides and heads
    more = SEED_TILES*(tile + 20) + SEED_TILES*G*16
    assert len(grow(context.state, seed + SEED_TILES*G)) == len(context.state) + more
    with pytest.raises(ValueError, match="is not a multiple"):
        grow(context.state, seed + 1)
    context.close()


def test_report(tiny, tmp_path, capsys):
    from kvarn import cli

    path = tmp_path/"bench.csv"
    words = ["bench", "--model", tiny(), "--depths", f"0,{DEPTH}", "--prompt-depths", "0", "--csv", str(path), *QUICK]
    assert cli.main(words) == 0
    out, err = capsys.readouterr()
    said = out.splitlines()
    assert all(line.startswith("bench ") for line in err.splitlines()), err  # progress, nothing of llama.cpp's own
    assert said[0].split()[:3] == ["threads", "depth", "cache"] and len(said) == 1 + 4 + 2
    assert said[1].split()[:3] == ["1", "0", "f16"] and "1.00x" in said[1]
    text = path.read_text().splitlines()
    assert text[0] == "# kvarn " + " ".join(words) and "kvarn" in text[1]
    rows = list(csv.DictReader(text[2:]))
    assert [(row["depth"], row["cache"]) for row in rows] == [
        ("0", "f16"), ("0", "kvarn4/kvarn2"), (str(DEPTH), "f16"), (str(DEPTH), "kvarn4/kvarn2")]
    for row in rows:
        assert float(row["decode_min"]) <= float(row["decode_tok_s"]) <= float(row["decode_max"])
        assert bool(row["prefill_tok_s"]) == (row["depth"] == "0")


def test_json(tiny, capsys):
    from kvarn import cli

    assert cli.main(["bench", "--model", tiny(), "--depths", "0", "--json", "--cpu-time", "--prompt-depths", "5", *QUICK]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["cache"] for row in rows] == ["f16", "kvarn4/kvarn2"]
    assert rows[0]["decode_tok_s"] > 0 and rows[0]["prefill_tok_s"] is None


def test_default_model_is_written_and_decodes(tmp_path):
    pytest.importorskip("gguf")
    from kvarn import bench

    path = bench.write_model(tmp_path/"small.gguf", n_layer=1, n_head=2, n_head_kv=1, n_embd=64, n_ff=64)
    context = open_context(str(path), "kvarn2", 30)
    context.run(2)
    context.close()


@pytest.mark.parametrize(("words", "said"), [
    (["--caches", "kvarn9"], "kvarn: unknown kv_type 'kvarn9'"),
    (["--depths", "1,x"], "kvarn: --depths 1,x: give whole numbers from 0 on, separated by commas"),
    (["--threads", "0"], "kvarn: --threads 0: give whole numbers from 1 on, separated by commas"),
    (["--cpu-time"], "kvarn: --cpu-time counts what all threads use, waiting included; add --threads 1"),
    (["--tokens", "0"], "kvarn: --tokens and --rounds must be 1 or more"),
    (["--model", "no-such.gguf"], "kvarn: no model at no-such.gguf"),
])
def test_errors_are_one_line(capsys, words, said):
    from kvarn import cli

    assert cli.main(["bench", *words]) == 1
    err = capsys.readouterr().err.strip()
    assert err.startswith(said) and len(err.splitlines()) == 1
