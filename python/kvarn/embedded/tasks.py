"""tasks.py - nine families of problems whose answers are long chains of exact look-ups.

Every line of an answer is one step. A step is easy by itself (copy, compare, add small numbers), but what it needs
stands somewhere in the context, often thousands of tokens back: a table row in the prompt, or a value that an earlier
step wrote. One wrong look-up spoils the rest, so exact answers measure how well a KV cache keeps its content.

Deterministic: a problem depends on (family, seed, index, size) only. Standard library only.

SPDX-License-Identifier: MIT
"""
import math
import random
from dataclasses import dataclass
from typing import Any, Callable, Iterator, NamedTuple

ANSWER_MIN, ANSWER_MAX = 300, 4000  # bytes; one byte is one token of the embedded model


@dataclass(frozen=True)
class Problem:
    """One problem: `prompt` is what the model reads, `answer` what it must write before it stops."""

    family: str
    prompt: str
    answer: str

    @property
    def steps(self) -> list[str]:
        """The lines of the right answer; the last one states the result."""
        return self.answer.splitlines()


class Score(NamedTuple):
    """`steps_right` counts the lines before the first wrong one; `exact` means the whole answer is right."""

    steps_right: int
    steps_total: int
    exact: bool


def hop(rng: random.Random, size: int) -> tuple[list[str], list[str]]:
    """Follow pointers through a shuffled table and add up the weights on the way.  kfz>mqd 37"""
    n = max(3, min(260, round(size / 15)))
    extra = rng.randint(n // 4, n) if n < 150 else rng.randint(n // 8, n // 3)
    codes = rng.sample(range(26 ** 3), n + extra)
    keys = ["".join(chr(97 + c // 26 ** p % 26) for p in range(3)) for c in codes]
    rows = [(keys[i], keys[i + 1] if i < n - 1 else "end") for i in range(n)]
    rows += [(k, rng.choice(keys)) for k in keys[n:]]
    weight = [rng.randrange(10, 100) for _ in rows]
    lines, total = [], 0
    for (key, target), w in zip(rows[:n], weight):
        total = (total + w) % 1000
        lines.append(f"{key}>{target} {w} {total:03}")
    table = [f"{key}>{target} {w}" for (key, target), w in zip(rows, weight)]
    rng.shuffle(table)
    return [f"hop from {keys[0]} to end, add the weights mod 1000", *table], [*lines, f"= {total:03}"]


VM_REGISTERS = "abcde"  # a, b, c hold data; d and e count loops


def vm_program(rng: random.Random, steps: int) -> list[tuple[Any, ...]]:
    """Straight pieces and counted loops (nested twice at most) that run for about `steps` steps and always halt."""
    program: list[tuple[Any, ...]] = []

    def straight(count: int) -> None:
        for _ in range(count):
            op = rng.choice(("set", "inc", "dec", "add", "sub", "get", "get", "add", "sub"))
            operand = rng.randrange(100) if op in ("set", "inc", "dec") else rng.choice(VM_REGISTERS)
            program.append((op, rng.choice("abc"), operand))

    def loop(counter: str, times: int, body: Callable[[], object]) -> None:
        program.append(("set", counter, times))
        start = len(program)
        body()
        program.append(("dec", counter, 1))
        program.append(("jnz", counter, start))

    left = steps
    while left > 0 and len(program) < 80:
        kind, body = rng.random(), rng.randint(2, 9)
        times = min(rng.randint(2, 7), left // (body + 2))
        if kind < 0.3 or times < 2:
            count = min(left, rng.randint(2, 9))
            straight(count)
            left -= count
        elif kind < 0.75 or left < 80:
            loop("d", times, lambda: straight(body))
            left -= (body + 2) * times + 1
        else:
            inner = rng.randint(2, 4)
            outer = rng.randint(2, 3)

            def nested(inner: int = inner, body: int = body) -> None:
                straight(2)
                loop("e", inner, lambda: straight(body))
                straight(1)

            loop("d", outer, nested)
            left -= outer * (inner * (body + 2) + 6)
    program.append(("hlt",))
    return program


def vm(rng: random.Random, size: int) -> tuple[list[str], list[str]]:
    """Trace a register machine: fetch by line number, read memory cells, restate all registers.  07 get a b|17 07 .."""
    program = vm_program(rng, max(4, round((size - 20) / 26.5)))
    memory = [rng.randrange(100) for _ in range(100)]
    state = dict(zip(VM_REGISTERS, (rng.randrange(100) for _ in VM_REGISTERS)))

    def text(instruction: tuple[Any, ...]) -> str:
        op, *args = instruction
        return " ".join([op, *(f"{x:02}" if isinstance(x, int) else x for x in args)])

    def registers() -> str:
        return " ".join(f"{state[r]:02}" for r in VM_REGISTERS)

    listing = [f"{i:02} {text(ins)}" for i, ins in enumerate(program)]
    cells = [" ".join(f"{i:02}:{memory[i]:02}" for i in range(row, row + 10)) for row in range(0, 100, 10)]
    prompt = [f"vm from line 00, registers {registers()}", *cells, *listing]
    lines, pc = [], 0
    while pc >= 0:
        op, *args = program[pc]
        here, pc = pc, pc + 1
        r = args[0] if args else ""
        value = state.get(args[1], args[1]) if len(args) > 1 else 0
        if op == "set":
            state[r] = value
        elif op in ("inc", "add"):
            state[r] = (state[r] + value) % 100
        elif op in ("dec", "sub"):
            state[r] = (state[r] - value) % 100
        elif op == "get":
            state[r] = memory[value]
        elif op == "jnz":
            pc = value if state[r] else pc
        else:
            pc = -1
        lines.append(f"{listing[here]}|{registers()}")
    return prompt, [*lines, f"= {registers()}"]


def mul(rng: random.Random, size: int) -> tuple[list[str], list[str]]:
    """Long multiplication, digit by digit, with running sums and carries.  k05 a02*b03 9*4=36 s127"""
    pairs = [(n, m) for n in range(2, 12) for m in range(2, 12)]
    weights = [math.exp(-abs(math.log((24 * n * m + 18 * (n + m)) / size)) * 12) for n, m in pairs]
    n, m = rng.choices(pairs, weights)[0]
    a = [rng.randrange(10) for _ in range(n - 1)] + [rng.randrange(1, 10)]
    b = [rng.randrange(10) for _ in range(m - 1)] + [rng.randrange(1, 10)]
    prompt = [f"mul a by b, {n:02} and {m:02} digits, lowest first"]
    for name, digits in (("a", a), ("b", b)):
        prompt.append(" ".join(f"{name}{i:02}={d}" for i, d in enumerate(digits)))
    lines, carry, result = [], 0, []
    for k in range(n + m):
        total = carry
        for i in range(max(0, k - m + 1), min(k, n - 1) + 1):
            j = k - i
            total += a[i] * b[j]
            lines.append(f"k{k:02} a{i:02}*b{j:02} {a[i]}*{b[j]}={a[i] * b[j]:02} s{total:03}")
        result.append(total % 10)
        carry = total // 10
        lines.append(f"k{k:02} w{total % 10} c{carry:03}")
    product = " ".join(f"{k:02}:{result[k]}" for k in reversed(range(n + m)))
    return prompt, [*lines, f"= {product}"]


def sort(rng: random.Random, size: int) -> tuple[list[str], list[str]]:
    """Merge sort with every comparison written down.  2.06: 1.05=482 1.07=113 >113"""
    counts = range(4, 33)
    n = min(counts, key=lambda c: abs(c * math.ceil(math.log2(c)) * 28 + 36 * c - size) + rng.random() * size * 0.1)
    level = rng.sample(range(100, 1000), n)
    prompt = [f"sort {n:02} numbers by merging"]
    prompt += [" ".join(f"0.{i:02}={level[i]}" for i in range(row, min(row + 8, n))) for row in range(0, n, 8)]
    lines, depth, width = [], 0, 1
    while width < n:
        merged = []
        for lo in range(0, n, 2 * width):
            mid, hi = min(lo + width, n), min(lo + 2 * width, n)
            lines.append(f"merge {depth + 1} {lo:02} {mid:02} {hi:02}")
            i, j = lo, mid
            for out in range(lo, hi):
                left = str(level[i]) if i < mid else "---"
                right = str(level[j]) if j < hi else "---"
                pick_left = right == "---" or (left != "---" and left < right)
                value = left if pick_left else right
                lines.append(f"{depth + 1}.{out:02}: {depth}.{i:02}={left} {depth}.{j:02}={right} >{value}")
                merged.append(int(value))
                i, j = (i + 1, j) if pick_left else (i, j + 1)
        level, depth, width = merged, depth + 1, 2 * width
    return prompt, [*lines, f"= first {level[0]} middle {level[n // 2]} last {level[-1]}"]


def bfs(rng: random.Random, size: int) -> tuple[list[str], list[str]]:
    """Breadth-first search with its queue in the text: is this node new, and if not, which number has it?"""
    n = max(3, min(52, round(size / 76)))
    nodes = [f"{chr(97 + c // 10)}{c % 10}" for c in rng.sample(range(260), n)]
    out: dict[str, list[str]] = {node: [] for node in nodes}
    for i in range(1, n):  # a random tree first, so that everything is reached
        parents = [p for p in nodes[max(0, i - 6):i] if len(out[p]) < 4] or [nodes[i - 1]]
        out[rng.choice(parents)].append(nodes[i])
    for _ in range(rng.randint(n, n + n // 2)):
        node = rng.choice(nodes)
        target = rng.choice(nodes)
        if len(out[node]) < 5 and target != node and target not in out[node]:
            out[node].append(target)
    for targets in out.values():
        rng.shuffle(targets)
    rows = [" ".join(f"{node}.{i} {t}" for i, t in enumerate([*targets, "end"])) for node, targets in out.items()]
    rng.shuffle(rows)
    goal = rng.choice(nodes[1:])
    lines, queue, found = [f"00={nodes[0]} d0"], [nodes[0]], {nodes[0]: (0, 0)}
    for head, node in enumerate(queue):  # the queue grows while it is walked
        depth = found[node][1]
        if head:
            lines.append(f"{head:02}={node} d{depth}")
        for i, target in enumerate(out[node]):
            word = "old" if target in found else "new"
            if word == "new":
                found[target] = (len(queue), depth + 1)
                queue.append(target)
            number, distance = found[target]
            lines.append(f"{node}.{i} {target} {word} {number:02}={target} d{distance} n{len(queue):02}")
        lines.append(f"{node}.{len(out[node])} end")
    return [f"bfs from {nodes[0]}, how far is {goal}", *rows], [*lines, f"= {goal} d{found[goal][1]}"]


def fsm(rng: random.Random, size: int) -> tuple[list[str], list[str]]:
    """Run a finite-state machine over a numbered input and count its x outputs.  017b 07b>12x 034"""
    n = max(5, min(230, round(size / 17)))
    n_states = rng.randint(4, 8 + min(24, n // 4))
    symbols = "bcdf"[:rng.randint(2, 4)]
    names = [f"{c:02}" for c in rng.sample(range(100), n_states)]
    table = {(s, c): (rng.choice(names), rng.choice("xyz")) for s in names for c in symbols}
    rows = [f"{s}{c}>{t}{o}" for (s, c), (t, o) in table.items()]
    rng.shuffle(rows)
    tape = [rng.choice(symbols) for _ in range(n)]
    state, count, lines = names[0], 0, []
    for i, symbol in enumerate(tape):
        target, output = table[state, symbol]
        count += output == "x"
        lines.append(f"{i:03}{symbol} {state}{symbol}>{target}{output} {count:03}")
        state = target
    cells = [f"{i:03}{c}" for i, c in enumerate(tape)]
    prompt = [f"fsm from {names[0]}, {n:03} symbols, count x"]
    prompt += [" ".join(rows[i:i + 8]) for i in range(0, len(rows), 8)]
    prompt += [" ".join(cells[i:i + 10]) for i in range(0, n, 10)]
    return prompt, [*lines, f"= {state} {count:03}"]


SHOP_KINDS = ("amber", "basic", "copper", "dusty", "elder", "faded", "golden", "hollow", "ivory", "jolly", "knotty", "linen",
              "mossy", "narrow", "oaken", "plain", "quiet", "rusty", "silver", "tiny", "velvet", "woven", "yellow", "zinc")
SHOP_THINGS = ("anchor", "basket", "candle", "drum", "engine", "fiddle", "globe", "hammer", "inkpot", "jug", "kettle", "lamp",
               "mirror", "needle", "oven", "pillow", "quilt", "rope", "saddle", "teapot", "umbrella", "vase", "wagon", "yoke")


def shop(rng: random.Random, size: int) -> tuple[list[str], list[str]]:
    """Add up an order from a price list.  12: 3 velvet lamp at 37 = 111, total 04512"""
    n = max(3, min(92, round(size / 44)))
    n_items = rng.randint(max(4, n // 3), 12 + n)
    names = [f"{SHOP_KINDS[c // 24]} {SHOP_THINGS[c % 24]}" for c in rng.sample(range(24 * 24), min(n_items, 90))]
    price = {name: rng.randrange(10, 100) for name in names}
    lines, orders, total = [], [], 0
    for i in range(n):
        name, count = rng.choice(names), rng.randrange(2, 10)
        total += count * price[name]
        orders.append(f"{i:02}: {count} {name}")
        lines.append(f"{orders[-1]} at {price[name]} = {count * price[name]:03}, total {total:05}")
    prompt = [f"shop, {n:02} orders, what is the total?", *(f"{name} at {p}" for name, p in price.items()), *orders]
    return prompt, [*lines, f"= {total:05}"]


BANK_NAMES = ("Ada", "Ben", "Cleo", "Dirk", "Emil", "Fay", "Gus", "Hana", "Igor", "Jane", "Kurt", "Lena", "Milo", "Nora", "Otto",
              "Pia", "Quin", "Rosa", "Sven", "Tara", "Ugo", "Vera", "Walt", "Xena", "Yuri", "Zoe")


def bank(rng: random.Random, size: int) -> tuple[list[str], list[str]]:
    """Keep accounts while people pay each other; the latest balance counts.  07: Ada 482-035 Ben 113+035 Ada=447 Ben=148"""
    n = max(3, min(92, round(size / 46)))
    names = rng.sample(BANK_NAMES, rng.randint(3, min(20, 4 + n // 3)))
    balance = {name: rng.randrange(200, 800) for name in names}
    prompt = [" ".join(f"{name}={balance[name]:03}" for name in names[i:i + 5]) for i in range(0, len(names), 5)]
    lines = []
    for i in range(n):
        most = 0
        while most < 1:  # balances stay within 0 and 999
            payer, payee = rng.sample(names, 2)
            if not balance[payer] or balance[payee] == 999:
                payer, payee = payee, payer
            most = min(99, balance[payer], 999 - balance[payee])
        amount = rng.randint(1, most)
        prompt.append(f"{i:02}: {payer} pays {payee} {amount:03}")
        before = f"{payer} {balance[payer]:03}-{amount:03} {payee} {balance[payee]:03}+{amount:03}"
        balance[payer] -= amount
        balance[payee] += amount
        lines.append(f"{i:02}: {before} {payer}={balance[payer]:03} {payee}={balance[payee]:03}")
    goal = rng.choice(names)
    return [f"bank, {n:02} payments, what has {goal}?", *prompt], [*lines, f"= {goal} {balance[goal]:03}"]


DAG_OPS: dict[str, Callable[[int, int], int]] = {
    "+": lambda x, y: (x + y) % 100,
    "-": lambda x, y: (x - y) % 100,
    "<": min,
    ">": max,
}


def dag(rng: random.Random, size: int) -> tuple[list[str], list[str]]:
    """Evaluate a shuffled list of formulas, each from two earlier results.  n017: n003+n011 47+82 n017=29"""
    n = max(4, min(134, round(size / 29.5)))
    rows, lines, value = [], [], []
    for i in range(n):
        if i < 2 or rng.random() < 0.08:
            value.append(rng.randrange(100))
            rows.append(f"n{i:03}: {value[i]:02}")
            lines.append(f"{rows[i]} n{i:03}={value[i]:02}")
        else:
            x, y = rng.sample(range(i), 2)
            op = rng.choice("+-+-<>")
            value.append(DAG_OPS[op](value[x], value[y]))
            rows.append(f"n{i:03}: n{x:03}{op}n{y:03}")
            lines.append(f"{rows[i]} {value[x]:02}{op}{value[y]:02} n{i:03}={value[i]:02}")
    rng.shuffle(rows)
    return [f"dag of {n:03} formulas mod 100, < is min, > is max", *rows], [*lines, f"= {value[-1]:02}"]


FAMILIES: dict[str, Callable[[random.Random, int], tuple[list[str], list[str]]]] = {
    "hop": hop, "vm": vm, "mul": mul, "sort": sort, "bfs": bfs, "fsm": fsm, "shop": shop, "bank": bank, "dag": dag,
}


def make(family: str, rng: random.Random, size: int) -> Problem:
    """One problem of `family` whose answer has about `size` bytes."""
    if family not in FAMILIES:
        raise ValueError(f"unknown task family {family!r}: use one of {', '.join(FAMILIES)}")
    prompt, lines = FAMILIES[family](rng, size)
    return Problem(family, "\n".join([*prompt, "steps", ""]), "\n".join([*lines, ""]))


def problems(family: str, n: int, seed: int, smallest: int = ANSWER_MIN, largest: int = ANSWER_MAX) -> Iterator[Problem]:
    """`n` problems with answers of `smallest` to `largest` bytes, spread evenly over the logarithm of the length."""
    for i in range(n):
        rng = random.Random(f"{family}/{seed}/{i}")
        for _ in range(100):
            problem = make(family, rng, round(math.exp(rng.uniform(math.log(smallest), math.log(largest)))))
            if smallest <= len(problem.answer) <= largest:
                break
        else:
            raise ValueError(f"{family} has no answers of {smallest} to {largest} bytes: widen the range")
        yield problem


def check(problem: Problem, text: str) -> Score:
    """Compare a decoded answer with the right one, line by line, up to the first wrong line."""
    right, got = problem.steps, text.splitlines()
    n = 0
    while n < len(right) and n < len(got) and right[n] == got[n]:
        n += 1
    return Score(n, len(right), n == len(right) == len(got))
