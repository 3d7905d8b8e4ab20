"""test_documents.py - figures in README and docs are those of the committed results, plots were drawn from them, formulas hold.

SPDX-License-Identifier: MIT
"""

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from kvarn import reference

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT/"tests/bench"))
documents = pytest.importorskip("documents")
marked = pytest.importorskip("marked")
quality, sizes, speed = documents.quality, documents.sizes, documents.speed


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def wrong(recipe: str) -> int:
    return quality.total(quality.load()["tasks", recipe], "wrong_tokens")


def kld(recipe: str) -> float:
    return quality.mean(quality.load()["text", recipe], "kld_mean")


@pytest.fixture(scope="module")
def parts():
    return documents.texts()


@pytest.mark.parametrize("path", documents.DOCUMENTS, ids=lambda path: path.name)
def test_tables_are_those_of_the_results(path, parts):
    text = text_of(path)
    assert text == quality.filled(text, parts), f"{path.name} is stale: python tests/bench/documents.py"


def test_every_part_stands_somewhere(parts):
    found = {name for path in documents.DOCUMENTS for name in re.findall(r"<!-- (\w+): begin", text_of(path))}
    assert found == set(parts)


def test_plots_are_drawn_from_the_results():
    wanted = documents.marks()
    stale = [name for name, mark in wanted.items() if marked.read(ROOT/"docs"/name) != mark]
    assert not stale, f"{stale} are stale: python tests/bench/documents.py"
    shown = {name for path in documents.DOCUMENTS for name in re.findall(r"\]\((?:docs/)?([\w-]+\.png)\)", text_of(path))}
    assert set(wanted) <= shown


def test_the_mark_survives_in_a_plot(tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    marked.save(Figure(), tmp_path/"a.png", marked.mark_of([1, "two"]))
    assert marked.read(tmp_path/"a.png") == marked.mark_of([1, "two"]) != marked.mark_of([1, "three"])


def claims() -> "list[tuple[str, str, bool]]":
    """(document, what it says in words, whether the results say so)"""
    total, h200 = quality.total(quality.load()["tasks", "f16"], "tokens"), speed.cuda()
    at_0 = speed.average(h200["kvarn4/kvarn2", 0])/speed.average(h200["f16", 0])
    return [
        ("README.md", "no wrong token in 100,000", wrong("kvarn4/2") == 0 and total >= 100000),
        ("README.md", "4.7 times smaller than f16", round(16/3.375, 1) == 4.7),
        ("README.md", "anything below 3.9 bits", all(kld(name) > kld("q4_0") for name in ("kvarn4/2", "kvarn3", "kvarn2"))),
        ("README.md", f"{at_0:.2f} times as fast as with f16", True),
        ("README.md", f"less than f16 from {sizes.wins_from('kvarn4/kvarn2', 'f16')} tokens on, less than q4_0 from "
                      f"{sizes.wins_from('kvarn4/kvarn2', 'q4_0')}", True),
        ("docs/choosing.md", "no wrong token in 100000", wrong("kvarn4/2") == 0 and total >= 100000),
        ("docs/choosing.md", "less than half its KLD", kld("kvarn4") < kld("q4_0")/2),
        ("docs/choosing.md", "6.7 times smaller than f16", round(16/2.375, 1) == 6.7),
        ("docs/choosing.md", f"{at_0:.2f} times as fast as with f16", True),
        ("docs/choosing.md", "better than rotated q4_0 on everything measured, at 0.6 bits less",
         kld("kvarn4/3") < kld("q4_0") and wrong("kvarn4/3") <= wrong("q4_0") and round(4.5 - 3.875, 1) == 0.6),
        ("docs/how-it-works.md", f"Over {total} predictions", True),
        ("docs/how-it-works.md", f"least squares alone makes {wrong('kvarn2 least squares throughout')} wrong tokens", True),
        ("docs/how-it-works.md", f"this makes {wrong('kvarn2')}, the published method {wrong('paper2')}", True),
        ("docs/how-it-works.md", "A value takes bits + 32/G + 16/D bits",
         all(8*reference.tile_size(D, bits)/(128*D) == bits + 32/128 + 16/D for D in (64, 80, 128) for bits in (2, 3, 4))),
    ]


@pytest.mark.parametrize("name, said, is_so", claims(), ids=[f"{name}: {said}" for name, said, _ in claims()])
def test_what_is_said_in_words(name, said, is_so):
    assert said in " ".join(text_of(ROOT/name).split()), f"{name} says it otherwise now: change the claim, too"
    assert is_so, f"{name} says '{said}', the results do not"


def test_attention_on_codes_is_attention():
    """The two formulas of how-it-works.md, against the tile that (1) gives back."""
    text = text_of(ROOT/"docs/how-it-works.md")
    assert "    s[t]   = token[t]*(sum_d (q[d]*scale[d])*code(t,d) + sum_d q[d]*zero[d])\n" in text
    assert "    out[d] = scale[d]*sum_t (p[t]*token[t])*code(t,d) + zero[d]*sum_t p[t]*token[t]\n" in text
    rng = np.random.default_rng(1)
    D, q, p = 64, rng.standard_normal(64), rng.random(128)
    for side in ("k", "v"):
        tile = reference.seal(rng.standard_normal((128, D)).astype(np.float32), side, 3)
        code, scale, zero, token = (a.astype(float) for a in reference.unpack(tile, side, 3, D))
        x = (code*scale + zero)*token[:, None]
        assert np.allclose(x, reference.unseal(tile, side, 3, D), rtol=1e-5, atol=1e-6)
        s = token*((q*scale*code).sum(1) + (q*zero).sum())
        out = scale*((p*token)[:, None]*code).sum(0) + zero*(p*token).sum()
        assert np.allclose(s, x @ q) and np.allclose(out, p @ x)


def test_rotating_both_sides_changes_no_score():
    rng = np.random.default_rng(2)
    q, k, H = rng.standard_normal(128), rng.standard_normal((5, 128)), reference.hadamard(128)
    assert np.allclose(H @ H, np.eye(128)) and np.allclose((q @ H) @ (k @ H).T, q @ k.T)


def test_the_plan_of_the_porting_page_is_the_one_of_the_cache():
    text, header = text_of(ROOT/"docs/porting.md"), text_of(ROOT/"ggml-kvarn/kvarn-graph.h")
    for name in ("rows[n_rows]", "seal[n_seal][2]", "map[n_stream][n_tiles]"):
        assert name in text and name in header
    assert "plan[n_rows + 2*n_seal + s*n_tiles + i]" in text
    assert ".map_off  = plan.n_rows + 2*plan.n_seal" in text_of(ROOT/"ggml-kvarn/kvarn-graph.c")
