"""web_pages.py - the embedded model behind a web page: ours, or llama-server's own, built, as the wheel xllamacpp carries it.

llama.cpp holds its page as sources only, and building it takes npm and its registry. xllamacpp is llama.cpp with the page inside
(a few builds later than the pinned one) and serves it, so it is asked for every file.

    python tests/web_pages.py docs      docs/serve.png and docs/llama-ui.png: both pages, answering with a kvarn cache

SPDX-License-Identifier: MIT
"""

import gzip
import importlib.util
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import browser

WHEEL = "xllamacpp"
LIMIT = 120         # seconds until a server must answer
N_CTX = 4096
SIZE = (1000, 700)  # of a screenshot
TEMPLATE = "{% for message in messages %}{{ message.content | trim }}\n{% endfor %}"    # the embedded model continues plain text
SERVE_PAGES = "import sys, time, xllamacpp as x; p = x.CommonParams(); p.model.path = sys.argv[1]; p.n_ctx = 256; p.port = 0; " \
              "s = x.Server(p); print('at', s.listening_address, flush=True); sys.stdin.read()"


def problem():
    """A short chain of look-ups whose answer is known."""
    from kvarn import embedded

    return next(embedded.problems("hop", 1, 3, 300, 330))


def fetch(url: str) -> bytes:
    request = urllib.request.Request(url, headers={"Accept-Encoding": "gzip"})
    with urllib.request.urlopen(request, timeout=LIMIT) as answer:
        data = answer.read()
        return gzip.decompress(data) if answer.headers.get("Content-Encoding") == "gzip" else data


def has_wheel() -> bool:
    return importlib.util.find_spec(WHEEL) is not None


def llama_ui(folder: Path) -> Path:
    """Writes llama-server's own page into folder: what its service worker lists, and the files behind that list."""
    from kvarn import embedded

    server = subprocess.Popen([sys.executable, "-c", SERVE_PAGES, str(embedded.path())], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        line = next((line for line in server.stdout if line.startswith("at ")), "")
        assert line, f"{WHEEL} did not start its server"
        url = line.split()[1] + "/"
        worker = fetch(url + "sw.js").decode()
        names = re.findall(r'url:"([^"]+)"', worker) + [f"{name}.js" for name in re.findall(r'"\./(workbox-\w+)"', worker)]
        for name in ["sw.js", "build.json", "manifest.webmanifest", "_app/version.json", *names]:
            path = folder/("index.html" if name == "./" else name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(fetch(url + name.replace("./", "")))
    finally:
        server.communicate()
    return folder


@contextmanager
def serving(folder: Path, kv: str, *options):
    """URL of `kvarn serve` on the embedded model; options are llama-server's."""
    from kvarn import embedded

    template = folder/"plain.jinja"
    template.write_text(TEMPLATE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "kvarn.cli", "serve", str(embedded.path()), "--kv", kv, "--ctx", str(N_CTX), "--threads",
               "1", "--port", str(port), "--", "-np", "1", "--temp", "0", "--jinja", "--chat-template-file", str(template),
               *map(str, options)]
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url, until = f"http://127.0.0.1:{port}/", time.monotonic() + LIMIT
    try:
        while True:
            try:
                fetch(url + "health")
                break
            except (urllib.error.URLError, ConnectionError):
                assert server.poll() is None and time.monotonic() < until, "the server ended or does not answer"
                time.sleep(0.1)
        yield url
    finally:
        server.terminate()
        server.wait(60)


def send(page, text: str) -> None:
    """Types into the page's text field as a person does, and presses Enter."""
    page.wait_for("document.querySelector('textarea') !== null")
    page.run("document.querySelector('textarea').focus()")
    page.ask("Input.insertText", text=text)
    page.wait_for(f"document.querySelector('textarea').value.length >= {len(text.strip())}")
    for kind in ("keyDown", "keyUp"):
        page.ask("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13,
                 **({"text": "\r"} if kind == "keyDown" else {}))


def answered(page, text: str) -> None:
    """Waits until the page shows the lines of text, one after the other."""
    wanted = "|".join(line.strip() for line in text.strip().splitlines())
    page.wait_for("document.body.innerText.split('\\n').map(line => line.trim()).filter(line => line).join('|')"
                  f".includes({wanted!r})")


def main(target: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        pages = {"serve": ()}
        if has_wheel():
            pages["llama-ui"] = ("--path", llama_ui(folder/"ui"))
        for name, options in pages.items():
            with serving(folder, "kvarn", *options) as url, browser.Browser(browser.find(), folder/name) as page:
                page.ask("Emulation.setDeviceMetricsOverride", width=SIZE[0], height=SIZE[1], deviceScaleFactor=1, mobile=False)
                page.open(url)
                send(page, problem().prompt)
                answered(page, problem().answer)
                time.sleep(1)       # the last smooth scrolling
                page.screenshot(target/f"{name}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
