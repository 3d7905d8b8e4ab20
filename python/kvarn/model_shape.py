"""What a model keeps per token: which layers have keys and values, how wide, and which forget or keep a state instead.

llama.cpp decides most of this in code, one rule an architecture; the tables below are those rules of the pinned version. A model
whose cache follows other rules (sparse attention) is refused, not guessed. SPDX-License-Identifier: MIT
"""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Sequence

from .gguf_header import Header, read

# architecture -> every how many layers one sees everything, and whether that is the first of them (else the last)
WINDOW_PERIOD = {"afmoe": (4, False), "cohere2": (4, False), "cohere2moe": (4, True), "exaone-moe": (4, False),
                 "exaone4": (4, False), "gemma2": (2, False), "gemma3": (6, False), "gemma3n": (5, False), "gpt-oss": (2, False),
                 "laguna": (4, True), "llama4": (4, False), "mellum": (4, False), "muse-glimmer": (4, False),
                 "olmo2": (4, False), "plamo3": (8, False), "smallthinker": (4, True)}

# the file says it layer by layer
WINDOW_LISTED = ("gemma4", "granite_swa", "maple", "mimo2", "spark2_5", "step35")

# window where the file need not give one, or is not asked
WINDOW_DEFAULT = {"gemma2": 4096, "exaone4": 4096, "exaone-moe": 128, "llama4": 8192, "smallthinker": 4096}
WINDOW_FIXED = ("llama4", "smallthinker")

# layers without KV heads are recurrent
HYBRID = ("jamba", "plamo2", "granitehybrid", "lfm2", "lfm2moe", "kimi-linear", "kimi-k3", "bailingmoe3", "nemotron_h",
          "nemotron_h_moe")
# one layer in so many has attention, unless the file lists them
HYBRID_INTERVAL = {"qwen3next": 4, "qwen35": 4, "qwen35moe": 4, "minimax-01": 8}

RECURRENT = ("mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7")
NO_CACHE = ("bert", "jina-bert-v2", "jina-bert-v3", "nomic-bert", "nomic-bert-moe", "neo-bert", "eurobert", "modern-bert",
            "gemma-embedding", "wavtokenizer-dec", "dream", "llada", "llada-moe", "rnd1", "t5encoder")
OTHER_CACHE = ("minimax-m3", "glm-dsa", "deepseek32", "deepseek4", "hy_v4", "dots3note", "qwen4exp", "glm5-next", "dflash",
               "gemma4-assistant", "granite_switch", "graniteswitch", "granite-switch", "t5", "eagle3")

BLOCK = re.compile(r"blk\.(\d+)\.")
EXPERTS = re.compile(r"\.ffn_(up|down|gate|gate_up)_(ch|)exps")    # what --cpu-moe keeps in main memory

# tensors that stay in main memory when the layers are on a GPU
INPUT_TENSORS = ("token_embd.", "position_embd.", "token_types.", "per_layer_token_embd.")


@dataclass(frozen=True)
class Layer:
    """Keys and values of one layer: `heads` KV heads of k and v channels; is_window: only the last tokens."""

    heads: int
    k: int
    v: int                 # 0: MLA, values are read from the keys
    is_window: bool
    index: int             # of the layer in the model


@dataclass(frozen=True)
class Shape:
    """What of a model decides how much memory it takes."""

    path: Path
    architecture: str
    name: str
    n_layer: int
    n_draft: int           # layers after these that only draft tokens (MTP)
    n_embd: int
    n_head: int
    n_ff: int
    n_vocab: int
    n_ctx_train: int
    window: int            # tokens; 0: no layer has one
    is_mla: bool
    layers: "tuple[Layer, ...]" = field(repr=False)
    n_recurrent: int
    state_bytes: int       # of one sequence, all recurrent layers
    weight_bytes: int
    tensors: "dict[str, int]" = field(repr=False)     # name -> bytes

    def gpu_weight_bytes(self, n_layers: int = -1, cpu_moe: bool = False) -> int:
        """What the last n_layers take on a GPU; -1: all, and the output. cpu_moe: experts stay in main memory.

        The input embedding does, too; where it is also the output, the GPU gets a copy.
        """
        first = first_on_gpu(self.n_layer + self.n_draft, n_layers)
        total = 0
        for name, size in self.tensors.items():
            block = BLOCK.match(name)
            layer = int(block.group(1)) if block else self.n_layer + self.n_draft
            if layer >= first and not name.startswith(INPUT_TENSORS) and not (cpu_moe and EXPERTS.search(name)):
                total += size
        is_tied = "output.weight" not in self.tensors and first <= self.n_layer + self.n_draft
        return total + (self.tensors.get("token_embd.weight", 0) if is_tied else 0)

    def on_gpu(self, n_layers: int) -> "Shape":
        """The last n_layers of it, as far as the cache goes."""
        first = first_on_gpu(self.n_layer + self.n_draft, n_layers)
        return replace(self, layers=tuple(layer for layer in self.layers if layer.index >= first))


def first_on_gpu(n_layer: int, n_layers: int) -> int:
    """llama.cpp counts the output as one layer more, and fills from the end: 1 is the output alone, n_layer + 1 everything."""
    return 0 if n_layers < 0 else max(n_layer + 1 - n_layers, 0)


def per_layer(value: Any, n: int, default: int = 0) -> "list[int]":
    """A number for all layers, or one for each."""
    if value is None:
        value = default
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [int(one) for one in value[:n]] + [0]*(n - len(value))
    return [int(value)]*n


def windows(header: Header, n_layer: int) -> "tuple[int, list[bool]]":
    """(window in tokens, which layers have it)"""
    arch = header.architecture
    size = int(header.get("attention.sliding_window", WINDOW_DEFAULT.get(arch, 0)) or 0)
    none = (0, [False]*n_layer)
    if arch in ("lfm2", "lfm2moe"):
        heads = per_layer(header.get("attention.head_count_kv"), n_layer)
        return (size, [count > 0 for count in heads]) if size and arch == "lfm2" else none
    if arch == "exaone4" and n_layer != 64:
        return none
    if not size or arch not in (*WINDOW_PERIOD, *WINDOW_LISTED):
        return none
    if arch in WINDOW_FIXED:
        size = WINDOW_DEFAULT[arch]
    pattern = header.get("attention.sliding_window_pattern")
    if isinstance(pattern, list):
        return size, [bool(one) for one in per_layer(pattern, n_layer)]
    period, is_first = WINDOW_PERIOD.get(arch, (1, False))
    period = int(pattern) if pattern is not None else period
    sees_all = 0 if is_first else period - 1
    return size, [period == 0 or layer % period != sees_all for layer in range(n_layer)]


def recurrent(header: Header, n_layer: int, n_all: int) -> "list[bool]":
    """Which layers keep a state instead of keys and values (falcon-h1: all have both)."""
    arch = header.architecture
    if arch in HYBRID_INTERVAL:
        listed = header.get("attention.recurrent_layers")
        if listed is not None:
            return [bool(one) for one in per_layer(listed, n_all)]
        interval = int(header.get("full_attention_interval", HYBRID_INTERVAL[arch]))
        return [layer < n_layer and (layer + 1) % interval != 0 for layer in range(n_all)]
    heads = per_layer(header.get("attention.head_count_kv"), n_all)
    widths = per_layer(header.get("feed_forward_length"), n_all) if arch.startswith("nemotron_h") else [0]*n_all
    return [arch in HYBRID and heads[layer] == 0 and widths[layer] == 0 and layer < n_layer or arch in (*RECURRENT, "falcon-h1")
            for layer in range(n_all)]


def state_values(header: Header, n_head: int, head: int) -> int:
    """f32 values that a recurrent layer keeps for one sequence."""
    n_embd, wkv = int(header.get("embedding_length", 0)), int(header.get("wkv.head_size", 0))
    if wkv:
        shifts = int(header.get("token_shift_count", 2))
        return shifts*n_embd + n_embd*wkv
    short = int(header.get("shortconv.l_cache", 0))
    kernel, inner, state, groups = (int(header.get(f"ssm.{name}", 0)) for name in
                                    ("conv_kernel", "inner_size", "state_size", "group_count"))
    if short:
        return n_embd*(short - 1) + state*inner
    kda = int(header.get("kda.head_dim", 0))
    if kda:
        return 3*(kernel - 1 if kernel else 3)*n_head*kda + kda*kda*n_head
    convolution = (kernel - 1 if kernel else 0)*(inner + 2*groups*state)
    if header.architecture == "minimax-01":
        return convolution + head*head*n_head
    return convolution + state*inner


def shape_of(header: Header) -> Shape:
    """ValueError if the cache of this architecture follows other rules than the ones here."""
    arch, path = header.architecture, header.path
    if not arch or header.get("block_count") is None:
        raise ValueError(f"{path} is no language model: its header has no " + (f"{arch}.block_count" if arch else "architecture"))
    if arch in OTHER_CACHE:
        raise ValueError(f"{path}: the cache of {arch} models is laid out in its own way, which this cannot plan; "
                         "load it with f16 and read the sizes in the log")
    if arch in NO_CACHE:
        raise ValueError(f"{path}: {arch} models keep no key-value cache")
    n_all = int(header.get("block_count"))*int(header.get("num_loops", 1) if arch == "nanbeige" else 1)
    n_layer = n_all - int(header.get("nextn_predict_layers", 0))
    n_heads = per_layer(header.get("attention.head_count"), n_all)
    n_kv = header.get("attention.head_count_kv")
    heads = n_heads if n_kv is None else per_layer(n_kv, n_all)
    n_embd = int(header.get("embedding_length", 0))
    head = n_embd//n_heads[0] if n_heads and n_heads[0] else 0
    k, v = int(header.get("attention.key_length", head)), int(header.get("attention.value_length", head))
    k_window = int(header.get("attention.key_length_swa", k))
    v_window = int(header.get("attention.value_length_swa", v))
    window, is_window = windows(header, n_layer)
    is_window += [False]*(n_all - n_layer)
    is_recurrent = recurrent(header, n_layer, n_all)
    is_mla = int(header.get("attention.key_length_mla", 0) or 0) > 0
    with_kv = n_all
    if arch == "gemma3n":
        with_kv = 20
    elif arch == "gemma4":
        with_kv = n_all - int(header.get("attention.shared_kv_layers", 0))
    widths = per_layer(header.get("feed_forward_length"), n_all)
    is_hybrid = arch in HYBRID
    layers = []
    for i in range(min(n_all if is_hybrid else n_layer or n_all, with_kv)):
        if is_recurrent[i] and arch != "falcon-h1" or arch.startswith("nemotron_h") and widths[i] > 0:
            continue
        layers.append(Layer(heads[i], k_window if is_window[i] else k, 0 if is_mla else v_window if is_window[i] else v,
                            is_window[i], i))
    n_recurrent = sum(is_recurrent[:n_layer])
    n_vocab = header.values.get("tokenizer.ggml.tokens", header.get("vocab_size", 0))
    name = str(header.values.get("general.name", path.stem))
    return Shape(path, arch, name, n_layer, n_all - n_layer, n_embd, max(n_heads, default=0),
                 max([*widths, *per_layer(header.get("expert_feed_forward_length"), n_all)]),
                 int(n_vocab if not isinstance(n_vocab, list) else len(n_vocab)), int(header.get("context_length", 0)),
                 window if any(layer.is_window for layer in layers) else 0, is_mla, tuple(layers), n_recurrent,
                 4*n_recurrent*state_values(header, n_heads[0] if n_heads else 0, k), sum(header.tensors.values()),
                 dict(header.tensors))


def load(path: "str | Path") -> Shape:
    """Shape of the model in a GGUF file, from its header."""
    return shape_of(read(path))
