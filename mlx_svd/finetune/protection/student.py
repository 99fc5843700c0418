"""The model in training: its values, and the tensors that a checkpoint of it holds."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_svd.checkpoint.loader import load_model
from mlx_svd.checkpoint.stored import stored_tensors
from mlx_svd.errors import MlxSvdError
from mlx_svd.finetune.protection.arms import Arm
from mlx_svd.finetune.protection.frozen import row_masks, trained_names


class Student:
    """Opens the checkpoint ``folder`` as the arm trains it.

    model: in training, with adapters where the arm has them; start: parameter name -> float32
    value before training; masks: see ``row_masks``; frozen_layers, trained, total: counts for the
    record. Raises MlxSvdError for what :func:`trained_names` refuses.
    """

    def __init__(self, folder: Path, arm: Arm, dtype: str, seed: int):
        self.folder, self.arm = folder, arm
        self._dtype = getattr(mx, dtype)
        self.model, self.config = load_model(folder, dtype=dtype)
        self._plain = self.model
        total = sum(p.size for _, p in tree_flatten(self.model.parameters()))
        if arm.adapter != "none":
            # What is measured is the model without adapters that has them in its weights.
            self._plain, _ = load_model(folder, dtype=dtype)
            _add_adapters(self.model, arm, self.config["mlx_svd"], seed)
        names = trained_names(self.model, arm)
        self.masks = row_masks(self.model, arm, names, seed)
        parameters = dict(tree_flatten(self.model.parameters()))
        # Copied: put() replaces what the model holds.
        self.start = {name: parameters[name].astype(mx.float32) for name in names}
        mx.eval(self.start)
        shares = arm.layer_shares(len(self.model.layers))
        self.layers, self.frozen_layers = len(shares), sum(share >= 1 for share in shares)
        masked = sum(
            int((~mask).sum().item()) * (self.start[name].size // mask.size)
            for name, mask in self.masks.items()
        )
        self.trained = sum(tensor.size for tensor in self.start.values()) - masked
        self.total = total
        self._before = stored_tensors(folder)

    def put(self, values: dict[str, mx.array]) -> None:
        """Let the model in training hold ``values`` (parameter name -> float32)."""
        cast = [(name, value.astype(self._dtype)) for name, value in values.items()]
        self.model.update(tree_unflatten(cast))

    def stored(self, values: dict[str, mx.array]) -> dict[str, mx.array]:
        """Tensor name -> tensor in the checkpoint's dtype, of all that ``values`` change; adapters
        are added to the weights they belong to."""
        if self.arm.adapter == "none":
            found = values
        else:
            self.put(values)
            found = {
                f"{path}.weight": module.fuse().weight
                for path, module in self.model.named_modules()
                if hasattr(module, "lora_a")
            }
        missing = [name for name in found if name not in self._before]
        if missing:
            raise MlxSvdError(
                f"{self.folder}: tensor {missing[0]} is stored under another name; give the "
                "original model, or a checkpoint as mlx-svd wrote it"
            )
        return {name: tensor.astype(self._before[name].dtype) for name, tensor in found.items()}

    def changed_share(self, stored: dict[str, mx.array]) -> float:
        """Of the numbers in these stored tensors, how many differ from before the training."""
        changed = sum(int((t != self._before[n]).sum().item()) for n, t in stored.items())
        return changed / sum(tensor.size for tensor in stored.values())

    @contextmanager
    def written(self, values: dict[str, mx.array]) -> Iterator[nn.Module]:
        """The model as it would be loaded from a checkpoint of ``values``, to be measured."""
        stored = [(n, t.astype(self._dtype)) for n, t in self.stored(values).items()]
        self._plain.update(tree_unflatten(stored))
        mx.eval(self._plain.parameters())
        self._plain.eval()
        try:
            yield self._plain
        finally:
            self._plain.train()


@contextmanager
def checkpointed(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Gradient checkpointing by mlx-lm within this block: layers are computed again in the backward
    pass. It changes the layers' class, which is put back."""
    kind = type(model.layers[0])
    call = kind.__call__
    if wanted:
        from mlx_lm.tuner.trainer import grad_checkpoint

        grad_checkpoint(model.layers[0])
    try:
        yield
    finally:
        kind.__call__ = call


def _add_adapters(model: nn.Module, arm: Arm, section: dict, seed: int) -> None:
    """mlx-lm's LoRA or DoRA layers, in layers that are not frozen."""
    from mlx_lm.tuner.utils import linear_to_lora_layers

    keys = _adapted(model, arm, section)
    mx.random.seed(seed)
    model.freeze()
    # Whole paths, which mlx-lm looks up from the model; keys from a layer on would take them all.
    linear_to_lora_layers(
        model,
        0,
        {
            "rank": arm.adapter_rank,
            "scale": arm.adapter_scale,
            "dropout": arm.adapter_dropout,
            "keys": keys,
        },
        use_dora=arm.adapter == "dora",
    )


def _adapted(model: nn.Module, arm: Arm, section: dict) -> set[str]:
    """Paths of the Linear modules of the arm's projections; of a low-rank form its last factor."""
    shares = arm.layer_shares(len(model.layers))
    linears = {path for path, module in model.named_modules() if type(module) is nn.Linear}
    found = set()
    for path, entry in section["projections"].items():
        if entry["projection"] not in arm.adapter_projections or shares[entry["layer"]] >= 1:
            continue
        # Its own module, the fused one that it is a part of, or a low-rank form.
        candidates = (path, path.rpartition(".")[0], f"{path}.up")
        found |= {next((c for c in candidates if c in linears), "")} - {""}
    if not found:
        raise MlxSvdError(
            f"--adapter-projections {','.join(arm.adapter_projections)}: none of them is known in "
            "a layer of this model that is not frozen; name others or freeze a smaller share"
        )
    return found
