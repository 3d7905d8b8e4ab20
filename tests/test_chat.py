"""test_chat.py - kvarn chat and kvarn run: in a pipe, on a terminal, with a model that thinks, and when Ctrl-C is pressed.

SPDX-License-Identifier: MIT
"""

import os
import re
import subprocess
import sys
import time

import pytest

from kvarn import thinking

TEMPLATE = ("{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}")
KVARN = [sys.executable, "-m", "kvarn.cli"]
PROMPT = r"\033\[0m\r\n(\033\[\?2004h)?> "   # behind a note: noise has a "> ", too
LIMIT = 120     # seconds until something expected on the terminal must have come


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A model with a chat template; it answers noise."""
    import tiny_model

    return tiny_model.write(tmp_path_factory.mktemp("chat")/"talker.gguf", chat_template=TEMPLATE, readable=True)


@pytest.fixture(scope="module")
def thinker(tmp_path_factory):
    """A model whose template begins a thought, which never ends."""
    import tiny_model

    return tiny_model.write(tmp_path_factory.mktemp("chat")/"thinker.gguf", chat_template=TEMPLATE + "<think>\n")


# ------------------------------------------------------------------------------------------ what a model thinks


def split(text: str, size: int, end: str = "") -> "tuple[str, str]":
    """(thought, said) of a text that comes in pieces."""
    splitter, parts = thinking.Splitter(end), []
    for start in range(0, len(text), size):
        parts += splitter.feed(text[start:start + size])
    parts += splitter.finish()
    return "".join(part for thinks, part in parts if thinks), "".join(part for thinks, part in parts if not thinks)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("text, end, thought, said", [
    ("plain text", "", "", "plain text"),
    ("<think>a < b</think>so", "", "a < b", "so"),
    ("x<think>one</think>y<thinking>two</thinking>z", "", "onetwo", "xyz"),
    ("[THINK]hm[/THINK]yes", "", "hm", "yes"),
    ("still thinking</think>done", "</think>", "still thinking", "done"),
    ("never closed", "</think>", "never closed", ""),
    ("a <b> <thin c", "", "", "a <b> <thin c"),
    ("ends in <thi", "", "", "ends in <thi"),
])
def test_thinking_is_told_apart(size, text, end, thought, said):
    assert split(text, size, end) == (thought, said)


def test_template_that_begins_a_thought():
    assert thinking.opens("<|assistant|><think>\n") == "</think>"
    assert thinking.opens("<|assistant|>") == thinking.opens("<think></think>") == ""


# ------------------------------------------------------------------------------------------------------- pipes


def run(*words, feed: str = "", **settings) -> subprocess.CompletedProcess:
    return subprocess.run([*KVARN, *map(str, words)], input=feed, capture_output=True, text=True, errors="replace", timeout=LIMIT,
                          **settings)


SHORT = ("--max-tokens", "24", "--temp", "0", "--ctx", "1024")


@pytest.mark.llama
def test_run_answers_on_stdout_and_reports_on_stderr(talker):
    model = talker
    done = run("run", model, "hello there", *SHORT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() and "\033" not in done.stdout
    status = done.stderr.strip().splitlines()[-1]
    assert re.fullmatch(r"\[\d+ tokens, [\d.]+ tok/s; context \d+/1024 \(\d+%\); "
                        r"KV kvarn4/kvarn2 [\d.]+ MiB \(f16: [\d.]+\)\]", status)
    assert run("run", model, "hello", "there", *SHORT).stdout == done.stdout
    assert run("run", model, *SHORT, feed="hello there").stdout == done.stdout


@pytest.mark.llama
def test_sink_and_types_reach_the_cache(talker):
    def mib(*words) -> float:
        return float(re.search(r"KV \S+ ([\d.]+) MiB", run("run", talker, "hello", *SHORT, *words).stderr).group(1))

    plain = mib("--sink", "0")
    assert mib("--sink", "512") > plain + 0.9 and mib("--sink", "0", "--kv", "kvarn2") < plain


@pytest.mark.llama
def test_prompt_from_a_pipe_follows_the_words(tiny):
    model = tiny()
    assert run("run", model, "one\n\ntwo", "--raw", *SHORT).stdout == run("run", model, "one", "--raw", *SHORT, feed="two").stdout
    done = run("run", model, "one", *SHORT)
    assert done.returncode == 0 and "no chat template" in done.stderr


@pytest.mark.llama
def test_chat_reads_lines_and_keeps_the_conversation(talker):
    done = run("chat", talker, *SHORT, feed="hello\n/size\nand now\n/sizes\n/clear\nhello\n/exit\nnot read\n")
    assert done.returncode == 0, done.stderr
    assert "no command /sizes: /clear forgets" in done.stderr
    used = [int(number) for number in re.findall(r"context (\d+)/1024", done.stderr)]
    assert len(used) == 3 and used[1] > used[0] + 24 and used[2] == used[0]
    assert done.stderr.count("KV cache kvarn4/kvarn2:") == 2 and "forgotten" in done.stderr


@pytest.mark.llama
def test_a_text_that_does_not_fit_does_not_end_the_chat(talker):
    done = run("chat", talker, "--max-tokens", "8", "--temp", "0", "--ctx", "256", feed="hello\n" + "x"*400 + "\nhello\n")
    assert done.returncode == 0
    assert done.stderr.count("tok/s") == 2 and done.stderr.count("/clear starts anew") == 1


@pytest.mark.llama
def test_thoughts_are_folded_in_a_pipe(thinker):
    done = run("run", thinker, "hello", *SHORT)
    assert done.returncode == 0 and done.stdout.strip() == ""
    assert re.search(r"\[thought for \d+ characters\]", done.stderr)
    assert run("run", thinker, "hello", *SHORT, "--think", "show").stdout.strip()


@pytest.mark.llama
def test_full_context_ends_the_answer_with_a_reason(tiny):
    done = run("run", tiny(), "hello", "--raw", "--temp", "0", "--ctx", "256", "--kv", "kvarn2")
    assert done.returncode == 0
    assert "the context of 256 tokens is full" in done.stderr or "tok/s" in done.stderr


# --------------------------------------------------------------------------------------------------- a terminal


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, *words):
        pty = pytest.importorskip("pty", reason="no pseudo terminals here")
        master, slave = pty.openpty()
        import fcntl
        import struct
        import termios

        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))

        def own_terminal():
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self.file = master
        self.process = subprocess.Popen([*KVARN, *map(str, words)], stdin=slave, stdout=slave, stderr=slave,
                                        preexec_fn=own_terminal, env={**os.environ, "TERM": "xterm"})
        os.close(slave)
        self.said = ""

    def wait_for(self, pattern: str, seconds: float = LIMIT) -> str:
        """Everything said until the pattern came; forgets it."""
        import select

        until = time.monotonic() + seconds
        while not re.search(pattern, self.said):
            assert time.monotonic() < until, f"no {pattern!r} in: {self.said[-2000:]!r}"
            if select.select([self.file], [], [], 0.2)[0]:
                try:
                    self.said += os.read(self.file, 65536).decode(errors="replace")
                except OSError:                             # the other side is closed
                    assert re.search(pattern, self.said), f"ended without {pattern!r}: {self.said[-2000:]!r}"
        end = re.search(pattern, self.said).end()
        said, self.said = self.said[:end], self.said[end:]
        return said

    def type(self, text: str) -> None:
        os.write(self.file, text.encode())

    def interrupt_until(self, pattern: str) -> str:
        """Ctrl-C until the pattern comes: Python forgets one that arrives between its prompt and the wait for a key."""
        until = time.monotonic() + LIMIT
        while True:
            self.type("\x03")
            try:
                return self.wait_for(pattern, seconds=1)
            except AssertionError:
                if time.monotonic() > until:
                    raise

    def close(self) -> int:
        os.close(self.file)
        return self.process.wait(LIMIT)


@pytest.mark.llama
def test_ctrl_c_stops_the_answer_and_not_the_chat(talker):
    terminal = Terminal("chat", talker, "--kv", "kvarn2", "--ctx", "131072", "--temp", "1.5", "--min-p", "0",
                        "--top-k", "0", "--top-p", "1")
    terminal.wait_for(PROMPT)
    terminal.type("tell me a very long story\n")
    live = terminal.wait_for(r"\d\d tokens, [\d.]+ tok/s; context")
    assert "\0337\033[1;23r\0338" in live, "the last row is kept for the status"
    said = live + terminal.interrupt_until(PROMPT)   # a model of random weights may have ended by itself just now
    assert "[stopped]" in said or "KV kvarn2" in said
    assert "\033[r" in said, "the scrolling region is given back"
    terminal.interrupt_until(r"\(Ctrl-D leaves\)")
    terminal.wait_for(PROMPT)
    terminal.type("/size\n")
    terminal.wait_for("KV cache kvarn2")
    terminal.wait_for(PROMPT)
    terminal.type("\x04")
    assert terminal.process.wait(LIMIT) == 0
    terminal.close()


@pytest.mark.llama
def test_thoughts_are_dim_on_a_terminal(thinker):
    terminal = Terminal("run", thinker, "hello", *SHORT)
    said = terminal.wait_for(r"\[\d+ tokens")
    assert "\033[2m" in said and "\033[0m" in said
    assert terminal.process.wait(LIMIT) == 0
    terminal.close()
