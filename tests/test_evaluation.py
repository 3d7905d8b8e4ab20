"""test_evaluation.py - kvarn eval: every figure is there, f16 is exactly f16, more bits are closer, refusals are one line.

SPDX-License-Identifier: MIT
"""

import csv
import subprocess
import sys

import pytest

import tiny_model

pytestmark = pytest.mark.llama


def evaluate(*arguments):
    return subprocess.run([sys.executable, "-m", "kvarn.cli", "eval", *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model.write(tmp_path_factory.mktemp("models")/"m.gguf", gain=0.8)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts")/"t.txt"
    path.write_text("".join(f"{i*i % 97} is what follows {i}. " for i in range(400)))
    return path


def test_a_text(model, text, tmp_path):
    out = tmp_path/"out"
    done = evaluate(model, "--text", text, "--ctx", 640, "--chunks", 1, "--decode", 16, "--greedy", 16, "--threads", 2,
                    "--caches", "q8_0,kvarn4,kvarn2", "--out", out)
    assert done.returncode == 0, done.stderr
    rows = {(row["kv"], row["setting"]): row for row in csv.DictReader((out/"eval.csv").open())}
    ours = [(kv, setting) for kv in ("kvarn4", "kvarn2") for setting in ("shipped", "no tail")]
    assert set(rows) == {("f16", "shipped"), ("q8_0", "shipped"), *ours}
    f16 = rows["f16", "shipped"]
    assert float(f16["kld_mean"]) == 0 and float(f16["same_top"]) == 1 and float(f16["bpv"]) == 16
    assert int(f16["tokens"]) == 640 - 16 - 256 and int(f16["decode_tokens"]) == 16
    kld = {key: float(row["kld_mean"]) for key, row in rows.items()}
    assert 0 < kld["kvarn4", "no tail"] < kld["kvarn2", "no tail"]
    assert kld["kvarn2", "shipped"] < kld["kvarn2", "no tail"]
    assert float(rows["kvarn2", "no tail"]["bpv"]) == pytest.approx(2.375, abs=0.01)
    assert float(rows["kvarn2", "no tail"]["bpv_allocated"]) > float(rows["kvarn2", "no tail"]["bpv"])
    depth = list(csv.DictReader((out/"depth.csv").open()))
    assert {row["cache"] for row in depth} == {f"{kv} {setting}" for kv, setting in rows}
    error = {row["cache"]: float(row["error"]) for row in depth if row["depth"] == "512"}
    assert error["f16 shipped"] == 0 < error["kvarn4 no tail"] < error["kvarn2 no tail"]
    assert "| kvarn2 |" in done.stdout and "No tail" in done.stdout
    assert (out/"eval.md").read_text().strip() in done.stdout
    assert (out/"depth.png").stat().st_size > 1000 and (out/"size.png").stat().st_size > 1000


@pytest.mark.slow
def test_the_embedded_model_answers_problems(tmp_path):
    done = evaluate("--ctx", 512, "--chunks", 1, "--decode", 8, "--greedy", 256, "--caches", "kvarn4/kvarn2", "--threads", 2,
                    "--out", tmp_path/"out")
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path/"out/eval.csv").open()))
    assert [row["answers"] for row in rows] == ["1"]*3
    assert rows[0]["answers_exact"] == "1" and rows[0]["steps_right"] == rows[0]["steps_total"]
    assert "steps right" in done.stdout


@pytest.mark.parametrize("arguments, line", [
    (["nowhere.gguf"], "kvarn: no model at nowhere.gguf"),
    (["--caches", "q9_9"], "kvarn: unknown kv_type 'q9_9'"),
    (["--ctx", "128"], "kvarn: --ctx 128 is too short"),
    (["--text", "nowhere.txt"], "kvarn: no text at nowhere.txt"),
])
def test_refusals(arguments, line, tmp_path):
    done = evaluate(*arguments, "--out", tmp_path/"out")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith(line)
    assert not (tmp_path/"out").exists()


def test_a_text_that_is_too_short(model, tmp_path):
    (tmp_path/"t.txt").write_text("short")
    done = evaluate(model, "--text", tmp_path/"t.txt", "--out", tmp_path/"out")
    assert done.returncode == 1 and "kvarn: the text has" in done.stderr
