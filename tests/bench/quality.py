"""quality.py - what the results say: tables, figures, and the claims with their bars.

SPDX-License-Identifier: MIT
"""

import csv
import re
import sys
from pathlib import Path

import marked

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT/"python"))

from kvarn import report  # noqa: E402

RESULTS = ROOT/"tests/bench/results/ablation.csv"
EVAL = ROOT/"tests/bench/results/eval-tasks.csv"
SHIFT = ROOT/"tests/bench/results/shift.csv"
DEPTH = ROOT/"tests/bench/results/eval-tasks-depth.csv"
MODELS = ("tasks", "text", "outliers")
COLORS = {"kvarn": "#c23b4e", "paper": "#2f6fa8", "q": "#777777"}

# (what, numerator, denominator, model, field, bar): the sum over all seeds of the one, over that of the other
CLAIMS = [
    ("kvarn2 against the paper, long decodes", "kvarn2", "paper2", "tasks", "wrong_tokens", 1/8),
    ("the same with a tail of 128", "kvarn2 tail 128", "paper2 tail 128", "tasks", "wrong_tokens", 1/8),
    ("kvarn2 against the paper, text", "kvarn2", "paper2", "text", "kld_mean", 1/2.5),
    ("kvarn4/2 against the paper, text", "kvarn4/2", "paper4/2", "text", "kld_mean", 0.55),
    ("kvarn3 against the paper, text", "kvarn3", "paper3", "text", "kld_mean", 0.55),
    ("kvarn4 against rotated q4_0, text", "kvarn4", "q4_0", "text", "kld_mean", 0.5),
    ("kvarn4/3 against rotated q4_0, text", "kvarn4/3", "q4_0", "text", "kld_mean", 1.0),
]
NO_WORSE = ("kvarn4", "kvarn4/2", "kvarn4 tail 128", "kvarn4/2 tail 128", "kvarn3 tail 128")  # long-decode errors: than q4_0's
HEAD = ("q8_0", "q4_0", "kvarn4", "paper4", "kvarn4/3", "paper4/3", "kvarn3", "paper3", "kvarn4/2", "paper4/2", "kvarn3/2",
        "paper3/2", "kvarn2", "paper2")


def load(path=RESULTS) -> "dict[tuple[str, str], list[dict]]":
    """(model, recipe) -> one row per seed, numbers as numbers."""
    table: "dict[tuple[str, str], list[dict]]" = {}
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            numbers = {name: float(value) for name, value in row.items() if name not in ("model", "recipe") and value}
            table.setdefault((row["model"], row["recipe"]), []).append(numbers)
    return table


def typed(path) -> "list[dict]":
    """Rows of a CSV of kvarn eval, numbers as numbers, as report.py takes them."""
    def value(text):
        for kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                pass
        return text

    with open(path, newline="", encoding="utf-8") as file:
        return [{name: value(text) for name, text in row.items() if text} for row in csv.DictReader(file)]


def mean(rows, field) -> float:
    return sum(row[field] for row in rows)/len(rows)


def total(rows, field) -> int:
    return int(sum(row[field] for row in rows))


def ratio(data, over, under, model, field) -> "tuple[float, list[float]]":
    """Of the sums over all seeds, and of every seed (inf where the denominator is 0)."""
    a, b = data[model, over], data[model, under]
    each = [x[field]/y[field] if y[field] else float("inf") for x, y in zip(a, b)]
    return sum(x[field] for x in a)/sum(y[field] for y in b), each


def kld(rows) -> str:
    values = [row["kld_mean"] for row in rows]
    return f"{mean(rows, 'kld_mean'):.6f} ({min(values):.6f} to {max(values):.6f})"


def table(head, body) -> str:
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in [head, ["---"]*len(head), *body])


def name_of(recipe: str) -> str:
    kind = recipe.split()[0]
    return recipe.replace(kind, {"q4_0": "q4_0, rotated", "q4_0-plain": "q4_0, not rotated"}.get(kind, kind), 1)


def headline(data, tail="") -> str:
    body = []
    for recipe in HEAD:
        key = f"{recipe}{tail}"
        if ("tasks", key) not in data:
            continue
        tasks = data["tasks", key]
        body.append([name_of(recipe), f"{tasks[0]['bpv']:g}", f"{total(tasks, 'wrong_tokens')} of {total(tasks, 'tokens')}",
                     f"{total(tasks, 'exact')} of {total(tasks, 'sequences')}", kld(data["text", key]),
                     f"{mean(data['outliers', key], 'kld_mean'):.4f}"])
    return table(["cache", "bits per value", "wrong tokens", "problems without one", "text: mean KLD (seeds)",
                  "outliers: mean KLD"], body)


def ablation(data) -> str:
    """Every variant of kvarn2 against kvarn2."""
    body = []
    for recipe in dict.fromkeys(recipe for _, recipe in data):
        if not recipe.startswith("kvarn2 ") or "tail" in recipe or "sink" in recipe:
            continue
        tasks = data.get(("tasks", recipe))
        judged = [total(tasks, "wrong_tokens"), total(tasks, "exact")] if tasks else ["not run"]*2
        line = [recipe.removeprefix("kvarn2 "), *judged]
        for other in ("text", "outliers"):
            if (other, recipe) not in data:
                line.append("not run")
                continue
            whole, each = ratio(data, recipe, "kvarn2", other, "kld_mean")
            line.append(f"{whole:.2f} ({min(each):.2f} to {max(each):.2f})")
        body.append(line)
    own = data["tasks", "kvarn2"]
    body.insert(0, ["**as it is**", total(own, "wrong_tokens"), total(own, "exact"), "1", "1"])
    return table(["kvarn2, one thing changed", "wrong tokens", "problems without one", "text KLD, times",
                  "outliers KLD, times"], body)


def exact_tokens(data) -> str:
    body = []
    for what in ("", " sink 4", " sink 128", " tail 128", " tail 896"):
        line = [what.strip() or "none"]
        for recipe in ("kvarn2", "paper2", "q4_0"):
            key = recipe + what
            line.append(f"{total(data['tasks', key], 'wrong_tokens')} / {mean(data['text', key], 'kld_mean'):.5f} / "
                        f"{mean(data['outliers', key], 'kld_mean'):.4f}")
        body.append(line)
    return table(["exact f16 tokens", "kvarn2", "paper2", "q4_0, rotated"], body)


def shifts(path=SHIFT) -> str:
    """What moving keys costs."""
    rows, body = typed(path), []
    for cache in dict.fromkeys(row["cache"] for row in rows):
        by_count = {row["shifts"]: row for row in rows if row["cache"] == cache}
        body.append([cache] + [f"{by_count[n]['kld_still']:.5f} / {by_count[n]['kld_moved']:.5f}" for n in (1, 2, 4, 7)])
    return table(["KLD still / moved", "1 shift", "2", "4", "7"], body)


def claims(data) -> str:
    body = []
    for what, over, under, model, field, bar in CLAIMS:
        whole, each = ratio(data, over, under, model, field)
        body.append([what, f"{bar:.3g}", f"{whole:.3f}", ", ".join(f"{x:.3f}" for x in each), "yes" if whole <= bar else "no"])
    return table(["ratio", "at most", "measured", "each seed", "holds"], body)


def no_worse(data) -> str:
    body = []
    for recipe in ("kvarn4", "kvarn4/2", "kvarn3", "kvarn4/3", "kvarn3/2"):
        line = [recipe]
        for tail in ("", " tail 128"):
            ours, theirs = data.get(("tasks", recipe + tail)), data["tasks", "q4_0" + tail]
            line.append(f"{total(ours, 'wrong_tokens')} against {total(theirs, 'wrong_tokens')}" if ours else "not run")
        body.append(line)
    return table(["wrong tokens against rotated q4_0's", "no tail", "tail 128"], body)


def summary(data) -> str:
    """The table of docs/choosing.md."""
    body = []
    for recipe in ("q8_0", "q4_0", "kvarn4", "kvarn4/2", "kvarn3", "kvarn2", "paper2"):
        tasks, text = data["tasks", recipe], data["text", recipe]
        name = {"kvarn4/2": "kvarn4/kvarn2", "q4_0": "q4_0, rotated", "paper2": "KVarN as published, 2 bits"}.get(recipe, recipe)
        body.append([name, f"{tasks[0]['bpv']:g}", f"{mean(text, 'kld_mean'):.6f}", f"{100*mean(text, 'same_top'):.2f} %",
                     f"{total(tasks, 'wrong_tokens')} of {total(tasks, 'tokens')}"])
    return table(["cache", "bits per value", "text: mean KLD to f16", "same top token",
                  "long chains of look-ups: wrong tokens"], body)


def texts(data) -> "dict[str, str]":
    tokens = {model: total(data[model, "f16"], "tokens") for model in MODELS}
    seeds = len(data["tasks", "f16"])
    return {
        "scope": f"{seeds} seeds; judged predictions: " + ", ".join(f"{model} {tokens[model]}" for model in MODELS) + ".",
        "claims": claims(data), "no_worse": no_worse(data), "headline": headline(data), "tail": headline(data, " tail 128"),
        "ablation": ablation(data), "exact": exact_tokens(data), "shift": shifts(), "quality": summary(data),
        "library": report.markdown(typed(EVAL)),
    }


def filled(text: str, parts: "dict[str, str]") -> str:
    """text with what stands between its marks replaced."""
    def put(match):
        return f"{match.group(1)}\n{parts[match.group(2)]}\n{match.group(3)}" if match.group(2) in parts else match.group(0)

    return re.sub(r"(<!-- (\w+): begin[^>]*-->)\n.*?(<!-- \2: end -->)", put, text, flags=re.DOTALL)


def plot_size(data, path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    titles = {"text": "text model, head size 64", "outliers": "planted outliers, head size 128"}
    for axes, (model, title) in zip(figure.subplots(1, 2), titles.items()):
        for recipe in HEAD[1:]:
            rows, bits = data[model, recipe], data["tasks", recipe][0]["bpv"]
            values = [row["kld_mean"] for row in rows]
            kind = next(kind for kind in COLORS if recipe.startswith(kind))
            middle, ours = mean(rows, "kld_mean"), kind == "kvarn"
            axes.errorbar(bits, middle, [[middle - min(values)], [max(values) - middle]], fmt="o", color=COLORS[kind], ms=4)
            place = (5, -2) if (model, recipe) == ("text", "kvarn4/2") else (-5, -7) if ours else (5, 3)    # kvarn3 is close
            axes.annotate(recipe, (bits, middle), xytext=place, textcoords="offset points",
                          ha="right" if place[0] < 0 else "left", fontsize=8)
        axes.set_xlim(1.9, 5.1)
        axes.set_yscale("log")
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("bits per value at head size 128")
        axes.set_ylabel("mean KLD to f16, no tail")
        axes.grid(alpha=0.3)
    marked.save(figure, path, marks()[path.name])


def plot_ablation(data, path) -> None:
    from matplotlib.figure import Figure

    names = [recipe for model, recipe in data if model == "text" and recipe.startswith("kvarn2 ")
             and not re.search(r"tail|sink| G ", recipe)]
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    for offset, model, color in ((-0.2, "text", "#c23b4e"), (0.2, "outliers", "#444444")):
        ratios = [ratio(data, name, "kvarn2", model, "kld_mean") for name in names]
        low = [whole - min(each) for whole, each in ratios]
        high = [max(each) - whole for whole, each in ratios]
        axes.barh([i + offset for i in range(len(names))], [whole - 1 for whole, _ in ratios], 0.38, left=1, color=color,
                  label=model, xerr=[[max(x, 0) for x in low], [max(x, 0) for x in high]], error_kw={"linewidth": 0.8})
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(names)), [name.removeprefix("kvarn2 ") for name in names], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("mean KLD, times kvarn2 as it is (bars: seeds)")
    axes.legend(fontsize=8)
    axes.grid(axis="x", alpha=0.3)
    marked.save(figure, path, marks()[path.name])


def draw(folder: Path) -> None:
    data = load()
    plot_size(data, folder/"quality-size.png")
    plot_ablation(data, folder/"quality-ablation.png")


def marks() -> "dict[str, str]":
    """File -> the mark that it must carry: of all results that it was drawn from."""
    own = marked.mark_of(RESULTS.read_text(encoding="utf-8"))
    return {"quality-size.png": own, "quality-ablation.png": own}
