"""test_cli.py - the command line tools of the install: they start, know the types, print them, and refuse what they do not know.

SPDX-License-Identifier: MIT
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from kvarn import cli, serve
from kvarn.cli import TOOLS

pytestmark = pytest.mark.tools
SCRIPTS = Path(sys.executable).parent


def run(*words, timeout: int = 120, **env) -> subprocess.CompletedProcess:
    return subprocess.run([str(word) for word in words], env={**os.environ, **env}, capture_output=True, text=True,
                          errors="replace", timeout=timeout, stdin=subprocess.DEVNULL)


def script(name: str) -> Path:
    path = SCRIPTS / name
    if not path.is_file():
        pytest.skip(f"{name} is not beside {sys.executable}: kvarn is not installed there")
    return path


@pytest.mark.parametrize("name", TOOLS)
def test_tool_starts(name):
    flag = "--help" if name in ("llama-bench", "llama-batched-bench") else "--version"
    done = run(script(name), flag)
    assert done.returncode == 0, done.stderr
    assert done.stdout + done.stderr


@pytest.mark.parametrize("name", [name for name in TOOLS if name != "llama-bench"])
def test_help_lists_the_types(name):
    said = run(script(name), "--help").stdout
    assert "kvarn2" in said and "kvarn4" in said


@pytest.mark.parametrize("name", TOOLS)
def test_unknown_cache_type_is_one_error(name, tiny):
    done = run(script(name), "-m", tiny(), "--cache-type-k", "kvarn7")
    assert done.returncode == 1, "an error is an exit status, not a crash"
    wanted = "invalid parameter for argument: --cache-type-k" if name == "llama-bench" else "kvarn7"
    said = [line for line in (done.stdout + done.stderr).splitlines() if wanted in line]
    assert len(said) == 1, done.stdout + done.stderr


@pytest.mark.parametrize("keys, values", [("kvarn4", "kvarn2"), ("kvarn2", "f16"), ("q8_0", "kvarn3")])
def test_bench_prints_type_names(tiny, keys, values):
    done = run(script("llama-bench"), "-m", tiny(), "-ctk", keys, "-ctv", values, "-fa", "1", "-p", "200", "-n", "8", "-d", "130",
               "-r", "1", "-o", "json")
    assert done.returncode == 0, done.stderr
    for row in json.loads(done.stdout):
        assert (row["type_k"], row["type_v"]) == (keys, values)
        assert row["avg_ts"] > 0


def test_perplexity_runs(tiny, tmp_path, whole_log):
    text = tmp_path / "text.txt"
    text.write_text("All work and no play makes Jack a dull boy. " * 60)
    done = run(script("llama-perplexity"), "-m", tiny(), "-f", text, "-c", "512", "-b", "512", "-ub", "128", "-fa", "on",
               "-ctk", "kvarn4", "-ctv", "kvarn4", **whole_log)
    assert done.returncode == 0, done.stderr
    assert "Final estimate: PPL" in done.stdout + done.stderr


def test_memory_log_names_types_and_sizes(tiny, whole_log):
    done = run(script("llama-completion"), "-m", tiny(), "-c", "2048", "-n", "4", "-p", "hello", "-no-cnv", "--verbose",
               "-ctk", "kvarn4", "-ctv", "kvarn2", **whole_log)
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stderr.splitlines() if "K (kvarn4)" in line)
    assert "V (kvarn2)" in line
    assert "kvarn: tail" in done.stderr


def test_refused_context_ends_with_one_reason(tiny, whole_log):
    done = run(script("llama-completion"), "-m", tiny(head_dim=72), "-n", "4", "-p", "hello", "-no-cnv", "-ctk", "kvarn4",
               **whole_log)
    assert done.returncode == 1, "a refusal is an exit status, not a crash"
    assert "72" in done.stderr


def test_tool_and_env(lib_dir):
    assert run(script("kvarn"), "tool", "llama-bench", "--help").returncode == 0
    said = run(script("kvarn"), "env").stdout
    assert f"export LLAMA_CPP_LIB_PATH={lib_dir.resolve()}" in said and "export MTMD_CPP_LIB=" in said
    assert "kvarn 0." in run(script("kvarn"), "--version").stdout
    wrong = run(script("kvarn"), "tool", "llama-quantise")
    assert wrong.returncode == 2 and "llama-bench" in wrong.stderr


def test_missing_tools_are_named(tmp_path):
    done = run(script("llama-cli"), "--version", KVARN_LIB_PATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith(f"kvarn: {tmp_path} has no llama-cli")


@pytest.mark.llama
def test_demo_on_an_own_model(tiny):
    done = run(script("kvarn"), "demo", "--model", tiny(), "--tokens", "24", "--caches", "f16,kvarn")
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["cache", "KV", "MiB", "bits/value", "tok/s", "bytes", "like", "f16"] in rows
    assert any(row[:1] == ["kvarn4/kvarn2"] for row in rows)


@pytest.mark.llama
def test_demo_and_eval_print_json(tiny, tmp_path):
    done = run(script("kvarn"), "demo", "--model", tiny(), "--tokens", "8", "--caches", "f16,kvarn", "--json")
    assert [row["cache"] for row in json.loads(done.stdout)] == ["f16", "kvarn4/kvarn2"], done.stderr
    text = tmp_path/"text.txt"
    text.write_text("All work and no play makes Jack a dull boy. " * 60)
    done = run(script("kvarn"), "eval", tiny(), "--text", text, "--ctx", "256", "--chunks", "1", "--decode", "8", "--greedy", "0",
               "--caches", "kvarn2", "--out", tmp_path/"out", "--json")
    assert done.returncode == 0, done.stderr
    assert [(row["kv"], row["setting"]) for row in json.loads(done.stdout)] \
        == [("f16", "shipped"), ("kvarn2", "shipped"), ("kvarn2", "no tail")]


@pytest.mark.llama
@pytest.mark.parametrize("words, said", [
    (["--caches", "f16,kvarn8"], "kvarn: unknown kv_type 'kvarn8'"),
    (["--model", "no-such.gguf"], "kvarn: Model path does not exist: no-such.gguf"),
])
def test_demo_errors_are_one_line(words, said):
    done = run(script("kvarn"), "demo", *words)
    assert done.returncode == 1
    assert done.stderr.strip().startswith(said) and len(done.stderr.strip().splitlines()) == 1


# ------------------------------------------------------------------------------------- help, completion, serve, patch


@pytest.mark.parametrize("name", [name for name in cli.COMMANDS])
def test_every_command_explains_itself_with_an_example(name, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0 and f"usage: kvarn {name}" in said
    assert "example" in said and f"kvarn {name}" in said.split("example")[1]


def test_help_lists_commands_and_exit_codes_and_imports_none(capsys):
    code = "import sys, kvarn.cli\ntry: kvarn.cli.main(['--help'])\nexcept SystemExit: print([m for m in sys.modules if " \
           "m.startswith('kvarn.') or m in ('numpy', 'gguf', 'rich', 'llama_cpp', 'importlib.metadata')])"
    done = run(sys.executable, "-c", code)
    assert done.stdout.splitlines()[-1] == "['kvarn.cli']"
    for name in cli.COMMANDS:
        assert f"    {name}" in done.stdout
    assert "exit status: 0 done, 1 refused or failed" in done.stdout and "130 interrupted" in done.stdout


@pytest.mark.parametrize("words, wanted", [
    (["kvarn", "pl"], ["plan"]), (["kvarn", "plan", "--vr"], ["--vram"]), (["kvarn", "completion", "z"], ["zsh"]),
    (["kvarn", "serve", "--po"], ["--port"]), (["kvarn", "patch", "rev"], ["revert"]),
])
def test_completion_in_bash(words, wanted, tmp_path):
    script_file = tmp_path/"kvarn.bash"
    script_file.write_text(run(sys.executable, "-m", "kvarn.cli", "completion", "bash").stdout)
    done = run("bash", "-c", f"source {script_file}; COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; _kvarn; "
               "printf '%s\\n' \"${COMPREPLY[@]}\"")
    assert done.stdout.split() == wanted, done.stderr


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_completion_scripts_know_every_command(shell, capsys):
    assert cli.main(["completion", shell]) == 0
    said = capsys.readouterr().out
    for name in cli.COMMANDS:
        assert name in said
    program = shutil.which(shell)
    if program:
        assert run(program, "-n", "-c", said).returncode == 0


def test_serve_speaks_both_servers_languages():
    args = cli.build_parser({"serve"}).parse_args(["serve", "m.gguf", "--kv", "kvarn", "--port", "81", "--threads", "3"])
    args.rest = ["-np", "4"]
    assert serve.server_arguments(args, 4096)[:16] == ["-m", "m.gguf", "-c", "4096", "-ctk", "kvarn4", "-ctv", "kvarn2", "--host",
                                                  "127.0.0.1", "--port", "81", "-fa", "on", "-t", "3"]
    assert serve.server_arguments(args, 4096)[-2:] == ["-np", "4"]
    assert serve.python_arguments(args, 4096)[:6] == ["--model", "m.gguf", "--n_ctx", "4096", "--kv_type", "kvarn"]


def test_serve_answers(tiny):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([str(script("kvarn")), "serve", tiny(), "--kv", "kvarn2", "--ctx", "1024", "--port", str(port),
                                "--threads", "1", "--", "-np", "1"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True, errors="replace")
    try:
        said = process.stderr.readline()
        assert said.startswith(f"kvarn: http://127.0.0.1:{port}, cache kvarn2, 1024 tokens"), said
        threading.Thread(target=process.stderr.read, daemon=True).start()
        body = json.dumps({"prompt": "hello", "max_tokens": 4}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"})
        for _ in range(600):
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    assert json.load(answer)["usage"]["completion_tokens"] == 4
                break
            except (urllib.error.URLError, ConnectionError):
                assert process.poll() is None, "the server ended"
                time.sleep(0.1)
        else:
            raise AssertionError("the server does not answer")
    finally:
        process.terminate()
        process.wait(60)


def test_patch_command_takes_options_anywhere(tmp_path):
    for words in (["revert", "--discard", tmp_path], ["revert", tmp_path, "--discard"]):
        done = run(script("kvarn"), "patch", *words)
        assert done.returncode == 1
        assert done.stderr.strip() == f"kvarn: {tmp_path} is not patched (no .kvarn-patched); nothing to revert"
    assert "| all |" in run(script("kvarn"), "patch", "table").stdout
