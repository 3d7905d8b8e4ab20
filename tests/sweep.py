"""sweep.py - every architecture of llama.cpp on a kvarn cache: 128 models (900 MB) that upstream's test-llama-archs makes.

    python tests/sweep.py                    all of them, 3 to 6 minutes on two busy cores; exit status 1 if one fails
    python tests/sweep.py llama qwen35       some
    python tests/sweep.py --models FOLDER    models made before: test-llama-archs -o FOLDER -s 1
    python tests/sweep.py --write docs/models.md    the table

Per model, in a process of its own: logits with exact tiles equal to those of an f16 cache, logits with kvarn4/kvarn2 finite and
near, and upstream's test-save-load-state with these types. A model that kvarn cannot serve must be refused with kvarn's reason.

SPDX-License-Identifier: MIT
"""

import argparse
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

KEYS, VALUES = "kvarn4", "kvarn2"
N_PROMPT, N_TEXT = 300, 30
N_LEARNED = 256                                   # these models have learned positions, and no more than that
LEARNED_POSITIONS = ("gpt2", "mpt", "starcoder")
NEAR = 0.05                                       # the weights are small: q4_0 makes 5e-3 at worst
TIME_LIMIT = 300


def feeds(path: str, keys: str, values: str):
    """(logits, what the context is like); logits are None if the model keeps no cache."""
    import llama_cpp
    import numpy as np

    import llama_session

    short = Path(path).name.split("-")[0] in LEARNED_POSITIONS
    n_prompt = N_LEARNED - N_TEXT if short else N_PROMPT
    with llama_session.Context(path, keys, values, n_ctx=N_LEARNED if short else 512) as context:
        if not context.memory:
            return None, ()
        log = "\n".join(context.creation_log)
        kinds = {"tiles": "kvarn: keys" in log, "window": "is not for a sliding window" in log,
                 "hybrid": llama_cpp.llama_model_is_hybrid(llama_session.model(path))}
        prompt = np.random.default_rng(1).integers(3, context.n_vocab - 1, n_prompt).tolist()
        return context.greedy(prompt, N_TEXT)[1], [kind for kind, is_so in kinds.items() if is_so]


def inspect(path: str) -> "tuple[str, str, list[str]]":
    """("pass" | "refused" | "unused" | "fail", reason, what the context is like)"""
    import numpy as np

    import llama_session

    wanted, _ = feeds(path, "f16", "f16")
    if wanted is None:
        return "unused", "it keeps no cache", []
    try:
        try:
            real, kinds = feeds(path, KEYS, VALUES)
        except llama_session.Refused as refused:
            if "different K" not in str(refused):   # upstream's own check of the pair; a pair of equal types gets kvarn's
                raise
            real, kinds = feeds(path, KEYS, KEYS)
    except llama_session.Refused as refused:
        is_clear = len(refused.errors) == 1 and ("kvarn" in str(refused) or "flash_attn" in str(refused))
        return ("refused" if is_clear else "fail"), str(refused).split("context: ")[-1], []
    if "tiles" not in kinds:
        return "unused", "its attention sees windows only, which stay f16" if kinds else "its state has a fixed size", kinds
    os.environ["KVARN_TEST_EXACT"] = "1"
    exact, _ = feeds(path, KEYS, VALUES)
    if not (exact == wanted).all():
        return "fail", f"exact tiles: NMSE {llama_session.nmse(wanted, exact):.1e} against f16, must be 0", kinds
    error = llama_session.nmse(wanted[0], real[0])
    if not np.isfinite(real).all() or not error < NEAR:
        return "fail", f"{KEYS}/{VALUES}: NMSE {error:.1e} against f16, must be below {NEAR}", kinds
    return "pass", f"NMSE {error:.1e}", kinds


def save_load(program: Path, path: str, keys: str = KEYS, values: str = VALUES, last: int = 8) -> "list[int]":
    """Numbers of the tests of upstream's test-save-load-state that pass, of 1 to `last`."""
    command = [program, "-m", path, "-fa", "on", "-b", "400", "-c", "1024", "-n", "64", "-t", "1", "-ctk", keys, "-ctv", values]
    with tempfile.TemporaryDirectory() as folder:   # it writes a state into the current one
        done = subprocess.run(list(map(str, command)), cwd=folder, capture_output=True, text=True, errors="replace",
                              timeout=TIME_LIMIT, env={**os.environ, **whole_log()})
    parts = re.split(r"=== Test (\d)", done.stdout + done.stderr)
    return [int(number) for number, said in zip(parts[1::2], parts[2::2])
            if int(number) <= last and (re.search(r"^PASS", said, re.M) or (number == "1" and "error" not in said))]


@functools.lru_cache(maxsize=None)
def whole_log() -> dict:
    import conftest

    return conftest.flush_log(Path(tempfile.mkdtemp(prefix="kvarn-log-")))


def check(folder: Path, path: str) -> "tuple[str, str, list[str]]":
    """inspect() in a process of its own, then test-save-load-state."""
    done = subprocess.run([sys.executable, __file__, "--one", path], capture_output=True, text=True, timeout=TIME_LIMIT)
    if done.returncode != 0:
        said = (done.stderr.strip() or "nothing was said").splitlines()[-1]
        return "fail", f"the process ended with {done.returncode}: {said}", []
    status, reason, kinds = json.loads(done.stdout.splitlines()[-1])
    if status == "pass" and Path(path).name.split("-")[0] not in LEARNED_POSITIONS:
        passed = save_load(folder/"test-save-load-state", path)
        if passed != [1, 2, 3, 4, 5, 6, 7, 8]:   # 9 switches flash attention off
            return "fail", f"of test-save-load-state only {passed} pass", kinds
    return status, reason, kinds


# ------------------------------------------------------------------------------------------------------- docs/models.md

HEAD = """# Models

Every architecture of the pinned llama.cpp, with keys {keys} and values {values}. Written by `python tests/sweep.py --write
docs/models.md`; the models are upstream's own of each kind (test-llama-archs: random weights, a few layers). "Runs" means: with
lossless tiles the logits are those of an f16 cache, to the bit, with real ones near them, and eight of upstream's tests of saved
states pass. That says nothing about what a real model answers: see [quality.md](quality.md).

Heads that draft the next tokens (MTP) have a cache of their own, which takes any type, too (`--cache-type-k-draft`). Contexts
that share the cache of another one are refused.

{counts}
"""
GROUPS = [
    ("pass", (), "Runs: all layers in tiles", ""),
    ("pass", ("window",), "Runs: layers that see everything in tiles, sliding windows in f16",
     "The log says so. With `swa_full` (`--swa-full`) the windows are caches of full size and in tiles, too."),
    ("pass", ("hybrid",), "Runs: attention layers in tiles, beside recurrent ones",
     "The recurrent state is llama.cpp's own, in f32."),
    ("pass", ("window", "hybrid"), "Runs: both", ""),
    ("unused", None, "Nothing to quantize", "The cache types are accepted and not used, as any other would be."),
    ("refused", None, "Refused", "When the context is created, with this line."),
]


def name_of(stem: str) -> "tuple[str, str]":
    """("qwen3moe", "moe") for the model file qwen3moe-moe.gguf"""
    name, _, variant = stem.rpartition("-")
    return name, variant


def table(results: "list[tuple[str, str, str, list[str]]]") -> str:
    """The page for (model, status, reason, kinds)."""
    def names(rows) -> str:
        variants: "dict[str, list[str]]" = {}
        for stem, *_ in rows:
            variants.setdefault(name_of(stem)[0], []).append(name_of(stem)[1])
        return ", ".join(f"{name} ({' and '.join(kinds).replace('moe', 'MoE')})" if kinds != ["dense"] else name
                         for name, kinds in sorted(variants.items()))

    n = {status: sum(row[1] == status for row in results) for status in ("pass", "unused", "refused", "fail")}
    counts = f"Of {len(results)} models {n['pass']} run, {n['unused']} have nothing to quantize, {n['refused']} are refused"
    text = HEAD.format(keys=KEYS, values=VALUES, counts=counts + (f", {n['fail']} fail." if n["fail"] else "."))
    for status, kinds, title, note in GROUPS:
        rows = [row for row in results if row[1] == status and (kinds is None or {*row[3]} - {"tiles"} == {*kinds})]
        if rows:
            text += f"\n## {title}\n\n" + (f"{note}\n\n" if note else "")
            if status == "pass":
                text += textwrap.fill(names(rows), 128, break_on_hyphens=False) + "\n"
            else:
                text += "| models | why |\n| --- | --- |\n"
                for reason in sorted({row[2] for row in rows}):
                    text += f"| {names(row for row in rows if row[2] == reason)} | {reason} |\n"
    for stem, status, reason, _ in results:
        if status == "fail":
            text += f"\nFails: {stem}: {reason}\n"
    return text


def title_in(page: str, stem: str) -> str:
    """Heading under which a page that table() wrote has a model."""
    name, variant = name_of(stem)
    wanted = re.compile(rf"(?:^|[ \n|]){re.escape(name)}(?:\s\(([^)]*)\))?(?=[,\n]| \|)")
    for part in page.split("\n## ")[1:]:
        title, _, text = part.partition("\n")
        for found in wanted.finditer(text):
            if variant in (found.group(1) or "dense").lower():
                return title
    return ""


def title_of(status: str, kinds: "list[str]") -> str:
    """Heading under which such a model belongs."""
    return next(title for one, which, title, _ in GROUPS
                if one == status and (which is None or {*kinds} - {"tiles"} == {*which}))


def main() -> int:
    import conftest

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="architectures; default: all")
    parser.add_argument("--models", type=Path, help="folder of models made before")
    parser.add_argument("--write", type=Path, metavar="FILE", help="writes the table of docs/models.md")
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
        counts, results = {}, []
        for number, path in enumerate(paths, 1):
            status, reason, kinds = check(folder, str(path))
            results.append((path.stem, status, reason, kinds))
            counts[status] = counts.get(status, 0) + 1
            print(f"{number:3}/{len(paths)} {path.stem:24} {status:8} {reason}", flush=True)
    if args.write:
        args.write.write_text(table(results))
    print(", ".join(f"{count} {status}" for status, count in sorted(counts.items())))
    return int("fail" in counts)


if __name__ == "__main__":
    sys.exit(main())
