"""pictures.py - the pictures of docs/how-it-works.md: a tile of the embedded model on its way, and where the bytes go.

Keys are those of a real problem (numpy, blockwise.py), sealed by kvarn.reference; nothing is drawn that was not computed.

SPDX-License-Identifier: MIT
"""

import hashlib
from pathlib import Path

import marked
import numpy as np
import quality
import sizes
import speed
from blockwise import Blockwise
from recipes import Recipe, quantize

from kvarn import cache_size, embedded, reference

ROOT = Path(__file__).resolve().parents[2]
FAMILY, SEED = "bank", 1
LAYER, HEAD, TILE = 1, 0, 4        # from 0: tokens 512 .. 639
BITS, CHANNEL = 2, 0               # the channel whose rounding is shown
G = reference.G
SIDES = {"kvarn4": (4, 4), "kvarn4/kvarn2": (4, 2), "kvarn3": (3, 3), "kvarn2": (2, 2)}
PARTS = {"codes": "#0072B2", "scale and zero": "#D55E00", "token scales": "#F0E442", "tail, f16": "#CC79A7",
         "spare tiles": "#999999"}


class Watched(Blockwise):
    """Keeps the keys of the run."""

    def _quantize(self, K, V, lo, hi, keys, values, sink, error):
        self.keys = K


def source() -> "tuple[list[int], str]":
    """(tokens, a hash of all that the pictures of the tile come from)"""
    problem = next(embedded.problems(FAMILY, 1, seed=SEED))
    tokens = [256, *problem.prompt.encode(), *problem.answer.encode()][:(TILE + 1)*G]
    model = hashlib.sha256(embedded.path().read_bytes()).hexdigest()
    return tokens, marked.mark_of([model, tokens, LAYER, HEAD, BITS, CHANNEL])


def keys_of(tokens: "list[int]") -> np.ndarray:
    """One tile, f32 [128, D]."""
    model = Watched(str(embedded.path()))
    model.run(np.array([tokens]))
    keys = model.keys.get() if hasattr(model.keys, "get") else model.keys
    return keys[LAYER, 0, HEAD, TILE*G:]


def steps(x: np.ndarray) -> "dict[str, np.ndarray]":
    """The equations of kvarn.reference, one after the other."""
    D = x.shape[1]
    rotated = (x @ reference.hadamard(D)).astype(np.float32)
    y = rotated/np.sqrt((rotated**2).mean())                                            # (2)
    tok = y.std(axis=1, ddof=1)
    c = (y/tok[:, None]).std(axis=0, ddof=1)
    tok = (y/c).std(axis=1, ddof=1)                                                     # (3)
    tile = reference.seal(rotated, "k", BITS)
    code, scale, zero, token = (a.astype(float) for a in reference.unpack(tile, "k", BITS, D))
    return {"x": x, "rotated": rotated, "normalized": y/tok[:, None]/c, "tok": tok, "code": code, "scale": scale, "zero": zero,
            "token": token, "read": reference.unseal(tile, "k", BITS, D)}


def figure_of(width: float, height: float):
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def plot_tile(path: Path, s: "dict[str, np.ndarray]", mark: str) -> None:
    figure = figure_of(10, 6.2)
    grid = figure.add_gridspec(2, 12, height_ratios=(1.45, 1))
    names = (("x", "keys as the model makes them"), ("rotated", "rotated"), ("normalized", "normalized"),
             ("code", "codes, 2 bits"))
    for i, (name, title) in enumerate(names):
        axes = figure.add_subplot(grid[0, 3*i:3*i + 3])
        a = s[name]
        if name == "code":
            image = axes.imshow(a, cmap="cividis", vmin=-0.5, vmax=3.5, aspect="auto", interpolation="nearest")
        else:
            most = 3*float(a.std())
            image = axes.imshow(a, cmap="PuOr", vmin=-most, vmax=most, aspect="auto", interpolation="nearest")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("channel d")
        axes.set_xticks((0, 64, 127))
        axes.set_yticks((0, 64, 127) if i == 0 else ())
        if i == 0:
            axes.set_ylabel("token t")
        figure.colorbar(image, ax=axes, location="bottom", shrink=0.8, **({"ticks": (0, 1, 2, 3)} if name == "code" else {}))

    axes = figure.add_subplot(grid[1, :4])
    for name, color in (("x", "#999999"), ("rotated", "#0072B2"), ("normalized", "#D55E00")):
        spread = np.sort(s[name].std(axis=0))[::-1]
        axes.plot(spread/np.median(spread), color=color, lw=1.8)
    for text, color, y in (("as they are", "#777777", 4.6), ("rotated", "#0072B2", 3.3), ("normalized", "#D55E00", 2.4)):
        axes.annotate(text, (45, y), color=color, fontsize=10)
    axes.set_yscale("log")
    axes.set_yticks((0.5, 1, 2, 5), ("0.5", "1", "2", "5"))
    axes.minorticks_off()
    axes.set_title("spread of a channel, over the median", fontsize=10)
    axes.set_xlabel("channels, widest first")
    axes.grid(alpha=0.25)

    axes = figure.add_subplot(grid[1, 4:8])
    axes.plot(s["scale"], color="#D55E00", lw=1.5)
    axes.plot(s["zero"], color="#0072B2", lw=1.5)
    axes.annotate("scale[d]", (4, 10.5), color="#D55E00", fontsize=10)
    axes.annotate("zero[d]", (4, -22.5), color="#0072B2", fontsize=10)
    axes.set_ylim(-25, 14)
    axes.set_title("stored per channel, f16", fontsize=10)
    axes.set_xlabel("channel d")
    axes.grid(alpha=0.25)

    axes = figure.add_subplot(grid[1, 8:])
    axes.plot(s["token"], color="#009E73", lw=1.5)
    axes.set_ylim(0, 1.05)
    axes.set_title("stored per token, f16: token[t]", fontsize=10)
    axes.set_xlabel("token t")
    axes.grid(alpha=0.25)
    marked.save(figure, path, mark)


def roundings(x: np.ndarray, rotated: np.ndarray) -> "dict[str, np.ndarray]":
    """What attention would read of the rotated tile, by three ways of choosing scales."""
    batch = rotated[None]

    def by(recipe: Recipe) -> np.ndarray:
        read = quantize(batch, recipe, "k")
        return np.asarray(read.get() if hasattr(read, "get") else read)[0]

    return {"min and max, as published": reference.paper_quantize(rotated, "k", BITS),
            "least squares": by(Recipe(BITS, token="least", channel="least")),
            "least squares, given back": reference.unseal(reference.seal(rotated, "k", BITS), "k", BITS, x.shape[1])}


def plot_rounding(path: Path, s: "dict[str, np.ndarray]", mark: str) -> None:
    figure = figure_of(10, 3.7)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
    read = roundings(s["x"], s["rotated"])
    v = s["rotated"][:, CHANNEL]/s["token"]
    left.hist(v, bins=24, color="#c8c8c8")
    least, most = v.min(), v.max()
    top = left.get_ylim()[1]
    for k in range(2**BITS):
        left.plot([least + k*(most - least)/(2**BITS - 1)]*2, [top*1.02, top*1.14], color="#CC79A7", lw=3)
        left.plot([s["zero"][CHANNEL] + k*s["scale"][CHANNEL]]*2, [top*1.17, top*1.29], color="#D55E00", lw=3)
    for text, y, color in (("min and max", 1.08, "#CC79A7"), ("as sealed", 1.23, "#D55E00")):
        left.annotate(text, (most, top*y), xytext=(10, 0), textcoords="offset points", va="center", color=color, fontsize=10)
    left.set_xlim(least - 0.1*(most - least), most + 0.65*(most - least))
    left.set_title(f"channel {CHANNEL}: where the four levels lie", fontsize=10)
    left.set_xlabel("value over token scale")
    left.set_ylabel("tokens")

    colors = ("#CC79A7", "#0072B2", "#D55E00")
    x = s["rotated"].astype(float)
    for (name, y), color, place in zip(read.items(), colors, (1.05, 0.945, 1)):
        share = np.sort((x*y).sum(1)/(x*x).sum(1))
        error = ((x - y)**2).sum()/(x**2).sum()
        right.plot(share, color=color, lw=2)
        right.annotate(f"{name}:\nerror {100*error:.1f} %", (127, place), xytext=(8, 0), textcoords="offset points", color=color,
                       fontsize=9.5, va="center", annotation_clip=False)
    right.axhline(1, color="black", lw=0.8)
    right.set_xlim(0, 127)
    right.set_title("what is left of a key along itself", fontsize=10)
    right.set_xlabel("tokens of the tile, sorted")
    right.set_ylabel("(x . read)/(x . x)")
    right.grid(alpha=0.25)
    marked.save(figure, path, mark)


def depth_data() -> "dict[str, list]":
    lines: "dict[str, list]" = {}
    for row in quality.typed(quality.DEPTH):
        lines.setdefault(row["cache"], []).append([row["depth"], row["error"]])
    return lines


def plot_depth(path: Path, lines: "dict[str, list]") -> None:
    figure = figure_of(10, 4)
    look = {**speed.LOOK, "kvarn4": ("#CC79A7", "o"), "kvarn3": ("#666666", "o")}
    titles = {"shipped": "as shipped", "no tail": "without the exact tail"}
    for axes, (setting, title) in zip(figure.subplots(1, 2, sharey=True), titles.items()):
        ends = []
        for name, line in lines.items():
            kv, _, how = name.partition(" ")
            if kv == "f16" or (how != setting and "kvarn" in kv):
                continue
            color, style = look[kv][0], "-" if "kvarn" in kv else "--"
            axes.plot([depth for depth, _ in line], [error for _, error in line], color=color, lw=1.8, ls=style)
            ends.append([np.log10(line[-1][1]), kv, color])
        spread_out(ends, 0.16)
        for y, kv, color in ends:
            axes.annotate(kv, (lines["q8_0 shipped"][-1][0], 10**y), xytext=(6, 0), textcoords="offset points", color=color,
                          fontsize=9.5, va="center", fontweight="bold" if "kvarn" in kv else "normal")
        axes.set_xlim(0, 5300)
        axes.set_xticks((0, 1000, 2000, 3000, 4000))
        axes.set_yscale("log")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("depth, tokens")
        axes.grid(alpha=0.25)
    figure.axes[0].set_ylabel("relative squared error\nof the attention outputs")
    marked.save(figure, path, marked.mark_of(lines))


def spread_out(ends: "list[list]", least: float) -> None:
    """Moves labels apart until neighbours are `least` away from each other."""
    ends.sort()
    for _ in range(200):
        for a, b in zip(ends, ends[1:]):
            if b[0] - a[0] < least:
                middle = (a[0] + b[0])/2
                a[0], b[0] = middle - least/2, middle + least/2


def bytes_data() -> dict:
    """Bits per value by part, and GiB of an 8B model's cache by part and context."""
    D, bits, caches = 128, {}, {}
    for name in ("f16", "q8_0", "q4_0"):
        whole = cache_size.bits_of(name)
        bits[name] = [{"f16": 16, "q8_0": 8, "q4_0": 4}[name], whole - {"f16": 16, "q8_0": 8, "q4_0": 4}[name], 0]
    for name, sides in SIDES.items():
        n = 2*D*G
        bits[name] = [sum(8*(D*G*b//8) for b in sides)/n, 2*8*4*D/n, 2*8*2*G/n]
        assert sum(bits[name]) == sum(8*reference.tile_size(D, b) for b in sides)/n
    for n_ctx in (1024, 4096, 32768):
        for name in ("f16", "q4_0", "kvarn4/kvarn2"):
            size = cache_size.of(sizes.eight_b(), *sizes.kvtype.parse(name), n_ctx)
            stored = size.key_bytes + size.value_bytes - size.spare_bytes
            caches[f"{name} {n_ctx}"] = [part/n_ctx/2**10 for part in (stored, size.tail_bytes, size.spare_bytes)]
    return {"bits": bits, "caches": caches}


def plot_bytes(path: Path, drawn: dict) -> None:
    figure = figure_of(10, 4)
    left, right = figure.subplots(1, 2)

    def bars(axes, table, parts, form):
        names = list(table)[::-1]
        start = np.zeros(len(names))
        for i, part in enumerate(parts):
            values = np.array([table[name][i] for name in names])
            axes.barh(range(len(names)), values, left=start, color=PARTS[part], edgecolor="white", linewidth=0.5)
            start += values
        for i, total in enumerate(start):
            axes.annotate(form(total), (total, i), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9)
        axes.set_xlim(0, max(start)*1.14)
        return names

    names = bars(left, drawn["bits"], ("codes", "scale and zero", "token scales"), lambda total: f"{total:g}")
    left.set_yticks(range(len(names)), names)
    left.set_title("bits of one value, heads of 128", fontsize=10)
    names = bars(right, drawn["caches"], ("codes", "tail, f16", "spare tiles"), lambda total: f"{total:.0f}")
    right.set_yticks(range(len(names)), [f"{name.split()[0]}, {int(name.split()[1])//1024}k" for name in names])
    right.set_title("KiB per token of an 8B model's cache, by context", fontsize=10)
    from matplotlib.patches import Patch

    names = {"codes": "codes; right: tiles or rows"}
    handles = [Patch(color=color, label=names.get(part, part)) for part, color in PARTS.items()]
    figure.legend(handles=handles, ncols=5, loc="outside lower center", fontsize=9, frameon=False)
    marked.save(figure, path, marked.mark_of(drawn))


def draw(folder: Path) -> None:
    tokens, mark = source()
    s = steps(keys_of(tokens))
    plot_tile(folder/"tile.png", s, mark)
    plot_rounding(folder/"rounding.png", s, mark)
    plot_depth(folder/"depth.png", depth_data())
    plot_bytes(folder/"bytes.png", bytes_data())


def cut(text: str, first: str, behind: str) -> str:
    """The lines of a text from the one that holds `first` to the one before `behind`, as a block of code."""
    lines = [line.removeprefix("//").rstrip() for line in text.splitlines()]
    start = next(i for i, line in enumerate(lines) if first in line)
    end = next(i for i, line in enumerate(lines[start:], start) if behind in line)
    while not lines[end - 1]:
        end -= 1
    least = min(len(line) - len(line.lstrip()) for line in lines[start:end] if line)
    return "```\n" + "\n".join(line[least:] for line in lines[start:end]) + "\n```"


def texts() -> "dict[str, str]":
    """What docs/how-it-works.md quotes from the definitions."""
    header = (ROOT/"ggml-kvarn/kvarn-format.h").read_text(encoding="utf-8")
    return {"equations": cut(reference.__doc__, "(2)  y", "Scale and mid begin"),
            "tile": cut(header, "0              C ", "Codes lie in"), "order": cut(header, "keys    r = d", "With 3 bits")}


def marks() -> "dict[str, str]":
    own = source()[1]
    return {"tile.png": own, "rounding.png": own, "depth.png": marked.mark_of(depth_data()),
            "bytes.png": marked.mark_of(bytes_data())}
