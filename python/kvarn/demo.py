"""kvarn demo: the same problems decoded with four caches, side by side.

Every problem asks for a long chain of steps that keep looking things up in the context, so a cache that loses something shows it
in the answers. Decoding is greedy; all caches see the same prompts. With --model, a GGUF file of your own continues one prompt
instead, and every cache is compared with what f16 wrote.

SPDX-License-Identifier: MIT
"""

import argparse
import functools
import json
import os
import sys
import time
from typing import TYPE_CHECKING, Any, Callable, NamedTuple

from . import kvtype, tables
from .kv_info import KVSize
from .progress import Bar

if TYPE_CHECKING:
    from .embedded import Score

CACHES = ("f16", "q4_0", "kvarn4/kvarn2", "kvarn2")
FAMILIES = ("hop", "vm", "sort", "bank", "fsm", "dag")
SEED = 20261
N_CTX = 16384      # what the embedded model was trained for; the sizes in the table are for it
N_UBATCH = 128     # a smaller tail, the same for all caches
PROMPT = """Here is a list of twelve cities with the number of visitors each had last year, in no order. First sort the list, then
add the numbers up one by one and show every sum, then say which city lies in the middle.

Lisbon 612, Oslo 207, Turin 388, Ghent 145, Porto 431, Lyon 520, Graz 173, Bergen 96, Malmo 254, Seville 467, Brno 118, Leeds 339

Sorted:
"""


class Task(NamedTuple):
    """One prompt, and how its text is judged: judge(text) -> (steps right, steps, exact), or None."""

    prompt: str
    n_expected: int     # tokens the answer should have, for the progress bar
    n_max: int          # tokens after which decoding stops
    judge: "Callable[[str], Score] | None"


class Run(NamedTuple):
    """What one cache did."""

    cache: str
    size: KVSize
    texts: "list[bytes]"
    n_tokens: int
    seconds: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="short problems: under a minute on two cores")
    parser.add_argument("--model", metavar="FILE", help="your own GGUF instead of the embedded model")
    parser.add_argument("--prompt", default=PROMPT, help="with --model: the text to continue")
    parser.add_argument("--tokens", type=int, default=256, help="with --model: how many tokens to decode (default 256)")
    parser.add_argument("--caches", default=",".join(CACHES), help="kv types, the first is the reference (default %(default)s)")
    parser.add_argument("--threads", type=int, default=n_cores(), help="default %(default)s")
    parser.add_argument("--json", action="store_true", help="print JSON, with what every cache wrote")


def n_cores() -> int:
    """All cores of a small machine, half of the hardware threads of a larger one."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return count if count <= 4 else count//2


def embedded_tasks(quick: bool) -> "tuple[str, list[Task]]":
    from . import embedded

    tasks = []
    for family in FAMILIES:
        smallest, largest = (300, 500) if quick else (900, 1600)
        for problem in embedded.problems(family, 1, SEED, smallest, largest):
            n = len(problem.answer)
            tasks.append(Task(problem.prompt, n, n + n//4, functools.partial(embedded.check, problem)))
    return str(embedded.path()), tasks


def decode(model: str, cache: str, tasks: "list[Task]", threads: int) -> Run:
    from .llama import Llama, llama_cpp

    loader = Llama(model, vocab_only=True, verbose=False)
    prompts = [loader.tokenize(task.prompt.encode(), special=False) for task in tasks]
    loader.close()
    n_ctx = max(N_CTX, *(len(prompt) + task.n_max + 1 for prompt, task in zip(prompts, tasks)))
    llm = Llama(model, kv_type=cache, n_ctx=n_ctx, n_ubatch=N_UBATCH, n_threads=threads, n_threads_batch=threads,
                n_gpu_layers=-1, flash_attn=True, verbose=False)
    vocabulary = llama_cpp.llama_model_get_vocab(llm.model)
    texts, n_tokens, seconds = [], 0, 0.0
    for number, (prompt, task) in enumerate(zip(prompts, tasks)):
        bar = Bar(f"{cache:13s} {number + 1}/{len(tasks)}")
        bar.show(0, f"reading {len(prompt)} tokens")
        text, count, started = b"", 0, None
        llm.reset()  # type: ignore[no-untyped-call]
        for token in llm.generate(prompt, temp=0.0, top_k=1):
            if started is None:                       # the first token belongs to the prompt
                started = time.monotonic()
            if llama_cpp.llama_vocab_is_eog(vocabulary, token):
                break
            text += llm.detokenize([token], special=False)
            count += 1
            if count >= task.n_max:
                break
            taken = time.monotonic() - started
            bar.show(count/task.n_expected, f"{count:5d} tokens {count/taken if taken else 0:6.1f}/s  {last_line(text)}")
        taken = time.monotonic() - (started or time.monotonic())
        seconds += taken
        n_tokens += count
        texts.append(text)
        bar.close(f"{count:5d} tokens {count/taken if taken else 0:6.1f}/s  {verdict(task, text)}")
    size = llm.kv_size
    llm.close()
    return Run(cache, size, texts, n_tokens, seconds)


def last_line(text: bytes) -> str:
    line = text.decode(errors="replace").rstrip("\n").rpartition("\n")[2]
    return "".join(letter if letter.isprintable() else " " for letter in line[-48:])


def verdict(task: Task, text: bytes) -> str:
    if task.judge is None:
        return ""
    right, total, exact = task.judge(text.decode(errors="replace"))
    return "exact" if exact else f"wrong after {right} of {total} steps"


def table(runs: "list[Run]", tasks: "list[Task]") -> str:
    """Plain text, aligned."""
    judged = all(task.judge for task in tasks)
    head = ["cache", "KV MiB", "bits/value", "tok/s"] + (["steps right", "exact"] if judged else [f"bytes like {runs[0].cache}"])
    rows = []
    for run in runs:
        row = [kvtype.label(*kvtype.parse(run.cache)), f"{run.size.mib:.2f}", f"{run.size.bits_per_value:.2f}",
               f"{run.n_tokens/run.seconds if run.seconds else 0:.1f}"]
        if judged:
            scores = [task.judge(text.decode(errors="replace")) for task, text in zip(tasks, run.texts) if task.judge]
            row += [f"{sum(score.steps_right for score in scores)}/{sum(score.steps_total for score in scores)}",
                    f"{sum(score.exact for score in scores)}/{len(scores)}"]
        else:
            same = [len(os.path.commonprefix([text, reference])) for text, reference in zip(run.texts, runs[0].texts)]
            row.append(f"{sum(same)}/{sum(map(len, runs[0].texts))}")
        rows.append(row)
    return tables.plain(head, rows)


def as_json(runs: "list[Run]", tasks: "list[Task]") -> "list[dict[str, Any]]":
    rows = []
    for run in runs:
        scores = [task.judge(text.decode(errors="replace")) for task, text in zip(tasks, run.texts) if task.judge]
        rows.append({"cache": kvtype.label(*kvtype.parse(run.cache)), "kv_mib": run.size.mib, "f16_mib": run.size.f16_mib,
                     "bits_per_value": run.size.bits_per_value, "tokens": run.n_tokens, "seconds": run.seconds,
                     "steps_right": sum(score.steps_right for score in scores),
                     "steps": sum(score.steps_total for score in scores),
                     "exact": sum(score.exact for score in scores), "problems": len(scores),
                     "texts": [text.decode(errors="replace") for text in run.texts]})
    return rows


def run(args: argparse.Namespace) -> int:
    started = time.monotonic()
    caches = kvtype.listed(args.caches)
    for cache in caches:
        kvtype.parse(cache)
    if args.threads < 1 or args.tokens < 1:
        raise ValueError("--threads and --tokens must be 1 or more")
    if args.model:
        model, tasks = args.model, [Task(args.prompt, args.tokens, args.tokens, None)]
        about = f"{os.path.basename(model)}: {args.tokens} tokens with each of {', '.join(caches)}"
    else:
        model, tasks = embedded_tasks(args.quick)
        about = (f"embedded model: {len(tasks)} problems, {sum(task.n_expected for task in tasks)} tokens of answers "
                 f"with each of {', '.join(caches)}")
    print(about, file=sys.stderr if args.json else sys.stdout, flush=True)
    runs = [decode(model, cache, tasks, args.threads) for cache in caches]
    if args.json:
        print(json.dumps(as_json(runs, tasks), indent=1))
        return 0
    print()
    print(table(runs, tasks))
    print(f"\n{args.threads} threads, {time.monotonic() - started:.0f} s. KV MiB: what was allocated for {N_CTX} tokens, "
          "with kvarn's f16 tail; bits/value: the same, per value. tok/s: decoding only.")
    return 0
