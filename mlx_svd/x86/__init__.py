"""Forward and backward passes on x86 processors without MLX's slow exponential.

MLX's CPU backend has vector exponentials for ARM only; on x86 it computes one value at a time,
twelve to twenty-five times as slowly as numpy. Softmax and activations then take more time than
all matrix products. Here numpy computes them, with the same results to float32 rounding. On every
other device nothing changes.
"""

from mlx_svd.x86.losses import cross_entropy, logsumexp
from mlx_svd.x86.substitute import numpy_exponentials, slow_exponentials

__all__ = ["cross_entropy", "logsumexp", "numpy_exponentials", "slow_exponentials"]
