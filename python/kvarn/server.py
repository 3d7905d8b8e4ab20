"""python -m kvarn.server: llama_cpp.server with names for cache types.

    python -m kvarn.server --model model.gguf --kv_type kvarn --n_ctx 32768

--type_k and --type_v take names as well. Flash attention is switched on for types that need it, and logits_all off unless asked
for: it would keep n_ctx x vocabulary floats, many times the cache. Everything else is llama_cpp.server's.

SPDX-License-Identifier: MIT
"""

import importlib.util
import sys

from . import kvtype

NEEDED = ("uvicorn", "fastapi", "pydantic_settings", "sse_starlette", "starlette_context")


def take(argv: "list[str]", name: str) -> "str | None":
    """Removes --name VALUE or --name=VALUE from argv; returns the value."""
    value, rest, words = None, [], iter(argv)
    for word in words:
        if word == f"--{name}":
            value = next(words, None)
            if value is None:
                raise ValueError(f"--{name} needs a value")
        elif word.startswith(f"--{name}="):
            value = word.partition("=")[2]
        else:
            rest.append(word)
    argv[:] = rest
    return value


def rewrite(argv: "list[str]") -> "list[str]":
    """llama_cpp.server's own arguments: ids for types, and the settings that follow from them."""
    from .llama import LIBRARY, type_id

    argv = list(argv)
    kv_type, type_k, type_v = (take(argv, name) for name in ("kv_type", "type_k", "type_v"))
    if kv_type is not None:
        if type_k is not None or type_v is not None:
            raise ValueError("give --kv_type, or --type_k and --type_v, not both")
        type_k, type_v = kvtype.parse(kv_type)
    quantized = False
    for name, given in (("type_k", type_k), ("type_v", type_v)):
        if given is not None:
            number = type_id(int(given) if given.isdigit() else given)
            quantized = quantized or kvtype.is_quantized(LIBRARY.name(number))
            argv += [f"--{name}", str(number)]
    named = {word.partition("=")[0] for word in argv}
    if quantized and "--flash_attn" not in named:
        argv += ["--flash_attn", "true"]
    if "--logits_all" not in named and "--config_file" not in named:
        argv += ["--logits_all", "false"]
    return argv


def main() -> int:
    """Runs llama_cpp.server with the arguments of this process."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f"kvarn: the server needs {', '.join(missing)}; next: pip install 'kvarn[server]'", file=sys.stderr)
        return 1
    try:
        arguments = rewrite(sys.argv[1:])
    except (ImportError, ValueError) as error:
        print(f"kvarn: {error}", file=sys.stderr)
        return 1
    import kvarn

    kvarn.install()
    from llama_cpp.server.__main__ import main as serve

    sys.argv[1:] = arguments
    serve()  # type: ignore[no-untyped-call]
    return 0


if __name__ == "__main__":
    sys.exit(main())
