"""Which tensors of a compressed model are trained.

- factors: the unquantized weights below a projection that is stored in a low-rank form (``down``
  and ``up``, also of every head and of every part of a fused module);
- norms: gains of norms and biases, which are all the one-dimensional floating-point parameters;
- scales: scales and biases of affine-quantized leaves, quantized embeddings included: what
  mlx_lm.quant.dwq trains, and 8-bit leaves too.

All else is frozen: embeddings and the head where they are dense (they are the teacher's own),
dense unquantized projections (likewise), packed integers, the ``order`` of a pivot form.
"""

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_svd.errors import MlxSvdError

_GROUPS = ("factors", "norms", "scales")


def trainable(model: nn.Module, section: dict | None, train: str, name: str) -> dict[str, str]:
    """Names of the parameters to train, in model order, each with its group.

    section: the checkpoint's ``mlx_svd`` section, None for one that mlx-lm quantized; train: a
    group above or "all"; name: of the checkpoint, for the MlxSvdError when nothing is left.
    """
    groups = _grouped(model, section)
    wanted = _GROUPS if train == "all" else (train,)
    chosen = {parameter: group for parameter, group in groups.items() if group in wanted}
    if not chosen:
        there = sorted(set(groups.values()))
        remedy = f"use --train all or {' or '.join(there)}" if there else "it cannot be healed"
        raise MlxSvdError(
            f"{name}: has nothing to train with --train {train} (low-rank factors, norms, biases, "
            f"or scales of affine quantization); {remedy}"
        )
    return chosen


def _grouped(model: nn.Module, section: dict | None) -> dict[str, str]:
    """Parameter name -> its group, for all that can be trained."""
    entries = section["projections"] if section else {}
    low_rank = tuple(path for path, entry in entries.items() if entry["form"] != "dense")
    affine = {
        path
        for path, module in model.named_modules()
        if hasattr(module, "bits") and getattr(module, "mode", None) == "affine"
    }
    groups = {}
    for name, parameter in tree_flatten(model.parameters()):
        path, _, kind = name.rpartition(".")
        if not mx.issubdtype(parameter.dtype, mx.floating):
            continue
        if path in affine and kind in ("scales", "biases"):
            groups[name] = "scales"
        elif parameter.ndim == 1:
            groups[name] = "norms"
        # A pivot form of full rank is a dense Linear at the projection's own path.
        elif kind == "weight" and any(path.startswith(f"{p}.") for p in low_rank):
            groups[name] = "factors"
    return groups
