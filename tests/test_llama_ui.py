"""test_llama_ui.py - llama-server's own web page, as llama.cpp ships it, in a real browser, with kvarn caches behind it.

SPDX-License-Identifier: MIT
"""

import os
import urllib.request

import pytest

import browser
import web_pages

pytestmark = pytest.mark.tools


@pytest.fixture(scope="module")
def own_page(tmp_path_factory):
    if browser.find() is None or not web_pages.has_wheel():
        what = f"needs Chromium and the wheel that holds the page: pip install {web_pages.WHEEL}"
        assert not os.environ.get("CI"), what + " (make test and .ci/run do it)"
        pytest.skip(what)
    return web_pages.llama_ui(tmp_path_factory.mktemp("ui"))


@pytest.mark.parametrize("kv", ["kvarn", "kvarn3"])
def test_it_answers_right(own_page, tmp_path, kv):
    """The whole chain of steps stands on the page, and its counters saw it."""
    with web_pages.serving(tmp_path, kv, "--path", own_page) as url, browser.Browser(browser.find(), tmp_path/"profile") as page:
        with urllib.request.urlopen(url + "build.json") as answer:
            assert b"version" in answer.read()
        page.open(url)
        problem = web_pages.problem()
        web_pages.send(page, problem.prompt)
        web_pages.answered(page, problem.answer)
        page.wait_for("/[0-9.]+ t\\/s/.test(document.body.innerText)")
