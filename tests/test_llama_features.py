"""test_llama_features.py - what llama-cpp-python's Llama can do, with a kvarn cache: chat, tools, embeddings, drafts, logits.

Models answer noise, so the tests ask that the machinery works and that what must be equal is equal. SPDX-License-Identifier: MIT
"""

import gc
import json
import pickle

import pytest

pytestmark = pytest.mark.llama

PROMPT = "The quick brown fox jumps over the lazy dog, and then " * 6
TOOL = {"type": "function", "function": {"name": "weather", "description": "weather of a city",
                                         "parameters": {"type": "object", "properties": {"warm": {"type": "boolean"}},
                                                        "required": ["warm"]}}}


def open_llama(path, **settings):
    from kvarn import Llama

    return Llama(path, **{"n_ctx": 1024, "verbose": False, "kv_type": "kvarn", **settings})


# ------------------------------------------------------------------------------------------------- what it takes


def test_kv_info(tiny):
    from kvarn import Llama

    with open_llama(tiny(n_layer=8), n_ctx=16384, n_ubatch=128, kv_type="kvarn2") as llm:
        assert isinstance(llm, Llama)
        info = llm.kv_info()
        assert (info.type, info.n_ctx, info.n_tokens) == ("kvarn2", 16384, 0)
        assert info.bytes == pytest.approx(llm.kv_size.mib*2**20, abs=1)
        assert info.f16_bytes == pytest.approx(16384*8*2*2*128*2, rel=0.01)
        assert info.saved_bytes == info.f16_bytes - info.bytes > 0.7*info.f16_bytes
        assert info.stored_bits == pytest.approx(2.375, abs=0.02) and 2.375 < info.bits_per_value < 3.2
        assert info.tail_bytes > 0
        llm.eval([5]*300)
        assert llm.kv_info().n_tokens == 300
        assert str(llm.kv_info()).startswith("kvarn2: ") and "less than f16" in str(llm.kv_info())
        assert repr(llm).startswith("<kvarn.Llama llama-128-n_layer=8.gguf, kvarn2: ")
        html = llm._repr_html_()
        assert html.count("<tr>") == html.count("</tr>") == 6 and "tiny-llama-128" in html
    assert open_llama(tiny(), kv_type="f16", n_ctx=256).kv_info().saved_bytes == pytest.approx(0, abs=20000)
    assert "more than f16" in str(open_llama(tiny(), n_ctx=256).kv_info())


def test_context_manager_frees_and_lets_errors_through(tiny):
    with pytest.raises(KeyError, match="mine"):
        with open_llama(tiny()) as llm:
            raise KeyError("mine")
    llm.close()                                             # a second time is harmless
    del llm
    gc.collect()


def test_repr_of_a_refused_llama(tiny):
    from kvarn import Llama

    llm = Llama.__new__(Llama)
    assert repr(llm) == "<kvarn.Llama , not loaded>" and llm._repr_html_()


def test_sizes_and_infos_are_plain_data(tiny):
    llm = open_llama(tiny())
    for one in (llm.kv_size, llm.kv_info()):
        assert pickle.loads(pickle.dumps(one)) == one and json.dumps(one._asdict())


# ------------------------------------------------------------------------------------------------ chat and tools


def test_chat_formats_and_handlers(tiny):
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]"
    handler = Jinja2ChatFormatter(template, "</s>", "<s>").to_chat_handler()
    for settings in ({"chat_format": "chatml"}, {"chat_handler": handler}, {}):
        llm = open_llama(tiny(), **settings)
        whole = llm.create_chat_completion(messages, max_tokens=16, temperature=0)
        parts = list(llm.create_chat_completion(messages, max_tokens=16, temperature=0, stream=True))
        text = "".join(part["choices"][0]["delta"].get("content") or "" for part in parts)
        assert whole["choices"][0]["message"]["content"].startswith(text)   # an unfinished letter is not streamed


@pytest.mark.parametrize("kv_type", ["f16", "kvarn"])
def test_function_calling(tiny, kv_type):
    llm = open_llama(tiny(), chat_format="chatml-function-calling", kv_type=kv_type, n_ctx=2048)
    done = llm.create_chat_completion([{"role": "user", "content": "weather in Oslo?"}], tools=[TOOL], max_tokens=64,
                                      temperature=0, tool_choice={"type": "function", "function": {"name": "weather"}})
    call = done["choices"][0]["message"]["tool_calls"][0]["function"]
    assert call["name"] == "weather" and isinstance(json.loads(call["arguments"])["warm"], bool)


def test_json_answers(tiny):
    llm = open_llama(tiny(), chat_format="chatml")
    done = llm.create_chat_completion([{"role": "user", "content": "?"}], max_tokens=40, temperature=0, response_format={
        "type": "json_object", "schema": {"type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"]}})
    assert isinstance(json.loads(done["choices"][0]["message"]["content"])["yes"], bool)


# ----------------------------------------------------------------------------------- embeddings, drafts, logits


def test_embeddings(tiny):
    import numpy as np

    exact = open_llama(tiny(), kv_type="f16", embedding=True)
    llm = open_llama(tiny(), embedding=True)
    one = np.array(llm.embed(PROMPT))
    assert one.shape == (len(llm.tokenize(PROMPT.encode())), 64)
    assert llm.embed("another text")
    assert np.array_equal(np.array(llm.embed(PROMPT)), one), "the first text is gone when the next one comes"
    for text in (PROMPT, [PROMPT, "another text"]):
        for wanted, found in zip(exact.create_embedding(text)["data"], llm.create_embedding(text)["data"]):
            wanted, found = np.array(wanted["embedding"]), np.array(found["embedding"])
            assert wanted.shape == found.shape and ((wanted - found)**2).sum() < 0.1*(wanted**2).sum()


def test_prompt_lookup_drafts_change_nothing(tiny):
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    settings = {"max_tokens": 100, "temperature": 0, "logit_bias": {2: -100}}
    n_drafted = []

    class Drafts(LlamaPromptLookupDecoding):
        def __call__(self, input_ids, **kwargs):
            found = super().__call__(input_ids, **kwargs)
            n_drafted.append(len(found))
            return found

    wanted = open_llama(tiny(), logits_all=True)("abcabcabc" * 30, **settings)["choices"][0]["text"]
    drafting = open_llama(tiny(), logits_all=True, draft_model=Drafts(max_ngram_size=1, num_pred_tokens=10))
    assert drafting("abcabcabc" * 30, **settings)["choices"][0]["text"][:20] == wanted[:20]
    assert sum(n_drafted) > 0, "nothing was ever proposed"


def test_logprobs_and_grammar(tiny):
    from llama_cpp import LlamaGrammar

    llm = open_llama(tiny(), logits_all=True)
    done = llm(PROMPT, max_tokens=8, temperature=0, logprobs=3)
    assert len(done["choices"][0]["logprobs"]["token_logprobs"]) == 8
    grammar = LlamaGrammar.from_string('root ::= "yes" | "no"', verbose=False)
    assert llm("is it?", max_tokens=8, grammar=grammar)["choices"][0]["text"] in ("yes", "no")


def test_disk_cache(tiny, tmp_path):
    import llama_cpp

    llm = open_llama(tiny())
    llm.set_cache(llama_cpp.LlamaDiskCache(str(tmp_path)))
    wanted = llm(PROMPT, max_tokens=20, temperature=0)["choices"][0]["text"]
    llm("something else", max_tokens=4)
    assert llm(PROMPT, max_tokens=20, temperature=0)["choices"][0]["text"] == wanted


def test_progress_of_prompts_and_tokens(tiny):
    llm, seen = open_llama(tiny(), n_batch=64), []
    llm.on_eval = lambda done, all: seen.append((done, all))
    llm.eval([5]*200)
    assert seen == [(0, 200), (64, 200), (128, 200), (192, 200)] and llm.n_tokens == 200
    llm.eval([5])
    assert seen[4:] == [(0, 1)]
