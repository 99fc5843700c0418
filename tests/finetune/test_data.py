"""Held-out windows and the order of the others."""

from itertools import chain

import numpy as np
import pytest

from mlx_svd.calibrate.text import Windows
from mlx_svd.errors import MlxSvdError
from mlx_svd.finetune.data import split_windows


def windows(count: int) -> Windows:
    """Window i holds only the number i."""
    return Windows(np.repeat(np.arange(count, dtype=np.int32)[:, None], 4, 1), "t", "d", count)


def ids(rows: np.ndarray) -> list[int]:
    return rows[:, 0].tolist()


@pytest.mark.parametrize(("count", "held_out"), [(2, 1), (7, 1), (16, 2), (128, 16), (500, 16)])
def test_every_window_is_either_trained_on_or_held_out(count, held_out):
    data = split_windows(windows(count), seed=0)
    assert len(data.held_out) == held_out
    assert sorted(ids(data.training) + ids(data.held_out)) == list(range(count))


def test_held_out_windows_depend_on_the_seed_only():
    first, again, other = (split_windows(windows(64), seed) for seed in (1, 1, 2))
    assert ids(first.held_out) == ids(again.held_out) != ids(other.held_out)


def test_every_epoch_holds_every_training_window_once_in_another_order():
    data = split_windows(windows(13), seed=3)  # 12 to train on
    batches = [ids(data.batch(step, 3)) for step in range(8)]
    epochs = [list(chain(*batches[:4])), list(chain(*batches[4:]))]
    assert all(sorted(epoch) == ids(data.training) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_batches_run_on_into_the_next_epoch():
    data = split_windows(windows(6), seed=3)  # 5 to train on
    order = list(chain(*(ids(data.batch(step, 2)) for step in range(5))))
    assert sorted(order) == sorted(2 * ids(data.training))


def test_batch_is_a_function_of_seed_and_step():
    one, other = (split_windows(windows(40), seed) for seed in (0, 0))
    one.batch(0, 4), one.batch(1, 4)
    assert ids(one.batch(7, 4)) == ids(other.batch(7, 4))


def test_one_window_cannot_be_split():
    with pytest.raises(MlxSvdError, match="t: has 1 window of 4 tokens"):
        split_windows(windows(1), 0)
