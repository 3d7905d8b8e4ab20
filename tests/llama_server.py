"""llama_server.py - a llama-server process on loopback: start it, ask it, stream from it, end it.

SPDX-License-Identifier: MIT
"""

import http.client
import json
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections import deque

START_LIMIT = 120    # seconds
ANSWER_LIMIT = 600   # seconds; a busy machine, eight slots
N_LINES_KEPT = 2000  # of the log: a soak writes millions


class Server:
    """with Server(program, model, "-np", 8, ...) as server: server.ask("/completion", {...})"""

    def __init__(self, program, model, *options):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        command = [str(program), "-m", str(model), "--host", "127.0.0.1", "--port", str(self.port), "-fa", "on",
                   *map(str, options)]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                        text=True, errors="replace")
        self.said = deque(maxlen=N_LINES_KEPT)
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        try:
            self._wait()
        except BaseException:
            self.process.kill()
            raise

    def _read(self):
        for line in self.process.stdout:
            self.said.append(line)

    def last_lines(self, n: int = 30) -> str:
        return "".join(list(self.said)[-n:])

    def _wait(self):
        started = time.monotonic()
        while time.monotonic() - started < START_LIMIT:
            if self.process.poll() is not None:
                raise AssertionError("llama-server ended:\n" + self.last_lines())
            try:
                if self.ask("/health")["status"] == "ok":
                    return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.1)
        raise AssertionError(f"llama-server is not ready after {START_LIMIT} s:\n" + self.last_lines())

    def ask(self, path: str, body: "dict | None" = None) -> dict:
        """urllib.error.HTTPError where the server refuses; its text is in .read()."""
        request = urllib.request.Request(self.url + path, json.dumps(body).encode() if body is not None else None,
                                         {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=ANSWER_LIMIT) as answer:
            return json.load(answer)

    def complete(self, prompt: "str | list[int]", slot: int = 0, n: int = 24, **more) -> dict:
        return self.ask("/completion", {"prompt": prompt, "n_predict": n, "temperature": 0, "id_slot": slot, "cache_prompt": True,
                                        "ignore_eos": True, **more})

    def stream(self, body: dict, n_events: int) -> int:
        """Reads so many events of a streamed completion, then hangs up; how many there were."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_LIMIT)
        try:
            connection.request("POST", "/completion", json.dumps({**body, "stream": True}), {"Content-Type": "application/json"})
            answer, n = connection.getresponse(), 0
            while n < n_events:
                line = answer.readline()
                if not line:
                    break
                n += line.startswith(b"data:")
            return n
        finally:
            connection.close()

    def resident_mib(self) -> float:
        """Memory of the process, as ps sees it."""
        said = subprocess.run(["ps", "-o", "rss=", "-p", str(self.process.pid)], capture_output=True, text=True).stdout
        return int(said or 0)/1024

    def close(self) -> "int | None":
        """Exit status of an orderly end; None if it had to be killed."""
        self.process.terminate()
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return None

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *details) -> None:
        if self.process.poll() is None:
            self.close()
