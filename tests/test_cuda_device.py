"""test_cuda_device.py - a build with CUDA on a real NVIDIA GPU: GGML_OP_KVARN against the CPU, and the embedded model's answers.

SPDX-License-Identifier: MIT
"""

import os
import subprocess
from pathlib import Path

import pytest

pytestmark = [pytest.mark.cuda, pytest.mark.llama, pytest.mark.slow]


@pytest.fixture(scope="module", autouse=True)
def gpu() -> str:
    """Name of the first CUDA device; without one there is nothing to test."""
    import kvarn
    from kvarn.doctor import devices

    kvarn.load()
    found = [device["name"] for device in devices(kvarn.lib_path()) if device["name"].startswith("CUDA")]
    if not found:
        pytest.skip('no NVIDIA GPU, or a build without it: CMAKE_ARGS="-DGGML_CUDA=on" make test ARGS="-m cuda"')
    return found[0]


@pytest.mark.upstream
def test_every_case_on_the_gpu(test_bin_dir: Path, lib_dir: Path, gpu: str):
    done = subprocess.run([test_bin_dir/"test-backend-ops", "test", "-b", gpu, "-o", "KVARN"], capture_output=True, text=True,
                          env={**os.environ, "LD_LIBRARY_PATH": str(lib_dir)})
    said = done.stdout + done.stderr
    failed = [line for line in said.splitlines() if "FAIL" in line or "not supported" in line]
    assert done.returncode == 0 and not failed, "\n".join(failed[:20]) or said[-2000:]
    assert said.count("KVARN(") >= 100, said[-2000:]


@pytest.mark.parametrize("cache", ["kvarn4/kvarn2", "kvarn2", "f16/kvarn2"])
def test_embedded_model_solves_its_problem(cache: str):
    """The prompt is 1835 tokens: of its ubatches the last has 43 rows, which PREP takes and ATTN does not."""
    from kvarn import embedded
    from kvarn.llama import Llama

    llm = Llama(str(embedded.path()), kv_type=cache, n_ctx=4096, n_ubatch=128, n_gpu_layers=-1, flash_attn=True, verbose=False)
    problem = next(iter(embedded.problems("hop", 1, 20261, 900, 1600)))
    text = llm(problem.prompt, max_tokens=len(problem.answer), temperature=0.0, top_k=1)["choices"][0]["text"]
    llm.close()
    assert embedded.check(problem, text).exact, text[-200:]


@pytest.mark.parametrize("megabytes", [1, 160])
def test_windows_of_a_prompt_change_no_value(tiny, monkeypatch, megabytes: int):
    """A window of 1 MiB holds one of the two heads, one of 160 MiB both; what differs is the order of sums."""
    session = pytest.importorskip("llama_session", exc_type=ImportError)
    monkeypatch.setenv("KVARN_TEST_EXACT", "1")
    monkeypatch.setenv("KVARN_WINDOW", str(megabytes))
    path = tiny("llama", 128)
    tokens = [3 + i*7919 % 200 for i in range(1900)]

    def logits(keys: str, values: str):
        with session.Context(path, keys, values, n_ctx=2048, n_ubatch=512) as context:
            return context.feed(tokens)

    reference = logits("f16", "f16")
    assert session.nmse(reference, logits("kvarn4", "kvarn2")) < 1e-4
