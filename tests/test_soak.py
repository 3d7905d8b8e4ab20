"""test_soak.py - two minutes of soak.py: eight slots, every answer right, no growth. Half an hour: `make soak`.

SPDX-License-Identifier: MIT
"""

import pytest

pytestmark = [pytest.mark.tools, pytest.mark.slow]

SECONDS = 120


def test_mixed_load(bin_dir):
    pytest.importorskip("gguf", reason="gguf writes the draft model; `make test` installs it")
    import soak

    rows, failures = soak.soak(SECONDS, soak.SETUPS)
    assert not failures, "\n".join(failures)
    for row in rows:
        assert row["answers_checked"] > 0, f"nothing was answered: {row}"
