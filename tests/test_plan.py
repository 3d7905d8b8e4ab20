"""test_plan.py - kvarn plan: the sizes it promises are the ones that are allocated, and what fits is what it says.

SPDX-License-Identifier: MIT
"""

import json
import re
from pathlib import Path

import pytest

from kvarn import cache_size, cli, gguf_header, model_shape, plan

pytest.importorskip("gguf")

MIB = 1 << 20
# keys, values, n_ctx, n_ubatch, sequences, one cache for all
CONTEXTS = [("f16", "f16", 4096, 512, 1, True), ("q8_0", "q4_0", 8192, 128, 3, True),
            ("kvarn4", "kvarn2", 16384, 512, 1, True),
            ("kvarn3", "f16", 2048, 256, 4, False), ("kvarn2", "kvarn2", 100, 64, 2, True),
            ("iq4_nl", "kvarn4", 1000, 2048, 1, True)]
# the rules that differ, one architecture each: windows of several kinds, hybrids of several kinds, MLA, a fixed window
GENERATED = ["qwen35", "falcon-h1", "lfm2", "nemotron_h", "jamba", "llama4", "gpt-oss", "deepseek2", "minimax-01",
             "cohere2moe", "kimi-linear", "exaone-moe", "mamba2"]


def allocated(path: str, keys: str, values: str, n_ctx: int, n_ubatch: int, n_seq: int, unified: bool) -> "dict[str, float]":
    """MiB by the library's own log."""
    import llama_session
    from kvarn.kv_info import read_size

    with llama_session.Context(path, keys, values, n_ctx=n_ctx, n_ubatch=n_ubatch, n_batch=max(512, n_ubatch), n_seq=n_seq,
                               unified=unified) as context:
        log = context.creation_log
    size = read_size(log)

    def mib(form: str) -> float:
        return sum(float(match.group(1)) for match in (re.search(form, line) for line in log) if match)

    return {"keys": size.keys_mib, "values": size.values_mib, "tail": size.tail_mib,
            "state": mib(r"size = *([\d.]+) MiB .*rs_seq\), R"), "compute": mib(r"compute buffer size = *([\d.]+) MiB")}


def check_sizes(path: str, *context) -> None:
    found = allocated(path, *context)
    shape = model_shape.load(path)
    size = cache_size.of(shape, *context)
    n_caches = 2 if shape.window else 1              # each prints its sizes with two decimals
    for name, n_bytes in (("keys", size.key_bytes), ("values", size.value_bytes), ("tail", size.tail_bytes),
                          ("state", size.state_bytes)):
        assert found[name] == pytest.approx(n_bytes/MIB, abs=0.0051*n_caches), f"{Path(path).name} {context}: {name}"


@pytest.mark.llama
@pytest.mark.parametrize("context", CONTEXTS, ids=lambda context: "-".join(map(str, context)))
@pytest.mark.parametrize("arch, settings", [
    ("llama", {"head_dim": 128}), ("llama", {"head_dim": 64, "n_head_kv": 1}), ("qwen3", {"head_dim": 256, "n_layer": 3}),
    ("gemma3", {"head_dim": 64, "n_layer": 7, "window": 512}),
    ("mimo2", {"head_dim": 192, "value_dim": 128, "n_layer": 4, "kv_heads": (4, 2, 1, 2)}),
])
def test_sizes_are_what_is_allocated(tiny, arch, settings, context):
    check_sizes(tiny(arch, **settings), *context)


@pytest.mark.llama
@pytest.mark.upstream
@pytest.mark.parametrize("arch", GENERATED)
def test_sizes_of_other_architectures(generated, arch):
    path = generated(arch)
    for context in (("q8_0", "q8_0", 8192, 128, 3, True), ("kvarn4", "kvarn2", 16384, 512, 1, True)):
        if not cache_size.why_not(model_shape.load(path), *context[:2]):
            check_sizes(path, *context)


@pytest.mark.llama
@pytest.mark.parametrize("n_seq", [1, 40])
def test_sinks_and_many_sequences(tiny, monkeypatch, n_seq):
    monkeypatch.setenv("KVARN_SINK", "200")
    found = allocated(tiny(), "kvarn4", "kvarn2", 8192, 512, n_seq, True)
    size = cache_size.of(model_shape.load(tiny()), "kvarn4", "kvarn2", 8192, 512, n_seq, sink=200)
    assert found["tail"] == pytest.approx(size.tail_bytes/MIB, abs=0.0051)
    assert found["keys"] == pytest.approx(size.key_bytes/MIB, abs=0.0051)
    assert arguments(tiny(), "--vram", "1G").sink == 200


@pytest.mark.llama
@pytest.mark.parametrize("arch, head_dim", [("llama", 72), ("llama", 80), ("llama", 64)])
def test_types_are_refused_where_the_library_refuses_them(tiny, arch, head_dim):
    import llama_session

    path = tiny(arch, head_dim)
    for cache in ("f16", "q8_0", "q4_0", "kvarn2", "kvarn4"):
        try:
            with llama_session.Context(path, cache, cache, n_ctx=256):
                is_refused = False
        except llama_session.Refused:
            is_refused = True
        assert bool(cache_size.why_not(model_shape.load(path), cache, cache)) == is_refused, cache


@pytest.mark.llama
@pytest.mark.parametrize("arch, settings", [("llama", {}), ("gemma3", {"n_layer": 7}), ("llama", {"n_head": 16, "n_embd": 512})])
def test_compute_buffer_is_covered_by_the_estimate(tiny, arch, settings):
    path = tiny(arch, **settings)
    for n_ctx in (4096, 16384):
        found = allocated(path, "f16", "f16", n_ctx, 512, 1, True)["compute"]
        estimate = plan.compute_bytes(model_shape.load(path), n_ctx, 512)/MIB
        assert found <= estimate <= 2*found + 4


def test_tile_bytes_are_the_formats():
    codec = pytest.importorskip("kvarn.codec")
    for bits in (2, 3, 4):
        for D in (16, 64, 128, 512):
            assert cache_size.tile_bytes(D, bits) == codec.tile_bytes(D, bits)


def arguments(*words):
    return cli.build_parser({"plan"}).parse_args(["plan", *words])


def test_largest_context_fits_and_the_next_one_does_not(tiny):
    path = tiny("llama", 128, n_layer=24)
    args = arguments(path, "--vram", "3G")
    shape = model_shape.load(path)
    rows = plan.plan(shape, args)
    assert [row.cache for row in rows] == plan.CACHES.split(",")
    for row in rows:
        assert row.fits and row.n_ctx % 256 == 0 and row.total <= 3 << 30
        assert not plan.row_at(shape, row.cache, row.n_ctx + 256, args).fits
    by_name = {row.cache: row.n_ctx for row in rows}
    assert by_name["kvarn2"] > by_name["kvarn4"] > by_name["q8_0"] > by_name["f16"]


def test_header_without_weights_is_enough(tiny, tmp_path):
    whole = Path(tiny("mimo2", 192, value_dim=128, n_layer=4, kv_heads=(4, 2, 1, 2)))
    header = gguf_header.read(whole)
    cut = tmp_path/"cut.gguf"
    cut.write_bytes(whole.read_bytes()[:whole.stat().st_size - sum(header.tensors.values())])
    shape, same = model_shape.load(whole), model_shape.load(cut)
    assert (same.layers, same.weight_bytes) == (shape.layers, shape.weight_bytes)
    assert [(layer.heads, layer.k, layer.v) for layer in shape.layers] == [(heads, 192, 128) for heads in (4, 2, 1, 2)]
    assert [layer.is_window for layer in shape.layers] == [True, False, True, False]


def test_split_model(tiny, tmp_path):
    import gguf
    import numpy as np

    def part(number: int, names: "list[str]") -> None:
        writer = gguf.GGUFWriter(str(tmp_path/f"m-{number:05}-of-00002.gguf"), "llama")
        writer.add_uint16("split.count", 2)
        if number == 1:
            writer.add_block_count(1)
            writer.add_embedding_length(64)
            writer.add_head_count(1)
        for name in names:
            writer.add_tensor(name, np.ones((64, 64), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    part(1, ["output.weight", "token_embd.weight"])
    with pytest.raises(FileNotFoundError, match="one of 2 parts, and .*m-00002-of-00002.gguf is missing"):
        model_shape.load(tmp_path/"m-00001-of-00002.gguf")
    part(2, ["blk.0.attn_q.weight"])
    shape = model_shape.load(tmp_path/"m-00001-of-00002.gguf")
    assert (shape.weight_bytes, shape.gpu_weight_bytes()) == (3*64*64*4, 2*64*64*4)


def test_table_json_and_plot(tiny, tmp_path, capsys):
    path = tiny()
    picture = tmp_path/"plan.png"
    pytest.importorskip("matplotlib")
    assert cli.main(["plan", path, "--vram", "1G", "--plot", str(picture)]) == 0
    said = capsys.readouterr().out
    assert "2 layers, 2 KV heads x 128; trained for 131072 tokens" in said
    assert any(line.split()[:1] == ["kvarn4/kvarn2"] for line in said.splitlines())
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    for words in (["--vram", "1G", "--ctx", "4096"], ["--ctx", "4096"]):
        assert cli.main(["plan", path, *words, "--plot", str(picture)]) == 0
    capsys.readouterr()
    assert cli.main(["plan", path, "--ctx", "4096", "--ram", "1G", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    shape = model_shape.load(path)
    by_name = {row["cache"]: row for row in found["rows"]}
    assert found["budget"] == 1 << 30 and by_name["f16"]["kv"] == 2*2*2*128*2*4096
    assert by_name["f16"]["weights"] == shape.weight_bytes and by_name["kvarn2"]["tail"] > 0


def test_refused_types_say_why(tiny, capsys):
    assert cli.main(["plan", tiny("llama", 72), "--vram", "1G", "--caches", "f16,kvarn,q8_0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(None, 1)[1] for line in lines if "refused" in line] == ["refused: heads of 72 channels"]*2


@pytest.mark.parametrize("text, wanted", [("24G", 24 << 30), ("24", 24 << 30), ("8192M", 8 << 30), ("1.5GiB", 3 << 29),
                                          ("2t", 2 << 40)])
def test_sizes_are_understood(text, wanted):
    assert plan.size_in_bytes(text, "vram") == wanted


# ------------------------------------------------------------------------- models that are too large to make here


def header(arch: str, tensors: "dict[str, int] | None" = None, **values) -> gguf_header.Header:
    named = {f"{arch}.{name}": value for name, value in values.items()}
    return gguf_header.Header(Path("model.gguf"), {"general.architecture": arch, **named}, tensors or {"output.weight": 1})


def eight_b() -> model_shape.Shape:
    return model_shape.shape_of(header("llama", block_count=32, embedding_length=4096, context_length=131072, **{
        "attention.head_count": 32, "attention.head_count_kv": 8}))


def test_documents_say_what_the_cache_of_an_8b_model_takes():
    text = (Path(__file__).parent.parent/"docs/choosing.md").read_text()
    rows = re.findall(r"^\| (\S+) \| ([\d.]+) \| (\d+) MiB \| (\d+) MiB \|$", text, re.M)
    assert [row[0] for row in rows] == ["f16", "q8_0", "q4_0", "kvarn4", "kvarn4/kvarn2", "kvarn2"]
    for cache, bits, short, long in rows:
        keys, values = plan.kvtype.parse(cache)
        for n_ctx, said in ((32768, short), (131072, long)):
            size = cache_size.of(eight_b(), keys, values, n_ctx)
            stored = size.key_bytes + size.value_bytes - size.spare_bytes
            assert stored == int(said)*MIB and 8*stored/(2*32*8*128*n_ctx) == float(bits)
    assert "7 x 128 tokens with `n_ubatch` 512: 112 MiB" in " ".join(text.split())
    assert cache_size.of(eight_b(), "kvarn4", "kvarn2", 32768).tail_bytes == 112*MIB


def test_gemma4_shares_keys_and_values_of_its_last_layers_and_has_two_head_sizes():
    pattern = [layer % 6 != 5 for layer in range(30)]
    shape = model_shape.shape_of(header("gemma4", block_count=30, embedding_length=2048, **{
        "attention.head_count": 8, "attention.head_count_kv": [8 if window else 4 for window in pattern],
        "attention.key_length": 512, "attention.value_length": 512, "attention.key_length_swa": 256,
        "attention.value_length_swa": 256, "attention.sliding_window": 1024, "attention.sliding_window_pattern": pattern,
        "attention.shared_kv_layers": 10}))
    assert len(shape.layers) == 20 and shape.window == 1024
    assert [(layer.heads, layer.k, layer.is_window) for layer in shape.layers[4:7]] \
        == [(8, 256, True), (4, 512, False), (8, 256, True)]


@pytest.mark.parametrize("arch, n_layer, settings, n_window, n_cached", [
    ("gemma3n", 30, {}, 16, 20), ("gemma3", 62, {}, 52, 62), ("gemma2", 42, {}, 21, 42), ("cohere2", 40, {}, 30, 40),
    ("exaone4", 64, {}, 48, 64), ("exaone4", 30, {}, 0, 30), ("gpt-oss", 36, {}, 18, 36), ("phi3", 32, {}, 0, 32),
    ("qwen3", 36, {}, 0, 36), ("smallthinker", 32, {}, 24, 32), ("llama4", 48, {}, 36, 48),
    ("gemma3", 12, {"attention.sliding_window_pattern": 3}, 8, 12),
])
def test_which_layers_have_a_window(arch, n_layer, settings, n_window, n_cached):
    """"attention.sliding_window" stands in many files whose models llama.cpp runs without one."""
    shape = model_shape.shape_of(header(arch, block_count=n_layer, embedding_length=1024, **{
        "attention.head_count": 8, "attention.head_count_kv": 4, "attention.sliding_window": 512, **settings}))
    assert (sum(layer.is_window for layer in shape.layers), len(shape.layers)) == (n_window, n_cached)


@pytest.mark.parametrize("arch, said", [("bert", "keep no key-value cache"), ("deepseek32", "laid out in its own way"),
                                        ("t5", "laid out in its own way")])
def test_models_that_cannot_be_planned(arch, said):
    with pytest.raises(ValueError, match=said):
        model_shape.shape_of(header(arch, block_count=2))
    with pytest.raises(ValueError, match="no language model: its header has no clip.block_count"):
        model_shape.shape_of(header("clip"))


def test_a_tied_embedding_is_on_the_gpu_once_more():
    tied = {"token_embd.weight": 100, "blk.0.attn_q.weight": 10}
    values = {"block_count": 1, "embedding_length": 64, "attention.head_count": 1}
    assert model_shape.shape_of(header("llama", tied, **values)).gpu_weight_bytes() == 110
    assert model_shape.shape_of(header("llama", {**tied, "output.weight": 90}, **values)).gpu_weight_bytes() == 100


def test_layers_and_experts_that_stay_in_main_memory(capsys):
    tensors = {"token_embd.weight": 1000, "output.weight": 900, "output_norm.weight": 1}
    for layer in range(4):
        tensors.update({f"blk.{layer}.attn_k.weight": 10, f"blk.{layer}.ffn_up_exps.weight": 100})
    shape = model_shape.shape_of(header("qwen3moe", tensors, block_count=4, embedding_length=64, **{"attention.head_count": 1}))
    assert shape.gpu_weight_bytes() == shape.gpu_weight_bytes(5) == shape.gpu_weight_bytes(99) == 901 + 4*110
    assert shape.gpu_weight_bytes(cpu_moe=True) == 901 + 4*10
    assert [shape.gpu_weight_bytes(n) for n in (0, 1, 2, 4)] == [0, 901, 901 + 110, 901 + 3*110]
    assert [layer.index for layer in shape.on_gpu(3).layers] == [2, 3] and not shape.on_gpu(1).layers


def test_partly_offloaded_model_has_more_room(tiny):
    shape = model_shape.load(tiny(n_layer=24))
    rows = {n: plan.row_at(shape, "kvarn4", 8192, arguments("m", "--vram", "1G", "--gpu-layers", str(n))) for n in (-1, 13)}
    assert rows[13].kv == rows[-1].kv/2 and rows[13].tail == rows[-1].tail/2 and rows[13].weights < rows[-1].weights


@pytest.mark.parametrize("trained, vram, said", [
    (131072, "8G", "kvarn4/kvarn2 holds all 131072 tokens that the model was trained for; f16 "),
    (131072, "24G", "All 131072 tokens that the model was trained for fit with f16 already."),
    (1 << 24, "24G", "kvarn4/kvarn2 holds "),
])
def test_the_table_in_a_sentence(trained, vram, said):
    from dataclasses import replace

    shape = replace(eight_b(), n_ctx_train=trained)
    args = arguments("m", "--vram", vram)
    assert plan.verdict(shape, plan.plan(shape, args)).startswith(said)
    assert plan.verdict(shape, plan.plan(shape, arguments("m", "--vram", vram, "--caches", "f16"))) in ("", said)


def test_what_a_gpu_unpacks_to_read_a_prompt():
    shape = eight_b()
    assert plan.unpacked_bytes(shape, 131072, "f16") == 0
    assert plan.unpacked_bytes(shape, 131072, "q8_0") == 131072*8*2*128*2
    assert plan.unpacked_bytes(shape, 131072, "kvarn") == plan.WINDOW
    assert plan.unpacked_bytes(shape, 8192, "kvarn") == 8192*8*2*128*2, "all heads are less than the window"
    assert plan.unpacked_bytes(shape, 1 << 20, "kvarn") == (1 << 20)*2*128*2, "one head is more"
