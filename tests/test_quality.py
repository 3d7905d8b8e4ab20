"""test_quality.py - the simulator computes what the C code computes, and the claims hold.

SPDX-License-Identifier: MIT
"""

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tiny_model
from kvarn import codec, reference

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT/"tests/bench"))
quality = pytest.importorskip("quality")
recipes = pytest.importorskip("recipes")

TIE = 2e-4         # share of squared error: a code or two fall the other way, since numpy adds in another order
KLD_SAME = 1e-4    # of the block-wise model to llama.cpp, both with an f16 or exact cache


def tiles(D, seed, n=3):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, 128, D))*np.exp(0.5*rng.standard_normal((n, 1, D)))*np.exp(0.3*rng.standard_normal((n, 128, 1)))
    return (x + 0.5*rng.standard_normal((n, 1, D))).astype(np.float32)


def share(a, b, x):
    return float(((a - b)**2).sum()/(x**2).sum())


@pytest.mark.parametrize("D", (64, 80, 128))
@pytest.mark.parametrize("bits", (2, 3, 4))
@pytest.mark.parametrize("side", ("k", "v"))
def test_the_simulated_encoder_is_the_shipping_one(D, bits, side):
    x = tiles(D, 1)
    shipping = codec.unseal(codec.seal(x, side, bits), side, bits)
    assert share(recipes.seal(x, recipes.Recipe(bits), side), shipping, x) < TIE


@pytest.mark.parametrize("bits", (2, 3, 4))
@pytest.mark.parametrize("side", ("k", "v"))
def test_the_simulated_paper_is_the_published_recipe(bits, side):
    x = tiles(128, 2)
    published = np.stack([reference.paper_quantize(tile, side, bits) for tile in x])
    assert share(recipes.paper(x, recipes.Recipe(bits, "paper", iterations=16), side), published, x) < TIE


@pytest.mark.parametrize("bits, at_least", ((2, 1.8), (4, 4.0)))
def test_normalization_protects_the_neighbours_of_a_loud_token(bits, at_least):
    """One token ten times as large: what its neighbours lose without normalization, in squared error."""
    x = np.random.default_rng(3).standard_normal((8, 128, 128)).astype(np.float32)
    x[:, 5] *= 10
    others = np.arange(128) != 5
    with_it, without = (((recipes.seal(x, recipes.Recipe(bits, normalize=how), "k") - x)[:, others]**2).sum()
                        for how in ("both", "none"))
    assert without > at_least*with_it


def test_llama_cpp_block_formats():
    x = tiles(64, 4)
    for bits, step in ((4, 1/8), (8, 1/127)):
        b = x.reshape(-1, 32)
        y = recipes.blocks_of_32(x, bits).reshape(-1, 32)
        assert (abs(y - b).max(1) <= abs(b).max(1)*step*1.01).all()


@pytest.mark.llama
@pytest.mark.slow
def test_the_simulated_model_is_llama_cpp(tmp_path):
    from blockwise import Blockwise

    from kvarn.context import Context, Model

    path = tiny_model.write(tmp_path/"m.gguf", n_head=4, n_head_kv=2, gain=0.8, loud=8.0, loud_tokens=3)
    tokens = np.random.default_rng(5).integers(3, 259, (1, 256))
    simulated = Blockwise(path).run(tokens).logits[0]
    model = Model(str(path))
    context = Context(model, "f16", 256)
    real = np.concatenate([context.decode(tokens[0, a:a + 128]).copy() for a in (0, 128)])
    context.close()
    model.close()
    a, b = (x - x.max(1, keepdims=True) for x in (real.astype(float), simulated.astype(float)))
    a, b = (x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (a, b))
    assert (np.exp(a)*(a - b)).sum(1).mean() < KLD_SAME


def test_every_claim_holds():
    data = quality.load()
    for what, over, under, model, field, bar in quality.CLAIMS:
        whole, each = quality.ratio(data, over, under, model, field)
        assert len(each) >= 3 and whole <= bar, f"{what}: {whole:.3f} of at most {bar:.3f}"
    for recipe in quality.NO_WORSE:
        tail = recipe.partition(" tail")[1] + recipe.partition(" tail")[2]
        ours, theirs = (quality.total(data["tasks", name], "wrong_tokens") for name in (recipe, "q4_0" + tail))
        assert ours <= theirs, f"{recipe}: {ours} wrong tokens, rotated q4_0 {theirs}"


def test_the_study_runs(tmp_path):
    """A few tokens of the smallest model: recipes are found, rows written, f16 is exact."""
    out = tmp_path/"a.csv"
    command = [sys.executable, str(ROOT/"tests/bench/ablation.py"), "--models", "outliers", "--n", "1", "--seeds", "2",
               "--size", "512", "--only", "kvarn2", "paper2", "kvarn2 sink 4", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(out.open()))
    kld = {(row["recipe"], row["seed"]): float(row["kld_mean"]) for row in rows}
    assert set(kld) == {(recipe, seed) for recipe in ("f16", "kvarn2", "paper2", "kvarn2 sink 4") for seed in "12"}
    for seed in "12":
        assert kld["f16", seed] == 0 < kld["kvarn2", seed] < kld["paper2", seed]
