"""Run a plan: read, decompose, store, one module of the model at a time."""

from mlx_svd.compress.run import compress

__all__ = ["compress"]
