"""Tables and plots of kvarn eval: eval.csv, depth.csv, eval.md, and two figures where matplotlib is installed.

SPDX-License-Identifier: MIT
"""

import csv
import sys
from pathlib import Path
from typing import Any, Dict

COLORS = {"q8_0": "#8c8c8c", "q4_0": "#bf7f3f", "kvarn4": "#1f5fa8", "kvarn4/kvarn2": "#2f9e8f", "kvarn3": "#7a4fa3",
          "kvarn2": "#c23b4e"}
PLAIN = ("bpv", "bpv_allocated", "ppl", "kld_mean", "kld_median", "kld_999")
Row = Dict[str, Any]
SETTINGS = {"shipped": "As shipped", "no tail": "No tail: every token is read from its tile as soon as the tile is full"}


def cell(value: Any) -> str:
    if value is None or value == "":
        return ""
    if isinstance(value, float):
        return f"{value:.2e}" if value and abs(value) < 0.001 else f"{value:.4g}"
    return str(value)


def columns(rows: "list[Row]") -> "list[str]":
    names: "list[str]" = []
    for row in rows:
        names += [name for name in row if name not in names]
    return names


def table(head: "list[str]", body: "list[list[str]]") -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"]*len(head), *body])


def markdown(rows: "list[Row]") -> str:
    """One table a setting; types that store rows stand in both."""
    out = []
    for setting, title in SETTINGS.items():
        mine = [row for row in rows if row["setting"] == setting or "kvarn" not in row["kv"]]
        wide = any(row.get("decode_tokens") for row in mine)
        head = ["cache", "bits/value", "allocated", "PPL", "KLD mean", "median", "99.9 %", "same top"]
        head += ["decode KLD", "same top"] if wide else []
        judged, free = any("answers" in row for row in mine), any(row.get("greedy_tokens") for row in mine)
        head += ["steps right", "exact"] if judged else ["greedy as f16", "first difference"] if free else []
        body = []
        for row in mine:
            line = [row["kv"], *(cell(row.get(name)) for name in PLAIN)]
            line.append(f"{row.get('same_top', 0):.4f}")
            line += [cell(row.get("decode_kld_mean")), f"{row.get('decode_same_top', 0):.4f}"] if wide else []
            if judged:
                line += [f"{row['steps_right']}/{row['steps_total']}", f"{row['answers_exact']}/{row['answers']}"]
            elif free:
                first = row.get("greedy_first_difference", -1)
                line += [f"{row['greedy_tokens_as_f16']}/{row['greedy_tokens']}" if row["greedy_tokens"] else "",
                         "" if first < 0 else str(first)]
            body.append(line)
        out.append(f"{title}\n\n{table(head, body)}")
    return "\n\n".join(out)


def depths(drifts: "dict[str, list[list[float]]]", block: int) -> "list[Row]":
    """Relative squared error of the attention outputs, mean over layers and chunks, against depth."""
    rows = []
    for name, chunks in drifts.items():
        for i in range(min(map(len, chunks), default=0)):
            rows.append({"cache": name, "depth": (i + 1)*block, "error": sum(chunk[i] for chunk in chunks)/len(chunks)})
    return rows


def write_csv(path: Path, rows: "list[Row]") -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns(rows), restval="")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()})
    return path


def plot_depth(path: Path, rows: "list[Row]") -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(row["cache"] for row in rows):
        kv, _, setting = name.partition(" ")
        if kv == "f16":
            continue
        mine = [row for row in rows if row["cache"] == name]
        axes.plot([row["depth"] for row in mine], [row["error"] for row in mine], color=COLORS.get(kv),
                  linestyle="-" if setting == "shipped" else ":", label=name)
    axes.set_yscale("log")
    axes.set_xlabel("depth, tokens")
    axes.set_ylabel("relative squared error\nof the attention outputs")
    figure.legend(fontsize=7, ncols=3, loc="outside lower center")  # inside it would hide a line
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    return path


def plot_size(path: Path, rows: "list[Row]") -> Path:
    """KLD against stored bits per value, no tail for anyone."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        if row["kv"] == "f16" or ("kvarn" in row["kv"] and row["setting"] == "shipped") or not row.get("kld_mean"):
            continue
        axes.plot(row["bpv"], row["kld_mean"], "o", color=COLORS.get(row["kv"], "black"))
        axes.annotate(row["kv"], (row["bpv"], row["kld_mean"]), xytext=(6, 4), textcoords="offset points", fontsize=8)
    axes.set_yscale("log")
    axes.set_xlabel("stored bits per value")
    axes.set_ylabel("mean KLD to f16")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    return path


def write(folder: Path, rows: "list[Row]", drifts: "dict[str, list[list[float]]]", block: int) -> "list[Path]":
    folder.mkdir(parents=True, exist_ok=True)
    depth = depths(drifts, block)
    written = [write_csv(folder/"eval.csv", rows)] + ([write_csv(folder/"depth.csv", depth)] if depth else [])
    (folder/"eval.md").write_text(markdown(rows) + "\n", encoding="utf-8")
    written.append(folder/"eval.md")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print("kvarn: no plots without matplotlib; pip install matplotlib, and run again", file=sys.stderr)
        return written
    return written + ([plot_depth(folder/"depth.png", depth)] if depth else []) + [plot_size(folder/"size.png", rows)]
