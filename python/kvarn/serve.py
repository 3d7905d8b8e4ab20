"""kvarn serve: an OpenAI-compatible server, with cache types by name.

Runs the bundled llama-server, which needs nothing else; with --python, llama-cpp-python's server. llama-server's own web page is
made with npm and not in this build: a small one of ours (web/index.html) takes its place. What comes after -- goes to that server
as it is. SPDX-License-Identifier: MIT
"""

import argparse
import os
import sys
from pathlib import Path

from . import cache_size, kvtype

EXAMPLE = """examples:
  kvarn serve model.gguf                                    a chat page at http://127.0.0.1:8080, the API below /v1
  kvarn serve model.gguf --kv kvarn3 --ctx 131072 -- -np 4  four slots; what follows -- is llama-server's
  kvarn serve model.gguf --python                           llama-cpp-python's server (pip install 'kvarn[server]')
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL.gguf")
    parser.add_argument("--kv", default="kvarn", metavar="TYPE", help="cache type: kvarn (= kvarn4/kvarn2), one of "
                        f"{', '.join(kvtype.NAMES)}, or KEYS/VALUES (default kvarn)")
    parser.add_argument("--ctx", type=int, default=0, metavar="N", help="context in tokens (default: as trained, at most 32768)")
    parser.add_argument("--sink", type=int, metavar="N", help="tokens at the start that stay exact (default: KVARN_SINK, or 0)")
    parser.add_argument("--host", default="127.0.0.1", help="(default %(default)s: only this machine)")
    parser.add_argument("--port", type=int, default=8080, help="(default %(default)s)")
    parser.add_argument("--threads", type=int, metavar="N", help="default: the server's choice")
    parser.add_argument("--gpu-layers", type=int, default=-1, metavar="N", help="layers on the GPU (default: all)")
    parser.add_argument("--python", action="store_true", help="llama-cpp-python's server instead of llama-server")


def server_arguments(args: argparse.Namespace, n_ctx: int) -> "list[str]":
    """llama-server's words."""
    keys, values = kvtype.parse(args.kv)
    words = ["-m", args.model, "-c", str(n_ctx), "-ctk", keys, "-ctv", values, "--host", args.host, "--port", str(args.port)]
    words += ["-fa", "on"] if kvtype.is_quantized(keys) or kvtype.is_quantized(values) else []
    words += ["-t", str(args.threads)] if args.threads else []
    return words + ["-ngl", str(args.gpu_layers if args.gpu_layers >= 0 else 999),
                    "--path", str(Path(__file__).with_name("web")), *args.rest]


def python_arguments(args: argparse.Namespace, n_ctx: int) -> "list[str]":
    """kvarn.server's words."""
    words = ["--model", args.model, "--n_ctx", str(n_ctx), "--kv_type", args.kv, "--host", args.host, "--port", str(args.port)]
    words += ["--n_threads", str(args.threads)] if args.threads else []
    return words + ["--n_gpu_layers", str(args.gpu_layers), *args.rest]


def run(args: argparse.Namespace) -> int:
    kvtype.parse(args.kv)
    if not 0 < args.port < 65536:
        raise ValueError(f"--port {args.port}: give a number from 1 to 65535")
    if args.ctx < 0:
        raise ValueError("--ctx must be 0 or more")
    cache_size.check_sink(args.sink)
    if args.sink is not None:
        os.environ["KVARN_SINK"] = str(args.sink)
    if not Path(args.model).is_file():
        raise FileNotFoundError(f"no model at {args.model}")
    from .chat import context_for

    n_ctx = args.ctx or context_for(args.model)
    if args.python:
        from . import server

        sys.argv = ["kvarn serve", *python_arguments(args, n_ctx)]
        return server.main()
    from .cli import execute

    cache = kvtype.label(*kvtype.parse(args.kv))
    print(f"kvarn: http://{args.host}:{args.port}, cache {cache}, {n_ctx} tokens", file=sys.stderr, flush=True)
    return execute("llama-server", server_arguments(args, n_ctx))
