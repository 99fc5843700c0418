"""Spectra against numpy's SVD; what else the commands share."""

import json

import numpy as np
import pytest

from mlx_svd.analyze.ranks import break_even, parse_numbers, policies
from mlx_svd.analyze.record import check_output, load_analysis, save_analysis
from mlx_svd.analyze.spectrum import spectrum, summary
from mlx_svd.analyze.subject import open_subject, parse_layers
from mlx_svd.calibrate.calibrate import calibrate
from mlx_svd.checkpoint.loader import load_model
from mlx_svd.demo import DEMO_MODEL
from mlx_svd.errors import MlxSvdError
from tests.conftest import source_weights


def check(found, matrix, ranks):
    values = np.linalg.svd(matrix, compute_uv=False)
    # Second moments come from float32 products: their own rounding shows in the last values.
    np.testing.assert_allclose(found["singular_values"], values, atol=1e-4 * values[0])
    energies = values**2 / (values**2).sum()
    for label, rank in ranks.items():
        assert found["energy"][label][0] == rank
        assert found["energy"][label][1] == pytest.approx(energies[:rank].sum(), abs=1e-6)
    for share, rank in found["rank_for_energy"].items():
        assert energies[:rank].sum() >= float(share) - 1e-6
        assert energies[: rank - 1].sum() < float(share) + 1e-6
    p = values / values.sum()
    p = p[p > 1e-12]
    assert found["effective_rank"] == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-3)
    assert found["stable_rank"] == pytest.approx((values**2).sum() / values[0] ** 2)


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_spectra_of_weights_heads_and_weighted_ones_are_numpys(subject, family, tmp_path):
    s = subject(family)
    calibration = calibrate(
        s.source,
        lambda: load_model(s.source.folder, dtype="float32", lazy=True)[0],
        s.windows,
        tmp_path / "calibration",
        projections=("q", "k", "v", "down"),
        moments=("input",),
    )
    result = spectrum(
        s, policies([0.9], [5]), projections=("q", "k", "down"), calibration=calibration
    )
    weights = source_weights(s.source.folder)
    rows = {row["projection"]["path"]: row for row in result["projections"]}
    assert len(rows) == 6
    for path, row in rows.items():
        p, w = s.projections[path], weights[path]
        limit = min(w.shape)
        check(row["weight"], w, {"ratio 0.9": int(0.9 * limit), "rank 5": 5})
        values, vectors = np.linalg.eigh(calibration.statistics(p).second)
        root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
        check(row["weighted"], w @ root, {"rank 5": 5})
        assert len(row["heads"]) == p.heads
        each = w.reshape(max(p.heads, 1), -1, w.shape[1])
        for found, weighted, head in zip(row["heads"], row["weighted_heads"], each, strict=False):
            check(found, head, {"ratio 0.9": 14, "rank 5": 5})
            check(weighted, head @ root, {"rank 5": 5})
        if p.heads:
            # Seed 000: singular values averaged over the heads, then squared.
            mean = np.mean([np.linalg.svd(h, compute_uv=False) for h in each], axis=0) ** 2
            rank, energy = row["mean_head_energy"]["ratio 0.9"]
            assert rank == 14
            assert energy == pytest.approx(mean[:14].sum() / mean.sum())
    assert result["calibration"]["tokens"] == 69
    assert "text" not in result["conditions"]


def test_break_even_is_the_last_rank_at_which_factors_are_smaller():
    for shape in ((64, 768), (768, 768), (96, 64), (1, 5), (2048, 2048)):
        rank = break_even(*shape)
        assert rank * sum(shape) < shape[0] * shape[1] <= (rank + 1) * sum(shape)
    # The seeds' numbers: 59 of 64 per head of GPT-2; just below 1024 for 2048 x 2048.
    assert break_even(64, 768) == 59
    assert break_even(2048, 2048) == 1023


def test_a_zero_matrix_and_a_singular_one_have_finite_summaries():
    assert summary(np.zeros(4), (4, 8)).condition_number is None
    found = summary(np.array([4.0, 1.0, 0.0]), (3, 3))
    assert found.condition_number is None
    assert found.stable_rank == 1.25
    assert summary(np.ones(5), (5, 5)).effective_rank == pytest.approx(5)


def test_layers_and_numbers_are_read():
    assert parse_layers(None) is None
    assert parse_layers("6, 0-2,1") == [0, 1, 2, 6]
    assert parse_numbers("1:0.9:-0.05,0.5", "--ratios") == (1.0, 0.95, 0.9, 0.5)
    assert parse_numbers("64:60:-2", "--ranks", int) == (64, 62, 60)
    for text in ("a", "1-", "5-2"):
        with pytest.raises(MlxSvdError, match="--layers"):
            parse_layers(text)
    for text in ("x", "1:2", "1:0.5:0.1", "1:2:0"):
        with pytest.raises(MlxSvdError, match="--ratios"):
            parse_numbers(text, "--ratios")
    for wrong in (((),), ((0.5, 0.5),), ((1.5,),)):
        with pytest.raises(MlxSvdError):
            policies(*wrong)


def test_the_demo_model_opens_as_a_subject():
    s = open_subject(str(DEMO_MODEL), windows=2, length=16)
    assert s.dtype == "float32"
    assert s.windows.tokens.shape == (2, 16)
    assert s.conditions()["text"]["length"] == 16
    with pytest.raises(MlxSvdError, match="has no"):
        s.chosen(())


def test_results_are_json_without_infinities(tmp_path):
    path = tmp_path / "new" / "a.json"
    saved = save_analysis({"analysis": "cliff", "x": (1.0, float("inf"))}, path)
    assert saved == {"analysis": "cliff", "x": [1.0, None]}
    assert load_analysis(path) == saved
    for content in ("[1]", "{", json.dumps({"analysis": "other"})):
        path.write_text(content)
        with pytest.raises(MlxSvdError, match=r"a\.json"):
            load_analysis(path)
    with pytest.raises(MlxSvdError, match="cannot be read"):
        load_analysis(tmp_path / "none.json")
    with pytest.raises(MlxSvdError, match=r"ends in \.json"):
        check_output(tmp_path / "a.txt")
