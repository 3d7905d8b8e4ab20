"""Decode and prompt speed of a CUDA build, whole models: llama-bench for every cache type in turns, on models of random weights.

    python cuda/bench/bench-llama.py --bin build/bin kv --csv OUT.csv     4 layers, 32 heads, 8 KV heads x 128: the cache decides
    python cuda/bench/bench-llama.py --bin build/bin 8b --depths 0        the shapes of an 8B model, Q4_0, a vocabulary of 128256

Needs the gguf package and numpy. The text is noise; shapes, launches and bytes are real. A figure is the median of its turns.
SPDX-License-Identifier: MIT
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np

FIELDS = ("model", "keys", "values", "test", "depth", "tok_s", "least", "most", "turns")


class Shape(NamedTuple):
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ff: int
    n_vocab: int
    kind: str               # of the weights


SHAPES = {
    "kv": Shape(4, 256, 32, 8, 128, 512, 260, "F16"),
    "8b": Shape(32, 4096, 32, 8, 128, 14336, 128256, "Q4_0"),
}


def random_bytes(kind: str, columns: int, rng) -> np.ndarray:
    """Some rows of weights with a standard deviation of 1/sqrt(columns), to be repeated."""
    n = 1 << 20
    if kind == "F16":
        return (rng.standard_normal(n, np.float32)/np.float32(np.sqrt(columns))).astype(np.float16).view(np.uint8)
    blocks = rng.integers(0, 256, (n//32, 18), np.uint8)          # Q4_0: an f16 scale, 32 codes around 8
    blocks[:, :2] = np.array([1/(4.6*np.sqrt(columns))], np.float16).view(np.uint8)
    return blocks.reshape(-1)


def write_model(path: str, name: str) -> None:
    """Tensor by tensor, so that 5 GB of weights need no 5 GB of memory."""
    s = SHAPES[name]
    kind = gguf.GGMLQuantizationType[s.kind]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(f"random-{name}")
    writer.add_context_length(1 << 18)
    writer.add_embedding_length(s.n_embd)
    writer.add_block_count(s.n_layer)
    writer.add_feed_forward_length(s.n_ff)
    writer.add_head_count(s.n_head)
    writer.add_head_count_kv(s.n_head_kv)
    writer.add_key_length(s.head_dim)
    writer.add_value_length(s.head_dim)
    writer.add_rope_dimension_count(s.head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(s.n_vocab)
    tokens = [b"<unk>", b"<s>", b"</s>"] + [f"<0x{byte:02X}>".encode() for byte in range(256)]
    tokens += [f"w{i}".encode() for i in range(s.n_vocab - len(tokens))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_types([2, 3, 3] + [6]*256 + [1]*(s.n_vocab - 259))
    writer.add_token_scores([0.0]*s.n_vocab)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    tensors = []

    def matrix(tensor: str, rows: int, columns: int) -> None:
        n_bytes = gguf.quant_shape_to_byte_shape((rows, columns), kind)
        tensors.append((tensor + ".weight", (rows, columns), kind, n_bytes[0]*n_bytes[1]))

    def ones(tensor: str) -> None:
        tensors.append((tensor + ".weight", (s.n_embd,), gguf.GGMLQuantizationType.F32, 4*s.n_embd))

    matrix("token_embd", s.n_vocab, s.n_embd)
    matrix("output", s.n_vocab, s.n_embd)
    ones("output_norm")
    for layer in range(s.n_layer):
        block = f"blk.{layer}."
        ones(block + "attn_norm")
        ones(block + "ffn_norm")
        matrix(block + "attn_q", s.n_head*s.head_dim, s.n_embd)
        matrix(block + "attn_k", s.n_head_kv*s.head_dim, s.n_embd)
        matrix(block + "attn_v", s.n_head_kv*s.head_dim, s.n_embd)
        matrix(block + "attn_output", s.n_embd, s.n_head*s.head_dim)
        matrix(block + "ffn_gate", s.n_ff, s.n_embd)
        matrix(block + "ffn_up", s.n_ff, s.n_embd)
        matrix(block + "ffn_down", s.n_embd, s.n_ff)

    for tensor, shape, of, size in tensors:
        writer.add_tensor_info(tensor, shape, np.dtype(np.float32), size, raw_dtype=of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(1)
    some = {}
    for at, (_, shape, of, size) in enumerate(tensors):
        if of == gguf.GGMLQuantizationType.F32:
            writer.write_tensor_data(np.ones(shape, np.float32))
            continue
        if shape[1] not in some:
            some[shape[1]] = random_bytes(s.kind, shape[1], rng)
        unit = 18 if s.kind == "Q4_0" else 2
        writer.write_tensor_data(np.resize(np.roll(some[shape[1]], unit*977*at), size))
    writer.close()


def bench(args, model: str, keys: str, values: str, tests: "list[str]", depths: str) -> "list[dict]":
    command = [str(Path(args.bin)/"llama-bench"), "-m", model, "-ngl", "99", "-fa", "1", "-ctk", keys, "-ctv", values,
               "-d", depths, "-b", str(args.batch), "-ub", str(args.batch), "-r", str(args.repeat), "-o", "json", *tests]
    done = subprocess.run(command, capture_output=True, text=True, timeout=args.timeout)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip().splitlines()[-1:] or 'failed'}")
    return json.loads(done.stdout)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=SHAPES)
    parser.add_argument("--bin", default="build/bin", help="the folder of llama-bench (default %(default)s)")
    parser.add_argument("--caches", default="f16,q8_0,q4_0,kvarn4/kvarn2,kvarn2", help="default %(default)s")
    parser.add_argument("--depths", default="0,4096,32768,131072", help="tokens in the cache (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens decoded, 0: none (default %(default)s)")
    parser.add_argument("--prompt", type=int, default=0, help="tokens of a prompt, 0: none (default %(default)s)")
    parser.add_argument("--batch", type=int, default=2048, help="n_batch and n_ubatch (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="turns of every cache (default %(default)s)")
    parser.add_argument("--repeat", type=int, default=3, help="repetitions within a turn (default %(default)s)")
    parser.add_argument("--timeout", type=int, default=300, help="seconds that one llama-bench may take (default %(default)s)")
    parser.add_argument("--csv", metavar="FILE", help="also write the table as CSV")
    parser.add_argument("--file", metavar="FILE", help="keep the model there, and use it if it is there already")
    parser.add_argument("--commit", default="", help="to be named in the CSV")
    args = parser.parse_args()

    tests = ["-p", str(args.prompt), "-n", str(args.tokens)]
    speeds, device = {}, ""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        path = args.file or f"{folder}/{args.model}.gguf"
        if not os.path.exists(path):
            write_model(path, args.model)
        caches = args.caches.split(",")
        for turn in range(args.rounds):
            first_one = turn % len(caches)  # on a host that drifts none is always the last
            for cache in caches[first_one:] + caches[:first_one]:
                keys, _, values = cache.partition("/")
                try:
                    found = bench(args, path, keys, values or keys, tests, args.depths)
                except (RuntimeError, subprocess.TimeoutExpired, json.JSONDecodeError) as error:
                    print(f"{cache}: {error}", file=sys.stderr)
                    continue
                for run in found:
                    device = run["gpu_info"]
                    test = f"pp{run['n_prompt']}" if run["n_prompt"] else f"tg{run['n_gen']}"
                    speeds.setdefault((keys, values or keys, test, run["n_depth"]), []).extend(run["samples_ts"])

    rows = [(args.model, *key, f"{statistics.median(of):.1f}", f"{min(of):.1f}", f"{max(of):.1f}", len(of))
            for key, of in sorted(speeds.items(), key=lambda item: (item[0][2], item[0][3]))]
    first: "dict[tuple, float]" = {}
    for row in rows:
        base = first.setdefault((row[3], row[4]), float(row[5]))
        print(f"{row[3]:>8} @ {row[4]:<7} {row[1] + '/' + row[2]:<16} {row[5]:>10}  {row[6]:>10}..{row[7]:<10}"
              f" {float(row[5])/base:6.2f}x")
    if args.csv:
        with open(args.csv, "w", newline="", encoding="utf-8") as out:
            out.write(f"# python cuda/bench/bench-llama.py {' '.join(sys.argv[1:])}\n# {device}; kvarn {args.commit}\n")
            writer = csv.writer(out, lineterminator="\n")
            writer.writerow(FIELDS)
            writer.writerows(rows)
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
