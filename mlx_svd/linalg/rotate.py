"""A gauge for factors that will be quantized.

``up @ down`` does not change under up T, T^T down for any orthogonal T. A random T spreads the
large first components over all r, so that no quantization group is dominated by one of them.
"""

import numpy as np


def random_orthogonal(rank: int, seed: int) -> np.ndarray:
    """A Haar-distributed orthogonal (rank, rank) matrix, the same for the same seed."""
    q, r = np.linalg.qr(np.random.default_rng(seed).standard_normal((rank, rank)))
    return q * np.sign(np.diagonal(r))


def rotate(up: np.ndarray, down: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """up (m, r) and down (r, n) in a random orthogonal gauge; their product stays the same."""
    rotation = random_orthogonal(up.shape[1], seed)
    return up @ rotation, rotation.T @ down
