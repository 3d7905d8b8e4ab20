"""export.py - write a checkpoint of train.py as a GGUF that stock llama.cpp loads.

Matrices become q8_0, norms stay f32. The tokenizer is byte-level: 256 byte tokens in GPT-2's spelling plus two control
tokens, no merges, so that any text comes back unchanged.

    python export.py weights kvarn-tasks.gguf          # needs gguf and numpy

SPDX-License-Identifier: MIT
"""
import argparse
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType, LlamaFileType, TokenType

BOS, EOS = 256, 257


def byte_tokens() -> list[str]:
    """GPT-2's printable spelling of each byte: itself where it is printable, else the next free code point from 256 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    return [chr(b if b in printable else next(spare)) for b in range(256)]


def read_checkpoint(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """All arrays by GGUF name, and the configuration."""
    files = sorted(folder.glob("weights*.npz"))
    if not files or not (folder / "config.npz").exists():
        raise SystemExit(f"{folder} holds no checkpoint: expected weights0.npz ... and config.npz as train.py writes them")
    arrays = {}
    for file in files:
        with np.load(file) as part:
            arrays.update({gguf_name(name): part[name] for name in part.files})
    with np.load(folder / "config.npz") as config:
        return arrays, {name: config[name].item() for name in config.files}


def gguf_name(parameter: str) -> str:
    """blk_3_attn_q -> blk.3.attn_q.weight"""
    if parameter.startswith("blk_"):
        _, layer, rest = parameter.split("_", 2)
        return f"blk.{layer}.{rest}.weight"
    return f"{parameter}.weight"


def write(arrays: dict[str, np.ndarray], cfg: dict[str, float], out: Path) -> None:
    w = gguf.GGUFWriter(out, "llama")
    w.add_name("kvarn-tasks")
    w.add_description("Byte-level model that solves long chains of exact look-ups; trained from scratch on generated problems.")
    w.add_license("MIT")
    w.add_context_length(cfg["context"])
    w.add_embedding_length(cfg["width"])
    w.add_block_count(cfg["layers"])
    w.add_feed_forward_length(cfg["ffn"])
    w.add_head_count(cfg["heads"])
    w.add_head_count_kv(cfg["kv_heads"])
    w.add_key_length(cfg["head_dim"])
    w.add_value_length(cfg["head_dim"])
    w.add_rope_dimension_count(cfg["head_dim"])
    w.add_rope_freq_base(cfg["rope_base"])
    w.add_layer_norm_rms_eps(cfg["eps"])
    w.add_file_type(LlamaFileType.MOSTLY_Q8_0)
    w.add_vocab_size(EOS + 1)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("qwen2")  # any pre-tokenizer does without merges; this one makes llama.cpp leave spaces alone
    w.add_token_list([*byte_tokens(), "<|start|>", "<|stop|>"])
    w.add_token_types([TokenType.NORMAL] * 256 + [TokenType.CONTROL] * 2)
    # llama.cpp insists on merges and gguf drops empty lists. This one can never apply: no merge makes its left half.
    w.add_token_merges(["ab c"])
    w.add_bos_token_id(BOS)
    w.add_eos_token_id(EOS)
    w.add_pad_token_id(EOS)
    w.add_add_bos_token(True)
    w.add_add_eos_token(False)
    for name, value in arrays.items():
        value = value.astype(np.float32)
        if value.ndim == 2:
            w.add_tensor(name, gguf.quants.quantize(value, GGMLQuantizationType.Q8_0), raw_dtype=GGMLQuantizationType.Q8_0)
        else:
            w.add_tensor(name, value)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def main() -> None:
    ap = argparse.ArgumentParser(description="Write a checkpoint of train.py as a q8_0 GGUF.")
    ap.add_argument("checkpoint", type=Path, help="folder that train.py wrote")
    ap.add_argument("out", type=Path)
    args = ap.parse_args()
    arrays, cfg = read_checkpoint(args.checkpoint)
    write(arrays, cfg, args.out)
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.2f} MB, {sum(a.size for a in arrays.values()) / 1e6:.1f} M parameters")


if __name__ == "__main__":
    main()
