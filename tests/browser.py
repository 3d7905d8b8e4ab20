"""browser.py - a headless Chromium, driven through its debugging pipe: open a page, evaluate JavaScript, take a screenshot.

SPDX-License-Identifier: MIT
"""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome")
LIMIT = 120     # seconds until something expected must be there


def find() -> "str | None":
    """A Chromium of this machine."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


class Browser:
    """with Browser(program, folder) as page: page.open(url); page.run("1 + 1")"""

    def __init__(self, program: str, folder: Path):
        to_browser, self.commands = os.pipe()
        self.answers, from_browser = os.pipe()

        def pipes():                                      # Chromium reads from 3 and writes to 4
            low, high = os.dup(to_browser), os.dup(from_browser)
            while low < 5 or high < 5:
                low, high = os.dup(low), os.dup(high)
            os.dup2(low, 3)
            os.dup2(high, 4)

        self.process = subprocess.Popen(
            [program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe",
             f"--user-data-dir={folder}", "about:blank"], preexec_fn=pipes, close_fds=False, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(to_browser)
        os.close(from_browser)
        self.number, self.data, self.session = 0, b"", None
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def ask(self, method: str, **params) -> dict:
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + LIMIT
        while time.monotonic() < until:
            *whole, self.data = self.data.split(b"\0")
            for text in whole:
                answer = json.loads(text)
                if answer.get("id") == self.number:
                    assert "error" not in answer, answer["error"]
                    return answer["result"]
            if select.select([self.answers], [], [], 1.0)[0]:
                self.data += os.read(self.answers, 1 << 20)
            assert self.process.poll() is None, "the browser ended"
        raise AssertionError(f"no answer to {method}")

    def open(self, url: str) -> None:
        self.ask("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete'")

    def run(self, script: str):
        """Value of a JavaScript expression."""
        done = self.ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def wait_for(self, script: str) -> None:
        until = time.monotonic() + LIMIT
        while not self.run(script):
            assert time.monotonic() < until, f"never true: {script}; the page: {self.run('document.body.innerText')[-500:]!r}"
            time.sleep(0.05)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.ask("Page.captureScreenshot")["data"]))

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *details) -> None:
        self.process.terminate()
        self.process.wait(30)
        os.close(self.commands)
        os.close(self.answers)
