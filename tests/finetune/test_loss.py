"""The KL divergence against numpy in float64."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_svd.finetune.loss import log_softmax, mean_kl, validation_kl


def numpy_log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def numpy_kl(teacher: np.ndarray, student: np.ndarray) -> np.ndarray:
    p, q = numpy_log_softmax(teacher), numpy_log_softmax(student)
    return (np.exp(p) * (p - q)).sum(axis=-1)


@pytest.fixture
def logits():
    rng = np.random.default_rng(0)
    return 3 * rng.standard_normal((2, 2, 7, 300)).astype(np.float32)


def test_mean_kl_is_numpys(logits):
    teacher, student = logits
    got = float(mean_kl(log_softmax(mx.array(teacher)), mx.array(student)))
    assert got == pytest.approx(numpy_kl(teacher, student).mean(), rel=1e-5)


def test_kl_of_a_distribution_from_itself_is_zero(logits):
    teacher = mx.array(logits[0])
    assert abs(float(mean_kl(log_softmax(teacher), teacher + 5.0))) < 1e-6


def test_gradient_is_the_difference_of_the_distributions(logits):
    teacher, student = logits
    gradient = mx.grad(lambda s: mean_kl(log_softmax(mx.array(teacher)), s))(mx.array(student))
    p, q = np.exp(numpy_log_softmax(teacher)), np.exp(numpy_log_softmax(student))
    assert np.allclose(np.array(gradient), (q - p) / 14, atol=1e-6)


def test_half_precision_logits_are_compared_in_float32(logits):
    teacher, student = logits
    half = mx.array(student).astype(mx.bfloat16)
    got = float(mean_kl(log_softmax(mx.array(teacher)), half))
    rounded = np.array(half.astype(mx.float32))
    assert got == pytest.approx(numpy_kl(teacher, rounded).mean(), rel=1e-5)


def test_validation_is_the_mean_over_all_tokens_of_all_windows():
    rng = np.random.default_rng(1)
    tables = rng.standard_normal((2, 20, 20)).astype(np.float32)
    teacher, student = (lambda tokens, t=t: mx.array(t)[tokens] for t in tables)
    windows = rng.integers(0, 20, (5, 9)).astype(np.int32)
    expected = numpy_kl(tables[0][windows], tables[1][windows]).mean()
    assert validation_kl(teacher, student, windows) == pytest.approx(expected, rel=1e-5)
