"""Which parameters are trained, and which rows of them stay as they are."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_svd.errors import MlxSvdError
from mlx_svd.finetune.protection.arms import Arm


def layer_of(model: nn.Module) -> dict[str, int]:
    """Parameter name -> index of its layer, for the parameters of layers."""
    numbers = {id(layer): i for i, layer in enumerate(model.layers)}
    paths = {
        f"{path}.": numbers[id(module)]
        for path, module in model.named_modules()
        if id(module) in numbers
    }
    found = {}
    for name, _ in tree_flatten(model.parameters()):
        for prefix, layer in paths.items():
            if name.startswith(prefix):
                found[name] = layer
    return found


def embedding_names(model: nn.Module) -> set[str]:
    """Parameters of token and position embeddings; a head tied to them is one of them."""
    return {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, (nn.Embedding, nn.QuantizedEmbedding))
        for name in module.parameters()
    }


def trained_names(model: nn.Module, arm: Arm) -> list[str]:
    """Parameters that the arm trains, in model order; adapters must be in the model already.

    Raises MlxSvdError if freezing leaves nothing to train: no layer and no adapter.
    """
    layers, embeddings = layer_of(model), embedding_names(model)
    shares = arm.layer_shares(len(model.layers))
    if min(shares) >= 1:
        raise nothing_left(arm, len(shares))
    found = []
    for name, parameter in tree_flatten(model.parameters()):
        if not mx.issubdtype(parameter.dtype, mx.floating):
            continue
        if arm.adapter != "none":
            wanted = name.rpartition(".")[2] in ("lora_a", "lora_b", "m")
        elif name in layers:
            wanted = shares[layers[name]] < 1
        else:
            wanted = arm.freeze == "none" or name not in embeddings
        if wanted:
            found.append(name)
    if not found:
        raise MlxSvdError(
            f"arm {arm.name}: leaves nothing to train; freeze a smaller share, or name other "
            "--adapter-projections"
        )
    return found


def nothing_left(arm: Arm, layers: int) -> MlxSvdError:
    """For an arm that freezes every layer."""
    return MlxSvdError(
        f"--freeze {arm.freeze}: all {layers} layers are frozen, which leaves nothing to train; "
        "freeze a smaller share"
    )


def row_masks(model: nn.Module, arm: Arm, names: list[str], seed: int) -> dict[str, mx.array]:
    """Parameter name -> (rows, 1, ...) or (rows,) bool, true where it is trained; only for those
    of which a part is frozen. The frozen rows of a share are int(share * rows), drawn by seed."""
    if arm.freeze != "hierarchical":
        return {}
    layers, shares = layer_of(model), arm.layer_shares(len(model.layers))
    parameters = dict(tree_flatten(model.parameters()))
    masks = {}
    for number, name in enumerate(names):
        if name not in layers:
            continue
        rows = parameters[name].shape[0]
        count = int(shares[layers[name]] * rows)
        mask = np.ones(rows, dtype=bool)
        mask[np.random.default_rng([seed, 11, number]).permutation(rows)[:count]] = False
        masks[name] = mx.array(mask.reshape(rows, *[1] * (parameters[name].ndim - 1)))
    return masks
