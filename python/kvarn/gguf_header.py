"""The header of a GGUF file: what a model is made of, without its weights. A file cut off after the header will do.

    header = gguf_header.read("model.gguf")     # or the first of the parts of a split model
    header.values["qwen3.block_count"], header.tensors["token_embd.weight"]

What the values and the types of tensors are called and how large they are comes from the gguf package; its own reader wants the
weights, too, and takes seconds for a large vocabulary. SPDX-License-Identifier: MIT
"""

import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
LONGEST = 1 << 28       # bytes of a string and elements of an array; more is a damaged file


@dataclass(frozen=True)
class Header:
    """Values and tensors of a file, or of all parts of a split model."""

    path: Path
    values: "dict[str, Any]"      # an array of strings is only its length
    tensors: "dict[str, int]"     # name -> bytes

    @property
    def architecture(self) -> str:
        """"llama", "qwen3", ..; "" if the file does not say."""
        return str(self.values.get("general.architecture", ""))

    def get(self, name: str, default: Any = None) -> Any:
        """A value of the architecture: get("block_count") is llama.block_count."""
        return self.values.get(f"{self.architecture}.{name}", default)


class _Reader:
    def __init__(self, file: BinaryIO, path: Path):
        self.file, self.path = file, path

    def take(self, n: int) -> bytes:
        data = self.file.read(n)
        if len(data) != n:
            raise ValueError(f"{self.path} ends inside its header; is the download complete?")
        return data

    def number(self, form: str) -> Any:
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))[0]

    def length(self) -> int:
        n = int(self.number("Q"))
        if n > LONGEST:
            raise ValueError(f"{self.path} has a damaged header: a length of {n}")
        return n

    def string(self) -> str:
        return self.take(self.length()).decode("utf-8", errors="replace")


def _forms() -> "dict[int, str]":
    from gguf import GGUFValueType as Kind

    return {Kind.UINT8: "B", Kind.INT8: "b", Kind.UINT16: "H", Kind.INT16: "h", Kind.UINT32: "I", Kind.INT32: "i",
            Kind.FLOAT32: "f", Kind.BOOL: "?", Kind.UINT64: "Q", Kind.INT64: "q", Kind.FLOAT64: "d"}


def _value(read: _Reader, kind: int, forms: "dict[int, str]") -> Any:
    from gguf import GGUFValueType as Kind

    if kind in forms:
        return read.number(forms[kind])
    if kind == Kind.STRING:
        return read.string()
    if kind != Kind.ARRAY:
        raise ValueError(f"{read.path} has a value of the unknown type {kind}; a newer gguf package may know it")
    of, n = int(read.number("I")), read.length()
    if of == Kind.STRING:
        for _ in range(n):
            read.take(read.length())
        return n
    if of in forms:
        return list(struct.unpack(f"<{n}{forms[of]}", read.take(n*struct.calcsize("<" + forms[of]))))
    return [_value(read, of, forms) for _ in range(n)]


def _tensor(read: _Reader) -> "tuple[str, int]":
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    name, elements = read.string(), 1
    for _ in range(min(int(read.number("I")), 8)):
        elements *= int(read.number("Q"))
    kind = int(read.number("I"))
    read.number("Q")
    try:
        per, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (KeyError, ValueError):
        raise ValueError(f"{read.path}: {name} has the unknown type {kind}; pip install -U gguf may help") from None
    return name, elements//per*size


def _read_one(path: Path) -> Header:
    forms = _forms()
    with path.open("rb") as file:
        read = _Reader(file, path)
        magic = file.read(4)
        if magic != b"GGUF":
            raise ValueError(f"{path} is no GGUF file (it begins with {magic!r})")
        version = int(read.number("I"))
        if version not in (2, 3):
            raise ValueError(f"{path} is GGUF version {version & 0xffff}; versions 2 and 3 of little-endian files can be read")
        n_tensors, n_values = read.length(), read.length()
        values = {}
        for _ in range(n_values):
            name = read.string()
            values[name] = _value(read, int(read.number("I")), forms)
        return Header(path, values, dict(_tensor(read) for _ in range(n_tensors)))


def read(path: "str | Path") -> Header:
    """Header of a model; of a split one, with the tensors of all parts. ValueError or OSError with one line if there is none."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no model at {path}")
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ImportError("reading a model's header needs the gguf package; next: pip install gguf") from None
    header = _read_one(path)
    n_parts, match = int(header.values.get("split.count", 0)), PART.search(path.name)
    if n_parts > 1 and match:
        for number in range(1, n_parts + 1):
            part = path.with_name(path.name[:match.start()] + f"-{number:05}-of-{match.group(2)}.gguf")
            if number == int(match.group(1)):
                continue
            if not part.is_file():
                raise FileNotFoundError(f"{path.name} is one of {n_parts} parts, and {part} is missing")
            other = _read_one(part)
            header.tensors.update(other.tensors)
            header.values.update({name: value for name, value in other.values.items() if name not in header.values})
    return header
