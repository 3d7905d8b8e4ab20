"""Fills a cache to any depth without prefilling it: a short prompt is decoded and saved, what is in the state is repeated until
it is as long as wanted, and loaded again.

SPDX-License-Identifier: MIT
"""

import ctypes
import re
import struct
from typing import Any

from .cache_size import bits_of
from .context import Context, Model
from .llama import llama_cpp as api
from .log import CapturedLog

G = 128                 # tokens per tile
TAIL = 64               # tokens of the filled cache that are not in a tile: half of one, the average
SEED_TILES = 4          # tiles of the prompt that is repeated


class Reader:
    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def take(self, n: int) -> bytes:
        if self.at + n > len(self.data):
            raise ValueError("the saved state is shorter than its own numbers say")
        self.at += n
        return self.data[self.at - n:self.at]

    def unpack(self, form: str) -> "tuple[Any, ...]":
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))


def repeated(block: bytes, unit: int, n: int) -> bytes:
    """The first n of the units that block holds, over and over."""
    have = len(block)//unit
    return block*(n//have) + block[:n % have*unit]


def grow(state: bytes, depth: int) -> bytes:
    """The state of a sequence that holds a short prompt, with `depth` tokens."""
    read = Reader(state)
    head = read.take(8)
    if read.data[read.at:read.at + 4] == b"KVRN":
        return head + grow_tiles(read, depth)
    return head + grow_rows(read, depth)


def grow_rows(read: Reader, depth: int) -> bytes:
    """llama.cpp's own state: one row per token, layer and side."""
    n_stream, cells = read.unpack("II")
    first = read.unpack("iIi")
    if n_stream != 1 or first != (0, 1, 0):
        raise ValueError("this model's cache cannot be filled without prefilling: its state has an unknown form")
    read.take(12*(cells - 1))
    is_transposed, n_layer = read.unpack("II")
    if is_transposed:
        raise ValueError("values are stored transposed; flash attention is needed")
    out = [struct.pack("<II", 1, depth), b"".join(struct.pack("<iIi", i, 1, 0) for i in range(depth)),
           struct.pack("<II", 0, n_layer)]
    for _ in range(2*n_layer):
        kind, row = read.unpack("iQ")
        out += [struct.pack("<iQ", kind, row), repeated(read.take(row*cells), row, depth)]
    return b"".join([*out, read.data[read.at:]])


def state_hash(parts: "list[bytes]") -> int:
    """kvarn_hash of ggml-kvarn/kvarn-cache-state.cpp: four lanes take words of 8 bytes in turns, the first also what is over."""
    def mix(x: int) -> int:
        x = x*0x9e3779b97f4a7c15 & 0xffffffffffffffff
        return x ^ x >> 29

    a, b, c, d = 1, 2, 3, 4
    for data in parts:
        whole = len(data)//32*32
        for w, x, y, z in struct.iter_unpack("<4Q", data[:whole]):
            a, b, c, d = mix(a ^ w), mix(b ^ x), mix(c ^ y), mix(d ^ z)
        for at in range(whole, len(data), 8):
            a = mix(a ^ int.from_bytes(data[at:at + 8], "little"))
    value = 0
    for lane in (a, b, c, d):
        value = mix(value ^ lane)
    return value


def row_bytes(name: str, values: int) -> int:
    """Bytes of a row of a cache type that stores rows."""
    return int(values*bits_of(name)/8)


def grow_tiles(read: Reader, depth: int) -> bytes:
    """A kvarn cache's state (ggml-kvarn/kvarn-cache-state.cpp): per side and layer the sealed tiles, then the open one's rows."""
    magic, n_text = read.unpack("II")
    text = read.take(n_text)
    n_stream, size, _ = read.unpack("IQQ")
    record = Reader(read.take(size))
    n_sealed, n_open = record.unpack("II")
    for _ in range(n_sealed):
        record.unpack("iQQ")
    if n_stream != 1 or n_open != 1 or not n_sealed:
        raise ValueError("the prompt to repeat must fill some tiles and open one")
    _, n_rows = record.unpack("iI")
    tiles = (depth - n_rows)//G
    n_rows_new = depth - tiles*G
    if n_rows_new != n_rows:
        raise ValueError(f"depth {depth} is not a multiple of {G} plus {n_rows}")
    full = (1 << 64) - 1
    new = struct.pack("<II", tiles, 1) + struct.pack("<iQQ", 0, full, full)*tiles + struct.pack("<iI", 0, n_rows)
    new += b"".join(struct.pack("<iiIi", i, 0, 1, 0) for i in range(depth))
    out = [struct.pack("<II", magic, n_text), text, struct.pack("<IQQ", 1, len(new), state_hash([new])), new]
    data: "list[bytes]" = []
    for side in text.decode().split("; ")[1:]:
        name, bits = side.split()[1], re.search(r"\((\d+) bits", side)
        for heads, channels in re.findall(r" (\d+)x(\d+)", side):
            heads, D = int(heads), int(channels)
            row = 2*heads*D if bits else row_bytes(name, heads*D)
            tile = (D*G*int(bits.group(1))//8 + 4*D + 2*G)*heads if bits else G*row
            sealed = repeated(read.take(tile*n_sealed), tile, tiles)
            data += [sealed[at:at + tile] for at in range(0, len(sealed), tile)] + [read.take(row*n_rows)]
    read.take(8)
    return b"".join([*out, *data, struct.pack("<Q", state_hash(data)), read.data[read.at:]])


def filled_depth(depth: int) -> int:
    """Tokens to fill for a depth: a short one is a real prompt, a long one ends in the middle of a tile."""
    return depth if depth <= SEED_TILES*G + TAIL else (depth - TAIL)//G*G + TAIL


class FilledContext(Context):
    """A context whose cache holds filled_depth(depth) tokens, with room for `room` more."""

    def __init__(self, model: Model, cache: str, depth: int, room: int, n_batch: int):
        depth = filled_depth(depth)
        n_ctx = (max(depth, SEED_TILES*G + TAIL) + room + 255)//256*256
        super().__init__(model, cache, n_ctx, n_ubatch=n_batch)
        self.memory = api.llama_get_memory(self.handle)
        self.n_batch = n_batch
        self.state = self.fill(depth)

    def run(self, n: int) -> None:
        """n more tokens, at most one batch; nothing but the decoding itself, which is what is timed."""
        tokens = (api.llama_token*n)(*((7*i + 11) % (self.model.n_vocab - 8) + 4 for i in range(n)))
        status = api.llama_decode(self.handle, api.llama_batch_get_one(tokens, n))
        if status:
            raise RuntimeError(f"llama_decode returned {status} with cache {self.cache}")
        api.llama_synchronize(self.handle)

    def fill(self, depth: int) -> "bytes | None":
        """Fills the cache; returns the state to come back to, None for an empty cache."""
        prompt = min(depth, SEED_TILES*G + TAIL)
        for start in range(0, prompt, self.n_batch):
            self.run(min(self.n_batch, prompt - start))
        if not depth:
            return None
        size = api.llama_state_seq_get_size(self.handle, 0)
        data = (ctypes.c_uint8*size)()
        size = api.llama_state_seq_get_data(self.handle, data, size, 0)
        state = bytes(data)[:size]
        if prompt < depth:
            state = grow(state, depth)
            self.load(state)
        return state

    def load(self, state: "bytes | None") -> None:
        api.llama_memory_clear(self.memory, True)
        if state is not None:
            data = (ctypes.c_uint8*len(state)).from_buffer_copy(state)
            with CapturedLog(False) as log:
                if api.llama_state_seq_set_data(self.handle, data, len(state), 0) != len(state):
                    raise RuntimeError(f"cache {self.cache} cannot be filled: {log.reason() or 'its state was refused'}")

    def set_threads(self, n: int) -> None:
        with CapturedLog(False):
            api.llama_set_n_threads(self.handle, n, n)
