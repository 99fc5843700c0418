"""Errors of the residual stream and growing sets of layers against plain loops."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_svd.analyze.cliff import CliffSettings, cliff
from mlx_svd.analyze.depth import DepthSettings, chains, depth, layer_counts
from mlx_svd.analyze.truncations import Truncations, replaced
from mlx_svd.demo import DEMO_MODEL
from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.divergence import kl_divergence
from mlx_svd.plan.policy import RankPolicy
from tests.analyze.conftest import logits, low_rank
from tests.conftest import source_weights

SETTINGS = DepthSettings(("half", RankPolicy(rank_ratio=0.5)), ("v", "o"))


def hidden(s, weights):
    """(blocks, N, L, d) float64 after each block, by calling the blocks of a Llama one by one."""
    tokens = mx.array(s.windows.tokens[:, :-1])
    with replaced(s, weights):
        h, found = s.model.model.embed_tokens(tokens), []
        mask = nn.MultiHeadAttention.create_additive_causal_mask(h.shape[1])
        for layer in s.model.layers:
            h = layer(h, mask)
            found.append(np.array(h, dtype=np.float64))
    return np.array(found)


def of_layers(s, layers):
    originals = source_weights(s.source.folder)
    return {
        p.path: low_rank(originals[p.path], min(p.shape) // 2) for p in s.chosen(("v", "o"), layers)
    }


def test_errors_after_each_block_and_of_growing_sets(subject):
    s = subject("llama", num_hidden_layers=4)
    result = depth(s, SETTINGS)
    dense, dense_logits = hidden(s, {}), logits(s)[:, :-1]
    for grown in result["growth"]:
        changed = hidden(s, of_layers(s, grown["compressed"]))
        expected = [
            np.linalg.norm(a - b) / np.linalg.norm(a) for a, b in zip(dense, changed, strict=True)
        ]
        found = [e["value"] for e in grown["after"]]
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)
    assert [g["compressed"] for g in result["growth"]] == [[0, 1, 2, 3], [0], [1], [2], [3]]
    order = chains(range(4), 0)
    cosines = []
    for chain in order:
        with replaced(s, of_layers(s, chain[:2])):
            now = logits(s)[:, :-1]
        norms = np.linalg.norm(dense_logits) * np.linalg.norm(now)
        cosines.append((dense_logits * now).sum() / norms)
    assert result["layer_counts"][1]["cosine"] == pytest.approx(np.mean(cosines), abs=1e-4)
    assert [c["layers"] for c in result["layer_counts"]] == [1, 2, 3, 4]
    averaged = result["averaging"]
    assert averaged["if_averaged_out"] == pytest.approx(averaged["error_of_one_layer"] / 2)
    every = result["growth"][0]["logits"]["relative_error"]["value"]
    assert averaged["error_of_all_layers"] == pytest.approx(every)
    assert [a["layer"] for a in result["attention"]] == [0, 1, 2, 3]


def test_chains_have_every_layer_once_at_every_place():
    found = np.array(chains([2, 3, 5, 7, 11], 4))
    for axis in (found, found.T):
        assert all(sorted(row) == [2, 3, 5, 7, 11] for row in axis.tolist())
    for k in range(1, 6):
        among = found[:, :k].ravel().tolist()
        assert all(among.count(layer) == k for layer in (2, 3, 5, 7, 11))


def test_many_layers_are_counted_in_powers_of_two():
    assert layer_counts(5, None) == [1, 2, 3, 4, 5]
    assert layer_counts(24, None) == [1, 2, 4, 8, 16, 24]
    assert layer_counts(24, (3, 12)) == [1, 3, 12, 24]
    for asked in ((), (30,), (0,)):
        with pytest.raises(MlxSvdError, match="--counts"):
            layer_counts(24, asked)


def test_two_layers_have_no_law(subject):
    with pytest.raises(MlxSvdError, match="three or more"):
        depth(subject("llama"), SETTINGS)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neo"])
def test_depth_runs_on_other_families(subject, family):
    layers = {"n_layer": 3} if family == "gpt2" else {
        "num_layers": 4, "attention_types": [[["global", "local"], 2]]
    }  # fmt: skip
    result = depth(subject(family, **layers), SETTINGS)
    after = result["growth"][1]["after"]
    assert after[0]["value"] > 0
    # A block that comes before all compressed ones has no error.
    assert result["growth"][2]["after"][0]["value"] == 0


def test_the_grid_begins_at_full_rank_and_every_point_is_the_evaluations(subject):
    s = subject("gpt2", windows=4)
    ratios = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
    settings = CliffSettings(ratios, ("q", "v"), per_head=True, prompts=0, at=0.5)
    result = cliff(s, settings)
    assert [p["ratio"] for p in result["points"]] == [1.0, *ratios]
    assert result["control"]["max_logit_difference"] < 1e-4 * result["control"]["max_logit"]
    assert result["points"][0]["effect"]["kl"]["value"] == pytest.approx(0, abs=1e-6)
    assert result["points"][0]["attention_kl"]["value"] == pytest.approx(0, abs=1e-6)
    point = result["points"][5]
    with Truncations(s, per_head=True).compressed(point["ranks"]):
        expected = kl_divergence(s.model, s.base, s.windows.tokens)
    assert point["effect"]["kl"]["value"] == pytest.approx(expected.kl, rel=1e-5)
    assert set(point["ranks"].values()) == {(8, 8, 8, 8)}
    assert result["change_point"]["log_energy_lost"]["points"] == 9
    assert [a["what"] for a in result["ablations"]["types"]] == ["q", "v"]
    same = next(a for a in result["ablations"]["directions"] if a["what"] == "smallest")
    assert same["effect"]["kl"]["value"] == pytest.approx(expected.kl, rel=1e-3)


def test_grids_too_short_for_the_test_say_so(subject):
    result = cliff(subject("gpt2"), CliffSettings((0.5,), prompts=0, attention_windows=0))
    found = result["change_point"]["log_energy_lost"]
    assert found["verdict"] == "not tested"
    assert "at least 8 ranks" in found["reason"]
    assert result["points"][1]["attention_kl"] is None


def test_texts_at_full_rank_are_the_dense_models():
    from mlx_svd.analyze.subject import open_subject

    s = open_subject(str(DEMO_MODEL), windows=2, length=32)
    result = cliff(s, CliffSettings((0.05,), prompts=3, max_tokens=12, attention_windows=0))
    full, low = result["points"]
    assert full["agreement"]["identical"]["value"] == 1
    assert full["agreement"]["teacher_forced"]["value"] == 1
    assert full["repetition"]["rep_3"]["value"] == result["generation"]["dense"]["rep_3"]["value"]
    assert full["repetition_change"]["rep_3"]["value"] == 0
    assert low["agreement"]["teacher_forced"]["value"] < 0.7
    assert low["agreement"]["first_difference"] < 12
