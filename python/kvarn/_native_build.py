"""Writes the source of the extension module kvarn._native: the declarations between the two cffi marks of kvarn.h, for cffi.

    python _native_build.py KVARN_H OUT.c     compiled later, checked against the header by the C compiler (ffi and lib)
    python _native_build.py KVARN_H OUT.py    no compiler: the same declarations, bound when they are loaded (ffi alone)

SPDX-License-Identifier: MIT
"""

import sys
from pathlib import Path

BEGIN, END = "// cffi: begin", "// cffi: end"


def declarations(header: Path) -> str:
    """The public functions of kvarn.h, as they stand there."""
    text = header.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise SystemExit(f"{header}: expected one '{BEGIN}' and one '{END}'")
    return text.split(BEGIN)[1].split(END)[0]


def main(header: str, out: str) -> None:
    from cffi import FFI  # type: ignore[import-untyped]

    ffi = FFI()
    ffi.cdef(declarations(Path(header)))
    if out.endswith(".py"):
        ffi.set_source("kvarn._native", None)
        ffi.emit_python_code(out)
    else:
        ffi.set_source("kvarn._native", '#include "kvarn.h"', py_limited_api=True)
        ffi.emit_c_code(out)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("usage: python _native_build.py KVARN_H OUT.c|OUT.py")
    main(*sys.argv[1:])
