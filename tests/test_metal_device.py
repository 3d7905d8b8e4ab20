"""test_metal_device.py - GGML_OP_KVARN on a real Apple GPU against the CPU, by upstream's test-backend-ops.

SPDX-License-Identifier: MIT
"""

import subprocess
import sys

import pytest

pytestmark = [pytest.mark.metal, pytest.mark.upstream, pytest.mark.slow]


def test_every_case_on_the_gpu(test_bin_dir):
    if sys.platform != "darwin":
        pytest.skip("no Apple GPU here; tests/test_metal.py runs the kernels on the CPU")
    done = subprocess.run([test_bin_dir/"test-backend-ops", "test", "-b", "MTL0", "-o", "KVARN"], capture_output=True, text=True)
    said = done.stdout + done.stderr
    failed = [line for line in said.splitlines() if "FAIL" in line]
    assert done.returncode == 0 and not failed, "\n".join(failed[:20]) or said[-2000:]
    assert "not supported" not in said, "\n".join([line for line in said.splitlines() if "not supported" in line][:5])
