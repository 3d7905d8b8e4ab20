"""kvarn chat and kvarn run: talk to a model, with its thinking set apart and the cache's size in sight.

The answer goes to stdout and nothing else does; status and notes go to the terminal's last row or to stderr, so that
`kvarn run model.gguf "..." | less` gives the answer. SPDX-License-Identifier: MIT
"""

import argparse
import re
import signal
import sys
import time
from types import FrameType
from typing import TYPE_CHECKING, Any, Dict, Iterator, List, Optional, cast

from . import cache_size, kvtype, thinking
from .status_line import StatusLine

if TYPE_CHECKING:
    from .llama import Llama

EXAMPLE = """examples:
  kvarn chat model.gguf                             kvarn4 keys, kvarn2 values, context as trained (at most 32768)
  kvarn chat model.gguf --kv kvarn3 --ctx 131072
  kvarn run model.gguf "Why is the sky blue?"
  git diff | kvarn run model.gguf "Write a commit message for this:"

in chat: Ctrl-C stops an answer, Ctrl-D leaves; /clear forgets the conversation, /size shows the cache, /help lists these
"""
COMMANDS = "/clear forgets the conversation, /size shows the cache, /exit or Ctrl-D leaves, Ctrl-C stops an answer"
CTX = 32768             # where the model takes that much
DIM, PLAIN = "\033[2m", "\033[0m"

Message = Dict[str, str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL.gguf")
    if parser.prog.split()[-1] == "run":
        parser.add_argument("prompt", nargs="*", help="the prompt; what comes through a pipe is put after it")
        parser.add_argument("--raw", action="store_true", help="continue the text as it is, without the model's chat template")
    parser.add_argument("--kv", default="kvarn", metavar="TYPE", help="cache type: kvarn (= kvarn4/kvarn2), one of "
                        f"{', '.join(kvtype.NAMES)}, or KEYS/VALUES (default kvarn)")
    parser.add_argument("--ctx", type=int, default=0, metavar="N", help=f"context in tokens (default: as trained, <= {CTX})")
    parser.add_argument("--sink", type=int, metavar="N", help="tokens at the start that stay exact (default: KVARN_SINK, or 0)")
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument("--max-tokens", type=int, default=0, metavar="N", help="of one answer (default: as the context takes)")
    parser.add_argument("--temp", type=float, default=0.7, help="temperature; 0: always the likeliest token (%(default)s)")
    parser.add_argument("--top-p", type=float, default=0.95, help="(default %(default)s)")
    parser.add_argument("--top-k", type=int, default=40, help="(default %(default)s)")
    parser.add_argument("--min-p", type=float, default=0.05, help="(default %(default)s)")
    parser.add_argument("--seed", type=int, default=-1, help="(default: random)")
    parser.add_argument("--think", choices=("auto", "dim", "fold", "show"), default="auto",
                        help="what a model thinks: dim, as one line, or as the rest (default: dim on a terminal, else fold)")
    parser.add_argument("--threads", type=int, metavar="N", help="default: llama.cpp's choice")
    parser.add_argument("--gpu-layers", type=int, default=-1, metavar="N", help="layers on the GPU (default: all)")
    parser.add_argument("--verbose", action="store_true", help="with llama.cpp's log")


class Screen:
    """Where the parts of an answer go."""

    def __init__(self, think: str, line: StatusLine):
        is_terminal = sys.stdout.isatty()
        self.think = ("dim" if is_terminal else "fold") if think == "auto" else think
        self.line, self.color = line, is_terminal
        self.n_thought, self.thinks, self.at_start = 0, False, True

    def write(self, is_thinking: bool, text: str) -> None:
        if is_thinking != self.thinks and self.think != "show":
            if self.thinks:
                self.leave()
            elif self.think == "dim" and self.color:
                sys.stdout.write(DIM)
            self.thinks, self.at_start = is_thinking, True
        if is_thinking and self.think == "fold":
            self.n_thought += len(text)
            return
        if self.at_start:                                  # the blank lines after a tag
            text = text.lstrip("\n")
            self.at_start = not text
        sys.stdout.write(text)
        sys.stdout.flush()

    def leave(self) -> None:
        """The thinking is over."""
        if self.think == "dim":
            sys.stdout.write((PLAIN if self.color else "") + "\n\n")
        elif self.n_thought:
            note(f"[thought for {self.n_thought} characters]")
        self.n_thought = 0

    def close(self) -> None:
        if self.thinks:
            self.leave()
        self.thinks = False
        sys.stdout.write("\n")
        sys.stdout.flush()


class Interrupt:
    """Ctrl-C while a model is loaded: ends an answer before its next batch or token, the second time at once; leaves input().

    Elsewhere it does nothing, and KeyboardInterrupt is raised once: no haste can break off what must be put back in order.
    """

    def __init__(self) -> None:
        self.asked = False                      # for the end of the answer
        self.patience: Optional[int] = None     # that many Ctrl-C only ask, the next one raises; None: none does

    def handle(self, number: int, frame: Optional[FrameType]) -> None:
        if self.patience == 0:
            self.patience = None
            raise KeyboardInterrupt
        self.asked = True
        if self.patience:
            self.patience -= 1

    def __enter__(self) -> "Interrupt":
        self.before = signal.signal(signal.SIGINT, self.handle)
        return self

    def __exit__(self, *details: Any) -> None:
        signal.signal(signal.SIGINT, self.before)

    def input(self, prompt: str) -> str:
        """A line; KeyboardInterrupt."""
        try:
            self.patience = 0
            return input(prompt)
        finally:
            self.patience, self.asked = None, False


class Stopped(Exception):
    """The user does not want the rest of an answer."""


def parts_of(stream: Any) -> "Iterator[dict[str, Any]]":
    """The parts of a streamed completion; its declared type is also that of a whole one."""
    return iter(stream)


class Talk:
    """A model and what was said so far."""

    def __init__(self, args: argparse.Namespace):
        from .llama import Llama

        self.args = args
        keys, values = kvtype.parse(args.kv)
        self.label = kvtype.label(keys, values)
        n_ctx = args.ctx or context_for(args.model)
        settings: "dict[str, Any]" = {"n_threads": args.threads, "n_threads_batch": args.threads} if args.threads else {}
        self.llm: "Llama" = Llama(args.model, kv_type=args.kv, n_ctx=n_ctx, n_gpu_layers=args.gpu_layers, flash_attn=True,
                                  kv_sink=args.sink, verbose=args.verbose,
                                  seed=args.seed if args.seed >= 0 else 0xffffffff, **settings)
        self.has_template = "tokenizer.chat_template" in self.llm.metadata and not getattr(args, "raw", False)
        self.messages: "List[Message]" = []
        self.clear()
        self.n_tokens, self.seconds = 0, 0.0               # of the last answer

    def clear(self) -> None:
        self.messages = [{"role": "system", "content": self.args.system}] if self.args.system else []

    def end_tag(self) -> str:
        """The tag that ends a thought which the template begins."""
        if not self.has_template:
            return ""
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        try:
            formatter = Jinja2ChatFormatter(self.llm.metadata["tokenizer.chat_template"], "", "")
            return thinking.opens(formatter(messages=[{"role": "user", "content": "?"}]).prompt)
        except Exception:                                  # a template may raise whatever it likes
            return ""

    def pieces(self, text: str) -> "Iterator[str]":
        """The answer to a text, in pieces."""
        args = self.args
        sampling: "dict[str, Any]" = {"temperature": args.temp, "top_p": args.top_p, "top_k": args.top_k, "min_p": args.min_p,
                                      "max_tokens": args.max_tokens or None, "stream": True}
        if not self.has_template:
            for part in parts_of(self.llm.create_completion(text, **sampling)):
                yield part["choices"][0]["text"]
            return
        self.messages.append({"role": "user", "content": text})
        for part in parts_of(self.llm.create_chat_completion(cast(Any, self.messages), **sampling)):
            yield part["choices"][0]["delta"].get("content") or ""

    def answer(self, text: str, line: StatusLine, interrupt: Interrupt) -> str:
        """Prints the answer; "" or why it ended early."""
        screen, splitter = Screen(self.args.think, line), thinking.Splitter(self.end_tag())
        said, why = "", ""

        def before_batch(done: int, all: int) -> None:   # a token may not show in the text yet
            if interrupt.asked:
                interrupt.patience = None
                raise Stopped
            self.read_clock()
            line.show(f"reading: {done} of {all} tokens" if all > 1 else self.status())

        self.start_clock()
        pieces = self.pieces(text)
        line.show("reading", now=True)
        self.llm.on_eval = before_batch
        try:
            interrupt.patience = 1
            for piece in pieces:
                for is_thinking, part in splitter.feed(piece):
                    said += "" if is_thinking else part
                    screen.write(is_thinking, part)
        except (Stopped, KeyboardInterrupt):
            why = "stopped"
        finally:
            interrupt.patience = None
            pieces.close()  # type: ignore[attr-defined]
            for is_thinking, part in splitter.finish():
                said += "" if is_thinking else part
                screen.write(is_thinking, part)
            screen.close()
            self.read_clock()
        if self.llm.n_tokens >= self.llm.n_ctx() - 1 and not why:
            why = f"the context of {self.llm.n_ctx()} tokens is full; a larger --ctx takes more"
        if self.has_template:
            self.messages.append({"role": "assistant", "content": said.strip()})
        return why

    def start_clock(self) -> None:
        from .llama import llama_cpp

        llama_cpp.llama_perf_context_reset(self.llm._ctx.ctx)
        self.began = time.monotonic()

    def read_clock(self) -> None:
        """Tokens written and seconds since the prompt was read."""
        from .llama import llama_cpp

        perf = llama_cpp.llama_perf_context(self.llm._ctx.ctx)
        self.n_tokens = perf.n_eval
        self.seconds = time.monotonic() - self.began - perf.t_p_eval_ms/1000

    def status(self) -> str:
        size, used, room = self.llm.kv_size, self.llm.n_tokens, self.llm.n_ctx()
        speed = f"{self.n_tokens/self.seconds:.1f} tok/s" if self.seconds > 0 and self.n_tokens else "- tok/s"
        return (f"{self.n_tokens} tokens, {speed}; context {used}/{room} ({used/room:.0%}); "
                f"KV {self.label} {size.mib:.1f} MiB (f16: {size.f16_mib:.1f})")


def context_for(path: str) -> int:
    """As much as the model was trained for, at most CTX."""
    from . import gguf_header

    trained = int(gguf_header.read(path).get("context_length", 0) or CTX)
    return min(trained, CTX)


def check(args: argparse.Namespace) -> None:
    kvtype.parse(args.kv)
    if args.ctx < 0 or args.max_tokens < 0:
        raise ValueError("--ctx and --max-tokens must be 0 or more")
    cache_size.check_sink(args.sink)
    if args.threads is not None and args.threads < 1:
        raise ValueError(f"--threads {args.threads}: give 1 or more")


def note(text: str) -> None:
    print(f"{DIM}{text}{PLAIN}" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)


def run_once(args: argparse.Namespace) -> int:
    words = " ".join([*args.prompt, *args.late])
    piped = "" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.read()
    text = "\n\n".join(part for part in (words, piped) if part.strip())
    if not text:
        raise ValueError("no prompt: give one after the model or through a pipe; kvarn chat is for a conversation")
    talk = Talk(args)
    if not talk.has_template and not args.raw:
        note("the model has no chat template: the text is continued as it is")
    with Interrupt() as interrupt, StatusLine() as line:
        why = talk.answer(text, line, interrupt)
    note(f"[{talk.status()}]")
    if why:
        note(f"[{why}]")
    return 130 if why == "stopped" else 0


def questions(interrupt: Interrupt, is_terminal: bool) -> "Iterator[str]":
    """What the user types, or the lines of a pipe."""
    while True:
        try:
            text = interrupt.input("> " if is_terminal else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            note("\n(Ctrl-D leaves)")
            continue
        if text.strip():
            yield text.strip()


def chat(args: argparse.Namespace) -> int:
    is_terminal = sys.stdin is not None and sys.stdin.isatty()
    if is_terminal:
        try:
            import readline  # noqa: F401  (input() edits lines with it)
        except ImportError:
            pass
    talk = Talk(args)
    note(f"{talk.llm.metadata.get('general.name', args.model)}; {talk.llm.kv_size}; {talk.llm.n_ctx()} tokens. /help helps.")
    if not talk.has_template:
        note("the model has no chat template: each text is continued as it is")
    with Interrupt() as interrupt:
        for text in questions(interrupt, is_terminal):
            if not reply(talk, text, interrupt):
                break
    return 0


def reply(talk: Talk, text: str, interrupt: Interrupt) -> bool:
    """An answer, or what a command says; False: the user leaves."""
    if text in ("/exit", "/quit", "/bye"):
        return False
    if text == "/clear":
        talk.clear()
        note("forgotten")
    elif text == "/size":
        note(str(talk.llm.kv_size))
    elif text.startswith("/help"):
        note(COMMANDS)
    elif re.fullmatch("/[a-z]+", text):
        note(f"no command {text}: {COMMANDS}")
    else:
        n_before = len(talk.messages)
        try:
            with StatusLine() as line:
                why = talk.answer(text, line, interrupt)
        except (RuntimeError, ValueError) as error:      # too long a text, mostly: the conversation goes on
            del talk.messages[n_before:]
            note(f"kvarn: {error}; /clear starts anew, a larger --ctx takes more")
            return True
        note(f"[{talk.status()}]" + (f" [{why}]" if why else ""))
    return True


def run(args: argparse.Namespace) -> int:
    check(args)
    return run_once(args) if args.command == "run" else chat(args)
