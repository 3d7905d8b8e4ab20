"""test_frameworks.py - optional: frameworks that make their own llama_cpp.Llama take kvarn's type ids, by their real packages.

    pip install 'llama-cpp-python[server]==0.3.36' langchain-community llama-index-llms-llama-cpp

Skipped where a package is missing: they are large, and nothing here needs them otherwise. SPDX-License-Identifier: MIT
"""

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

pytestmark = pytest.mark.llama
LIMIT = 120     # seconds until a server must answer


def settings() -> dict:
    import kvarn

    return {"type_k": kvarn.KVARN4, "type_v": kvarn.KVARN2, "flash_attn": True}


@pytest.mark.filterwarnings("ignore")
def test_langchain(tiny):
    ids = settings()                               # from here on the patched libraries are the ones loaded
    llms = pytest.importorskip("langchain_community.llms", reason="optional: pip install langchain-community")
    llm = llms.LlamaCpp(model_path=tiny(), n_ctx=512, max_tokens=8, temperature=0, verbose=False, model_kwargs=ids)
    assert llm.invoke("hello") == llm.invoke("hello")
    assert (llm.client.context_params.type_k, llm.client.context_params.type_v) == (ids["type_k"], ids["type_v"])


@pytest.mark.filterwarnings("ignore")
def test_llama_index(tiny):
    ids = settings()
    llms = pytest.importorskip("llama_index.llms.llama_cpp", reason="optional: pip install llama-index-llms-llama-cpp")
    llm = llms.LlamaCPP(model_path=tiny(), max_new_tokens=8, context_window=512, temperature=0, verbose=False, model_kwargs=ids)
    assert llm.complete("hello").text is not None
    assert llm._model.context_params.type_k == ids["type_k"]


def test_python_server(tiny):
    for name in ("fastapi", "uvicorn", "sse_starlette", "starlette_context", "pydantic_settings"):
        pytest.importorskip(name, reason="optional: pip install 'llama-cpp-python[server]'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-m", "kvarn.cli", "serve", tiny(), "--python", "--kv", "kvarn", "--ctx", "1024",
                                "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    body = json.dumps({"prompt": "hello", "max_tokens": 5, "temperature": 0}).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"})
    try:
        until = time.monotonic() + LIMIT
        while True:
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    assert json.load(answer)["choices"]
                return
            except (urllib.error.URLError, ConnectionError):
                assert process.poll() is None and time.monotonic() < until, "the server ended or does not answer"
                time.sleep(0.2)
    finally:
        process.terminate()
        process.wait(60)
