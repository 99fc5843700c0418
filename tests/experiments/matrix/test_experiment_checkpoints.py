"""Kind checkpoints: real bytes, real forms."""

import pytest

from mlx_svd.checkpoint.loader import tensor_bytes
from mlx_svd.errors import MlxSvdError
from mlx_svd.experiments.matrix.kinds.checkpoints import Checkpoints
from mlx_svd.experiments.matrix.kinds.compression import Compression
from tests.experiments.matrix.capitals import SETTINGS

PLAIN = {k: v for k, v in SETTINGS.items() if k != "importance"}


@pytest.fixture
def kind(places):
    return Checkpoints(PLAIN | {"speed": {"prompt": 8, "tokens": 2}}, places)


def test_an_uncompressed_model_is_measured_as_it_is(kind, data):
    measured = kind.run({}, 0)
    assert measured.numbers["bytes"] == sum(tensor_bytes(data / "tiny").values())
    assert measured.numbers["decode_tps"] > 0
    assert not kind.seeded({})


def test_a_recipe_gives_what_the_same_truncation_in_memory_gives(kind, places):
    recipe = {"projections": "q,k,o", "rank_ratio": 0.4, "scorer": "plain", "dtype": "float32"}
    assert not kind.seeded({"recipe": recipe})
    stored = kind.run({"recipe": recipe}, 0)
    steps = [{"truncate": {"projections": "q,k,o", "rank_ratio": 0.4}}]
    memory = Compression(SETTINGS, places).run({"steps": steps}, 0)
    assert stored.numbers["bytes"] < kind.run({}, 0).numbers["bytes"] * 2
    for name in ("facts_margin", "perplexity"):
        assert stored.metrics[name].values == pytest.approx(memory.metrics[name].values, rel=1e-4)


def test_a_budget_may_be_the_bytes_of_another_model(kind, data):
    condition = {"recipe": {"target_size": {"bytes_of": "tiny"}, "scorer": "two-sided"}}
    kind.check(condition)
    assert kind.seeded(condition)
    assert kind._recipe(condition).budget.target_size == sum(tensor_bytes(data / "tiny").values())


def test_wrong_recipes_are_refused(kind):
    with pytest.raises(MlxSvdError, match="rank_ration"):
        kind.check({"recipe": {"rank_ration": 0.5}})
    with pytest.raises(MlxSvdError, match="'steps'"):
        kind.check({"steps": []})
