"""Teacher-forced and free-running agreement on texts that are known."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_svd.analyze.agreement import agreement
from mlx_svd.errors import MlxSvdError


def counting(tokens):
    """Logits of a model that always expects the next number, modulo 10."""
    return mx.array(np.eye(10, dtype=np.float32)[(np.array(tokens) + 1) % 10])


def test_agreement_counts_tokens_and_texts():
    prompts = [[1, 2], [5], [7]]
    dense = [[3, 4, 9, 0], [6, 7], [8, 8, 9]]
    own = [[3, 4, 5, 6], [6, 7], [8, 9, 0, 1]]
    found = agreement(counting, prompts, dense, own)
    # Named after the dense text: 3 4 5 0 | 6 7 | 8 9 9.
    assert found.teacher_forced.value == pytest.approx((3 + 2 + 2) / 9)
    assert found.teacher_forced.n == 3
    assert found.identical.value == pytest.approx(1 / 3)
    assert found.first_difference == 2
    by = found.by_token
    assert by["teacher_forced"] == pytest.approx([1, 2 / 3, 1 / 2, 1])
    assert by["free_running"] == pytest.approx([1, 2 / 3, 0, 0])
    assert by["identical"] == pytest.approx([1, 2 / 3, 1 / 3, 1 / 3])
    assert by["identical_if_independent"] == pytest.approx([1, 2 / 3, 1 / 3, 1 / 3])


def test_an_own_text_that_ends_early_differs_there():
    found = agreement(counting, [[1]], [[2, 3, 4]], [[2]])
    assert found.first_difference == 1
    assert found.by_token["free_running"] == pytest.approx([1, 0, 0])


def test_texts_that_end_at_once_are_refused():
    with pytest.raises(MlxSvdError, match="ends every text at once"):
        agreement(counting, [[1]], [[]], [[2]])
