"""test_embedded.py - the embedded model and its problems: every answer is recomputed from the prompt alone, by other code.

SPDX-License-Identifier: MIT
"""
import hashlib
import importlib.util
import random
import re
import subprocess
import sys
from collections import deque

import pytest

from kvarn.embedded import check, families, path, problems

N = 25  # problems per family in the checks that need no model
MAX_FILE_SIZE = 24_000_000
PROBLEM_DIGEST = "1902928851174116"  # three problems of each family, seed 5


# ---- each solver reads the prompt and returns the last line of the answer, and what its steps must contain, in order

def solve_hop(prompt: str):
    edges = {m[1]: (m[2], int(m[3])) for m in re.finditer(r"^(\w{3})>(\w{3}) (\d\d)$", prompt, re.M)}
    node, total, facts = re.match(r"hop from (\w+)", prompt)[1], 0, []
    while node != "end":
        target, weight = edges[node]
        total += weight
        facts.append(f"{node}>{target} {weight} {total % 1000:03}")
        node = target
    return f"= {total % 1000:03}", facts


def solve_vm(prompt: str):
    state = dict(zip("abcde", map(int, prompt.splitlines()[0].split()[-5:])))
    memory = {int(a): int(b) for a, b in re.findall(r"\b(\d\d):(\d\d)\b", prompt)}
    program = {int(m[1]): m[2].split() for m in re.finditer(r"^(\d\d) ([a-z].*)$", prompt, re.M)}
    pc, facts = 0, []
    while program[pc] != ["hlt"]:
        op, r, x = program[pc]
        value = state[x] if x in state else int(x)
        here, pc = pc, pc + 1
        if op == "jnz":
            pc = value if state[r] != 0 else pc
        else:
            new = {"set": value, "inc": state[r] + value, "add": state[r] + value, "dec": state[r] - value,
                   "sub": state[r] - value, "get": memory.get(value)}[op]
            state[r] = new % 100
        facts.append(f"{here:02} {op} {r} {x}|" + " ".join(f"{v:02}" for v in state.values()))
    return "= " + " ".join(f"{v:02}" for v in state.values()), facts


def solve_mul(prompt: str):
    a, b = (int("".join(re.findall(rf"{name}\d\d=(\d)", prompt))[::-1]) for name in "ab")
    n, m = (int(x) for x in re.findall(r"\d\d", prompt.splitlines()[0]))
    digits = f"{a * b:0{n + m}}"
    return "= " + " ".join(f"{n + m - 1 - i:02}:{d}" for i, d in enumerate(digits)), [f" w{d} " for d in digits[::-1]]


def solve_sort(prompt: str):
    numbers = sorted(int(x) for x in re.findall(r"0\.\d\d=(\d{3})", prompt))
    levels = (len(numbers) - 1).bit_length()
    facts = [m for i, x in enumerate(numbers) for m in (f"{levels}.{i:02}: ", f">{x}")]
    return f"= first {numbers[0]} middle {numbers[len(numbers) // 2]} last {numbers[-1]}", facts


def solve_bfs(prompt: str):
    start, goal = re.match(r"bfs from (\w\d), how far is (\w\d)", prompt).groups()
    edges: dict = {}
    for node, index, target in re.findall(r"\b([a-z]\d)\.(\d) (\w+)", prompt):
        edges.setdefault(node, {})[int(index)] = target
    distance, queue = {start: 0}, deque([start])
    facts = []
    while queue:
        node = queue.popleft()
        facts.append(f"={node} d{distance[node]}")
        for _, target in sorted(edges[node].items())[:-1]:
            if target not in distance:
                distance[target] = distance[node] + 1
                queue.append(target)
                facts.append(f" {target} new ")
    return f"= {goal} d{distance[goal]}", facts


def solve_fsm(prompt: str):
    table = {m[1]: (m[2], m[3]) for m in re.finditer(r"\b(\d\d[a-f])>(\d\d)([xyz])", prompt)}
    tape = [symbol for _, symbol in sorted(re.findall(r"\b(\d{3})([a-f])\b", prompt))]
    state, outputs = re.match(r"fsm from (\d\d)", prompt)[1], ""
    facts = []
    for symbol in tape:
        before = state
        state, output = table[state + symbol]
        outputs += output
        facts.append(f"{before}{symbol}>{state}{output} {outputs.count('x'):03}")
    return f"= {state} {outputs.count('x'):03}", facts


def solve_shop(prompt: str):
    price = {m[1]: int(m[2]) for m in re.finditer(r"^([a-z]+ [a-z]+) at (\d\d)$", prompt, re.M)}
    orders = [(int(m[1]), m[2]) for m in re.finditer(r"^\d\d: (\d) ([a-z]+ [a-z]+)$", prompt, re.M)]
    sums = [sum(count * price[name] for count, name in orders[:i + 1]) for i in range(len(orders))]
    return f"= {sums[-1]:05}", [f"total {s:05}" for s in sums]


def solve_bank(prompt: str):
    balance = {name: int(x) for name, x in re.findall(r"([A-Z][a-z]+)=(\d{3})", prompt)}
    facts = []
    for payer, payee, amount in re.findall(r"([A-Z][a-z]+) pays ([A-Z][a-z]+) (\d{3})", prompt):
        balance[payer] -= int(amount)
        balance[payee] += int(amount)
        facts.append(f"{payer}={balance[payer]:03} {payee}={balance[payee]:03}")
    goal = re.search(r"what has (\w+)\?", prompt)[1]
    return f"= {goal} {balance[goal]:03}", facts


def solve_dag(prompt: str):
    formulas = dict(re.findall(r"^(n\d{3}): (.*)$", prompt, re.M))
    value: dict = {}
    for name in sorted(formulas):
        m = re.fullmatch(r"(n\d{3})([-+<>])(n\d{3})", formulas[name])
        if m is None:
            value[name] = int(formulas[name])
        else:
            x, y = value[m[1]], value[m[3]]
            value[name] = {"+": (x + y) % 100, "-": (x - y) % 100, "<": min(x, y), ">": max(x, y)}[m[2]]
    last = value[max(value)]
    return f"= {last:02}", [f"{name}={v:02}" for name, v in sorted(value.items())]


SOLVERS = {"hop": solve_hop, "vm": solve_vm, "mul": solve_mul, "sort": solve_sort, "bfs": solve_bfs, "fsm": solve_fsm,
           "shop": solve_shop, "bank": solve_bank, "dag": solve_dag}


def test_every_family_has_a_solver():
    assert set(SOLVERS) == set(families)
    assert len(families) >= 6


@pytest.mark.parametrize("family", families)
def test_answers_agree_with_an_independent_computation(family):
    for problem in problems(family, N, seed=3):
        last, facts = SOLVERS[family](problem.prompt)
        assert problem.steps[-1] == last, f"{family}: answer ends {problem.steps[-1]!r}, recomputed {last!r}"
        position = 0
        for fact in facts:
            found = problem.answer.find(fact, position)
            assert found >= 0, f"{family}: no step with {fact!r} after byte {position} of\n{problem.answer}"
            position = found + 1


@pytest.mark.parametrize("family", families)
def test_problems_are_deterministic_and_sized(family):
    first, again = (list(problems(family, N, seed=11)) for _ in range(2))
    assert first == again
    assert first[:3] == list(problems(family, 3, seed=11))
    assert len({p.prompt for p in [*first, *problems(family, N, seed=12)]}) == 2 * N
    assert all(300 <= len(p.answer) <= 4000 for p in first)
    assert all(p.prompt.endswith("\nsteps\n") and p.answer.endswith("\n") and p.answer.isascii() for p in first)
    assert all(300 <= len(p.answer) <= 500 for p in problems(family, 5, 1, 300, 500))


def test_problems_are_those_the_model_was_trained_on():
    text = "".join(p.prompt + p.answer for family in families for p in problems(family, 3, seed=5))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == PROBLEM_DIGEST, "the tasks changed: the model needs new training"


def test_check_counts_steps_up_to_the_first_wrong_one():
    problem = next(problems("bank", 1, seed=4))
    lines = problem.steps
    assert check(problem, problem.answer) == (len(lines), len(lines), True)
    assert check(problem, problem.answer.rstrip("\n")).exact
    assert check(problem, "") == (0, len(lines), False)
    assert check(problem, "\n".join(lines[:5])) == (5, len(lines), False)
    wrong = [*lines[:4], lines[4][:-1] + "?", *lines[5:]]
    assert check(problem, "\n".join(wrong)) == (4, len(lines), False)
    assert not check(problem, problem.answer + "more\n").exact


def test_unknown_family_is_one_clear_error():
    with pytest.raises(ValueError, match="unknown task family 'chess': use one of hop"):
        next(problems("chess", 1, seed=0))
    with pytest.raises(ValueError, match="no answers of 1 to 2 bytes"):
        next(problems("hop", 1, 0, 1, 2))


# ---- the file

def test_gguf_is_small_and_says_what_the_issue_asks():
    gguf = pytest.importorskip("gguf", reason="gguf reads the metadata; `make test` installs it")
    assert path().stat().st_size <= MAX_FILE_SIZE
    reader = gguf.GGUFReader(path())

    def value(key):
        return reader.fields[key].contents()

    assert value("general.architecture") == "llama"
    assert value("general.license") == "MIT"
    assert value("llama.context_length") == 16384
    assert value("llama.attention.key_length") == value("llama.attention.value_length") == 128
    assert value("llama.attention.head_count") == 2 * value("llama.attention.head_count_kv")
    assert value("tokenizer.ggml.model") == "gpt2"
    assert len(value("tokenizer.ggml.tokens")) == 258
    kinds = {t.tensor_type.name for t in reader.tensors if len(t.shape) == 2}
    assert kinds == {"Q8_0"}
    assert not [t.name for t in reader.tensors if "q_norm" in t.name or "k_norm" in t.name]


# ---- the model in llama.cpp

@pytest.fixture(scope="module")
def llama():
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python is not installed: `make test` sets everything up")
    from kvarn import Llama

    return Llama(str(path()), n_ctx=2048, n_threads=1, flash_attn=True, verbose=False)


@pytest.mark.llama
def test_any_text_comes_back_from_the_tokenizer(llama):
    rng = random.Random(7)
    alphabet = [*range(1, 0x250), *range(0x400, 0x500), *range(0x900, 0x980), *range(0x4E00, 0x4E80), 0x1F600, 0x10FFFD, 0xFEFF]
    for _ in range(50):
        raw = "".join(chr(rng.choice(alphabet)) for _ in range(rng.randint(1, 200))).encode()
        assert llama.tokenize(raw, add_bos=False, special=False) == list(raw)
        assert b"".join(llama.detokenize([token]) for token in raw) == raw
    assert llama.tokenize(b"ab") == [256, 97, 98]


@pytest.mark.llama
@pytest.mark.parametrize("family", ["mul", "vm"])
def test_a_short_problem_is_solved_greedily(llama, family):
    problem = next(problems(family, 1, 9, 300, 400))
    prompt = llama.tokenize(problem.prompt.encode(), special=False)
    llama.reset()
    written = []
    for token in llama.generate(prompt, temp=0.0, top_k=1):
        if token == llama.token_eos() or len(written) > 450:
            break
        written.append(token)
    score = check(problem, llama.detokenize(written).decode())
    assert score.exact, f"{family}: wrong after {score.steps_right} of {score.steps_total} steps"


def test_training_code_runs_without_a_gpu(tmp_path):
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed: pip install torch to train the model yourself")
    script = path().with_name("train.py")
    arguments = "--seconds 1 --batch 2048 --layers 1 --width 64 --ffn 64 --workers 1 --exam 0".split()
    subprocess.run([sys.executable, script, "--out", tmp_path, *arguments], check=True, timeout=300)
    subprocess.run([sys.executable, path().with_name("export.py"), tmp_path, tmp_path / "tiny.gguf"], check=True, timeout=60)
    assert (tmp_path / "tiny.gguf").stat().st_size > 10_000
