"""test_llama_caches.py - what llama-cpp-python keeps between calls: prefixes, states in memory and on disk, drafts taken back.

With the embedded model, on problems of known answer: what comes back from a cache must go on to the right end, to the byte.

SPDX-License-Identifier: MIT
"""

import pytest

from kvarn import embedded

pytestmark = pytest.mark.llama

TYPES = ["kvarn", "kvarn2", "kvarn4/f16", "f16/kvarn2"]
SEED, SMALLEST, LARGEST = 77, 300, 450   # three to five tiles of prompt and answer


def open_llama(kv_type: str = "kvarn", **settings):
    from kvarn import Llama

    return Llama(str(embedded.path()), kv_type=kv_type, n_ctx=2048, n_threads=1, n_threads_batch=1, verbose=False, **settings)


def problem(family: str = "sort", index: int = 0) -> "embedded.Problem":
    return list(embedded.problems(family, index + 1, SEED, SMALLEST, LARGEST))[index]


def answer(llm, prompt: str, n: int = 600) -> str:
    return llm(prompt, max_tokens=n, temperature=0)["choices"][0]["text"]


def count_evaluated(llm) -> "list[int]":
    """Sizes of the batches that are decoded from now on."""
    sizes, decode = [], llm._ctx.decode
    llm._ctx.decode = lambda batch: (sizes.append(batch.batch.n_tokens), decode(batch))
    return sizes


@pytest.mark.parametrize("kv_type", TYPES)
def test_prefix_of_the_last_call_is_reused(kv_type):
    """Back to any place in the answer, on the border of a tile or inside it: only the next token is read."""
    llm, one = open_llama(kv_type), problem()
    assert answer(llm, one.prompt) == one.answer
    n_prompt = 1 + len(one.prompt)
    for at in (384, 383, n_prompt + 200, 300, 257, 256, 255, n_prompt + 1):
        kept = max(1, at - n_prompt)
        evaluated = count_evaluated(llm)
        assert answer(llm, one.prompt + one.answer[:kept]) == one.answer[kept:], f"from byte {kept} of the answer"
        assert evaluated[0] < 16, f"{evaluated[0]} tokens were read again"


@pytest.mark.parametrize("kv_type", TYPES)
def test_state_in_the_middle_of_an_answer(kv_type):
    llm, one, other = open_llama(kv_type), problem(), problem("bfs")
    half = len(one.answer)//2
    assert answer(llm, one.prompt, half) == one.answer[:half]
    state = llm.save_state()
    assert state.scores.size == 0, "the scores are nothing but zeros, and larger than the cache"
    assert answer(llm, other.prompt) == other.answer
    for target in (llm, open_llama(kv_type)):
        target.load_state(state)
        evaluated = count_evaluated(target)
        assert answer(target, one.prompt + one.answer[:half]) == one.answer[half:]
        assert evaluated[0] < 4, f"{evaluated[0]} tokens were read again"


@pytest.mark.parametrize("kv_type", TYPES[:2])
def test_memory_cache(kv_type):
    """Two conversations in turns: each finds its own tokens again."""
    import llama_cpp

    llm, talks = open_llama(kv_type), [problem("sort"), problem("bfs")]
    llm.set_cache(llama_cpp.LlamaRAMCache(1 << 30))
    written = ["", ""]
    for n in (100, 60, 500):
        for i, talk in enumerate(talks):
            evaluated = count_evaluated(llm)
            written[i] += answer(llm, talk.prompt + written[i], n)
            assert talk.answer.startswith(written[i])
            assert n == 100 or evaluated[0] < 4, f"{evaluated[0]} tokens were read again"
    assert written == [talk.answer for talk in talks]


@pytest.mark.parametrize("kv_type", TYPES[:2])
def test_disk_cache(kv_type, tmp_path):
    """One conversation over three processes' worth of models; upstream's cache on disk forgets what it has given back."""
    import llama_cpp

    talk, written = problem("sort"), ""
    for n in (100, 60, 500):
        llm = open_llama(kv_type)
        llm.set_cache(llama_cpp.LlamaDiskCache(str(tmp_path/"cache")))
        evaluated = count_evaluated(llm)
        written += answer(llm, talk.prompt + written, n)
        assert n == 100 or evaluated[0] < 4, f"{evaluated[0]} tokens were read again"
        llm.close()
    assert written == talk.answer


def test_capacity_of_the_memory_cache():
    """Sizes are those of the states, so that capacity_bytes means something."""
    import llama_cpp

    llm = open_llama()
    llm.set_cache(llama_cpp.LlamaRAMCache(1 << 30))
    sizes = []
    for i in range(3):
        answer(llm, problem("sort", i).prompt, 20)
        sizes.append(llm.cache.cache_size)
    one = sizes[0]
    assert sizes[0] < sizes[1] < sizes[2]
    llm.set_cache(llama_cpp.LlamaRAMCache(int(1.5*one)))
    for i in range(3):
        answer(llm, problem("sort", i).prompt, 20)
    assert len(llm.cache.cache_state) == 1 and 0 < llm.cache.cache_size <= 1.5*one


@pytest.mark.slow
@pytest.mark.parametrize("kv_type", TYPES)
def test_prompt_lookup_gives_the_same_tokens(kv_type):
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    drafts = LlamaPromptLookupDecoding(max_ngram_size=3, num_pred_tokens=10)
    n_drafted = []

    def drafting(input_ids, **kwargs):
        found = drafts(input_ids, **kwargs)
        n_drafted.append(len(found))
        return found

    # without logits_all llama-cpp-python writes the drafts' scores beyond its array
    llm = open_llama(kv_type, draft_model=drafting, logits_all=True)
    for family in ("sort", "bfs", "fsm"):
        one = problem(family)
        n_drafted.clear()
        evaluated = count_evaluated(llm)
        assert answer(llm, one.prompt) == one.answer, family
        assert len(evaluated) < len(one.answer) < sum(n_drafted), f"{family}: no draft was accepted, or none rejected"
