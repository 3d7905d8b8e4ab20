"""test_server.py - llama-server on a kvarn cache: what its prompt cache, slots and parallel requests ask of it.

The server ends the whole process when a cache refuses to drop tokens, so every way of dropping some is tried here.

SPDX-License-Identifier: MIT
"""

import threading

import pytest

from llama_server import Server

pytestmark = pytest.mark.tools

TEXT = "The quick brown fox jumps over the lazy dog, and then " * 8   # 440 bytes, three tiles and a piece
SMALL = ("-c", 4096, "-np", 2, "-t", 1)


@pytest.fixture(scope="module")
def server(tiny, bin_dir, tmp_path_factory):
    one = Server(bin_dir / "llama-server", tiny(), *SMALL, "-ctk", "kvarn4", "-ctv", "kvarn2",
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


@pytest.mark.parametrize("pool", ["--kv-unified", "--no-kv-unified"])
def test_text_goes_on_after_a_context_shift(tiny, bin_dir, pool):
    with Server(bin_dir / "llama-server", tiny(), *SMALL, "-ctk", "kvarn4", "-ctv", "kvarn2", "--context-shift", pool,
                "--kv-unified-per-slot", 2048) as one:
        answer = one.complete(TEXT, n=3000)
        assert answer["tokens_predicted"] == 3000 and answer["truncated"]
        assert one.complete(TEXT, n=24)["tokens_predicted"] == 24


def test_shifted_chunks_are_reused(tiny, bin_dir):
    """A prompt without its beginning: the rest is taken from the cache, at other positions."""
    with Server(bin_dir / "llama-server", tiny(), *SMALL, "-ctk", "kvarn4", "-ctv", "kvarn2", "--cache-reuse", 64) as one:
        one.complete("These words come first and are gone in the second prompt. " + TEXT)
        answer = one.complete(TEXT)
        assert answer["timings"]["prompt_n"] < 200, "the words that both prompts have were read again"
