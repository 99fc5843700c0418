"""Output errors and logit errors against plain numpy."""

import math

import mlx.core as mx
import numpy as np
import pytest

from mlx_svd.analyze.logits import DenseLogits
from mlx_svd.analyze.output_error import OutputErrors, jackknife, relative_error_of
from mlx_svd.analyze.truncations import Truncations
from mlx_svd.analyze.verdict import PRESETS, parse_bands
from mlx_svd.errors import MlxSvdError
from tests.analyze.conftest import logits, low_rank

RNG = np.random.default_rng(3)
# (layer, cosine, relative error in %) of seed 001's table.
SEED_001 = (
    (0.5456, 83.81), (0.5719, 82.03), (0.5625, 82.68), (0.5688, 82.25),
    (0.5880, 80.89), (0.6565, 75.44), (0.6042, 79.69), (0.5492, 83.57),
)  # fmt: skip


def test_errors_of_outputs_are_numpys():
    weight = RNG.standard_normal((20, 12))
    changed = low_rank(weight, 5)
    windows = [RNG.standard_normal((7, 12)).astype(np.float32) * (i + 1) for i in range(4)]
    errors = OutputErrors(weight, changed)
    for window in windows:
        errors.add(mx.array(window))
    found = errors.result()
    x = np.concatenate(windows).astype(np.float64)
    y, z = x @ weight.T, x @ changed.T
    assert found.cosine.value == pytest.approx(
        (y * z).sum() / np.linalg.norm(y) / np.linalg.norm(z), rel=1e-5
    )
    assert found.relative_error.value == pytest.approx(
        np.linalg.norm(y - z) / np.linalg.norm(y), rel=1e-5
    )
    assert found.mse == pytest.approx(((y - z) ** 2).mean(), rel=1e-5)
    assert found.mae == pytest.approx(np.abs(y - z).mean(), rel=1e-5)
    assert found.max_difference == pytest.approx(np.abs(y - z).max(), rel=1e-5)
    assert found.rows == 28
    assert found.cosine.low < found.cosine.value < found.cosine.high


def test_the_jackknife_of_a_mean_is_students_interval():
    values = RNG.standard_normal((9, 1))
    found = jackknife(np.hstack([values, np.ones((9, 1))]), lambda s: s[0] / s[1])
    error = values.std(ddof=1) / 3
    assert found.value == pytest.approx(values.mean())
    assert found.high - found.value == pytest.approx(2.306004135 * error)
    assert jackknife(values[:1], lambda s: s[0]).high == math.inf


def test_on_white_noise_one_number_says_all():
    weight = RNG.standard_normal((64, 64))
    energies = np.linalg.svd(weight)[1] ** 2
    for rank in (8, 32, 60):
        errors = OutputErrors(weight, low_rank(weight, rank))
        for _ in range(8):
            errors.add(mx.array(RNG.standard_normal((512, 64), dtype=np.float32)))
        found = errors.result()
        kept = energies[:rank].sum() / energies.sum()
        assert found.cosine.value == pytest.approx(math.sqrt(kept), abs=3e-3)
        expected = relative_error_of(found.cosine.value)
        assert found.relative_error.value == pytest.approx(expected, abs=3e-3)


def test_a_plain_truncation_has_one_error_on_any_inputs():
    weight = RNG.standard_normal((24, 16))
    errors = OutputErrors(weight, low_rank(weight, 6))
    skewed = RNG.standard_normal((50, 16)) @ np.diag(np.arange(1, 17)) + 3
    errors.add(mx.array(skewed.astype(np.float32)))
    found = errors.result()
    expected = relative_error_of(found.cosine.value)
    assert found.relative_error.value == pytest.approx(expected, rel=1e-5)


def test_the_seeds_table_obeys_that_identity_and_its_target_does_not():
    for cosine, percent in SEED_001:
        assert 100 * relative_error_of(cosine) == pytest.approx(percent, abs=0.015)
    assert 100 * relative_error_of(0.85) == pytest.approx(52.7, abs=0.05)
    assert relative_error_of(0.866) == pytest.approx(0.5, abs=1e-3)


def test_verdicts_are_those_of_the_original_code():
    bands = PRESETS["seed-001"]
    words = [bands.verdict(c) for c in (0.995, 0.96, 0.91, 0.81, 0.80, 0.6565)]
    # The seed's table calls 0.6565 RUIM, against its own code.
    assert words == ["excellent", "good", "moderate", "ruim", "critical", "critical"]
    assert parse_bands("seed-002").verdict(0.86) == "target met"
    own = parse_bands("0.9=fine,0.5=poor,lost")
    assert [own.verdict(c) for c in (0.95, 0.6, 0.5)] == ["fine", "poor", "lost"]


@pytest.mark.parametrize("text", ["seed-009", "0.9=a", "x=a,b", "0.5=a,0.9=b,c"])
def test_bands_that_make_no_sense_are_refused(text):
    with pytest.raises(MlxSvdError, match="bands"):
        parse_bands(text)


def test_logit_errors_are_numpys(subject):
    s = subject("qwen2")
    dense = logits(s)[:, :-1]
    kept = DenseLogits(s)
    path = next(p.path for p in s.projections.values() if p.name == "down")
    with Truncations(s).compressed({path: 8}):
        found, now = kept.error(), logits(s)[:, :-1]
    assert found.cosine.value == pytest.approx(
        (dense * now).sum() / np.linalg.norm(dense) / np.linalg.norm(now), abs=1e-5
    )
    a, b = (x - x.mean(axis=-1, keepdims=True) for x in (dense, now))
    mean = a.mean(axis=(0, 1))
    a, b = a - mean, b - mean
    assert found.mean_removed_cosine.value == pytest.approx(
        (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-5
    )
    assert found.relative_error.value == pytest.approx(
        np.linalg.norm(a - b) / np.linalg.norm(a), rel=1e-4
    )
    p, q = (x - np.log(np.exp(x).sum(axis=-1, keepdims=True)) for x in (dense, now))
    assert found.kl.value == pytest.approx((np.exp(p) * (p - q)).sum(axis=-1).mean(), rel=1e-3)
    assert found.mean_removed_cosine.value < 1
