"""What a cache of keys and values takes: read from the library's own log, compared with f16.

SPDX-License-Identifier: MIT
"""

import re
from html import escape
from typing import NamedTuple

from . import kvtype
from .cache_size import bits_of

MIB = 1 << 20
_NUMBER = r"\s*([\d.]+)"
_SIZE = re.compile(rf"size ={_NUMBER} MiB \({_NUMBER} cells,{_NUMBER} layers.*"
                   rf"K \((\w+)\):{_NUMBER} MiB, V \((\w+)\):{_NUMBER} MiB")
_SIDE = re.compile(rf"kvarn: (keys|values) (\w+):{_NUMBER} bits per value,{_NUMBER} tiles of{_NUMBER} tokens per stream "
                   rf"\({_NUMBER} asked")
_TAIL = re.compile(rf"kvarn: tail ={_NUMBER} MiB")


class KVSize(NamedTuple):
    """What a context allocated for keys and values."""

    keys: str          # type names
    values: str
    keys_mib: float
    values_mib: float
    tail_mib: float    # tokens that are not in a full tile yet, in f16; 0 without kvarn
    f16_mib: float     # what f16 takes for the same number of tokens
    stored_mib: float  # keys and values of these tokens alone, without tail and spare tiles

    @property
    def mib(self) -> float:
        """All that was allocated."""
        return self.keys_mib + self.values_mib + self.tail_mib

    @property
    def bits_per_value(self) -> float:
        """Everything allocated, spread over the tokens the user asked for."""
        return 16*self.mib/self.f16_mib if self.f16_mib else 0.0

    @property
    def stored_bits(self) -> float:
        """Bits per value of the types themselves: what a long context comes close to."""
        return 16*self.stored_mib/self.f16_mib if self.f16_mib else 0.0

    def __str__(self) -> str:
        return (f"KV cache {kvtype.label(self.keys, self.values)}: {self.mib:.2f} MiB, {self.bits_per_value:.2f} bits per value "
                f"(f16: {self.f16_mib:.2f} MiB)")


class KVInfo(NamedTuple):
    """What the cache of a Llama takes now; see Llama.kv_info(). Sizes are the log's, to the hundredth of a MiB."""

    type: str               # "kvarn4/kvarn2"; one name if keys and values have the same
    n_ctx: int
    n_tokens: int           # in the cache
    bits_per_value: float   # of all that is allocated, tail and spare tiles included
    stored_bits: float      # of the types themselves
    bytes: int              # allocated
    f16_bytes: int          # what f16 would take
    tail_bytes: int         # of bytes: tokens that are not in a full tile yet

    @property
    def saved_bytes(self) -> int:
        """Against f16; negative where the tail outweighs what the tiles save (short contexts)."""
        return self.f16_bytes - self.bytes

    def __str__(self) -> str:
        saved = f"{self.saved_bytes/MIB:.2f} MiB less" if self.saved_bytes >= 0 else f"{-self.saved_bytes/MIB:.2f} MiB more"
        return (f"{self.type}: {self.bytes/MIB:.2f} MiB for {self.n_ctx} tokens, {saved} than f16; "
                f"{self.bits_per_value:.2f} bits per value; {self.n_tokens} tokens in use")

    def _repr_html_(self) -> str:
        rows = {"cache": self.type, "context": f"{self.n_tokens} of {self.n_ctx} tokens",
                "allocated": f"{self.bytes/MIB:.2f} MiB", "f16": f"{self.f16_bytes/MIB:.2f} MiB",
                "saved": f"{self.saved_bytes/MIB:.2f} MiB", "bits per value": f"{self.bits_per_value:.2f}"}
        lines = (f"<tr><th align='left'>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in rows.items())
        return f"<table>{''.join(lines)}</table>"


def info_of(size: KVSize, n_ctx: int, n_tokens: int) -> KVInfo:
    """What kv_info() of a context with this size returns."""
    return KVInfo(kvtype.label(size.keys, size.values), n_ctx, n_tokens, size.bits_per_value, size.stored_bits,
                  round(size.mib*MIB), round(size.f16_mib*MIB), round(size.tail_mib*MIB))


def read_size(lines: "list[str]") -> KVSize:
    """Sums the size lines of all caches of a context (a model with sliding windows has two)."""
    keys = values = "f16"
    total = {"keys": 0.0, "values": 0.0, "tail": 0.0, "f16": 0.0, "stored": 0.0}
    sides = {match.group(1): (float(match.group(3)), float(match.group(4))/float(match.group(6)))
             for match in map(_SIDE.search, lines) if match}  # bits per value, tokens allocated per token asked for
    for line in lines:
        tail, size = _TAIL.search(line), _SIZE.search(line)
        if tail:
            total["tail"] += float(tail.group(1))
        if size:
            for which, name, mib in (("keys", size.group(4), size.group(5)), ("values", size.group(6), size.group(7))):
                bits, spare = sides.get(which, (16.0, 1.0)) if kvtype.is_kvarn(name) else (bits_of(name), 1.0)
                total[which] += float(mib)
                total["stored"] += float(mib)/spare
                total["f16"] += float(mib)*16/bits/spare
            if not kvtype.is_kvarn(keys, values):
                keys, values = size.group(4), size.group(6)
    return KVSize(keys, values, total["keys"], total["values"], total["tail"], total["f16"], total["stored"])
