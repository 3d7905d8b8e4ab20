"""test_metal_device.py - GGML_OP_KVARN on a real Apple GPU against the CPU, by upstream's test-backend-ops.

SPDX-License-Identifier: MIT
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.metal, pytest.mark.upstream, pytest.mark.slow]


def run(folder: Path, **environment: str) -> "tuple[list[str], str]":
    """Failed cases and everything that was said."""
    if sys.platform != "darwin":
        pytest.skip("no Apple GPU here; tests/test_metal.py runs the kernels on the CPU")
    done = subprocess.run([folder/"test-backend-ops", "test", "-b", "MTL0", "-o", "KVARN"], capture_output=True, text=True,
                          env={**os.environ, **environment})
    said = done.stdout + done.stderr
    failed = [line for line in said.splitlines() if "FAIL" in line or "not supported" in line]
    return failed or [said[-2000:]] * (done.returncode != 0), said


def test_every_case_on_the_gpu(test_bin_dir):
    failed, said = run(test_bin_dir)
    assert not failed, "\n".join(failed[:20])
    assert said.count("KVARN(") >= 100, said[-2000:]


@pytest.mark.xfail(reason="not the default: nobody knows yet whether Apple's GPUs keep f16 subnormals", strict=False)
def test_codes_as_subnormals(test_bin_dir):
    failed, _ = run(test_bin_dir, KVARN_METAL_TINY="1")
    assert not failed, "\n".join(failed[:20])
