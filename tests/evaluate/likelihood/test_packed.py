"""Items in packed passes: who is scored with whom, and where each text lies."""

import pytest

from mlx_svd.checkpoint.loader import load
from mlx_svd.demo import DEMO_MODEL
from mlx_svd.evaluate.likelihood.encode import EncodedItem
from mlx_svd.evaluate.likelihood.packed import PackedPasses, pack
from mlx_svd.evaluate.likelihood.passes import passes
from mlx_svd.evaluate.likelihood.split import SplitModel
from tests.evaluate.likelihood.test_scorer import MAX_LENGTH, random_items


@pytest.fixture(scope="module")
def run():
    model, _ = load(DEMO_MODEL, dtype="float32")
    return PackedPasses(SplitModel(model))


def tokens_in(items, batch):
    rows = passes([items[i] for i in batch.items], batch.shared)
    return sum(len(row.tokens) for part in rows for row in part)


@pytest.mark.parametrize("limit", [1, 200, 1000])
def test_batches_hold_every_item_once_and_respect_the_tokens(run, limit):
    items = random_items(60)
    batches = run.batches(items, MAX_LENGTH, limit)
    assert sorted(i for batch in batches for i in batch.items) == list(range(60))
    for batch in batches:
        assert len(batch.items) == 1 or tokens_in(items, batch) <= limit
    if limit == 1:
        assert [len(batch.items) for batch in batches] == [1] * 60


def test_batches_of_one_cluster_are_of_about_the_same_size(run):
    items = [EncodedItem(f"{n}", (((n,) * 30, (1, 2)),), 0) for n in range(70)]
    sizes = [tokens_in(items, batch) for batch in run.batches(items, MAX_LENGTH, 1000)]
    assert len(sizes) == 3
    assert max(sizes) - min(sizes) <= 31


def test_every_text_lies_behind_its_prompt():
    context = (7, 8, 9)
    several = EncodedItem("a", tuple((context, (n, n + 1, n + 2)) for n in (20, 30)), 0)
    alone = EncodedItem("b", (((1, 2), (3, 4)),), 0)
    packed = pack(*passes([several, alone], 0))
    assert packed.tokens.tolist() == [7, 8, 9, 20, 21, 30, 31, 1, 2, 3]
    assert packed.starts == [0, 7, 3, 5]
    assert [(group.start, group.lengths) for group in packed.groups] == [(0, (3, 2, 2)), (7, (3,))]
    assert packed.groups[0].places.tolist() == [0, 1, 2, 3, 4, 3, 4]
