"""sweep.py - every architecture of llama.cpp on a kvarn cache: 128 models (900 MB) that upstream's test-llama-archs makes.

    python tests/sweep.py                    all of them, 3 to 6 minutes on two busy cores; exit status 1 if one fails
    python tests/sweep.py llama qwen35       some
    python tests/sweep.py --models FOLDER    models made before: test-llama-archs -o FOLDER -s 1

Per model, in a process of its own: logits with exact tiles equal to those of an f16 cache, logits with kvarn4/kvarn2 finite and
near, and upstream's test-save-load-state with these types. A model that kvarn cannot serve must be refused with kvarn's reason.

SPDX-License-Identifier: MIT
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

KEYS, VALUES = "kvarn4", "kvarn2"
N_PROMPT, N_TEXT = 300, 30
N_LEARNED = 256                                   # these models have learned positions, and no more than that
LEARNED_POSITIONS = ("gpt2", "mpt", "starcoder")
NEAR = 0.05                                       # the weights are small: q4_0 makes 5e-3 at worst
N_TRIES = 5                                       # upstream's tools may exit before their log is written
TIME_LIMIT = 300


def feeds(path: str, keys: str, values: str):
    """(logits, whether tiles are in use); logits are None if the model keeps no cache."""
    import numpy as np

    import llama_session

    short = Path(path).name.split("-")[0] in LEARNED_POSITIONS
    n_prompt = N_LEARNED - N_TEXT if short else N_PROMPT
    with llama_session.Context(path, keys, values, n_ctx=N_LEARNED if short else 512) as context:
        if not context.memory:
            return None, False
        prompt = np.random.default_rng(1).integers(3, context.n_vocab - 1, n_prompt).tolist()
        return context.greedy(prompt, N_TEXT)[1], any("kvarn: keys" in line for line in context.creation_log)


def inspect(path: str) -> "tuple[str, str]":
    """("pass" | "refused" | "unused" | "fail", reason)"""
    import numpy as np

    import llama_session

    wanted, _ = feeds(path, "f16", "f16")
    if wanted is None:
        return "unused", "the model keeps no cache"
    try:
        try:
            real, is_used = feeds(path, KEYS, VALUES)
        except llama_session.Refused as refused:
            if "different K" not in str(refused):   # upstream's own check of the pair; a pair of equal types gets kvarn's
                raise
            real, is_used = feeds(path, KEYS, KEYS)
    except llama_session.Refused as refused:
        is_clear = len(refused.errors) == 1 and ("kvarn" in str(refused) or "flash_attn" in str(refused))
        return ("refused" if is_clear else "fail"), str(refused).split("context: ")[-1]
    if not is_used:
        return "unused", "no attention cache of full size"
    os.environ["KVARN_TEST_EXACT"] = "1"
    exact, _ = feeds(path, KEYS, VALUES)
    if not (exact == wanted).all():
        return "fail", f"exact tiles: NMSE {llama_session.nmse(wanted, exact):.1e} against f16, must be 0"
    error = llama_session.nmse(wanted[0], real[0])
    if not np.isfinite(real).all() or not error < NEAR:
        return "fail", f"{KEYS}/{VALUES}: NMSE {error:.1e} against f16, must be below {NEAR}"
    return "pass", f"NMSE {error:.1e}"


def save_load(program: Path, path: str, keys: str = KEYS, values: str = VALUES, last: int = 8) -> "list[int]":
    """Numbers of the tests of upstream's test-save-load-state that pass, of 1 to 9; tried again until the last one does."""
    command = [program, "-m", path, "-fa", "on", "-b", "400", "-c", "1024", "-n", "64", "-t", "1", "-ctk", keys, "-ctv", values]
    passed = []
    for _ in range(N_TRIES):
        with tempfile.TemporaryDirectory() as folder:   # it writes a state into the current one
            done = subprocess.run(list(map(str, command)), cwd=folder, capture_output=True, text=True, errors="replace",
                                  timeout=TIME_LIMIT)
        parts = re.split(r"=== Test (\d)", done.stdout + done.stderr)
        found = [int(number) for number, said in zip(parts[1::2], parts[2::2])
                 if re.search(r"^PASS", said, re.M) or (number == "1" and "error" not in said)]
        passed = max(passed, found, key=len)
        if last in passed:
            break
    return passed


def check(folder: Path, path: str) -> "tuple[str, str]":
    """inspect() in a process of its own, then test-save-load-state."""
    done = subprocess.run([sys.executable, __file__, "--one", path], capture_output=True, text=True, timeout=TIME_LIMIT)
    if done.returncode != 0:
        said = (done.stderr.strip() or "nothing was said").splitlines()[-1]
        return "fail", f"the process ended with {done.returncode}: {said}"
    status, reason = json.loads(done.stdout.splitlines()[-1])
    if status == "pass" and Path(path).name.split("-")[0] not in LEARNED_POSITIONS:
        passed = save_load(folder/"test-save-load-state", path)
        if passed[:8] != [1, 2, 3, 4, 5, 6, 7, 8]:   # 9 switches flash attention off
            return "fail", f"of test-save-load-state only {passed} pass"
    return status, reason


def main() -> int:
    import conftest

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="architectures; default: all")
    parser.add_argument("--models", type=Path, help="folder of models made before")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(inspect(args.one)))
        return 0
    folder = conftest.upstream_bin()
    if folder is None:
        parser.error("upstream's test programs are not built: `make test`, or set KVARN_TEST_BIN")
    with tempfile.TemporaryDirectory() as temporary:
        models = args.models or Path(temporary)
        if not args.models:
            print("making the models", flush=True)
            pattern = "|".join(f"^{name}$" for name in args.names)
            subprocess.run([folder/"test-llama-archs", "-o", models, "-s", "1", *(["-a", pattern] if pattern else [])],
                           check=True, capture_output=True)
        paths = sorted(path for path in models.glob("*.gguf") if not args.names or path.name.rsplit("-", 1)[0] in args.names)
        counts = {}
        for number, path in enumerate(paths, 1):
            status, reason = check(folder, str(path))
            counts[status] = counts.get(status, 0) + 1
            print(f"{number:3}/{len(paths)} {path.stem:24} {status:8} {reason}", flush=True)
    print(", ".join(f"{count} {status}" for status, count in sorted(counts.items())))
    return int("fail" in counts)


if __name__ == "__main__":
    sys.exit(main())
