"""What a user must know about a plan and would not see in its table."""

from mlx_svd.plan.plan import ProjectionPlan
from mlx_svd.plan.recipe import Recipe
from mlx_svd.source.source import Source


def plan_notes(source: Source, recipe: Recipe, plans: dict[str, ProjectionPlan]) -> tuple[str, ...]:
    """One sentence each; plans: of every projection, by path."""
    notes = list(source.warnings)
    # A correction is meant to add bytes to what it corrects.
    grown = [p for p in plans.values() if p.form != "corrected" and p.bytes_after > p.bytes_dense]
    if grown:
        notes.append(
            f"{len(grown)} projections are larger than stored dense, because --form asks for it; "
            "--form auto takes the smallest form"
        )
    if recipe.quantize and (odd := _unquantized(source, recipe.quantize.group_size)):
        notes.append(
            f"{len(odd)} weights have an input dimension that is no multiple of the group size "
            f"{recipe.quantize.group_size} and stay unquantized, as in mlx-lm: {_some(odd)}"
        )
    if source.dropped:
        notes.append(
            f"{len(source.dropped)} source tensors are left out, because the model computes them "
            f"itself or shares them: {_some(source.dropped)}"
        )
    return tuple(notes)


def _unquantized(source: Source, group_size: int) -> list[str]:
    """Modules that could be quantized but for the size of their input."""
    modules = dict(source.skeleton.named_modules())
    return [
        path
        for path, module in modules.items()
        if hasattr(module, "to_quantized") and module.weight.shape[-1] % group_size
    ]


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
