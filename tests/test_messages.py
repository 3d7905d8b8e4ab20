"""test_messages.py - what a person reads when something is wrong: (input, exit status, message), for every command and for Llama.

A message is one line, names what was given, and says what to do instead. SPDX-License-Identifier: MIT
"""

import os
import re

import pytest

from kvarn import cli

NO_CACHE = "unknown kv_type 'q9': use kvarn (= kvarn4/kvarn2), one of kvarn2, kvarn3, kvarn4, "

# what is typed after kvarn; {model} is a good model, {odd} one with heads of 72 channels, {text} no model, {cut} half a header
TABLE = [
    # a model that is not there, or none
    ("chat none.gguf", 1, "no model at none.gguf"),
    ("run none.gguf hello", 1, "no model at none.gguf"),
    ("serve none.gguf", 1, "no model at none.gguf"),
    ("plan none.gguf --vram 24G", 1, "no model at none.gguf"),
    ("demo --model none.gguf", 1, "Model path does not exist: none.gguf"),
    ("bench --model none.gguf --depths 0", 1, "no model at none.gguf"),
    ("eval none.gguf", 1, "no model at none.gguf"),
    ("run {text} hello", 1, "{text} is no GGUF file (it begins with b'All ')"),
    ("plan {text} --vram 24G", 1, "{text} is no GGUF file (it begins with b'All ')"),
    ("plan {cut} --vram 24G", 1, "{cut} ends inside its header; is the download complete?"),
    ("eval {text}", 1, "cannot load {text}: "),
    # cache types
    ("chat {model} --kv q9", 1, NO_CACHE),
    ("run {model} hello --kv q9", 1, NO_CACHE),
    ("serve {model} --kv q9", 1, NO_CACHE),
    ("plan {model} --vram 24G --caches f16,q9", 1, NO_CACHE),
    ("demo --caches q9", 1, NO_CACHE),
    ("bench --caches q9", 1, NO_CACHE),
    ("eval --caches q9", 1, NO_CACHE),
    ("run {odd} hello --ctx 256 --kv kvarn4", 1, "Failed to create llama_context: "),
    ("bench --model {odd} --depths 0 --caches kvarn4", 1, "no context with cache type kvarn4: "),
    # numbers
    ("run {model} hello --ctx -1", 1, "--ctx and --max-tokens must be 0 or more"),
    ("chat {model} --threads 0", 1, "--threads 0: give 1 or more"),
    ("run {model} hello --sink -1", 1, "--sink -1: give 0 or more tokens"),
    ("serve {model} --sink -1", 1, "--sink -1: give 0 or more tokens"),
    ("serve {model} --port 99999", 1, "--port 99999: give a number from 1 to 65535"),
    ("serve {model} --ctx -5", 1, "--ctx must be 0 or more"),
    ("plan {model}", 1, "give --vram SIZE or --ram SIZE, what must fit, or --ctx N"),
    ("plan {model} --vram 24G --ram 24G", 1, "give --vram or --ram, not both"),
    ("plan {model} --ram 24G --cpu-moe", 1, "--gpu-layers and --cpu-moe go with --vram"),
    ("plan {model} --vram 24G --sink -1", 1, "--sink -1: give 0 or more tokens"),
    ("plan {model} --vram lots", 1, "--vram lots: give a size like 24G or 8192M"),
    ("plan {model} --vram 1G --reserve much", 1, "--reserve much: give a size like 24G or 8192M"),
    ("plan {model} --vram 1G --ctx 0 --sequences 0", 1, "--ctx, --ubatch and --sequences must be 1 or more"),
    ("plan {model} --vram 1G --plot plan.doc", 1, "--plot plan.doc: name a .png, .svg or .pdf file"),
    ("plan {model} --vram 1M", 1, "no cache type fits into 0.00 GiB: with "),
    ("bench --depths x", 1, "--depths x: give whole numbers from 0 on, separated by commas"),
    ("bench --cpu-time --threads 2", 1, "--cpu-time counts what all threads use, waiting included; add --threads 1"),
    ("eval --ctx 100", 1, "--ctx 100 is too short: at least 256, and more than --decode 256"),
    ("eval --text none.txt", 1, "no text at none.txt"),
    # prompts, trees, tools
    ("run {model}", 1, "no prompt: give one after the model or through a pipe; kvarn chat is for a conversation"),
    ("patch revert {empty}", 1, "{empty} is not patched (no .kvarn-patched); nothing to revert"),
    ("patch check {empty}", 1, "{empty} is no llama.cpp tree (no ggml/CMakeLists.txt)"),
    ("patch apply", 2, "apply needs the llama.cpp tree: kvarn patch apply TREE"),
    # usage: argparse's own form, status 2
    ("", 2, "the following arguments are required: COMMAND"),
    ("chat", 2, "the following arguments are required: MODEL.gguf"),
    ("plan", 2, "the following arguments are required: MODEL.gguf"),
    ("frob", 2, "invalid choice: 'frob'"),
    ("chat {model} --frob", 2, "unrecognized arguments: --frob; kvarn chat --help lists what it takes"),
    ("chat {model} hello", 2, "unrecognized arguments: hello; kvarn chat --help lists what it takes"),
    ("run {model} --think loud hello", 2, "invalid choice: 'loud'"),
    ("tool llama-quantise", 2, "invalid choice: 'llama-quantise'"),
    ("completion csh", 2, "invalid choice: 'csh'"),
    ("doctor --frob", 2, "unrecognized arguments: --frob; kvarn doctor --help lists what it takes"),
    ("env x", 2, "unrecognized arguments: x; kvarn env --help lists what it takes"),
]


@pytest.fixture(scope="module")
def places(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("messages")
    (folder/"text.gguf").write_text("All work and no play makes Jack a dull boy. "*100)
    with open(tiny(), "rb") as model:
        (folder/"cut.gguf").write_bytes(model.read(3000))
    (folder/"empty").mkdir()
    return {"model": tiny(), "odd": tiny(head_dim=72), "text": str(folder/"text.gguf"), "cut": str(folder/"cut.gguf"),
            "empty": str(folder/"empty")}


def typed(words: "list[str]", monkeypatch, capfd) -> "tuple[int, str]":
    """(exit status, stderr)"""
    monkeypatch.setattr("sys.stdin", open(os.devnull))
    try:
        status = cli.main(words)
    except SystemExit as ended:
        status = int(ended.code or 0)
    return status, capfd.readouterr().err


@pytest.mark.llama
@pytest.mark.parametrize("line, status, message", TABLE, ids=[line or "(nothing)" for line, _, _ in TABLE])
def test_command(line, status, message, places, monkeypatch, capfd):
    message = message.format(**places)
    found, said = typed(line.format(**places).split(), monkeypatch, capfd)
    lines = [one for one in said.splitlines() if one.strip()]
    assert found == status, said
    if status == 1 or "patch" in line:
        assert lines[-1].startswith(f"kvarn: {message}"), said
        assert not [one for one in lines[:-1] if re.search("error|Traceback", one)], said
        assert "eval" in line or len(lines) == 1, f"more than one line: {said}"
    else:
        assert message in lines[-1] and lines[0].startswith("usage: kvarn"), said


def test_every_command_is_in_the_table():
    """env and doctor can only fail at usage, or where nothing is installed (test_library_messages)."""
    named = {line.split()[0] for line, _, _ in TABLE if line}
    assert set(cli.COMMANDS) <= named


@pytest.mark.parametrize("words", [["env"], ["tool", "llama-bench"], ["chat", "{model}"], ["demo", "--quick"]])
def test_without_libraries(words, tiny, tmp_path, monkeypatch, capfd):
    import subprocess
    import sys

    done = subprocess.run([sys.executable, "-m", "kvarn.cli", *(word.replace("{model}", tiny()) for word in words)],
                          env={**os.environ, "KVARN_LIB_PATH": str(tmp_path)}, capture_output=True, text=True, timeout=120)
    if words == ["env"]:                                    # says where they would be
        assert done.returncode == 0
        return
    assert done.returncode == 1 and done.stderr.startswith(f"kvarn: {tmp_path} has no ")
    assert len(done.stderr.splitlines()) == 1


# settings of Llama, and the error they give
LLAMA_TABLE = [
    ({"kv_type": "kvarn9"}, ValueError, "unknown kv_type 'kvarn9': use kvarn (= kvarn4/kvarn2), one of kvarn2"),
    ({"kv_type": 43}, ValueError, "kv_type is a name, not 43; for ids use type_k and type_v"),
    ({"kv_type": "kvarn", "type_k": "f16"}, ValueError, "give kv_type, or type_k and type_v, not both"),
    ({"type_k": "q3"}, ValueError, "unknown cache type 'q3': use one of kvarn2, kvarn3, kvarn4, f16"),
    ({"type_v": 200}, ValueError, "200 is no type id of "),
    ({"type_v": 10}, ValueError, "type q2_K (id 10) is no cache type: use one of kvarn2"),
    ({"kv_type": "kvarn", "flash_attn": False}, ValueError, "cache type kvarn4/kvarn2 needs flash attention; "),
    ({"model_path": "none.gguf"}, ValueError, "Model path does not exist: none.gguf"),
]


@pytest.mark.llama
@pytest.mark.parametrize("settings, kind, message", LLAMA_TABLE, ids=[str(settings) for settings, _, _ in LLAMA_TABLE])
def test_llama(settings, kind, message, tiny):
    from kvarn import Llama

    with pytest.raises(kind) as raised:
        Llama(**{"model_path": tiny(), "verbose": False, **settings})
    assert str(raised.value).startswith(message) and "\n" not in str(raised.value)
