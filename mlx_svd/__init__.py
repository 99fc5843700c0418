"""mlx-svd: low-rank compression of language models for Apple silicon.

``mlx_svd.load(path)`` gives mlx-lm's (model, tokenizer). ``open_source``, ``make_plan`` and
``mlx_svd.compress.compress`` are the steps of the main job, ``inspect`` describes its result,
``compare`` compares the measured results of two models.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# TF32 products (the default on CUDA and M5) lose the small singular values. MLX reads this
# before its first product, so it must be set when the package is imported.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

if TYPE_CHECKING:
    from mlx_svd.checkpoint.adapter import export_adapter
    from mlx_svd.checkpoint.inspect import inspect
    from mlx_svd.checkpoint.loader import load
    from mlx_svd.errors import MlxSvdError
    from mlx_svd.evaluate.comparison.compare import compare
    from mlx_svd.plan.make import make_plan
    from mlx_svd.source.source import open_source

_EXPORTS = {
    "MlxSvdError": "mlx_svd.errors",
    "compare": "mlx_svd.evaluate.comparison.compare",
    "export_adapter": "mlx_svd.checkpoint.adapter",
    "inspect": "mlx_svd.checkpoint.inspect",
    "load": "mlx_svd.checkpoint.loader",
    "make_plan": "mlx_svd.plan.make",
    "open_source": "mlx_svd.source.source",
}
__all__ = [
    "MlxSvdError",
    "compare",
    "export_adapter",
    "inspect",
    "load",
    "make_plan",
    "open_source",
]


def __getattr__(name: str) -> Any:
    """Import on first use: mlx-lm takes seconds, and --help needs none of it."""
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)
