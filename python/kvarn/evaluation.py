"""kvarn eval: how far each cache type takes a model away from f16.

All caches decode the same text in lockstep and are compared with f16 at once, so nothing is stored and a large vocabulary costs
no disk. What is measured, for every cache type:

    text     the text in blocks of 128 tokens, each block against all earlier ones through the cache: perplexity, KLD of the next
             token's distribution to f16, how often both have the same top token; error of the attention outputs against depth
    decode   the text going on one token at a time (teacher-forced): the same figures
    greedy   a continuation chosen by the cache itself: how many tokens are as with f16, and where the first one differs; with the
             model of this package, problems with known answers instead: steps right and exact answers
    size     what was allocated, bits per value

Twice: as shipped, and "no tail": every token is read from its tile as soon as the tile is full (KVARN_STRICT), so that no cache
gains from a stretch of exact f16 tokens. Types that store rows have no tail and stand in both tables unchanged.

SPDX-License-Identifier: MIT
"""

import argparse
import json
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import kvtype
from .progress import Bar

if TYPE_CHECKING:
    from .context import Model

CACHES = "q8_0,q4_0,kvarn4,kvarn4/kvarn2,kvarn3,kvarn2"
BLOCK = 128
FIRST = 256        # tokens of context before a prediction counts
REST = 1e-30       # probabilities below count as this


class Plan(NamedTuple):
    """What is decoded."""

    chunks: "list[list[int]]"     # text, each of n_ctx tokens
    n_text: int                   # tokens of a chunk in blocks; the rest one at a time
    prompts: "list[Any]"          # greedy: (tokens, most tokens to write, judge or None)


@dataclass
class Figures:
    """Sums over the judged predictions of one cache."""

    kld: "list[np.ndarray]" = field(default_factory=list)
    same: int = 0
    nll: float = 0.0
    n: int = 0

    def add(self, exact: np.ndarray, other: np.ndarray, following: np.ndarray) -> None:
        """Log-probabilities f64 [n, vocabulary] of f16 and of this cache, and the tokens that did follow."""
        kld = (np.exp(exact)*(exact - other)).sum(1)
        self.kld.append(kld)
        self.same += int((exact.argmax(1) == other.argmax(1)).sum())
        self.nll -= float(other[np.arange(len(following)), following].sum())
        self.n += len(following)

    def row(self, prefix: str) -> "dict[str, float]":
        if not self.n:
            return {}
        kld = np.concatenate(self.kld)
        return {f"{prefix}tokens": self.n, f"{prefix}ppl": float(np.exp(self.nll/self.n)), f"{prefix}kld_mean": float(kld.mean()),
                f"{prefix}kld_median": float(np.median(kld)), f"{prefix}kld_999": float(np.percentile(kld, 99.9)),
                f"{prefix}same_top": self.same/self.n}


@dataclass
class Subject:
    """One cache type in one setting, and what is known about it so far."""

    cache: str
    setting: str       # "shipped" or "no tail"
    context: "Any" = None   # Context, while it is measured
    text: Figures = field(default_factory=Figures)
    decode: Figures = field(default_factory=Figures)
    drift: "list[list[float]]" = field(default_factory=list)   # per chunk, per block: relative squared error of attention outputs
    greedy: "dict[str, float]" = field(default_factory=dict)

    @property
    def label(self) -> str:
        return kvtype.label(*kvtype.parse(self.cache))


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    x -= x.max(1, keepdims=True)
    return np.maximum(x - np.log(np.exp(x).sum(1, keepdims=True)), np.log(REST))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", nargs="?", help="a GGUF file; default: the embedded model and its problems")
    parser.add_argument("--caches", default=CACHES, help="kv types to compare with f16 (default %(default)s)")
    parser.add_argument("--text", metavar="FILE", help="what to read; default: the manual that comes with Python")
    parser.add_argument("--ctx", type=int, default=2048, help="tokens of each chunk of text (default %(default)s)")
    parser.add_argument("--chunks", type=int, default=2, help="chunks, spread over the text (default %(default)s)")
    parser.add_argument("--decode", type=int, default=256, help="of them, so many one at a time (default %(default)s)")
    parser.add_argument("--greedy", type=int, default=256, help="tokens written freely, or problems x 256 (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="which problems, where chunks begin (default %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="default: llama.cpp's choice")
    parser.add_argument("--gpu-layers", type=int, default=-1, help="layers on the GPU (default all)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--out", metavar="FOLDER", default="kvarn-eval", help="for tables and plots (default %(default)s)")


def embedded_plan(args: argparse.Namespace, model: "Model") -> Plan:
    """Text: problems with their answers, one after the other; greedy: fresh problems."""
    from . import embedded

    chunks, size = [], args.ctx
    for i in range(args.chunks):
        tokens: "list[int]" = []
        number = 0
        while len(tokens) < size + 1:
            family = embedded.families[(i + number) % len(embedded.families)]
            for p in embedded.problems(family, 1, seed=args.seed*1000 + 10*i + number):
                tokens += model.tokenize((p.prompt + p.answer).encode())
            number += 1
        chunks.append(tokens[:size + 1])
    prompts = []
    for i in range(args.greedy//256):
        family = ("hop", "bank", "fsm", "vm", "dag", "sort")[i % 6]
        for p in embedded.problems(family, 1, seed=args.seed*1000 + 500 + i, smallest=900, largest=1600):
            prompts.append((model.tokenize(p.prompt.encode()), len(p.answer)*5//4,
                            lambda text, p=p: embedded.check(p, text.decode(errors="replace"))))
    return Plan(chunks, size - args.decode, prompts)


def text_plan(args: argparse.Namespace, model: "Model") -> Plan:
    if args.text:
        data = Path(args.text).read_bytes()
    else:
        from pydoc_data import topics

        data = "\n".join(topics.topics[name] for name in sorted(topics.topics)).encode()
    tokens = model.tokenize(data[:64*(args.ctx + 1)*(args.chunks + 1)])
    need = args.ctx*args.chunks + 1
    if len(tokens) < need:
        raise ValueError(f"the text has {len(tokens)} tokens; {args.chunks} chunks of {args.ctx} need {need}: "
                         "give a longer --text, or fewer --chunks or a smaller --ctx")
    rng = np.random.default_rng(args.seed)
    start = int(rng.integers(0, len(tokens) - need + 1))
    lead, tokens = tokens[0], tokens[start:start + need]
    chunks = [[lead, *tokens[i*args.ctx:(i + 1)*args.ctx]] for i in range(args.chunks)]
    prompts = [(chunks[0][:args.ctx//2], args.greedy, None)] if args.greedy else []
    return Plan(chunks, args.ctx - args.decode, prompts)


def follow_text(plan: Plan, subjects: "list[Subject]", bar: Bar) -> None:
    """All contexts read all chunks; the first subject is f16 itself."""
    done, began = 0.0, time.monotonic()
    size = sum(len(chunk) - 1 for chunk in plan.chunks)
    for number, chunk in enumerate(plan.chunks):
        for subject in subjects:
            subject.context.clear()
            subject.drift.append([])
        spans = [(a, min(a + BLOCK, plan.n_text)) for a in range(0, plan.n_text, BLOCK)]
        spans += [(a, a + 1) for a in range(plan.n_text, len(chunk) - 1)]
        for start, end in spans:
            following = np.array(chunk[start + 1:end + 1])
            skip = max(0, min(FIRST, plan.n_text//2) - start)
            reference, outputs = None, {}
            for subject in subjects:
                subject.context.tap.listening = end - start > 1
                logits = log_probabilities(subject.context.decode(chunk[start:end]))
                rows = subject.context.tap.rows
                if reference is None:
                    reference, outputs = logits, {name: a.copy() for name, a in rows.items()}
                if skip < end - start:
                    figures = subject.decode if end - start == 1 and start >= plan.n_text else subject.text
                    figures.add(reference[skip:], logits[skip:], following[skip:])
                if end - start > 1 and outputs:
                    wrong = [((rows[name] - a)**2).sum()/(a**2).sum() for name, a in outputs.items() if a.any()]
                    subject.drift[-1].append(float(np.mean(wrong)))
            done += (end - start)/size
            left = (time.monotonic() - began)*(1/done - 1)
            bar.show(done, f"chunk {number + 1}/{len(plan.chunks)}, token {end}, {left:.0f} s left")


def write_freely(plan: Plan, subject: Subject, texts: "list[list[int]]", reference: "list[list[int]] | None", bar: Bar) -> None:
    """Greedy continuation of every prompt; reference: what f16 wrote."""
    right = total = exact = same = length = 0
    first = None
    for number, (prompt, most, judge) in enumerate(plan.prompts):
        context = subject.context
        context.tap.listening = False
        context.clear()
        for start in range(0, len(prompt), BLOCK):
            part = prompt[start:start + BLOCK]
            logits = context.decode(part, all_logits=False)
        written: "list[int]" = []
        while len(written) < most:
            token = int(logits[-1].argmax())
            if context.model.is_end(token):
                break
            written.append(token)
            logits = context.decode([token])
            bar.show((number + len(written)/most)/len(plan.prompts), f"writing freely, {len(written)} tokens")
        texts.append(written)
        if judge:
            score = judge(context.model.text(written))
            right, total, exact = right + score.steps_right, total + score.steps_total, exact + score.exact
        if reference is not None:
            wanted = reference[number]
            n = next((i for i, (a, b) in enumerate(zip(written, wanted)) if a != b), min(len(written), len(wanted)))
            same, length = same + n, length + len(wanted)
            if n < max(len(written), len(wanted)) and (first is None or n < first):
                first = n
    subject.greedy = {"greedy_tokens_as_f16": same, "greedy_tokens": length,
                      "greedy_first_difference": -1 if first is None else first}
    if total:
        subject.greedy.update(steps_right=right, steps_total=total, answers_exact=exact, answers=len(plan.prompts))


def measure(args: argparse.Namespace, model: "Model", plan: Plan) -> "list[Subject]":
    from .context import AttentionTap, Context

    names = ["f16"] + [name for name in args.caches.split(",") if name.strip() and name.strip() != "f16"]
    wanted = [Subject(name.strip(), setting) for name in names for setting in ("shipped", "no tail")
              if setting == "shipped" or kvtype.is_kvarn(*kvtype.parse(name.strip()))]
    bar = Bar("eval")
    n_ctx = max([args.ctx, *(len(prompt) + most + 1 for prompt, most, _ in plan.prompts)])
    try:
        for subject in wanted:
            is_strict = subject.setting == "no tail"
            subject.context = Context(model, subject.cache, n_ctx, BLOCK, args.threads, is_strict, AttentionTap())
        follow_text(plan, wanted, bar)
        reference: "list[list[int]] | None" = None
        for subject in wanted if plan.prompts else []:
            texts: "list[list[int]]" = []
            bar.label = f"eval {subject.label}"
            write_freely(plan, subject, texts, reference, bar)
            reference = reference if reference is not None else texts
    finally:
        for subject in wanted:
            if subject.context is not None:
                subject.context.close()
        bar.close()
    return wanted


def rows_of(args: argparse.Namespace, model_name: str, subjects: "list[Subject]") -> "list[dict[str, Any]]":
    rows = []
    for subject in subjects:
        size = subject.context.size
        rows.append({"model": model_name, "kv": subject.label, "setting": subject.setting, "ctx": args.ctx, "seed": args.seed,
                     "bpv": round(size.stored_bits, 4), "bpv_allocated": round(size.bits_per_value, 3), **subject.text.row(""),
                     **subject.decode.row("decode_"), **subject.greedy})
    return rows


def run(args: argparse.Namespace) -> int:
    began = time.monotonic()
    for cache in args.caches.split(","):
        kvtype.parse(cache)
    if args.ctx < 2*BLOCK or args.decode >= args.ctx:
        raise ValueError(f"--ctx {args.ctx} is too short: at least {2*BLOCK}, and more than --decode {args.decode}")
    if args.text and not Path(args.text).is_file():
        raise FileNotFoundError(f"no text at {args.text}")
    from . import embedded, report
    from .context import Model

    path = args.model or str(embedded.path())
    model = Model(path, args.gpu_layers)
    is_embedded = model.meta("general.name") == "kvarn-tasks" and not args.text
    plan = (embedded_plan if is_embedded else text_plan)(args, model)
    name = os.path.basename(path)
    print(f"{name}: {len(plan.chunks)} chunks of {args.ctx} tokens with f16 and {args.caches}", file=sys.stderr, flush=True)
    subjects = measure(args, model, plan)
    rows = rows_of(args, name, subjects)
    model.close()
    written = report.write(Path(args.out), rows, {f"{s.label} {s.setting}": s.drift for s in subjects}, BLOCK)
    print(json.dumps(rows, indent=1) if args.json else report.markdown(rows))
    print(f"\n{time.monotonic() - began:.0f} s. Written: {', '.join(map(str, written))}",
          file=sys.stderr if args.json else sys.stdout)
    return 0
