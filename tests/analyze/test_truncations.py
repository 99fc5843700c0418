"""Compressing in memory: the right rows, the right matrices, and the originals back."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_svd.analyze.truncations import Truncations, replaced
from mlx_svd.calibrate.scorers import Scoring
from mlx_svd.checkpoint.loader import load_model
from mlx_svd.errors import MlxSvdError
from mlx_svd.plan.policy import RankPolicy
from tests.analyze.conftest import logits, low_rank
from tests.conftest import relative_difference, source_weights
from tests.tiny import FAMILIES


def parameters(subject):
    return {name: np.array(value) for name, value in tree_flatten(subject.model.parameters())}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("per_head", [False, True])
def test_full_rank_gives_the_dense_logits(subject, family, per_head):
    s = subject(family)
    dense = logits(s)
    t = Truncations(s, per_head=per_head)
    full = {p.path: t.rank(p, RankPolicy(rank_ratio=1.0)) for p in s.projections.values()}
    with t.compressed(full):
        assert relative_difference(logits(s), dense) < 1e-5


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "gpt_neox", "phi3", "gpt_neo"])
def test_a_projection_is_replaced_by_numpys_truncation_and_nothing_else_is(subject, family):
    s = subject(family)
    before = parameters(s)
    originals = source_weights(s.source.folder)
    for name in ("k", "o", "up"):
        path = next(p.path for p in s.projections.values() if p.name == name and p.layer == 1)
        with Truncations(s).compressed({path: 5}):
            for other, weight in originals.items():
                expected = low_rank(weight, 5) if other == path else weight
                np.testing.assert_allclose(s.weight(other), expected, atol=2e-5)
    after = parameters(s)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "gpt_neox"])
def test_heads_are_truncated_one_by_one(subject, family):
    s = subject(family)
    p = next(p for p in s.projections.values() if p.name == "q")
    ranks = (3, 16, 1, 7)
    weight = source_weights(s.source.folder)[p.path]
    found = Truncations(s).truncated(p, ranks)
    for head, rank in enumerate(ranks):
        rows = slice(16 * head, 16 * (head + 1))
        np.testing.assert_allclose(found[rows], low_rank(weight[rows], rank), atol=1e-6)


def test_the_logits_are_those_of_a_model_with_that_weight(subject):
    s = subject("gpt2")
    p = next(p for p in s.projections.values() if p.name == "v")
    with Truncations(s).compressed({p.path: 4}):
        found = logits(s)
    other, _ = load_model(s.source.folder, dtype="float32")
    weight = np.array(other.model.h[0].attn.c_attn.weight)
    weight[128:192] = low_rank(weight[128:192], 4)  # q 0..63, k 64..127, v 128..191
    other.model.h[0].attn.c_attn.weight = mx.array(weight)
    expected = np.array(other(mx.array(s.windows.tokens)), dtype=np.float64)
    assert relative_difference(found, expected) < 1e-5
    assert relative_difference(logits(s), found) > 1e-3


def test_originals_come_back_after_an_error(subject):
    s = subject("llama")
    before = parameters(s)
    path = next(iter(s.projections))
    zeros = {path: np.zeros(s.projections[path].shape)}

    def fail():
        with replaced(s, zeros):
            assert not s.weight(path).any()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    after = parameters(s)
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_the_base_is_never_taken_of_a_compressed_model(subject):
    s = subject("llama")
    path = next(iter(s.projections))
    t = Truncations(s)
    with t.compressed({path: 2}), pytest.raises(RuntimeError, match="before weights are replaced"):
        _ = s.base
    with t.compressed({path: 2}), pytest.raises(RuntimeError, match="is replaced; decompose"):
        Truncations(s).truncated(s.projections[path], 3)
    with t.compressed({path: 2}), pytest.raises(RuntimeError, match="is replaced already"):  # noqa: SIM117
        with t.compressed({path: 3}):
            pass
    dense = logits(s)[:, :-1]
    log_p = dense - np.log(np.exp(dense).sum(axis=-1, keepdims=True))
    np.testing.assert_allclose(s.base.log_probs, log_p, atol=1e-4)


def test_a_rank_policy_gives_the_seeds_ranks(subject):
    s = subject("gpt2", n_embd=128, n_head=2)
    q, o, up = (
        next(p for p in s.projections.values() if p.name == name) for name in ("q", "o", "up")
    )
    heads = Truncations(s, per_head=True)
    # int(ratio * 64), as the original computes it: 57, and 62 and 60 where the seed says 63 and 61.
    for ratio, rank in ((0.9, 57), (0.98, 62), (0.95, 60)):
        assert heads.rank(q, RankPolicy(rank_ratio=ratio)) == (rank, rank)
    assert heads.rank(o, RankPolicy(rank_ratio=0.9)) == int(0.9 * 128)
    assert Truncations(s).rank(up, RankPolicy(rank=3)) == 3


@pytest.mark.parametrize(("ranks", "message"), [(0, "rank 0 is not in"), ((1, 2), "2 ranks for 4")])
def test_impossible_ranks_are_refused_by_name(subject, ranks, message):
    s = subject("llama")
    p = next(p for p in s.projections.values() if p.name == "q")
    with pytest.raises(MlxSvdError, match=rf"{p.path}: {message}"):
        Truncations(s).truncated(p, ranks)


def test_decompositions_that_do_not_fit_are_made_again(subject):
    s = subject("llama")
    small, large = Truncations(s, cache_bytes=1), Truncations(s, Scoring("plain"))
    for p in s.projections.values():
        np.testing.assert_array_equal(small.truncated(p, 4), large.truncated(p, 4))
    assert len(small._kept) == 1
    assert len(large._kept) == len(s.projections)
