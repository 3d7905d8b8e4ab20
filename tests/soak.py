"""soak.py - llama-server under a mixed load for minutes or hours: eight slots, answers that must be exactly right.

    python tests/soak.py                           two minutes; exit status 1 if anything went wrong
    python tests/soak.py --minutes 30 --csv FILE   `make soak`

Eight clients send at random, with the embedded model: problems whose answers are known, alone, after a shared prefix, from the
middle of an answer (a cut in the cache), several completions of one prompt, slots saved, restored and erased; and between them
what must not disturb those: answers hung up on, texts that run over the context (shifted where the setup allows it), prompts that
are too long. Setups differ in cache types, one pool of cells for all slots or a stream each, room, and speculation.

Right means: every byte of every answer that the client waited for. FAMILIES are those with all answers right in the model's
examination; with f16 the right byte is ahead of every other by 9 logits or more in the problems used here, so that no
quantization makes a wrong answer of them.

SPDX-License-Identifier: MIT
"""

import argparse
import csv
import json
import random
import sys
import tempfile
import threading
import time
import traceback
import urllib.error
from pathlib import Path
from typing import NamedTuple

from kvarn import bin_path, embedded
from llama_server import Server

N_SLOTS = 8
N_SLOT_CTX = 2048         # tokens of one slot
CACHE_RAM = 32            # MiB of the server's prompt cache
GROWTH_MIB = 48           # after the first third of a setup's time, beyond what the prompt cache may still take
SAMPLE_SECONDS = 1
BOS, EOS = 256, 257

FAMILIES = ("mul", "sort", "bfs", "fsm")   # every answer right in the model's own examination
N_PROBLEMS, SEED = 6, 77
SMALLEST, LARGEST = 150, 450


class Setup(NamedTuple):
    name: str
    keys: "str | None"       # None: drawn
    values: "str | None"
    options: tuple
    has_slots: bool = False     # slots are saved, restored and erased; then without the prompt cache, see below
    may_run_out: bool = False   # the pool is smaller than the slots: a request may be refused, never answered wrong


# A request that names a busy slot (id_slot) makes this llama-server load a prompt from its prompt cache into that slot before it
# sees that the slot is busy; the answer being written there then goes on with another text. With an f16 cache just as well: this
# soak found it, --types f16/f16 is the control. So a setup either names slots or has a prompt cache.
UNIFIED = ("--kv-unified", "--kv-unified-per-slot", N_SLOT_CTX, "-c", N_SLOTS*N_SLOT_CTX)
STREAMS = ("--no-kv-unified", "-c", N_SLOTS*N_SLOT_CTX)
SETUPS = [
    Setup("one pool, shift", "kvarn4", "kvarn2", (*UNIFIED, "--context-shift")),
    Setup("streams, shift, chunks reused", "kvarn2", "kvarn2", (*STREAMS, "--context-shift", "--cache-reuse", 32), True),
    Setup("small pool", "kvarn4", "kvarn2", ("--kv-unified", "--kv-unified-per-slot", N_SLOT_CTX, "-c", 2*N_SLOT_CTX),
          may_run_out=True),
    Setup("draft model", None, None, UNIFIED, True),
    Setup("streams, n-grams", None, None, (*STREAMS, "--spec-type", "ngram-simple", "--spec-ngram-simple-size-n", 4)),
    Setup("one pool, n-grams, shift", None, None, (*UNIFIED, "--spec-type", "ngram-mod", "--spec-ngram-mod-n-match", 6,
                                                   "--spec-ngram-mod-n-min", 4, "--context-shift"), True),
]
PAIRS = [("kvarn4", "f16"), ("f16", "kvarn2"), ("kvarn3", "q8_0"), ("q4_0", "kvarn4"), ("kvarn3", "kvarn3"), ("kvarn4", "kvarn4"),
         ("kvarn2", "kvarn4")]


def chosen() -> "list[embedded.Problem]":
    return [p for family in FAMILIES for p in embedded.problems(family, N_PROBLEMS, SEED, SMALLEST, LARGEST)]


def shortened(source: Path, target: Path, n_layer: int = 6) -> Path:
    """The embedded model without its last layer: a draft model that is mostly wrong."""
    import gguf

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "llama")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        value = n_layer if field.name.endswith(".block_count") else field.contents()
        writer.add_key_value(field.name, value, field.types[0], field.types[-1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        if not tensor.name.startswith("blk.") or int(tensor.name.split(".")[1]) < n_layer:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


class Client:
    """One of eight users: sends what `rng` says until the time is over."""

    def __init__(self, soak: "Soak", number: int):
        self.soak, self.number = soak, number
        self.rng = random.Random(f"{soak.seed}/{soak.setup.name}/{number}")

    def run(self, until: float) -> None:
        actions = [self.solve, self.resume, self.chain, self.hang_up, self.overflow, self.too_long, self.several, self.slot]
        weights = [20, 25, 10, 15, 10, 2, 4, 8 if self.soak.setup.has_slots else 0]
        self.until = until
        try:
            while not self.is_late() and not self.soak.is_over():
                action = self.rng.choices(actions, weights)[0]
                action()
                self.soak.count(action.__name__)
        except Exception:
            if not self.soak.is_over():   # else: the end of the server is reported, once
                self.soak.fail(f"client {self.number}: {traceback.format_exc(limit=3)}")

    def is_late(self) -> bool:
        return time.monotonic() >= self.until

    # ------------------------------------------------------------------------------------------- requests

    def ask(self, tokens: "list[int]", n: int, **more) -> "dict | None":
        """None if the pool ran out, where it may."""
        body = {"prompt": tokens, "n_predict": n, "temperature": 0, "cache_prompt": True, "n_cache_reuse": 0, **more}
        try:
            answer = self.soak.server.ask("/completion", body)
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            if self.soak.setup.may_run_out and "Context size has been exceeded" in text:
                self.soak.count("ran out")
                return None
            raise AssertionError(f"HTTP {error.code}: {text[:300]}") from None
        for one in answer if isinstance(answer, list) else [answer]:
            self.soak.count("tokens", one["tokens_predicted"])
        return answer

    def problem(self) -> "embedded.Problem":
        return self.rng.choice(self.soak.problems)

    def expect(self, what: str, tokens: "list[int]", wanted: str, **more) -> None:
        """The answer must be `wanted`, to the byte, and end there."""
        answer = self.ask(tokens, len(wanted) + 50, **more)
        for one in answer if isinstance(answer, list) else [answer] if answer else []:
            self.soak.count("answers")
            if one["content"] != wanted:
                got = one["content"]
                at = next((i for i, (a, b) in enumerate(zip(got, wanted)) if a != b), min(len(got), len(wanted)))
                self.soak.fail(f"wrong answer ({what}) of {len(wanted)} bytes from byte {at} on: {got[at:at + 40]!r} instead of "
                               f"{wanted[at:at + 40]!r}; slot {one.get('id_slot')}, prompt of {len(tokens)} tokens ending "
                               f"{bytes(t for t in tokens[-60:] if t < BOS)!r}")

    def solve(self) -> None:
        p = self.problem()
        self.expect("alone", prompt_of(p), p.answer)

    def resume(self) -> None:
        """From the middle of an answer, in the slot that wrote it or any other: the cache is cut anywhere in a tile."""
        p = self.problem()
        for _ in range(self.rng.randint(1, 3)):
            if self.is_late():
                return
            kept = self.rng.randrange(len(p.answer))
            self.expect(f"from byte {kept}", prompt_of(p) + list(p.answer[:kept].encode()), p.answer[kept:])

    def chain(self) -> None:
        """After another problem and its answer, which all clients share."""
        first, p = self.soak.problems[0], self.problem()
        self.expect("after a shared prefix", prompt_of(first) + list(first.answer.encode()) + [EOS] + prompt_of(p)[1:], p.answer)

    def several(self) -> None:
        p = self.problem()
        self.expect("several", prompt_of(p), p.answer, n_cmpl=self.rng.randint(2, 4))

    def hang_up(self) -> None:
        p = self.problem()
        body = {"prompt": prompt_of(p), "n_predict": len(p.answer), "temperature": 0, "cache_prompt": True}
        self.soak.server.stream(body, self.rng.choice([0, 1, 5, 30, 130]))

    def overflow(self) -> None:
        """Text that runs over the slot's context: ends there, or is shifted and goes on, with chunks taken from the cache."""
        n_prompt = self.rng.choice([N_SLOT_CTX - 20, N_SLOT_CTX//2, 100])
        p = self.problem()
        tokens = (prompt_of(p) + list(p.answer.encode())*20)[self.rng.choice([0, 0, 40]):][:n_prompt]
        n = N_SLOT_CTX - n_prompt + self.rng.choice([1, 40, 150]) if n_prompt > 1000 else 150
        answer = self.ask(tokens, n, ignore_eos=True, n_cache_reuse=self.rng.choice([0, 32]), n_keep=self.rng.choice([0, 1, 130]))
        if answer and not (answer["tokens_predicted"] == n or answer["truncated"]):
            self.soak.fail(f"a text of {n_prompt} + {n} tokens ended after {answer['tokens_predicted']}: "
                           f"{answer.get('stop_type')}")

    def too_long(self) -> None:
        try:
            self.soak.server.ask("/completion", {"prompt": [65]*(N_SLOT_CTX + 1), "n_predict": 1})
            self.soak.fail(f"a prompt of {N_SLOT_CTX + 1} tokens was taken by a slot of {N_SLOT_CTX}")
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            if error.code != 400 or "exceed_context_size" not in text:
                self.soak.fail(f"a prompt that is too long: HTTP {error.code} {text[:200]}")

    def slot(self) -> None:
        """Saves, takes, restores and erases one slot, whoever uses it besides."""
        p, number, file = self.problem(), self.rng.randrange(N_SLOTS), f"client{self.number}.bin"
        kept = self.rng.randrange(len(p.answer))

        def do(action, **body):
            try:
                return self.soak.server.ask(f"/slots/{number}?action={action}", body)
            except urllib.error.HTTPError as error:   # a slot without tokens, or no room for them in the pool
                self.soak.count(f"{action} refused")
                error.read()
                return None

        self.expect("before saving", prompt_of(p), p.answer, id_slot=number)
        is_saved = do("save", filename=file)
        if self.rng.random() < 0.5:
            do("erase")
        if self.is_late():
            return
        other = self.problem()
        self.expect("over a saved slot", prompt_of(other), other.answer, id_slot=number)
        if is_saved:
            do("restore", filename=file)
        self.expect("after restoring", prompt_of(p) + list(p.answer[:kept].encode()), p.answer[kept:], id_slot=number)


def prompt_of(problem: "embedded.Problem") -> "list[int]":
    return [BOS, *problem.prompt.encode()]


class Soak:
    """One setup for some seconds."""

    def __init__(self, setup: Setup, program: Path, folder: Path, threads: int, seed: int, types: str = ""):
        pair = types.split("/") if types else random.Random(f"{seed}/{setup.name}").choice(PAIRS)
        self.setup, self.seed = setup, seed
        self.keys, self.values = pair if types or not setup.keys else (setup.keys, setup.values)
        self.problems = chosen()
        self.counts: "dict[str, int]" = {}
        self.failures: "list[str]" = []
        self.memory: "list[tuple[float, float]]" = []   # (seconds, MiB)
        self.lock = threading.Lock()
        options = ["-ctk", self.keys, "-ctv", self.values, "-np", N_SLOTS, "-t", threads, "-tb", threads, "--no-webui",
                   "--cache-ram", 0 if setup.has_slots else CACHE_RAM, "--slot-save-path", folder, *setup.options]
        if setup.name == "draft model":
            draft = shortened(embedded.path(), folder/"draft.gguf")
            options += ["-md", draft, "--spec-type", "draft-simple", "--spec-draft-n-max", 4]
            options += ["-ctkd", "kvarn4", "-ctvd", "kvarn4"]
        self.server = Server(program, embedded.path(), *options)

    def count(self, what: str, n: int = 1) -> None:
        with self.lock:
            self.counts[what] = self.counts.get(what, 0) + n

    def fail(self, text: str) -> None:
        with self.lock:
            self.failures.append(text)

    def is_over(self) -> bool:
        return self.server.process.poll() is not None

    def growth(self) -> float:
        """MiB by which the later memory exceeds that of the first third."""
        third = self.memory[-1][0]/3
        return max(mib for _, mib in self.memory) - max(mib for seconds, mib in self.memory if seconds <= third)

    def run(self, seconds: float) -> dict:
        started = time.monotonic()
        clients = [threading.Thread(target=Client(self, i).run, args=(started + seconds,), daemon=True) for i in range(N_SLOTS)]
        for client in clients:
            client.start()
        while any(client.is_alive() for client in clients):
            self.memory.append((time.monotonic() - started, self.server.resident_mib()))
            time.sleep(SAMPLE_SECONDS)
        status = self.server.process.poll()
        if status is not None:
            self.fail(f"the server ended with {status}:\n" + self.server.last_lines(60))
        elif self.server.ask("/health")["status"] != "ok":
            self.fail("the server is not well")
        elif self.server.close() != 0:
            self.fail("the server did not end in order:\n" + self.server.last_lines())
        if self.growth() > GROWTH_MIB + CACHE_RAM:
            self.fail(f"memory grew by {self.growth():.0f} MiB after the first third, more than {GROWTH_MIB + CACHE_RAM}")
        requests = sum(n for what, n in self.counts.items() if what not in ("tokens", "answers", "ran out"))
        return {"setup": self.setup.name, "keys": self.keys, "values": self.values, "seconds": round(time.monotonic() - started),
                "requests": requests, "answers_checked": self.counts.get("answers", 0), "wrong_or_failed": len(self.failures),
                "refused_no_room": self.counts.get("ran out", 0), "hung_up": self.counts.get("hang_up", 0),
                "overflows": self.counts.get("overflow", 0), "tokens": self.counts.get("tokens", 0),
                "rss_start_mib": round(self.memory[0][1]), "rss_max_mib": round(max(mib for _, mib in self.memory)),
                "growth_after_first_third_mib": round(self.growth(), 1)}


def soak(seconds: float, setups: "list[Setup]", threads: int = 1, seed: int = 1, types: str = "",
         say=print) -> "tuple[list[dict], list[str]]":
    """(one row per setup, failures)"""
    rows, failures = [], []
    for setup in setups:
        with tempfile.TemporaryDirectory() as folder:
            one = Soak(setup, bin_path()/"llama-server", Path(folder), threads, seed, types)
            with one.server:
                rows.append(one.run(seconds/len(setups)))
            say(json.dumps(rows[-1]))
            for text in one.failures:
                say(text)
            failures += [f"{setup.name} ({one.keys}/{one.values}): {text}" for text in one.failures]
    return rows, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=2)
    parser.add_argument("--setups", nargs="+", type=int, choices=range(len(SETUPS)), default=range(len(SETUPS)))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--types", default="", help="KEYS/VALUES in every setup; f16/f16 is the control")
    parser.add_argument("--csv", type=Path, help="writes the table there")
    args = parser.parse_args()
    rows, failures = soak(60*args.minutes, [SETUPS[i] for i in args.setups], args.threads, args.seed, args.types,
                          lambda text: print(text, flush=True))
    if args.csv:
        with args.csv.open("w", newline="") as file:
            file.write(f"# python tests/soak.py {' '.join(sys.argv[1:])}\n")
            table = csv.DictWriter(file, rows[0], lineterminator="\n")
            table.writeheader()
            table.writerows(rows)
    print(f"{len(failures)} failures, {sum(row['answers_checked'] for row in rows)} answers checked")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
