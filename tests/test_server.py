"""test_server.py - llama-server on a kvarn cache: what its prompt cache, slots and parallel requests ask of it.

The server ends the whole process when a cache refuses to drop tokens, so every way of dropping some is tried here.

SPDX-License-Identifier: MIT
"""

import json
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request

import pytest

pytestmark = pytest.mark.tools

TEXT = "The quick brown fox jumps over the lazy dog, and then " * 8   # 440 bytes, three tiles and a piece
START_LIMIT = 120                                                     # seconds


class Server:
    def __init__(self, program, model, *options):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [str(program), "-m", model, "--host", "127.0.0.1", "--port", str(port), "-c", "4096", "-np", "2", "-t", "1",
                   "-fa", "on", *map(str, options)]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                        text=True, errors="replace")
        self.said = []
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        self._wait()

    def _read(self):
        for line in self.process.stdout:
            self.said.append(line)

    def _wait(self):
        started = time.monotonic()
        while time.monotonic() - started < START_LIMIT:
            if self.process.poll() is not None:
                raise AssertionError("llama-server ended:\n" + "".join(self.said[-30:]))
            try:
                if self.ask("/health")["status"] == "ok":
                    return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.1)
        raise AssertionError(f"llama-server is not ready after {START_LIMIT} s:\n" + "".join(self.said[-30:]))

    def ask(self, path: str, body: "dict | None" = None) -> dict:
        request = urllib.request.Request(self.url + path, json.dumps(body).encode() if body is not None else None,
                                         {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def complete(self, prompt: str, slot: int = 0, n: int = 24, **more) -> dict:
        return self.ask("/completion", {"prompt": prompt, "n_predict": n, "temperature": 0, "id_slot": slot, "cache_prompt": True,
                                        "ignore_eos": True, **more})

    def close(self):
        self.process.terminate()
        self.process.wait(30)


@pytest.fixture(scope="module")
def server(tiny, bin_dir, tmp_path_factory):
    one = Server(bin_dir / "llama-server", tiny(), "-ctk", "kvarn4", "-ctv", "kvarn2",
                 "--slot-save-path", tmp_path_factory.mktemp("slots"))
    yield one
    one.close()


def test_same_prompt_again(server):
    first = server.complete(TEXT)
    second, third = server.complete(TEXT), server.complete(TEXT)
    assert first["tokens_predicted"] == second["tokens_predicted"] == 24
    assert second["tokens_cached"] >= 400
    assert third["content"] == second["content"]


@pytest.mark.parametrize("kept", [1, 100, 128, 129, 200, 256, 300, 383, 384, 385, 430])
def test_prompt_that_parts_inside_a_tile(server, kept):
    server.complete(TEXT, n=100)
    answer = server.complete(TEXT[:kept] + "something else from here on, and long enough to fill a tile " * 3, n=100)
    assert answer["tokens_predicted"] == 100


def test_two_slots_at_once(server):
    answers = [None, None]

    def run(slot):
        answers[slot] = server.complete(f"{slot}: " + TEXT, slot, 150)

    threads = [threading.Thread(target=run, args=(slot,)) for slot in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answer["tokens_predicted"] for answer in answers] == [150, 150]


def test_slot_is_saved_and_restored(server):
    server.complete(TEXT, 0)
    wanted = server.complete(TEXT, 0)["content"]
    saved = server.ask("/slots/0?action=save", {"filename": "slot.bin"})
    assert saved["n_saved"] > 400
    server.complete("another prompt that takes the slot", 0)
    assert server.ask("/slots/0?action=restore", {"filename": "slot.bin"})["n_restored"] == saved["n_saved"]
    again = server.complete(TEXT, 0)
    assert again["timings"]["prompt_n"] < 30, "the restored tokens were read again"
    assert again["tokens_predicted"] == 24 and wanted


def test_several_completions_of_one_prompt(server):
    answer = server.ask("/v1/completions", {"prompt": TEXT, "max_tokens": 16, "temperature": 0, "n": 2})
    assert len(answer["choices"]) == 2


def test_full_context_ends_the_text_not_the_process(server):
    answer = server.complete(TEXT, n=4000)
    assert answer["truncated"] or answer["tokens_predicted"] < 4000
    assert server.ask("/health")["status"] == "ok"


def test_server_is_still_the_same_process(server):
    assert server.process.poll() is None


def test_context_shift_is_not_done(tiny, bin_dir):
    one = Server(bin_dir / "llama-server", tiny(), "-ctk", "kvarn2", "-ctv", "kvarn2", "--context-shift")
    try:
        answer = one.complete(TEXT, n=3000)
        assert answer["tokens_predicted"] < 3000
        assert one.ask("/health")["status"] == "ok"
    finally:
        one.close()
