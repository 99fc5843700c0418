"""The whole job on an embedded model, without a model hub."""

from mlx_svd.demo.run import DEMO_MODEL, demo

__all__ = ["DEMO_MODEL", "demo"]
