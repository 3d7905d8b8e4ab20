"""test_faults.py - memory runs out, a batch is given up half-way: one line and an error code, and the conversation goes on.

The programs of test_fuzz.py with allocations that fail: of host memory in the cache's own work (late seals, compaction, states)
and of buffers. What the kvarn cache kept of a failed batch is given to the f16 twin; from then on both must agree again.

SPDX-License-Identifier: MIT
"""

import pytest

import fuzz_program
from kernel_requests import patched_tree

pytestmark = [pytest.mark.llama, pytest.mark.slow]

SMALL = dict(n_layer=1, n_head=4, n_head_kv=2, n_embd=32, n_ff=32)
FOUND = sorted((fuzz_program.FUZZ/"found").glob("*.txt"))

SETTINGS = [
    "n_ctx=512 n_ubatch=128 n_seq=3 unified=1 keys=2 values=2 exact=1 strict=0 sink=0",
    "n_ctx=512 n_ubatch=64 n_seq=3 unified=0 keys=4 values=2 exact=1 strict=1 sink=128",
    "n_ctx=512 n_ubatch=200 n_seq=3 unified=1 keys=4 values=16 exact=1 strict=0 sink=0",
]


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory, lib_dir):
    return fuzz_program.Fuzzer(tmp_path_factory.mktemp("fuzz"), patched_tree(), lib_dir)


@pytest.fixture(scope="module")
def model(tiny):
    return tiny("llama", 16, **SMALL)


@pytest.mark.parametrize("program", FOUND, ids=lambda path: path.stem)
def test_programs_that_failed_once(fuzzer, model, program):
    fuzzer.replay(model, program)


def test_allocations_fail(fuzzer, model):
    agreed, output = fuzzer.run(model, 12000, faults=1)
    assert agreed, output
    counted = fuzz_program.numbers(output)
    assert counted["faults"] > 40 and counted["aborted"] > 20, output


@pytest.mark.parametrize("settings", SETTINGS)
def test_context_without_memory(fuzzer, model, tmp_path, settings):
    """Each allocation of a context in turn; then a conversation in the same process."""
    program = tmp_path/"program.txt"
    program.write_text(f"set {settings}\ndecode 1 0 0 300\ndecode 2 1 1 20 2 90\ncut 0 30\ndecode 3 0 0 50\ncheck\n")
    assert fuzzer.replay(model, program, "create")["faults"] >= 2


@pytest.mark.parametrize("settings", SETTINGS)
def test_batch_given_up_at_every_node(fuzzer, model, tmp_path, settings):
    """A batch that fills two tiles, the first with tokens of an earlier batch: given up at every node of its graphs."""
    lines = [f"set {settings}"]
    for after in range(120):
        lines += ["clear 0", "decode 1 0 1 60 0 100", f"abort {after} {after} 0 250", "check", "decode 3 0 0 60 1 70", "check"]
    program = tmp_path/"program.txt"
    program.write_text("\n".join(lines) + "\n")
    counted = fuzzer.replay(model, program)
    assert counted["aborted"] >= 40, counted
