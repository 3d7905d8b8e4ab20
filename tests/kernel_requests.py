"""kernel_requests.py - compiles kernel_driver.c and op-driver-ggml.cpp with the shipping sources, and asks them.

With it the codec and the kernels of another processor, or with a sanitizer in them, are compared with numpy and float64.
SPDX-License-Identifier: MIT
"""

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from kvarn import reference
from test_attend_op import GARBAGE, error, numbers, ones

ROOT = Path(__file__).resolve().parent.parent
G = 128
KEY, VALUE = 0, 1
SIDE = ("k", "v")


def patched_tree() -> Path:
    """A llama.cpp with the patches: KVARN_TEST_TREE, or the newest one that a build made."""
    if os.environ.get("KVARN_TEST_TREE"):
        return Path(os.environ["KVARN_TEST_TREE"])
    found = [path.parents[2] for path in ROOT.glob("build/**/llama.cpp/ggml/src/ggml.c")]
    if not found:
        reason = "no patched llama.cpp: `make test` makes one, KVARN_TEST_TREE names one"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    return max(found, key=lambda path: path.stat().st_mtime)


class Build:
    """Objects and drivers of one pair of compilers, in a folder. Each source is compiled once, two at a time."""

    OURS = ROOT / "ggml-kvarn"

    def __init__(self, folder: Path, c: "list[str]", cxx: "list[str] | None" = None, tree: "Path | None" = None):
        self.folder, self.c, self.cxx, self.tree = folder, c, cxx, tree
        self.made = {}

    def objects(self, sources: "list[Path]") -> "list[str]":
        include = [f"-I{self.folder}", f"-I{self.OURS}"]
        if self.tree:
            ggml = self.tree / "ggml"
            (self.folder / "ggml-version.h").write_text('#define GGML_VERSION "test"\n#define GGML_COMMIT "test"\n')
            include += [f"-I{path}" for path in (ggml / "include", ggml / "src", ggml / "src/ggml-cpu")]
        commands = []
        for path in set(sources) - set(self.made):
            language = [*self.c, "-std=c11"] if path.suffix == ".c" else [*self.cxx, "-std=c++17"]
            warnings = ["-w"] if self.tree and path not in self.kernels() else ["-Wall", "-Wextra", "-Werror"]
            self.made[path] = str(self.folder / f"{path.name}.o")
            commands.append([*language, *warnings, "-D_GNU_SOURCE", *include, "-c", str(path), "-o", self.made[path]])
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(self.run, commands))
        return [self.made[path] for path in sources]

    @staticmethod
    def run(command: "list[str]") -> None:
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"

    def kernels(self) -> "list[Path]":
        return [self.OURS / "kvarn-ref.c", self.OURS / "kvarn-cpu.c", *sorted(self.OURS.glob("kvarn-x86*.c")),
                *sorted(self.OURS.glob("kvarn-arm*.c"))]

    def kernel_driver(self) -> Path:
        """kernel_driver.c with the sources that ship."""
        path = self.folder / "kernel_driver"
        self.run([*self.c, *self.objects([ROOT / "tests/kernel_driver.c", *self.kernels()]), "-o", str(path), "-pthread", "-lm"])
        return path

    def ggml(self) -> "list[str]":
        """What the op needs of ggml."""
        return self.objects([self.tree / "ggml/src" / name for name in ("ggml.c", "ggml-quants.c", "ggml-threading.cpp")])

    def op_driver(self, ggml: "list[str]") -> Path:
        """op-driver-ggml.cpp with our graph, op and kernels."""
        path = self.folder / "op_driver"
        ours = [ROOT / "tests/op-driver-ggml.cpp", self.OURS / "kvarn-cpu-ggml.cpp", self.OURS / "kvarn-graph.c", *self.kernels()]
        self.run([*self.cxx, *self.objects(ours), *ggml, "-o", str(path), "-pthread", "-lm"])
        return path


def run_op(command: "list[str]", env=None) -> "list[float]":
    """Errors of the op's cases against the portable kernels."""
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0 and not done.stderr, f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-6000:]}"
    return [float(line.split()[-1]) for line in done.stdout.splitlines()]


def ask(command: "list[str]", requests: "list[tuple[bytes, int]]", env=None) -> "list[bytes]":
    """Answers of the driver; a request is its bytes and the size of its answer."""
    done = subprocess.run(command, input=b"".join(text for text, _ in requests), capture_output=True, env=env)
    errors = done.stderr.decode()[-6000:]
    assert done.returncode == 0 and not errors, f"{' '.join(command)} ended with {done.returncode}:\n{errors}"
    answers, at = [], 0
    for _, size in requests:
        answers.append(done.stdout[at : at + size])
        at += size
    assert at == len(done.stdout), f"{len(done.stdout)} bytes instead of {at}"
    return answers


def found(command: "list[str]", *names: str) -> "list[str]":
    """The kernels that the driver's processor has for these names."""
    done = subprocess.run(command, input="".join(f"find {name}\n" for name in names), capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}"
    return done.stdout.split("\n")[:-1]


def seal_request(x: np.ndarray, side: int, bits: int):
    D = x.shape[1]
    return f"seal {side} {bits} {D}\n".encode() + x.astype(np.float32).tobytes(), reference.tile_size(D, bits)


def unseal_request(tile: np.ndarray, side: int, bits: int, D: int):
    return f"unseal {side} {bits} {D}\n".encode() + tile.tobytes(), 4 * G * D


@dataclass(frozen=True)
class Attend:
    """Query heads of one KV head over a few tiles, the middle one open (rows of f16), others sealed."""

    bits: tuple = (4, 2)
    D: tuple = (128, 128)
    rows: int = 1
    gqa: int = 4
    tiles: int = 3
    mask: str = "all"  # or "holes", "blind rows"
    bias: float = 0.0
    softcap: float = 0.0
    data: str = "gaussian"
    sharp: float = 1.0  # standard deviation of the scores, about

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in vars(self).items())

    def make(self, seed: int = 0) -> "tuple[bytes, np.ndarray]":
        """Everything behind the request's name, and the float64 output [rows, gqa, DV]."""
        rng = np.random.default_rng(seed)
        is_sealed = [self.tiles == 1 or i != self.tiles // 2 for i in range(self.tiles)]
        parts, seen = [[], []], [[], []]
        for side, (bits, D) in enumerate(zip(self.bits, self.D)):
            x = numbers(rng, self.data, (self.tiles, G, D), side)
            for i in range(self.tiles):
                if is_sealed[i]:
                    tile = reference.seal(x[i].astype(np.float32), SIDE[side], bits)
                    tile = ones(D, bits) if self.data == "largest codes" else tile
                    parts[side].append(tile.tobytes())
                    seen[side].append(reference.unseal(tile, SIDE[side], bits, D))
                else:
                    parts[side].append(x[i].tobytes())
                    seen[side].append(x[i].astype(float))
        keys, values = (np.concatenate(s).astype(float) for s in seen)

        q = rng.standard_normal((self.rows, self.gqa, self.D[KEY]))
        if self.data == "largest codes":
            q = np.sign(q[..., :1]) + 0 * q
        spread = np.sqrt(np.mean(keys**2))
        q = (q * self.sharp / np.sqrt(self.D[KEY]) / (spread if spread > 0 else 1)).astype(np.float32)
        q = (q / self.softcap).astype(np.float32) if self.softcap else q
        mask = -rng.integers(0, 50, (self.rows, 1, keys.shape[0])) if self.bias else np.zeros((self.rows, 1, keys.shape[0]))
        hidden = np.zeros(mask.shape, bool)
        if self.mask == "holes":
            hidden |= rng.random(mask.shape) < 0.5
            hidden[..., :5] = hidden[..., -3:] = True
            hidden[..., self.tiles // 2 * G :][..., :9] = True
        elif self.mask == "blind rows":
            hidden[::2] = True
        mask = np.where(hidden, -np.inf, mask).astype(np.float16)
        slope = np.float32(2.0) ** -(1 + np.arange(self.gqa)) if self.bias else np.ones(self.gqa)
        slope = slope.astype(np.float32)

        score = q.astype(float) @ keys.T
        score = self.softcap * np.tanh(score) if self.softcap else score
        with np.errstate(invalid="ignore"):
            score = score + slope[:, None] * mask.astype(float)
        top = score.max(axis=2, keepdims=True)
        p = np.exp(score - np.where(np.isneginf(top), 0, top))
        total = p.sum(axis=2, keepdims=True)
        want = np.divide(p @ values, total, out=np.zeros((self.rows, self.gqa, self.D[VALUE])), where=total > 0)

        # what no query row sees must not matter
        unseen = hidden.all(axis=(0, 1)).reshape(self.tiles, G)
        for i in range(self.tiles):
            if not is_sealed[i]:
                for side in (KEY, VALUE):
                    x = np.frombuffer(parts[side][i], np.float16).reshape(G, -1).copy()
                    x[unseen[i]] = GARBAGE
                    parts[side][i] = x.tobytes()
        cap = np.float32(self.softcap).view(np.int32)
        numbers_of = f"{self.bits[0]} {self.bits[1]} {self.D[0]} {self.D[1]} {self.rows} {self.gqa} {self.tiles} {cap}\n"
        tiles = b"".join(bytes([is_sealed[i]]) + parts[KEY][i] + parts[VALUE][i] for i in range(self.tiles))
        return numbers_of.encode() + q.tobytes() + slope.tobytes() + mask.tobytes() + tiles, want


HEAD_DIMS = (16, 32, 48, 64, 80, 96, 112, 128, 192, 256, 512)
CASES = [
    *[Attend(bits=(k, v)) for k in (2, 3, 4) for v in (2, 3, 4)],
    *[Attend(bits=(bits, bits), D=(D, D), gqa=2) for bits in (2, 3, 4) for D in HEAD_DIMS if D != 128],
    *[Attend(bits=(3, 4), D=D) for D in ((192, 128), (64, 256))],
    *[Attend(bits=(2 + gqa % 3, 4 - gqa % 3), D=(64, 64), gqa=gqa) for gqa in range(1, 17) if gqa != 4],
    *[Attend(bits=bits, rows=5, gqa=3, mask=mask) for bits in ((3, 2), (2, 4)) for mask in ("holes", "blind rows")],
    *[Attend(bits=(4, 3), D=(64, 96), bias=8.0, softcap=softcap, mask="holes") for softcap in (0.0, 20.0)],
    *[Attend(bits=(bits, bits), D=(128, 128), data=data, rows=2) for bits in (2, 3, 4) for data in ("planted", "shared mean")],
    *[Attend(bits=(bits, bits), D=(D, D), data="planted", sharp=sharp) for bits, D in ((2, 64), (4, 256))
      for sharp in (0.2, 4.0)],
    *[Attend(bits=(bits, bits), D=(D, D), data="largest codes", sharp=0.1) for bits in (2, 3, 4) for D in (64, 512)],
    *[Attend(data=data, tiles=1) for data in ("zero", "tiny", "huge")],
    Attend(tiles=7, gqa=8, D=(64, 64)),
]


def check_attention(command: "list[str]", limits: "dict[str, float]", cases=CASES, env=None) -> "dict[str, float]":
    """Every case with each of the named kernels: rms error over the rms of the float64 output, at most their limit.

    Returns the largest error of each.
    """
    made = [case.make(seed) for seed, case in enumerate(cases)]
    requests = [(f"attend {name} ".encode() + text, 4 * want.size) for name in limits for text, want in made]
    answers = iter(ask(command, requests, env))
    worst = {}
    for name, limit in limits.items():
        for case, (_, want) in zip(cases, made):
            out = np.frombuffer(next(answers), np.float32).reshape(want.shape).astype(float)
            wrong = error(out, want) if np.isfinite(out).all() else np.inf
            row, head, d = np.unravel_index(np.abs(out - want).argmax(), want.shape)
            assert wrong <= limit, (
                f"{name}: rms error {wrong:.2e} of the output, allowed {limit:g}; worst at row {row}, head {head}, channel {d}: "
                f"{out[row, head, d]:.7g} instead of {want[row, head, d]:.7g}; {case}")
            worst[name] = max(worst.get(name, 0.0), wrong)
    return worst
