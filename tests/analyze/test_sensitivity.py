"""Scans and ablations against plain loops."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_svd.analyze.ablation import LOST, by_direction, by_type, without
from mlx_svd.analyze.effect import base_losses, effect
from mlx_svd.analyze.layers import LayersSettings, layers
from mlx_svd.analyze.ranks import policies
from mlx_svd.analyze.sensitivity import group_ranks, scan
from mlx_svd.analyze.truncations import Truncations, replaced
from mlx_svd.calibrate.scorers import Scoring
from mlx_svd.calibrate.taps import inputs_of, tapped
from mlx_svd.checkpoint.loader import load_model
from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.divergence import kl_divergence
from mlx_svd.evaluate.perplexity import window_losses
from mlx_svd.linalg.truncate import decompose
from mlx_svd.plan.policy import RankPolicy
from tests.analyze.conftest import low_rank
from tests.conftest import source_weights

HALF = RankPolicy(rank_ratio=0.5)


def kl_with(s, weights):
    """Mean KL per token of the model with other weights, by the evaluation's own function and
    from a dense model that is loaded anew."""
    dense, _ = load_model(s.source.folder, dtype="float32")
    with replaced(s, weights):
        return kl_divergence(s.model, dense, s.windows.tokens).kl


def truncated(s, paths):
    originals = source_weights(s.source.folder)
    return {p: low_rank(originals[p], min(originals[p].shape) // 2) for p in paths}


def test_the_effect_is_that_of_the_evaluation(subject):
    s = subject("qwen2")
    np.testing.assert_allclose(
        base_losses(s).sums, window_losses(s.model, s.windows.tokens).sums, rtol=1e-5
    )
    path = next(iter(s.projections))
    _ = s.base
    with Truncations(s).compressed({path: 4}):
        found = effect(s)
        expected = kl_divergence(s.model, s.base, s.windows.tokens)
    assert found.kl.value == pytest.approx(expected.kl)
    assert (found.kl.low, found.kl.n, found.kl.rows) == (pytest.approx(expected.kl_low), 3, 69)
    assert np.mean(found.window_kl) == pytest.approx(expected.kl)
    assert effect(s).kl.value == pytest.approx(0, abs=1e-6)
    assert effect(s).perplexity_ratio.ratio == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("by", ["layer", "type"])
def test_groups_compressed_or_left_dense_are_measured_one_by_one(subject, by):
    s = subject("qwen2", num_hidden_layers=3)
    chosen = s.chosen(("q", "v", "down"))
    alone, dense = scan(s, Truncations(s), chosen, by, ("half", HALF))
    everything = kl_with(s, truncated(s, [p.path for p in chosen]))
    assert alone.everything.kl.value == pytest.approx(everything, rel=1e-3)
    key = (lambda p: str(p.layer)) if by == "layer" else (lambda p: p.name)
    expected = {}
    for group in {key(p) for p in chosen}:
        inside = [p.path for p in chosen if key(p) == group]
        others = [p.path for p in chosen if key(p) != group]
        expected[group] = kl_with(s, truncated(s, inside)), kl_with(s, truncated(s, others))
    assert [g.group for g in alone.groups] == sorted(expected, key=lambda g: -expected[g][0])
    assert [g.group for g in dense.groups] == sorted(expected, key=lambda g: expected[g][1])
    for g in alone.groups:
        assert g.effect.kl.value == pytest.approx(expected[g.group][0], rel=1e-3)
        assert g.place_low <= g.place <= g.place_high
    for g in dense.groups:
        assert g.effect.kl.value == pytest.approx(expected[g.group][1], rel=1e-3)
        assert g.gain.value == pytest.approx(everything - expected[g.group][1], rel=1e-2, abs=1e-5)


def test_a_head_takes_its_query_heads_along(subject):
    s = subject("qwen2")  # 4 query heads of 16, 2 key heads
    t = Truncations(s, per_head=True)
    groups = group_ranks(t, s.chosen(("q", "k", "o")), "head", HALF)
    assert list(groups) == ["0.0", "0.1", "1.0", "1.1"]
    assert list(groups["0.1"].values()) == [(16, 16, 8, 8), (16, 8)]
    with pytest.raises(MlxSvdError, match="cuts q, k and v"):
        group_ranks(t, s.chosen(("o",)), "head", HALF)


def test_all_heads_but_one_are_those_of_the_merged_ranks(subject):
    s = subject("gpt2")
    chosen = s.chosen(("q", "v"))
    alone, dense = scan(s, Truncations(s), chosen, "head", ("half", HALF))
    assert len(alone.groups) == len(dense.groups) == 8
    originals = source_weights(s.source.folder)
    left = dense.groups[0].group
    weights = {}
    for p in chosen:
        weights[p.path] = originals[p.path].copy()
        for head in range(4):
            rows = slice(16 * head, 16 * head + 16)
            if f"{p.layer}.{head}" != left:
                weights[p.path][rows] = low_rank(originals[p.path][rows], 8)
    assert dense.groups[0].effect.kl.value == pytest.approx(kl_with(s, weights), rel=1e-3)


@pytest.mark.parametrize(("by", "leave"), [("block", ("dense",)), ("layer", ("open",))])
def test_unknown_groupings_are_refused(subject, by, leave):
    s = subject("llama")
    with pytest.raises(MlxSvdError, match="scan"):
        scan(s, Truncations(s), s.chosen(), by, ("half", HALF), leave)


def test_directions_and_noise_lose_exactly_the_energy_of_the_truncation():
    weight = np.random.default_rng(0).standard_normal((12, 20))
    d = decompose(weight)
    lost = (np.linalg.svd(weight)[1][7:] ** 2).sum()
    for kind in LOST:
        found = without(d, 7, kind, np.random.default_rng(1))
        assert ((weight - found) ** 2).sum() == pytest.approx(lost)
    smallest = without(d, 7, "smallest", np.random.default_rng(1))
    np.testing.assert_allclose(smallest, low_rank(weight, 7), atol=1e-9)
    # Only the first directions are touched when the largest ones go.
    _, values, right = np.linalg.svd(weight)
    touched = np.searchsorted(np.cumsum(values**2), lost) + 1
    change = weight - without(d, 7, "largest", np.random.default_rng(1))
    np.testing.assert_allclose(change @ right[touched:].T, 0, atol=1e-9)


def test_ablations_measure_types_and_directions(subject):
    s = subject("gpt_neo")
    chosen, t = s.chosen(("q", "v")), Truncations(s)
    types = by_type(s, t, chosen, HALF)
    assert [a.what for a in types] == ["q", "v"]
    originals = source_weights(s.source.folder)
    paths = [p.path for p in chosen if p.name == "v"]
    energies = [np.linalg.svd(originals[p])[1] ** 2 for p in paths]
    expected = sum(e[32:].sum() for e in energies) / sum(e.sum() for e in energies)
    assert types[1].energy_lost == pytest.approx(expected)
    assert types[1].effect.kl.value == pytest.approx(kl_with(s, truncated(s, paths)), rel=1e-3)
    directions = by_direction(s, t, chosen, HALF, seeds=(0, 1))
    assert [a.what for a in directions] == [
        "smallest",
        "random",
        "random",
        "largest",
        "noise",
        "noise",
    ]
    assert len({a.energy_lost for a in directions}) == 1
    assert len({a.effect.kl.value for a in directions}) == 6
    with pytest.raises(MlxSvdError, match="only add up with --scorer plain"):
        by_direction(s, Truncations(s, Scoring("whitened")), chosen, HALF)


def test_every_projection_alone_is_measured_on_its_own_real_inputs(subject):
    s = subject("gpt2")
    settings = LayersSettings(policies([0.5], [4]), ("k", "down"), [1], scans=("type",))
    result = layers(s, settings)
    assert [(r["projection"]["path"], r["ranks"]) for r in result["projections"]] == [
        ("model.h.1.attn.c_attn.k", 32),
        ("model.h.1.attn.c_attn.k", 4),
        ("model.h.1.mlp.c_proj", 32),
        ("model.h.1.mlp.c_proj", 4),
    ]
    originals = source_weights(s.source.folder)
    for row in result["projections"]:
        path, rank = row["projection"]["path"], row["ranks"]
        with tapped(s.model, [s.linear_of[path]]) as taps:
            s.model(mx.array(s.windows.tokens[:, :-1]))
            (x,) = inputs_of(taps)
        x, w = np.array(x, dtype=np.float64), originals[path]
        y, z = x @ w.T, x @ low_rank(w, rank).T
        relative = np.linalg.norm(y - z) / np.linalg.norm(y)
        assert row["real"]["relative_error"]["value"] == pytest.approx(relative, rel=1e-4)
        assert row["real"]["max_difference"] == pytest.approx(np.abs(y - z).max(), rel=1e-3)
        assert row["real"]["rows"] == 69
        energies = np.linalg.svd(w)[1] ** 2
        kept = energies[:rank].sum() / energies.sum()
        assert row["energy"] == pytest.approx(kept)
        assert row["gaussian"]["cosine"]["value"] == pytest.approx(np.sqrt(kept), abs=0.02)
        kl = kl_with(s, {path: low_rank(w, rank)})
        assert row["effect"]["kl"]["value"] == pytest.approx(kl, rel=1e-3, abs=1e-6)
    assert [x["rank_label"] for x in result["summary"]] == ["ratio 0.5", "rank 4"]
    assert [(x["by"], x["leave"]) for x in result["scans"]] == [
        ("type", "compressed"), ("type", "dense"),
    ] * 2  # fmt: skip
    with pytest.raises(MlxSvdError, match="has layers 0 to 1"):
        layers(s, LayersSettings(policies([0.5]), layers=[2]))


def test_scans_without_projections_alone(subject):
    s = subject("llama")
    settings = LayersSettings(policies([0.5]), ("v",), alone=False, scans=("layer",))
    result = layers(s, settings)
    assert (result["projections"], result["summary"]) == ([], [])
    assert len(result["scans"]) == 2
    with pytest.raises(MlxSvdError, match="neither projections alone nor a scan"):
        layers(s, LayersSettings(policies([0.5]), alone=False))
