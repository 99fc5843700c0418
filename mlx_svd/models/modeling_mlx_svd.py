"""Low-rank projections inside an mlx-lm model. This file is copied into checkpoints as it is.

mlx-lm loads it through ``model_file`` in config.json (with ``--trust-remote-code``). It builds the
original architecture and replaces the projections listed under ``mlx_svd`` in config.json.
It imports only mlx and mlx_lm, so that it stands alone; mlx-lm does not register the module, so
postponed annotations and relative imports would not work here.

Every replacement is a container of real ``nn.Linear`` children and has no ``weight``,
``to_quantized``, ``to_lora`` or ``fuse`` of its own: mlx-lm's quantizers, LoRA, fuse, DWQ and
sharding all work on the children.
"""

import importlib
import importlib.util
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers.distributed import shard_linear
from mlx_lm.utils import MODEL_REMAPPING


class Factored(nn.Module):
    """A rank-r matrix as two factors: ``y = up (down x) + b``.

    down: (r, n), up: (m, r); the bias belongs to ``up``.
    """

    def __init__(self, rows: int, columns: int, rank: int, bias: bool):
        super().__init__()
        self.down = nn.Linear(columns, rank, bias=False)
        self.up = nn.Linear(rank, rows, bias=bias)

    def __call__(self, x: mx.array) -> mx.array:
        return self.up(self.down(x))

    def shard_outputs(self, group):
        self.up = shard_linear(self.up, "all-to-sharded", group=group)

    def shard_inputs(self, group):
        self.down = shard_linear(self.down, "sharded-to-all", group=group)


class AlwaysFrozen(set):
    """Names of frozen parameters; those it is made with stay frozen. ``nn.Module.unfreeze``
    clears this set in every submodule without calling the submodules' own ``unfreeze``."""

    def __init__(self, names):
        super().__init__(names)
        self.always = frozenset(names)

    def clear(self):
        self.intersection_update(self.always)

    def difference_update(self, names):
        super().difference_update(set(names) - self.always)


class Pivot(nn.Module):
    """A rank-r matrix as r of its rows and the coefficients of the others (PIFA, 2501.19090).

    down: (r, n), the pivot rows; up: (m - r, r), the other rows in terms of the pivot rows;
    order: (m,) uint32, where each output is found in [down x, up (down x)]; integers have no
    gradient, so it is always frozen; bias: (m,).
    """

    def __init__(self, rows: int, columns: int, rank: int, bias: bool):
        super().__init__()
        self.down = nn.Linear(columns, rank, bias=False)
        self.up = nn.Linear(rank, rows - rank, bias=False)
        self.order = mx.arange(rows, dtype=mx.uint32)
        if bias:
            self.bias = mx.zeros((rows,))
        self._no_grad = AlwaysFrozen({"order"})

    def __call__(self, x: mx.array) -> mx.array:
        pivots = self.down(x)
        y = mx.concatenate([pivots, self.up(pivots)], axis=-1)
        y = mx.take(y, self.order, axis=-1)
        return y + self.bias if "bias" in self else y

    def shard_outputs(self, group):
        """Keep all pivot rows and, of the others, those among this process's outputs."""
        rank, size = group.rank(), self.order.size // group.size()
        mine = self.order[rank * size : (rank + 1) * size].tolist()
        n_pivots = self.down.weight.shape[0]  # packed weights keep their rows
        # Never zero rows: an empty matrix product is not defined on every device.
        others = sorted(i - n_pivots for i in mine if i >= n_pivots) or [0]
        self.up.update({k: v[mx.array(others)] for k, v in self.up.parameters().items()})
        position = {i + n_pivots: n_pivots + at for at, i in enumerate(others)}
        self.order = mx.array([position.get(i, i) for i in mine], dtype=mx.uint32)
        if "bias" in self:
            self.bias = self.bias[rank * size : (rank + 1) * size]

    def shard_inputs(self, group):
        self.down = shard_linear(self.down, "sharded-to-all", group=group)


class PerHead(nn.Module):
    """One low-rank matrix for each attention head; the outputs are concatenated."""

    def __init__(self, heads: list):
        super().__init__()
        self.heads = heads

    def __call__(self, x: mx.array) -> mx.array:
        return mx.concatenate([head(x) for head in self.heads], axis=-1)

    def shard_outputs(self, group):
        size = len(self.heads) // group.size()
        self.heads = self.heads[group.rank() * size : (group.rank() + 1) * size]


class Fused(nn.Module):
    """Parts of one fused projection (q, k, v or gate, up), each with its own rank and form.

    The outputs are concatenated; with ``interleaved_heads`` = h they are interleaved head by
    head, [q_1 k_1 v_1 q_2 ...], which is GPT-NeoX's layout.
    """

    def __init__(self, parts: dict, interleaved_heads: int = 0):
        super().__init__()
        for name, part in parts.items():
            self[name] = part
        self._names = tuple(parts)
        self._interleaved_heads = interleaved_heads

    def __call__(self, x: mx.array) -> mx.array:
        outputs = [self[name](x) for name in self._names]
        if not self._interleaved_heads:
            return mx.concatenate(outputs, axis=-1)
        heads = [mx.unflatten(y, -1, (self._interleaved_heads, -1)) for y in outputs]
        return mx.flatten(mx.concatenate(heads, axis=-1), -2)


class Corrected(nn.Module):
    """A quantized matrix and a rank-r correction of its error: ``y = base x + up (down x)``.

    base: (m, n), with the bias; down: (r, n), up: (m, r).
    """

    def __init__(self, rows: int, columns: int, rank: int, bias: bool):
        super().__init__()
        self.base = nn.Linear(columns, rows, bias=bias)
        self.down = nn.Linear(columns, rank, bias=False)
        self.up = nn.Linear(rank, rows, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.base(x) + self.up(self.down(x))

    def shard_outputs(self, group):
        self.base = shard_linear(self.base, "all-to-sharded", group=group)
        self.up = shard_linear(self.up, "all-to-sharded", group=group)

    def shard_inputs(self, group):
        self.base = shard_linear(self.base, "sharded-to-all", group=group)
        self.down = shard_linear(self.down, "sharded-to-all", group=group)


class SlicedRotary(nn.Module):
    """Rotary positions for heads that kept only some of the pairs (i, i + d / 2) of dimensions.

    rope: the original rotation, a ``nn.RoPE`` or one of mlx-lm's with a table of frequencies
    (llama3, yarn); pairs: the kept ones. Every pair keeps its own frequency.
    """

    def __init__(self, rope: nn.Module, pairs: list):
        super().__init__()
        if isinstance(rope, nn.RoPE):
            table = rope.base ** (mx.arange(0, rope.dims, 2, dtype=mx.float32) / rope.dims)
        else:
            table = rope._freqs
        self._freqs = table[mx.array(pairs)]
        self._scale = rope.scale if isinstance(rope, nn.RoPE) else 1.0
        self._factor = getattr(rope, "mscale", 1.0)

    def __call__(self, x: mx.array, offset=0) -> mx.array:
        if self._factor != 1.0:
            x = x * self._factor
        return mx.fast.rope(
            x,
            x.shape[-1],
            traditional=False,
            base=None,
            scale=self._scale,
            offset=offset,
            freqs=self._freqs,
        )


FORMS = {"factored": Factored, "pivot": Pivot, "corrected": Corrected}


def build_projection(entry: dict) -> nn.Module:
    """The module for one entry of ``config["mlx_svd"]["projections"]``.

    entry: form, shape (m, n), bias, and ranks: one for the matrix, one for each head, or null; of
    a sliced form also stored_shape: it is a plain Linear of that shape.
    """
    if entry["form"] == "sliced":
        rows, columns = entry["stored_shape"]
        return nn.Linear(columns, rows, bias=entry["bias"])
    rows, columns = entry["shape"]
    ranks = entry["ranks"] or [0]
    rows //= len(ranks)
    parts = [_low_rank(entry["form"], rows, columns, rank, entry["bias"]) for rank in ranks]
    return parts[0] if len(parts) == 1 else PerHead(parts)


def _low_rank(form: str, rows: int, columns: int, rank: int, bias: bool) -> nn.Module:
    # A pivot form in which every row is a pivot is the dense matrix.
    if form == "dense" or (form == "pivot" and rank == rows):
        return nn.Linear(columns, rows, bias=bias)
    return FORMS[form](rows, columns, rank, bias)


def base_module(model_type: str):
    """The Python module that defines the original architecture: mlx-lm's, or a file beside this
    one for an architecture that mlx-lm lacks."""
    beside = Path(__file__).with_name(f"modeling_{model_type}.py")
    if beside.is_file():
        spec = importlib.util.spec_from_file_location(f"modeling_{model_type}", beside)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    return importlib.import_module(f"mlx_lm.models.{MODEL_REMAPPING.get(model_type, model_type)}")


class ModelArgs:
    """The original architecture's arguments and the ``mlx_svd`` section of config.json."""

    def __init__(self, config: dict):
        self.base = base_module(config["model_type"])
        self.base_args = self.base.ModelArgs.from_dict(config)
        self.projections = config["mlx_svd"]["projections"]
        self.fused = config["mlx_svd"]["fused"]

    @classmethod
    def from_dict(cls, config: dict):
        return cls(config)


def _parent(model: nn.Module, path: str):
    """The module that holds ``path``, and the last name of the path."""
    *parents, name = path.split(".")
    for key in parents:
        model = model[int(key)] if isinstance(model, list) else getattr(model, key)
    return model, name


def replaced_modules(args: ModelArgs) -> dict:
    """path -> the module to put there."""
    modules = {
        path: build_projection(entry)
        for path, entry in args.projections.items()
        if entry["form"] != "dense" and not entry["fused"]
    }
    for path, fused in args.fused.items():
        parts = {n: build_projection(args.projections[f"{path}.{n}"]) for n in fused["parts"]}
        modules[path] = Fused(parts, fused["interleaved_heads"])
    return modules


def Model(args: ModelArgs) -> nn.Module:
    """The original architecture with its projections replaced, weights not yet loaded."""

    class LowRankModel(args.base.Model):
        pass

    replaced = replaced_modules(args)
    # A sliced projection is a Linear, which the base class shards itself.
    containers = [path for path, module in replaced.items() if not isinstance(module, nn.Linear)]

    def shard(self, group=None):
        """Tensor parallelism: the base class shards everything but the replaced modules."""
        group = group or mx.distributed.init()
        places = {path: _parent(self, path) for path in containers}
        modules = {path: getattr(*place) for path, place in places.items()}
        for parent, name in places.values():
            setattr(parent, name, nn.Linear(group.size(), group.size(), bias=False))
        args.base.Model.shard(self, group)
        for path, module in modules.items():
            if args.projections[path]["projection"] in ("o", "down"):
                module.shard_inputs(group)
            else:
                module.shard_outputs(group)
            setattr(*places[path], module)

    if hasattr(args.base.Model, "shard"):
        LowRankModel.shard = shard
    model = LowRankModel(args.base_args)
    for path, module in replaced.items():
        setattr(*_parent(model, path), module)
    for path, entry in args.projections.items():
        if entry.get("pairs") and entry["projection"] == "q":
            attention, _ = _parent(model, path)
            attention.rope = SlicedRotary(attention.rope, entry["pairs"])
    return model
