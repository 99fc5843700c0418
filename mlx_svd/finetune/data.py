"""Which windows are held out, and which are trained on at which step."""

from dataclasses import dataclass

import numpy as np

from mlx_svd.calibrate.text import Windows
from mlx_svd.errors import MlxSvdError

# One window in 8 is held out, at most 16: each validation scores them with both models.
_HELD_OUT_SHARE, _HELD_OUT_LIMIT = 8, 16


@dataclass(frozen=True)
class HealingData:
    """training, held_out: (count, length) int32, disjoint windows of one text."""

    training: np.ndarray
    held_out: np.ndarray
    seed: int

    def batch(self, step: int, size: int) -> np.ndarray:
        """The (size, length) windows of one step (from 0): a function of seed and step only.

        Epochs are permutations of the training windows, one after the other, cut into batches.
        """
        count = len(self.training)
        rows = []
        for position in range(step * size, (step + 1) * size):
            order = np.random.default_rng([self.seed, 1, position // count]).permutation(count)
            rows.append(order[position % count])
        return self.training[rows]


def split_windows(windows: Windows, seed: int) -> HealingData:
    """Hold out a random share. Raises MlxSvdError for fewer than two windows."""
    count = len(windows)
    if count < 2:
        raise MlxSvdError(
            f"{windows.origin}: has {count} window of {windows.tokens.shape[1]} tokens, and "
            "healing needs one to train on and one to validate; give a longer text or a smaller "
            "--length"
        )
    held_out = min(_HELD_OUT_LIMIT, max(1, count // _HELD_OUT_SHARE))
    order = np.random.default_rng([seed, 0]).permutation(count)
    return HealingData(
        training=windows.tokens[np.sort(order[held_out:])],
        held_out=windows.tokens[np.sort(order[:held_out])],
        seed=seed,
    )
