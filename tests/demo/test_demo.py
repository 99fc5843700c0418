"""The embedded model and the demonstration."""

import pytest

from mlx_svd.demo import DEMO_MODEL, demo
from mlx_svd.demo.run import RECIPES


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return {row.name: row for row in demo(tmp_path_factory.mktemp("demo"), "float32")}


def test_demo_shows_the_source_and_every_form(rows):
    assert list(rows) == ["uncompressed", *RECIPES]


def test_forms_of_one_rank_differ_in_bytes_and_not_in_perplexity(rows):
    dense, factored, pivot = (
        rows[name] for name in ("dense, 70 % of the ranks", "factored, 70 %", "pivot, 70 %")
    )
    assert pivot.nbytes < dense.nbytes < factored.nbytes
    for other in (factored, pivot):
        assert other.perplexity.perplexity == pytest.approx(dense.perplexity.perplexity, rel=5e-3)


def test_perplexity_of_the_embedded_model_is_that_of_a_trained_model(rows):
    assert 15 < rows["uncompressed"].perplexity.perplexity < 35
    assert rows["uncompressed"].perplexity.tokens > 1000


def test_embedded_model_carries_its_card():
    assert "license: mit" in (DEMO_MODEL / "README.md").read_text()
