"""kvarn bench: decode and prefill speed at depth, cache types side by side.

The depth is not prefilled, which would take longer than everything else: a short real prompt is saved, its rows and tiles are
repeated in the saved state, and that is loaded. All types are measured in turns within one run, so that whatever else the machine
does hits them alike; a figure is the median of its turns, the range is that of all turns. SPDX-License-Identifier: MIT
"""

import argparse
import csv
import json
import os
import platform
import re
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Callable, NamedTuple

from . import kvtype
from .progress import Bar

if TYPE_CHECKING:
    from .depth import FilledContext

SLOW_PROMPT = 20.0      # seconds of a prefill turn that is not repeated
CACHES = "f16,q8_0,q4_0,kvarn2,kvarn4/kvarn2"
FIELDS = ("threads", "depth", "cache", "decode_tok_s", "decode_min", "decode_max", "prefill_tok_s", "prefill_min", "prefill_max",
          "kv_mib", "turns")


class Row(NamedTuple):
    """One cache at one depth. Speeds in tokens per second: median, slowest and fastest turn; None: not measured."""

    threads: int
    depth: int
    cache: str
    decode_tok_s: "float | None"
    decode_min: "float | None"
    decode_max: "float | None"
    prefill_tok_s: "float | None"
    prefill_min: "float | None"
    prefill_max: "float | None"
    kv_mib: float
    turns: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="FILE", help="a GGUF; default: random weights, 4 layers, 16 heads, 4 KV heads x 128")
    parser.add_argument("--caches", default=CACHES, help="kv types, compared with the first (default %(default)s)")
    parser.add_argument("--depths", default="0,512,4096,16384", help="tokens in the cache (default %(default)s)")
    parser.add_argument("--threads", default="1,2", help="default %(default)s")
    parser.add_argument("--tokens", type=int, default=16, help="tokens decoded per turn (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of every cache (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=2.0, help="a decoding turn ends after this (default %(default)s)")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of one prefill turn, in one batch (default %(default)s)")
    parser.add_argument("--prompt-depths", default="0,4096", help="depths at which prefill is timed (default %(default)s)")
    parser.add_argument("--prompt-rounds", type=int, default=3, help="prefill turns, one if slow (default %(default)s)")
    parser.add_argument("--cpu-time", action="store_true", help="one thread: count processor time, not what others take of it")
    parser.add_argument("--csv", metavar="FILE", help="also write the table as CSV")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


# --- a model whose decoding is its cache ---


def write_model(path: Path, n_layer: int = 4, n_head: int = 16, n_head_kv: int = 4, head_dim: int = 128, n_embd: int = 1024,
                n_ff: int = 2048, seed: int = 1) -> Path:
    """A llama of random Q4_0 weights: the text is noise, the shapes and the traffic of the cache are real."""
    try:
        import gguf
    except ImportError:
        raise RuntimeError("the default model is written with the gguf package; pip install gguf, or give --model") from None
    import numpy as np

    rng = np.random.default_rng(seed)
    tokens = [b"<unk>", b"<s>", b"</s>"] + [f"<0x{byte:02X}>".encode() for byte in range(256)] + ["\u2581".encode()]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name(f"random-{n_layer}x{n_head}x{n_head_kv}x{head_dim}")
    writer.add_context_length(1 << 20)
    writer.add_embedding_length(n_embd)
    writer.add_block_count(n_layer)
    writer.add_feed_forward_length(n_ff)
    writer.add_head_count(n_head)
    writer.add_head_count_kv(n_head_kv)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_types([2, 3, 3] + [6]*256 + [1])
    writer.add_token_scores([0.0]*len(tokens))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)

    def matrix(name: str, rows: int, columns: int) -> None:
        weights = rng.standard_normal((rows, columns), dtype=np.float32)/np.float32(np.sqrt(columns))
        kind = gguf.GGMLQuantizationType.Q4_0
        writer.add_tensor(name + ".weight", gguf.quants.quantize(weights, kind), raw_dtype=kind)

    def ones(name: str) -> None:
        writer.add_tensor(name + ".weight", np.ones(n_embd, np.float32))

    matrix("token_embd", len(tokens), n_embd)
    matrix("output", len(tokens), n_embd)
    ones("output_norm")
    for layer in range(n_layer):
        block = f"blk.{layer}."
        ones(block + "attn_norm")
        ones(block + "ffn_norm")
        matrix(block + "attn_q", n_head*head_dim, n_embd)
        matrix(block + "attn_k", n_head_kv*head_dim, n_embd)
        matrix(block + "attn_v", n_head_kv*head_dim, n_embd)
        matrix(block + "attn_output", n_embd, n_head*head_dim)
        matrix(block + "ffn_gate", n_ff, n_embd)
        matrix(block + "ffn_up", n_ff, n_embd)
        matrix(block + "ffn_down", n_embd, n_ff)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# --- turns ---


def decode_turn(context: "FilledContext", n: int, seconds: float, clock: "Callable[[], float]") -> float:
    """Tokens per second of up to n tokens, one by one."""
    started = clock()
    for i in range(1, n + 1):
        context.run(1)
        if clock() - started > seconds:
            break
    return i/(clock() - started)


def prefill_turn(context: "FilledContext", n: int, clock: "Callable[[], float]") -> float:
    """Tokens per second of one batch at the filled depth; the cache is as before afterwards."""
    context.load(context.state)
    started = clock()
    context.run(n)
    taken = clock() - started
    context.load(context.state)
    return n/taken


def spread(speeds: "list[float]") -> "tuple[float | None, float | None, float | None]":
    return (statistics.median(speeds), min(speeds), max(speeds)) if speeds else (None, None, None)


def measure(args: argparse.Namespace, caches: "list[str]", depths: "list[int]", threads: "list[int]",
            prompt_depths: "set[int]", path: str) -> "list[Row]":
    from .context import Model
    from .depth import FilledContext

    model = Model(path, gpu_layers=0)
    bar = Bar("bench")
    rows: "list[Row]" = []
    total = len(depths)*len(caches)*(1 + len(threads))
    room = len(threads)*(args.rounds*args.tokens + 2) + args.prompt + 8
    for depth in depths:
        contexts = []
        try:
            for cache in caches:
                bar.show(1.5*len(rows)/total, f"depth {depth}: filling {cache}")
                contexts.append(FilledContext(model, cache, depth, room, max(args.prompt, 512)))
            for n_threads in threads:
                label = f"depth {depth}, {n_threads} threads:"
                n_turns = args.prompt_rounds if args.prompt and depth in prompt_depths else 0
                rows += measure_depth(args, contexts, depth, n_threads, n_turns,
                                      lambda text: bar.show(1.5*len(rows)/total, f"{label} {text}"))
        finally:
            for context in contexts:
                context.close()
    bar.close()
    model.close()
    return rows


def measure_depth(args: argparse.Namespace, contexts: "list[FilledContext]", depth: int, n_threads: int, n_prompt_turns: int,
                  show: "Callable[[str], None]") -> "list[Row]":
    """All caches in turns."""
    clock = time.process_time if args.cpu_time else time.perf_counter
    decode: "list[list[float]]" = [[] for _ in contexts]
    prefill: "list[list[float]]" = [[] for _ in contexts]
    for context in contexts:
        context.set_threads(n_threads)
        context.load(context.state)
        context.run(1)
    for turn in range(args.rounds):
        for context, speeds in zip(contexts, decode):
            show(f"decode {turn + 1}/{args.rounds} {context.cache}")
            speeds.append(decode_turn(context, args.tokens, args.seconds, clock))
    for turn in range(n_prompt_turns):
        for context, speeds in zip(contexts, prefill):
            if not turn or args.prompt/speeds[0] < SLOW_PROMPT:
                show(f"prefill {turn + 1}/{n_prompt_turns} {context.cache}")
                speeds.append(prefill_turn(context, args.prompt, clock))
    return [Row(n_threads, depth, kvtype.label(*kvtype.parse(context.cache)), *spread(decode[i]), *spread(prefill[i]),
                context.size.mib, args.rounds) for i, context in enumerate(contexts)]


# --- output ---


def table(rows: "list[Row]") -> str:
    """Plain text, one block per number of threads; ratios to the first cache of the same depth."""
    def number(value: "float | None") -> str:
        return "-" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.1f}"

    def ratio(value: "float | None", of: "float | None") -> str:
        return "-" if value is None or not of else f"{value/of:.2f}x"

    def turns(least: "float | None", most: "float | None") -> str:
        return "-" if least is None else f"{number(least)}..{number(most)}"

    lines = [["threads", "depth", "cache", "KV MiB", "decode tok/s", "turns", "", "prefill tok/s", "turns", ""]]
    first: "dict[tuple[int, int], Row]" = {}
    for row in rows:
        base = first.setdefault((row.threads, row.depth), row)
        lines.append([str(row.threads), str(row.depth), row.cache, f"{row.kv_mib:.1f}",
                      number(row.decode_tok_s), turns(row.decode_min, row.decode_max),
                      ratio(row.decode_tok_s, base.decode_tok_s),
                      number(row.prefill_tok_s), turns(row.prefill_min, row.prefill_max),
                      ratio(row.prefill_tok_s, base.prefill_tok_s)])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) if column == 2 else cell.rjust(width)
                               for column, (cell, width) in enumerate(zip(line, widths))).rstrip() for line in lines)


def processor() -> str:
    try:
        names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        return names[0] if names else platform.processor() or platform.machine()
    except OSError:
        return platform.processor() or platform.machine()


def commit() -> str:
    """The checkout's commit, or the version of the package."""
    import kvarn

    done = subprocess.run(["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "--short", "HEAD"],
                          capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else str(kvarn.__version__)


def write_csv(path: str, rows: "list[Row]", command: str, model: str) -> None:
    with open(path, "w", newline="", encoding="utf-8") as out:
        out.write(f"# {command}\n# {processor()}, {os.cpu_count()} cores; kvarn {commit()}; {model}\n")
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(FIELDS)
        for row in rows:
            writer.writerow(["" if value is None else f"{value:.2f}" if isinstance(value, float) else value for value in row])


def numbers(text: str, what: str, least: int) -> "list[int]":
    try:
        found = [int(word) for word in text.split(",") if word.strip()]
    except ValueError:
        found = []
    if not found or min(found) < least:
        raise ValueError(f"--{what} {text}: give whole numbers from {least} on, separated by commas")
    return found


def run(args: argparse.Namespace) -> int:
    caches = kvtype.listed(args.caches)
    for cache in caches:
        kvtype.parse(cache)
    depths, threads = numbers(args.depths, "depths", 0), numbers(args.threads, "threads", 1)
    if args.cpu_time and threads != [1]:
        raise ValueError("--cpu-time counts what all threads use, waiting included; add --threads 1")
    prompt_depths = set(numbers(args.prompt_depths, "prompt-depths", 0))
    if min(args.tokens, args.rounds) < 1 or min(args.prompt, args.prompt_rounds) < 0:
        raise ValueError("--tokens and --rounds must be 1 or more, --prompt and --prompt-rounds 0 or more")
    with tempfile.TemporaryDirectory() as folder:
        path = args.model or str(write_model(Path(folder)/"bench.gguf"))
        rows = measure(args, caches, depths, threads, prompt_depths, path)
    name = os.path.basename(path) if args.model else "random weights, 4 layers, 16 heads, 4 KV heads x 128"
    if args.csv:
        write_csv(args.csv, rows, "kvarn bench " + " ".join(args.words), name)
    if args.json:
        print(json.dumps([row._asdict() for row in rows], indent=1))
    else:
        print(table(rows))
        print(f"\n{name}; {processor()}. Medians and ranges of {args.rounds} turns; ratios to {rows[0].cache}.")
    return 0
