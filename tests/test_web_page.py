"""test_web_page.py - the page of kvarn serve in a real browser: a conversation, folded thoughts, Stop, Clear, errors in words.

SPDX-License-Identifier: MIT
"""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

import browser
from test_chat import TEMPLATE

pytestmark = pytest.mark.tools
LIMIT = 120


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page, of a model that answers noise with at most 48 tokens."""
    import tiny_model

    program = browser.find()
    if program is None:
        assert not os.environ.get("CI"), "no browser: apt-get install chromium (.ci/run does it)"
        pytest.skip("no browser: apt-get install chromium")
    folder = tmp_path_factory.mktemp("page")
    model = tiny_model.write(folder/"talker.gguf", chat_template=TEMPLATE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, "-m", "kvarn.cli", "serve", str(model), "--kv", "kvarn", "--ctx", "4096", "--port",
                               str(port), "--threads", "1", "--", "-np", "1", "-n", "48"], stdin=subprocess.DEVNULL,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url, until = f"http://127.0.0.1:{port}/", time.monotonic() + LIMIT
    try:
        while True:
            try:
                urllib.request.urlopen(url + "health", timeout=10).close()
                break
            except (urllib.error.URLError, ConnectionError):
                assert server.poll() is None and time.monotonic() < until, "the server ended or does not answer"
                time.sleep(0.1)
        with browser.Browser(program, folder/"profile") as one:
            one.open(url)
            one.wait_for("document.getElementById('status').textContent.includes('of 4096 tokens')")
            yield one
    finally:
        server.terminate()
        server.wait(60)


def say(page, text: str) -> None:
    page.run(f"document.getElementById('text').value = {text!r}; document.getElementById('form').requestSubmit()")


def finished(page, n: int) -> None:
    page.wait_for(f"document.querySelectorAll('article.assistant').length === {n} && stop === null")


def test_a_conversation(page):
    assert page.run("document.title") == "kvarn: talker.gguf"
    say(page, "hello")
    finished(page, 1)
    assert page.run("document.querySelector('article.user').textContent") == "hello"
    assert page.run("document.querySelector('article.assistant').textContent.length") > 5
    status = page.run("document.getElementById('status').textContent")
    assert "tok/s; context" in status and status.endswith("of 4096 tokens")
    say(page, "and now?")
    finished(page, 2)
    assert page.run("messages.map(m => m.role).join()") == "user,assistant,user,assistant"
    used = int(page.run("document.getElementById('status').textContent.match(/context (\\d+)/)[1]"))
    assert used > 100, "the second answer follows on the first"


def test_thoughts_are_folded(page):
    assert page.run("split('<think>a b</think>c').join('|')") == "a b|c"
    assert page.run("split('a b</think>c').join('|')") == "a b|c"
    assert page.run("split('<think>going on').join('|')") == "going on|"
    assert page.run("split('plain <b>').join('|')") == "|plain <b>"
    page.run("show(add('assistant'), 'hm <i>', 'yes')")
    last = "Array.from(document.querySelectorAll('article')).pop()"
    assert page.run(f"{last}.querySelector('details').textContent") == "thoughthm <i>"
    assert page.run(f"{last}.querySelector('details').open") is False and page.run(f"{last}.innerHTML.includes('<i>')") is False


def test_clear_and_stop(page):
    page.run("document.getElementById('clear').click()")
    assert page.run("messages.length + document.querySelectorAll('article').length") == 0
    say(page, "a long story")
    page.wait_for("document.getElementById('send').textContent === 'Stop'")
    page.run("document.getElementById('form').requestSubmit()")
    finished(page, 1)
    assert page.run("document.getElementById('send').textContent") == "Send"


def test_an_error_is_said_in_words(page):
    page.run("document.getElementById('clear').click()")
    say(page, "x"*6000)
    page.wait_for("document.querySelectorAll('.error').length === 1")
    assert "context" in page.run("document.querySelector('.error').textContent")
