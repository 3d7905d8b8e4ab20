"""sizes.py - what caches take, from the rules that kvarn plan goes by: tables of the documents. Nothing here is measured.

SPDX-License-Identifier: MIT
"""

import argparse
from pathlib import Path

import quality

from kvarn import cache_size, gguf_header, kvtype, model_shape, plan

MOST = 1 << 20         # tokens; a type that has not won by then never does
ROWS = ("f16", "q8_0", "q4_0")
TILES = ("kvarn4", "kvarn4/kvarn2", "kvarn2")


def shape(name: str, n_layer: int, n_embd: int, n_head: int, n_ff: int, n_vocab: int, weights: int) -> model_shape.Shape:
    """A llama with 8 KV heads x 128, as its GGUF's header would give it."""
    values = {"block_count": n_layer, "embedding_length": n_embd, "context_length": MOST, "feed_forward_length": n_ff,
              "attention.head_count": n_head, "attention.head_count_kv": 8, "attention.key_length": 128,
              "attention.value_length": 128, "vocab_size": n_vocab}
    named = {f"llama.{key}": value for key, value in values.items()}
    header = gguf_header.Header(Path(name), {"general.architecture": "llama", **named}, {"output.weight": weights})
    return model_shape.shape_of(header)


def eight_b() -> model_shape.Shape:
    return shape("8B", 32, 4096, 32, 14336, 128256, int(4.6*2**30))


def thirty_two_b() -> model_shape.Shape:
    return shape("32B", 64, 5120, 64, 25600, 151936, int(18.4*2**30))


def stored(of: model_shape.Shape, cache: str, n_ctx: int) -> int:
    """Bytes of the caches that a context allocates."""
    return cache_size.of(of, *kvtype.parse(cache), n_ctx).kv_bytes


def wins_from(cache: str, other: str) -> "int | None":
    """The context from which on cache is never larger than other, in steps of the library; None if it never wins."""
    of, last = eight_b(), None
    for n_ctx in (*range(MOST - 256, 65536, -16384), *range(65536, 0, -256)):
        if stored(of, cache, n_ctx) >= stored(of, other, n_ctx):
            return last
        last = n_ctx
    return last


def break_even() -> str:
    body = [[cache, *(f"{wins_from(cache, other) or 'never'}" for other in ROWS)] for cache in TILES]
    return quality.table(["takes less, from so many tokens on", *(f"than {other}" for other in ROWS)], body)


def planned() -> str:
    parser = argparse.ArgumentParser()
    plan.add_arguments(parser)
    args = parser.parse_args(["model.gguf", "--vram", "24G", "--sink", "0", "--caches", ",".join((*ROWS, *TILES))])
    rows = plan.plan(thirty_two_b(), args)
    body = [[row.cache, row.n_ctx, plan.gib(row.kv), plan.gib(row.tail + row.spare), plan.gib(row.compute)] for row in rows]
    return quality.table(["keys/values", "largest context", "cache, GiB", "tail and spare tiles", "compute, estimated"], body)


def texts() -> "dict[str, str]":
    return {"break_even": break_even(), "plan": planned()}
