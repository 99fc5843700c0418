"""Every module of the model with the tensors that the plan stores for it, in file order."""

import mlx.nn as nn

from mlx_svd.checkpoint.layout import (
    Quantization,
    TensorSpec,
    linear_tensors,
    projection_tensors,
)
from mlx_svd.plan.plan import ProjectionPlan, Unit, target_dtype
from mlx_svd.plan.recipe import Recipe
from mlx_svd.source.families import LinearModule
from mlx_svd.source.source import Source


def make_units(
    source: Source,
    recipe: Recipe,
    plans: dict[str, ProjectionPlan],
    chosen: dict[str, Quantization | None],
) -> tuple[Unit, ...]:
    """All modules in the architecture's order; plans: of every projection, by path;
    chosen: quantization of other modules where it is not ``recipe.quantize``."""
    linears = {linear.path: index for index, linear in enumerate(source.linears)}
    modules = dict(source.skeleton.named_modules())
    names: dict[str, list[str]] = {}
    for name in source.tensors:
        names.setdefault(name.rpartition(".")[0], []).append(name)
    units = []
    for path, sources in names.items():
        quantize = None
        if path in linears:
            tensors = _linear_tensors(source, recipe, source.linears[linears[path]], plans)
        else:
            quantize = _module_quantization(modules.get(path), chosen.get(path, recipe.quantize))
            tensors = _module_tensors(source, recipe, sources, quantize)
        units.append(Unit(path, tuple(sources), tuple(tensors), linears.get(path), quantize))
    return tuple(units)


def stays_fused(linear: LinearModule, plans: dict[str, ProjectionPlan]) -> bool:
    """A module is stored as the original architecture has it if all its parts are dense and
    quantized alike; otherwise each part stands alone."""
    parts = [plans[p.path] for p in linear.projections]
    if any(part.form != "dense" for part in parts):
        return False
    return all(part.quantization == parts[0].quantization for part in parts)


def _module_quantization(module: nn.Module | None, q: Quantization | None) -> Quantization | None:
    """-q quantizes what mlx-lm's convert does: every module that can be and whose input
    dimension is a multiple of the group size."""
    if q is None or not hasattr(module, "to_quantized"):
        return None
    return q if q.fits(module.weight.shape) else None


def _module_tensors(
    source: Source, recipe: Recipe, sources: list[str], q: Quantization | None
) -> list[TensorSpec]:
    tensors = []
    for name in sources:
        shape, dtype = source.tensors[name]
        dtype = target_dtype(dtype, recipe.dtype)
        path, _, kind = name.rpartition(".")
        if kind == "weight" and q:
            tensors += linear_tensors(path, shape, dtype, q)
        else:
            tensors.append(TensorSpec(name, shape, dtype))
    return tensors


def _linear_tensors(
    source: Source, recipe: Recipe, linear: LinearModule, plans: dict[str, ProjectionPlan]
) -> list[TensorSpec]:
    dtype = target_dtype(source.tensors[f"{linear.path}.weight"][1], recipe.dtype)
    parts = [plans[p.path] for p in linear.projections]
    if stays_fused(linear, plans):
        first = linear.projections[0]
        rows = sum(p.shape[0] for p in linear.projections)
        shape, q = (rows, first.shape[1]), parts[0].quantization
        return projection_tensors(linear.path, "dense", shape, (0,), first.bias, dtype, q)
    tensors = []
    for part in parts:
        p, ranks = part.projection, part.ranks or (0,)
        shape = part.stored_shape or p.shape
        tensors += projection_tensors(
            p.path, part.form, shape, ranks, p.bias, dtype, part.quantization, part.factors
        )
    return tensors
