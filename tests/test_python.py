"""test_python.py - the Python package: names of cache types, proof of the libraries, states, and errors that say what to do.

SPDX-License-Identifier: MIT
"""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from kvarn import kvtype

PROMPT = "The quick brown fox jumps over the lazy dog, and then " * 6   # 330 bytes: two full tiles and a piece
MODEL_TYPES = ["f16", "kvarn", "kvarn2", "kvarn3", "kvarn4", "q8_0/kvarn2", "kvarn4/f16", "q4_0"]


def in_new_process(code: str, **env) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, timeout=120)


def last_line(done: subprocess.CompletedProcess) -> str:
    return (done.stderr.strip().splitlines() or [""])[-1]


def open_llama(path, **settings):
    from kvarn import Llama

    return Llama(path, n_ctx=settings.pop("n_ctx", 1024), verbose=False, **settings)


def text_of(llm, n: int = 40, prompt: str = PROMPT) -> str:
    return llm(prompt, max_tokens=n, temperature=0.0)["choices"][0]["text"]


# ------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("given, keys, values", [
    ("kvarn", "kvarn4", "kvarn2"), ("kvarn_k4v2_g128", "kvarn4", "kvarn2"), ("kvarn2", "kvarn2", "kvarn2"),
    ("kvarn4/kvarn2", "kvarn4", "kvarn2"), ("q4_0/kvarn2", "q4_0", "kvarn2"), (" KVARN3 ", "kvarn3", "kvarn3"),
    ("f16", "f16", "f16"),
])
def test_kv_type_names(given, keys, values):
    assert kvtype.parse(given) == (keys, values)


@pytest.mark.parametrize("given", ["kvarn5", "", "kvarn4/", "/kvarn4", "kvarn4/kvarn2/f16", "q2_K", 43, None])
def test_unknown_kv_type(given):
    with pytest.raises(ValueError, match="kv_type"):
        kvtype.parse(given)


def test_size_is_read_from_the_log():
    from kvarn.kv_info import read_size

    size = read_size([
        "kvarn: keys kvarn4: 4.375 bits per value, 20 tiles of 128 tokens per stream (16 asked for), head size 128",
        "kvarn: values kvarn2: 2.375 bits per value, 20 tiles of 128 tokens per stream (16 asked for), head size 128",
        "kvarn: tail =    1.00 MiB (4 slots of 128 tokens in f16)",
        "llama_kv_cache: size =   13.50 MiB (  2560 cells,   2 layers,  1/1 seqs), K (kvarn4):  8.75 MiB, V (kvarn2):  4.75 MiB",
        "llama_kv_cache: size =    4.00 MiB (  1024 cells,   2 layers,  1/1 seqs), K (f16):    2.00 MiB, V (f16):    2.00 MiB"])
    assert (size.keys, size.values, size.tail_mib) == ("kvarn4", "kvarn2", 1.0)
    assert size.mib == pytest.approx(13.5 + 4 + 1)
    assert size.f16_mib == pytest.approx((32 + 32)*16/20 + 4)


# ------------------------------------------------------------------------------------------------- loading


@pytest.mark.llama
def test_import_is_light():
    done = in_new_process("import kvarn, kvarn.cli, sys; print([m for m in ('llama_cpp', 'numpy', 'cffi') if m in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.llama
def test_stock_libraries_are_refused(tmp_path):
    """A library without our symbols: compiled here, named like the real one."""
    source = tmp_path / "stock.c"
    source.write_text("const char * ggml_type_name(int type) { return type == 0 ? \"f32\" : 0; }\n")
    for name in ("libggml-base.so", "libllama.so"):
        subprocess.run(["cc", "-shared", "-fPIC", "-o", str(tmp_path / name), str(source)], check=True)
    done = in_new_process("import kvarn; kvarn.KVARN4", KVARN_LIB_PATH=str(tmp_path))
    assert done.returncode == 1 and "are stock llama.cpp, without kvarn's types" in last_line(done), done.stderr


@pytest.mark.llama
def test_missing_libraries_are_named(tmp_path):
    done = in_new_process("import kvarn; kvarn.load()", KVARN_LIB_PATH=str(tmp_path))
    assert done.returncode == 1 and last_line(done).startswith(f"ImportError: {tmp_path} has no libggml-base"), done.stderr


@pytest.mark.llama
def test_llama_cpp_imported_first_is_refused(lib_dir, tmp_path):
    elsewhere = tmp_path / "lib"
    elsewhere.mkdir()
    for path in lib_dir.iterdir():
        if ".so" in path.name or ".dylib" in path.name:
            (elsewhere / path.name).symlink_to(path)
    code = "import llama_cpp, kvarn; kvarn.load()"
    done = in_new_process(code, LLAMA_CPP_LIB_PATH=str(elsewhere), MTMD_CPP_LIB=str(elsewhere))
    assert done.returncode == 1 and "llama_cpp was imported before kvarn" in last_line(done), done.stderr


@pytest.mark.llama
def test_environment_is_restored(lib_dir):
    code = ("import os; before = dict(os.environ); import kvarn; kvarn.load(); import llama_cpp, llama_cpp.mtmd_cpp, json\n"
            "print(json.dumps([before == dict(os.environ), llama_cpp.llama_cpp._lib._name, llama_cpp.mtmd_cpp._libmtmd._name]))")
    done = in_new_process(code)
    assert done.returncode == 0, done.stderr
    same, llama, mtmd = json.loads(done.stdout)
    assert same
    assert Path(llama).parent.resolve() == Path(mtmd).parent.resolve() == lib_dir.resolve()


@pytest.mark.llama
def test_wrong_llama_cpp_python_version(monkeypatch):
    from kvarn import library

    monkeypatch.setattr(library.importlib.metadata, "version", lambda name: "0.3.1")
    with pytest.raises(ImportError, match="found 0.3.1; next: CMAKE_ARGS=-DLLAMA_BUILD=OFF pip install --no-cache-dir"):
        library.check_version()


@pytest.mark.llama
def test_wrong_struct_is_refused(monkeypatch):
    import llama_cpp

    from kvarn import library

    library.load()
    library.check_structs(llama_cpp)
    monkeypatch.setitem(library.STRUCT_SIZES, "llama_batch", 48)
    with pytest.raises(ImportError, match="llama_batch with 56 bytes"):
        library.check_structs(llama_cpp)
    monkeypatch.undo()
    monkeypatch.setitem(library.DEFAULTS, "n_ctx", 4096)
    with pytest.raises(ImportError, match="n_ctx = 512 instead of 4096"):
        library.check_structs(llama_cpp)


@pytest.mark.llama
def test_type_ids_come_from_the_library():
    import kvarn

    library = kvarn.load()
    assert [library.name(number) for number in (kvarn.KVARN2, kvarn.KVARN3, kvarn.KVARN4)] == ["kvarn2", "kvarn3", "kvarn4"]
    assert library.types["f16"] == 1 and library.types["q8_0"] == 8
    with pytest.raises(ValueError, match="200 is no type id"):
        library.name(200)


# --------------------------------------------------------------------------------------------------- Llama


@pytest.mark.llama
def test_kv_sink(tiny, monkeypatch):
    """128 tokens more of f16 for the one sequence; the environment is left as it was, and a copy by pickle has it too."""
    monkeypatch.setenv("KVARN_SINK", "0")
    plain = open_llama(tiny(), kv_type="kvarn").kv_size
    llm = open_llama(tiny(), kv_type="kvarn", kv_sink=100)
    assert os.environ["KVARN_SINK"] == "0"
    one_tile = 2*2*2*128*128*2/2**20      # layers, sides, heads, D, G, bytes
    assert llm.kv_size.tail_mib - plain.tail_mib == pytest.approx(one_tile, abs=0.01)
    again = pickle.loads(pickle.dumps(llm))
    assert again.kv_sink == 100 and again.kv_size == llm.kv_size
    with pytest.raises(ValueError, match="KVARN_SINK=-5 is not a number of tokens"):
        open_llama(tiny(), kv_type="kvarn", kv_sink=-5)


@pytest.mark.parametrize("kv_type", MODEL_TYPES)
def test_llama_runs(tiny, kv_type):
    import llama_cpp

    llm = open_llama(tiny(), kv_type=kv_type)
    assert isinstance(llm, llama_cpp.Llama)
    first = text_of(llm)
    llm.reset()
    assert text_of(llm) == first
    keys, values = kvtype.parse(kv_type)
    assert (llm.kv_size.keys, llm.kv_size.values) == (keys, values)
    wanted = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED if kv_type == "f16" else llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
    assert llm.context_params.flash_attn_type == wanted
    assert llm.context_params.swa_full == (not kvtype.is_kvarn(keys, values))


@pytest.mark.llama
def test_size_report(tiny):
    f16 = open_llama(tiny(), kv_type="f16", n_ctx=8192).kv_size
    small = open_llama(tiny(), kv_type="kvarn", n_ctx=8192).kv_size
    assert f16.bits_per_value == pytest.approx(16, abs=0.05)
    assert small.f16_mib == pytest.approx(f16.mib, rel=0.02)
    assert small.tail_mib > 0
    assert 3.3 < small.bits_per_value < 8
    assert small.mib == pytest.approx(small.keys_mib + small.values_mib + small.tail_mib)
    assert str(small).startswith("KV cache kvarn4/kvarn2: ")


@pytest.mark.llama
def test_types_by_name_and_id(tiny):
    import kvarn

    by_name = open_llama(tiny(), type_k="kvarn4", type_v="kvarn2")
    by_id = open_llama(tiny(), type_k=kvarn.KVARN4, type_v=kvarn.KVARN2)
    assert by_name.kv_size == by_id.kv_size == open_llama(tiny(), kv_type="kvarn").kv_size
    assert open_llama(tiny(), type_k="kvarn3").kv_size.values == "f16"


@pytest.mark.llama
@pytest.mark.parametrize("settings, said", [
    ({"kv_type": "kvarn9"}, "unknown kv_type 'kvarn9': use kvarn"),
    ({"type_k": "q3"}, "unknown cache type 'q3': use one of kvarn2"),
    ({"type_k": 200}, "200 is no type id"),
    ({"type_v": -1}, "-1 is no type id"),
    ({"type_k": 4}, "4 is no type id"),
    ({"type_k": 10}, "type q2_K .* is no cache type"),
    ({"kv_type": "kvarn", "type_k": "f16"}, "not both"),
    ({"kv_type": "kvarn", "flash_attn": False}, "needs flash attention"),
    ({"type_v": "q8_0", "flash_attn": False}, "needs flash attention"),
])
def test_bad_settings(tiny, settings, said):
    with pytest.raises(ValueError, match=said):
        open_llama(tiny(), **settings)


@pytest.mark.llama
def test_reason_of_a_refused_context_is_in_the_exception(tiny):
    with pytest.raises(ValueError, match="(?i)failed to create llama_context: .*72"):
        open_llama(tiny(head_dim=72), kv_type="kvarn2")
    with pytest.raises(ValueError, match="(?i)failed to create llama_context: .*q8_0"):
        open_llama(tiny(head_dim=80), kv_type="q8_0")
    with pytest.raises(ValueError, match="(?i)path does not exist"):
        open_llama("no-such-file.gguf", kv_type="kvarn")


@pytest.mark.llama
def test_broken_model_file(tmp_path):
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF" + b"\3\0\0\0" + b"\xff"*64)
    with pytest.raises(ValueError, match="Failed to load model"):
        open_llama(str(path), kv_type="kvarn")


@pytest.mark.llama
def test_n_ctx_too_small(tiny):
    llm = open_llama(tiny(), kv_type="kvarn", n_ctx=256)
    with pytest.raises(ValueError, match="exceed context window of 256"):
        text_of(llm)
    with pytest.raises(RuntimeError, match="do not fit: 0 of n_ctx = 256 are in use"):
        llm.eval([5]*300)
    llm.eval([5]*256)
    with pytest.raises(RuntimeError, match="1 more tokens do not fit: 256 of n_ctx = 256"):
        llm.eval([5])
    assert text_of(llm, 10, "short prompt")


@pytest.mark.llama
def test_whole_context_is_usable(tiny):
    llm = open_llama(tiny(), kv_type="kvarn2", n_ctx=512, n_batch=64)
    # no end of text, and no byte that begins a longer letter: after one of those at the end llama-cpp-python decodes on
    unwanted = {2: -100, **{3 + byte: -100 for byte in range(128, 256)}}
    done = llm(PROMPT, max_tokens=None, temperature=0.0, logit_bias=unwanted)
    assert done["choices"][0]["finish_reason"] == "length"
    assert done["usage"]["total_tokens"] == 512 and llm.n_tokens == 511  # the last one is not decoded


# -------------------------------------------------------------------------------------------------- states


@pytest.mark.llama
@pytest.mark.parametrize("kv_type", ["f16", "kvarn", "kvarn3/f16"])
def test_save_and_load_state(tiny, kv_type):
    llm = open_llama(tiny(), kv_type=kv_type)
    llm.eval(llm.tokenize(PROMPT.encode()))
    state = llm.save_state()
    llm._requires_eval = True   # as after a restore: the last token is decoded again, in a batch of its own
    wanted = text_of(llm, 60)
    other = open_llama(tiny(), kv_type=kv_type)
    for target in (llm, other):
        target.load_state(pickle.loads(pickle.dumps(state)))
        assert target.n_tokens == state.n_tokens
        assert text_of(target, 60) == wanted


@pytest.mark.llama
def test_state_is_lean(tiny):
    llm = open_llama(tiny(), kv_type="kvarn", n_ctx=4096)
    llm.eval(llm.tokenize(PROMPT.encode()*4))
    state = llm.save_state()
    assert state.scores.size == 0 and len(state.input_ids) == llm.n_tokens
    assert len(pickle.dumps(state)) < state.llama_state_size + 16*llm.n_tokens + 2000


@pytest.mark.llama
def test_logits_stay_with_logits_all(tiny):
    llm = open_llama(tiny(), kv_type="kvarn", logits_all=True)
    llm.eval(llm.tokenize(PROMPT.encode()))
    state = llm.save_state()
    before = llm.scores[:llm.n_tokens].copy()
    llm.scores[:] = 0
    llm.load_state(state)
    assert (llm.scores[:llm.n_tokens] == before).all()


@pytest.mark.llama
def test_foreign_and_damaged_states(tiny):
    llm = open_llama(tiny(), kv_type="kvarn2")
    llm.eval(llm.tokenize(PROMPT.encode()))
    state = llm.save_state()
    wanted = text_of(llm)
    for path, kv_type in ((tiny(), "f16"), (tiny(), "kvarn4"), (tiny(n_layer=3), "kvarn2")):
        other = open_llama(path, kv_type=kv_type)
        with pytest.raises(RuntimeError, match="does not fit this context"):
            other.load_state(state)
        assert text_of(other, 5)
    for cut in (0, 1, 100, state.llama_state_size//2, state.llama_state_size - 1):
        damaged = pickle.loads(pickle.dumps(state))
        damaged.llama_state, damaged.llama_state_size = state.llama_state[:cut], cut
        with pytest.raises(RuntimeError, match="does not fit this context"):
            llm.load_state(damaged)
    with pytest.raises(RuntimeError, match="this context takes 256"):
        open_llama(tiny(), kv_type="kvarn2", n_ctx=256).load_state(state)
    llm.reset()
    assert text_of(llm) == wanted


@pytest.mark.llama
def test_pickle_keeps_names(tiny):
    llm = open_llama(tiny(), kv_type="kvarn")
    assert llm.__getstate__()["type_k"] == "kvarn4"
    again = pickle.loads(pickle.dumps(llm))
    assert again.kv_size == llm.kv_size
    assert text_of(again) == text_of(llm)


@pytest.mark.llama
def test_ram_cache(tiny):
    import llama_cpp

    llm = open_llama(tiny(), kv_type="kvarn")
    text_of(llm)
    llm.set_cache(llama_cpp.LlamaRAMCache())
    wanted = text_of(llm)
    text_of(llm, prompt="something else entirely")
    assert text_of(llm) == wanted


@pytest.mark.llama
def test_next_chat_turn_reuses_the_prefix(tiny):
    llm = open_llama(tiny(), kv_type="kvarn")
    text_of(llm, 100)
    before, evaluated = llm.n_tokens, []
    decode = llm._ctx.decode
    llm._ctx.decode = lambda batch: (evaluated.append(batch.batch.n_tokens), decode(batch))
    assert before > 200 and text_of(llm, 20, PROMPT[:200] + " but now")
    assert evaluated[0] < 20


# ---------------------------------------------------------------------------------------------- frameworks


@pytest.mark.llama
def test_unmodified_llama_takes_ids(tiny):
    code = f"""
import kvarn
k, v = kvarn.KVARN4, kvarn.KVARN2          # from here on the patched libraries are the ones loaded
import llama_cpp
llm = llama_cpp.Llama({tiny()!r}, n_ctx=512, type_k=k, type_v=v, flash_attn=True, verbose=False)
assert type(llm) is llama_cpp.Llama
print(len(llm("hello", max_tokens=8, temperature=0)["choices"]))
kvarn.install()
assert llama_cpp.Llama is kvarn.Llama
print(llama_cpp.Llama({tiny()!r}, kv_type="kvarn2", verbose=False).kv_size.keys)
"""
    done = in_new_process(code)
    assert done.stdout.split() == ["1", "kvarn2"], done.stderr


@pytest.mark.llama
def test_server_arguments():
    import kvarn
    from kvarn.server import rewrite

    ids = ["--type_k", str(kvarn.KVARN4), "--type_v", str(kvarn.KVARN2)]
    assert rewrite(["--model", "m", "--kv_type", "kvarn"]) \
        == ["--model", "m", *ids, "--flash_attn", "true", "--logits_all", "false"]
    assert rewrite(["--type_k=kvarn4", "--type_v=kvarn2", "--flash_attn", "true", "--logits_all=true"]) \
        == ["--flash_attn", "true", "--logits_all=true", *ids]
    assert rewrite(["--type_k", "1"]) == ["--type_k", "1", "--logits_all", "false"]
    for bad, said in ((["--kv_type", "x"], "unknown kv_type"), (["--type_k", "x"], "unknown cache type"),
                      (["--kv_type"], "needs a value"), (["--kv_type", "kvarn", "--type_k", "f16"], "not both")):
        with pytest.raises(ValueError, match=said):
            rewrite(bad)
