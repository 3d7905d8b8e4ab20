"""kvarn plan: the largest context that fits, for every cache type, from a model's header alone.

Weights and caches are what the files and the library say, to the byte. Two things are not known before a model runs: the compute
buffer, estimated here from the shapes that size it, and what a driver and a desktop keep for themselves (--reserve).
SPDX-License-Identifier: MIT
"""

import argparse
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import cache_size, kvtype, model_shape
from .model_shape import Shape

HELP = "the largest context that fits into a GPU's or the main memory, for every cache type"
EXAMPLE = """examples:
  kvarn plan model.gguf --vram 24G                  largest context of every cache type, and where the memory goes
  kvarn plan model.gguf --vram 24G --ctx 65536      does this context fit?
  kvarn plan model.gguf --vram 24G --cpu-moe        a mixture of experts whose experts stay in main memory
  kvarn plan model.gguf --ram 64G --plot plan.png   all in main memory; the same as a picture
"""
CACHES = "f16,q8_0,q5_1,q5_0,q4_1,q4_0,iq4_nl,kvarn4,kvarn4/kvarn2,kvarn3,kvarn2"
UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
MOST = 1 << 26          # tokens; nothing is trained for more
WINDOW = 160 << 20      # bytes of a kvarn cache that CUDA unpacks at once


@dataclass(frozen=True)
class Row:
    """One cache type, in bytes."""

    cache: str
    n_ctx: int          # 0: nothing fits
    fits: bool
    weights: int
    kv: int             # keys and values of n_ctx tokens
    tail: int           # kvarn: the f16 tail
    spare: int          # kvarn: spare tiles
    state: int          # recurrent layers
    compute: int        # estimated
    reserve: int
    refused: str        # why this type is not for this model

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.tail + self.spare + self.state + self.compute + self.reserve


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL.gguf", help="a GGUF, or the first part of one; its header is enough")
    parser.add_argument("--vram", metavar="SIZE", help="memory of the GPU: 24G, 8192M (G = 1024 M)")
    parser.add_argument("--gpu-layers", type=int, default=-1, metavar="N", help="with --vram: layers on the GPU (default: all)")
    parser.add_argument("--cpu-moe", action="store_true", help="with --vram: experts stay in main memory (llama.cpp's --cpu-moe)")
    parser.add_argument("--ram", metavar="SIZE", help="main memory instead: nothing is on a GPU")
    parser.add_argument("--ctx", type=int, metavar="N", help="sizes at this context instead of the largest one")
    parser.add_argument("--caches", default=CACHES, help="kv types (default: all)")
    parser.add_argument("--ubatch", type=int, default=512, help="n_ubatch: tokens of a prompt computed at once (default 512)")
    parser.add_argument("--sequences", type=int, default=1, metavar="N", help="sequences that share the cache (default 1)")
    parser.add_argument("--sink", type=int, default=int(os.environ.get("KVARN_SINK") or 0), metavar="N",
                        help="exact tokens at the start of every sequence (default: KVARN_SINK, or 0)")
    parser.add_argument("--reserve", default="512M", metavar="SIZE", help="left to driver and desktop (default 512M)")
    parser.add_argument("--plot", metavar="FILE.png", help="also draw it (needs matplotlib)")
    parser.add_argument("--json", action="store_true", help="print JSON, all sizes in bytes")


def size_in_bytes(text: str, what: str) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    if not match:
        raise ValueError(f"--{what} {text}: give a size like 24G or 8192M")
    return int(float(match.group(1))*UNITS[match.group(2).upper() or "G"])


def unpacked_bytes(shape: Shape, n_ctx: int, cache: str) -> int:
    """What a GPU needs to turn a quantized cache into f16, one layer at a time, to read a prompt.

    kvarn does it a few heads at a time, at most WINDOW bytes unless one head is more (KVARN_WINDOW, cuda/README.md).
    """
    types = kvtype.parse(cache)
    if not any(map(kvtype.is_quantized, types)):
        return 0
    most = 0
    for layer in shape.layers:
        if not layer.is_window:
            head = 2*n_ctx*(layer.k + layer.v)
            most = max(most, min(head*layer.heads, max(WINDOW, head)) if kvtype.is_kvarn(*types) else head*layer.heads)
    return most


def compute_bytes(shape: Shape, n_ctx: int, n_ubatch: int) -> int:
    """An estimate of the compute buffer: the mask, and the widest rows alive at once."""
    n_ubatch = min(n_ubatch, n_ctx)
    mask = 2*n_ubatch*(n_ctx + (min(n_ctx, shape.window + n_ubatch) if shape.window else 0))
    heads = shape.n_head*max((layer.k for layer in shape.layers), default=0)
    widest = max(shape.n_vocab + 2*shape.n_embd, 3*shape.n_embd + 4*heads, 3*shape.n_embd + 3*shape.n_ff)
    return mask + 4*n_ubatch*widest + (1 << 20)


def row_at(shape: Shape, cache: str, n_ctx: int, args: argparse.Namespace) -> Row:
    keys, values = kvtype.parse(cache)
    name, on_gpu = kvtype.label(keys, values), not args.ram
    weights = shape.gpu_weight_bytes(args.gpu_layers, args.cpu_moe) if on_gpu else shape.weight_bytes
    here = shape.on_gpu(args.gpu_layers) if on_gpu else shape
    reserve = size_in_bytes(args.reserve, "reserve")
    refused = cache_size.why_not(shape, keys, values)
    if refused:
        return Row(name, 0, False, weights, 0, 0, 0, 0, 0, reserve, refused)
    size = cache_size.of(here, keys, values, n_ctx, args.ubatch, args.sequences, sink=args.sink)
    compute = compute_bytes(shape, size.n_ctx, args.ubatch) + (unpacked_bytes(here, size.n_ctx, cache) if on_gpu else 0)
    row = Row(name, size.n_ctx, False, weights, size.key_bytes + size.value_bytes - size.spare_bytes, size.tail_bytes,
              size.spare_bytes, size.state_bytes, compute, reserve, "")
    budget = budget_of(args)
    return Row(**{**asdict(row), "fits": budget is not None and row.total <= budget})


def largest(shape: Shape, cache: str, args: argparse.Namespace) -> Row:
    """The row of the largest context that fits; n_ctx 0 if not even the smallest does."""
    step = cache_size.CELLS
    low, high = 0, MOST//step                # low fits (or is 0), high does not
    while high - low > 1:
        middle = (low + high)//2
        row = row_at(shape, cache, middle*step, args)
        if row.refused:
            return row
        low, high = (middle, high) if row.fits else (low, middle)
    row = row_at(shape, cache, max(low, 1)*step, args)
    return row if low else Row(**{**asdict(row), "n_ctx": 0})


def budget_of(args: argparse.Namespace) -> "int | None":
    given = args.vram or args.ram
    return size_in_bytes(given, "vram" if args.vram else "ram") if given else None


def plan(shape: Shape, args: argparse.Namespace) -> "list[Row]":
    caches = kvtype.listed(args.caches)
    return [row_at(shape, cache, args.ctx, args) if args.ctx else largest(shape, cache, args) for cache in caches]


# --- output ---


def gib(n: int) -> str:
    return f"{n/UNITS['G']:.2f}"


def describe(shape: Shape) -> str:
    widths = sorted({(layer.heads, layer.k, layer.v) for layer in shape.layers})
    heads = ", ".join(f"{n} KV heads x {k}" + (f"/{v}" if v != k else "") for n, k, v in widths[:3]) or "no attention"
    n_window = sum(layer.is_window for layer in shape.layers)
    parts = [f"{len(shape.layers)} of {shape.n_layer} layers with a cache" if len(shape.layers) != shape.n_layer
             else f"{shape.n_layer} layers", heads]
    parts += [f"{n_window} of them see only {shape.window} tokens"] if n_window else []
    parts += [f"{shape.n_recurrent} recurrent"] if shape.n_recurrent else []
    parts += ["MLA"] if shape.is_mla else []
    return (f"{shape.name} ({shape.architecture}): {', '.join(parts)}; trained for {shape.n_ctx_train} tokens; "
            f"weights {gib(shape.weight_bytes)} GiB")


def cells(shape: Shape, rows: "list[Row]", args: argparse.Namespace) -> "tuple[list[str], list[list[str]], list[str]]":
    """(head, rows, notes) of the table."""
    is_fit = budget_of(args) is not None
    head = ["cache", "context", "cache GiB", "tail + spare", "compute (est.)", "weights", "total GiB"]
    if any(row.state for row in rows):
        head.insert(4, "states")
    if args.ctx and is_fit:
        head.append("fits")
    body, notes = [], []
    for row in rows:
        if row.refused:
            body.append([row.cache, "refused: " + row.refused] + [""]*(len(head) - 2))
            continue
        over = row.n_ctx > shape.n_ctx_train > 0
        line = [row.cache, (f"{row.n_ctx}" if row.n_ctx else "none") + ("*" if over else ""), gib(row.kv),
                gib(row.tail + row.spare), gib(row.compute), gib(row.weights), gib(row.total)]
        if "states" in head:
            line.insert(4, gib(row.state))
        body.append(line + ([("yes" if row.fits else "no")] if args.ctx and is_fit else []))
    if any(row.n_ctx > shape.n_ctx_train > 0 for row in rows):
        notes.append(f"* more than the {shape.n_ctx_train} tokens the model was trained for")
    place = "on the GPU, without the input embedding" if not args.ram else "in main memory"
    if not args.ram and args.gpu_layers >= 0:
        place = f"of {args.gpu_layers} layers on the GPU, and so is the cache; the rest is in main memory"
    if not args.ram and args.cpu_moe:
        place += ", without experts"
    notes.append(f"weights: {place}; total: with {gib(rows[0].reserve)} GiB in reserve; tail + spare: kvarn's f16 tail and spare "
                 "tiles; compute: an estimate")
    return head, body, notes


def verdict(shape: Shape, rows: "list[Row]") -> str:
    """The table in a sentence: what kvarn makes of the memory, against the first row-wise type; "" if there is nothing to say."""
    fitting = [row for row in rows if row.n_ctx and row.fits]
    base = next((row for row in fitting if not row.cache.startswith("kvarn")), None)
    mine = [row for row in fitting if row.cache.startswith("kvarn")]
    best = next((row for row in mine if row.cache == "kvarn4/kvarn2"), mine[0] if mine else None)
    if base is None or best is None:
        return ""
    trained = shape.n_ctx_train
    if base.n_ctx >= trained > 0:
        return f"All {trained} tokens that the model was trained for fit with {base.cache} already."
    if best.n_ctx >= trained > 0:
        return f"{best.cache} holds all {trained} tokens that the model was trained for; {base.cache} {base.n_ctx} of them."
    return f"{best.cache} holds {best.n_ctx/base.n_ctx:.1f} times the tokens of {base.cache}."


def draw(path: str, shape: Shape, rows: "list[Row]", args: argparse.Namespace) -> None:
    """Left: the largest contexts; right: where the memory goes, at --ctx or at the largest context of the first row that fits."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("--plot needs matplotlib; next: pip install matplotlib") from None
    rows = [row for row in rows if not row.refused]
    at = args.ctx or next((row.n_ctx for row in rows if row.n_ctx), 0) or 4096
    splits = [row_at(shape, row.cache, at, args) for row in rows]
    names = [row.cache for row in rows]
    budget = budget_of(args)
    figure = Figure(figsize=(11 if budget is not None else 6, 0.6 + 0.38*max(len(rows), 4)), layout="constrained")
    if budget is not None:
        left, right = figure.subplots(1, 2, sharey=True)
        contexts = [largest(shape, row.cache, args).n_ctx/1024 for row in rows]
        left.barh(names, contexts, color=["#2f9e8f" if "kvarn" in name else "#8c8c8c" for name in names])
        left.set_xlabel("largest context, in 1024 tokens; dotted: as trained")
        if shape.n_ctx_train:
            left.axvline(shape.n_ctx_train/1024, color="black", linewidth=0.8, linestyle=":")
    else:
        right = figure.subplots()
    right.invert_yaxis()
    start = [0.0]*len(rows)
    for part, color in (("weights", "#bdbdbd"), ("kv", "#1f5fa8"), ("tail", "#7a4fa3"), ("spare", "#c9a3d8"),
                        ("state", "#bf7f3f"), ("compute", "#e0b060"), ("reserve", "#e6e6e6")):
        values = [getattr(row, part)/UNITS["G"] for row in splits]
        if any(values):
            label = {"kv": "keys and values", "compute": "compute (est.)"}.get(part, part)
            right.barh(names, values, left=start, color=color, label=label)
            start = [a + b for a, b in zip(start, values)]
    if budget is not None:
        right.axvline(budget/UNITS["G"], color="#c23b4e", linewidth=1)
    right.set_xlabel(f"GiB at {at} tokens")
    figure.legend(fontsize=7, ncols=7, loc="outside lower center")
    figure.suptitle(f"{shape.name}" + (f", {args.vram or args.ram}" if budget is not None else ""), fontsize=10)
    figure.savefig(path, dpi=150)


def run(args: argparse.Namespace) -> int:
    if args.vram and args.ram:
        raise ValueError("give --vram or --ram, not both")
    if args.ram and (args.gpu_layers >= 0 or args.cpu_moe):
        raise ValueError("--gpu-layers and --cpu-moe go with --vram")
    if not args.vram and not args.ram and not args.ctx:
        raise ValueError("give --vram SIZE or --ram SIZE, what must fit, or --ctx N")
    cache_size.check_sink(args.sink)
    if args.ctx is not None and args.ctx < 1 or args.ubatch < 1 or args.sequences < 1:
        raise ValueError("--ctx, --ubatch and --sequences must be 1 or more")
    if args.plot and Path(args.plot).suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--plot {args.plot}: name a .png, .svg or .pdf file")
    for cache in args.caches.split(","):
        kvtype.parse(cache)
    shape = model_shape.load(args.model)
    rows = plan(shape, args)
    if args.json:
        print(json.dumps(as_json(shape, rows, args), indent=1))
    else:
        from .tables import show

        print(describe(shape) + "\n")
        head, body, notes = cells(shape, rows, args)
        show(head, body)
        said = "" if args.ctx else verdict(shape, rows)
        print("\n" + "\n".join([said, *notes] if said else notes))
    if args.plot:
        draw(args.plot, shape, rows, args)
    budget, usable = budget_of(args), [row for row in rows if not row.refused]
    if budget is not None and usable and not any(row.fits for row in usable):
        least = min(usable, key=lambda row: row.total)
        n_ctx = least.n_ctx or cache_size.CELLS
        raise ValueError(f"no cache type fits into {gib(budget)} GiB: with {least.cache} and {n_ctx} tokens "
                         f"{gib(least.total)} GiB are needed, {gib(least.weights)} of them for weights; "
                         "take a smaller quantization, or leave layers in main memory")
    return 0


def as_json(shape: Shape, rows: "list[Row]", args: argparse.Namespace) -> "dict[str, Any]":
    layers = [asdict(layer) for layer in shape.layers]
    model = {name: value for name, value in asdict(shape).items() if name not in ("path", "layers", "tensors")}
    return {"model": {"path": str(shape.path), **model, "layers": layers}, "budget": budget_of(args), "ubatch": args.ubatch,
            "sequences": args.sequences, "rows": [{**asdict(row), "total": row.total} for row in rows]}
