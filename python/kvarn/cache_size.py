"""How many bytes a context allocates for keys and values, exactly, before there is one.

    cache_size.of(shape, "kvarn4", "kvarn2", n_ctx=32768)

The rules are those of llama_kv_cache and of ggml-kvarn/kvarn-cache.cpp; tests compare them with what is allocated.

    one cell a token, one row a cell                   row-wise types: the padded context
    one tile a 128 tokens and head, some spare         kvarn: plus a tail of rows in f16, for tiles that are not full
    a window of tokens                                 layers with a sliding window; kvarn is f16 there

SPDX-License-Identifier: MIT
"""

from dataclasses import dataclass

from . import kvtype
from .model_shape import Shape

G = 128                # tokens per tile
CELLS = 256            # a context is a multiple of this
OWNERS_MAX = 32        # sequences of one cache that get tiles of their own
SLOTS_KEPT = 1         # slots for a tile that is sealed already

NO_FLASH = ("grok",)   # architectures that llama.cpp runs without flash attention

# type -> (values, bytes) of what a row is made of
ROW_TYPES = {"f32": (1, 4), "f16": (1, 2), "bf16": (1, 2), "q8_0": (32, 34), "q5_1": (32, 24), "q5_0": (32, 22),
             "q4_1": (32, 20), "q4_0": (32, 18), "iq4_nl": (32, 18)}


@dataclass(frozen=True)
class CacheSize:
    """Bytes, all sequences together."""

    keys: str
    values: str
    n_ctx: int         # padded
    key_bytes: int     # all layers, spare tiles included
    value_bytes: int
    window_bytes: int  # of both, what layers with a window take
    tail_bytes: int    # tokens that are not in a full tile, in f16
    spare_bytes: int   # of keys and values, what cells beyond n_ctx take
    state_bytes: int   # recurrent layers

    @property
    def kv_bytes(self) -> int:
        """What kv_size and the log call the cache: keys, values and tail."""
        return self.key_bytes + self.value_bytes + self.tail_bytes

    @property
    def total(self) -> int:
        """All that grows with contexts and sequences."""
        return self.kv_bytes + self.state_bytes


def padded(n: int, to: int) -> int:
    """n, rounded up to a multiple."""
    return (n + to - 1)//to*to


def bits_of(name: str) -> float:
    """Bits per value of a row-wise type, scales included."""
    values, size = ROW_TYPES[name]
    return 8*size/values


def tile_bytes(D: int, bits: int) -> int:
    """Codes, scale and zero of every channel, token scales (ggml-kvarn/kvarn-format.h)."""
    return D*G*bits//8 + 4*D + 2*G


def check_sink(n: "int | None") -> None:
    """ValueError if this is no number of tokens for --sink; None: not given."""
    if n is not None and n < 0:
        raise ValueError(f"--sink {n}: give 0 or more tokens")


def why_not(shape: Shape, keys: str, values: str) -> str:
    """Why llama.cpp would refuse these types for this model; "" if it takes them."""
    if kvtype.is_kvarn(keys, values) and shape.is_mla:
        return "MLA compresses keys and values itself"
    if shape.is_mla and keys != values:
        return "MLA: keys and values must have one type"
    if shape.architecture in NO_FLASH and (kvtype.is_kvarn(keys) or kvtype.is_quantized(values)):
        return f"no flash attention in {shape.architecture} models"
    for layer in shape.layers:
        for name, D in ((keys, layer.k), (values, layer.v)):
            if kvtype.is_kvarn(name):
                if not layer.is_window and (D % 16 or D > 512):
                    return f"heads of {D} channels"
            elif D % ROW_TYPES[name][0]:
                return f"heads of {D} channels"
    return ""


def of(shape: Shape, keys: str, values: str, n_ctx: int, n_ubatch: int = 512, n_seq: int = 1, unified: bool = True,
       sink: int = 0) -> CacheSize:
    """Types by name; n_ctx tokens for all sequences together, or, if not unified, split among them. sink: see KVARN_SINK."""
    n_ubatch, n_ctx = min(n_ubatch, n_ctx), padded(n_ctx, CELLS)
    n_stream = 1 if unified else n_seq
    per_stream = n_ctx if unified else padded(n_ctx//n_seq, CELLS)
    n_owners = n_stream*(1 if n_stream > 1 else min(n_seq, OWNERS_MAX))
    n_slots = 2*n_owners + n_ubatch//G + SLOTS_KEPT + n_owners*padded(sink, G)//G
    window_cells = padded(min(per_stream, shape.window*(n_seq if unified else 1) + n_ubatch), CELLS)

    size = {"keys": 0, "values": 0, "window": 0, "tail": 0, "spare": 0}
    for layer in shape.layers:
        asked = window_cells if layer.is_window else per_stream
        types = {"keys": (keys, layer.k), "values": (values, layer.v)}
        if layer.is_window and asked < per_stream:
            types = {side: ("f16" if kvtype.is_kvarn(name) else name, D) for side, (name, D) in types.items()}
        cells = asked
        if kvtype.is_kvarn(types["keys"][0], types["values"][0]):
            cells = padded(asked + G*(n_owners//n_stream + 1), 2*G)
        for side, (name, D) in types.items():
            if kvtype.is_kvarn(name):
                per_tile = tile_bytes(D, int(name[5:]))*layer.heads
                taken, spare = per_tile*cells//G, per_tile*(cells - asked)//G
                size["tail"] += 2*D*layer.heads*G*n_slots
            else:
                per, of_row = ROW_TYPES[name]
                row = D*layer.heads//per*of_row
                taken, spare = row*cells, row*(cells - asked)
            size[side] += taken*n_stream
            size["spare"] += spare*n_stream
            size["window"] += taken*n_stream if layer.is_window else 0
    return CacheSize(keys, values, per_stream*n_stream, size["keys"], size["values"], size["window"], size["tail"], size["spare"],
                     shape.state_bytes*max(1, n_seq))
