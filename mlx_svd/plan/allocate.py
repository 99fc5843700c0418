"""A budget divided over the projections: candidates measured, the best ones chosen."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod

from mlx_svd.calibrate.scorers import Scoring
from mlx_svd.errors import MlxSvdError
from mlx_svd.plan.budget import choose
from mlx_svd.plan.candidates import Candidate, measure_candidates, module_candidates
from mlx_svd.plan.forms import Storage
from mlx_svd.plan.joint import measure_joint, sliceable_groups
from mlx_svd.plan.plan import ProjectionPlan, target_dtype
from mlx_svd.plan.recipe import Recipe
from mlx_svd.plan.units import make_units
from mlx_svd.plan.zero_sum import (
    GUARD,
    measure_components,
    second_order_cost,
    zero_sum_ranks,
)
from mlx_svd.source.families import Projection
from mlx_svd.source.slices import SliceGroup
from mlx_svd.source.source import Source


@dataclass(frozen=True)
class Allocation:
    """chosen: path -> candidate, of projections, and of other modules where the whole size
    counts; remarks: what the user must know about the choice."""

    chosen: dict[str, Candidate]
    remarks: tuple[str, ...] = ()


def allocate(
    source: Source,
    recipe: Recipe,
    scoring: Scoring,
    wanted: list[Projection],
    plans: dict[str, ProjectionPlan],
    groups: dict[str, SliceGroup],
    advance: Callable[[str], None],
) -> Allocation:
    """Divide ``recipe.budget`` over the ``wanted`` projections.

    plans: of every projection, by path, with the others as they will be stored; groups: by
    path, those that can be sliced together. Raises
    MlxSvdError for a budget out of reach.
    """
    if not wanted:
        raise MlxSvdError("the budget has nothing to choose from; every projection is skipped")
    budget = recipe.budget
    alone = replace(recipe.choices, forms=tuple(f for f in recipe.choices.forms if f != "sliced"))
    found = measure_candidates(source, wanted, alone, scoring, recipe.dtype, advance)
    joint = []
    if "sliced" in recipe.choices.forms:
        sliceable = sliceable_groups(source, set(found), scoring)
        joint = measure_joint(source, sliceable, found, recipe.choices, scoring, recipe.dtype)
    if budget.keep_bytes is None:
        if recipe.allocation == "zero-sum":
            raise MlxSvdError("--allocation zero-sum: divides a share of bytes; give --keep-bytes")
        chosen = _within_size(source, recipe, scoring, wanted, plans, found, joint)
        return Allocation(chosen, _remarks(chosen))
    limit = int(budget.keep_bytes * sum(plans[p.path].bytes_before for p in wanted))
    greedy = choose(found, limit, f"--keep-bytes {budget.keep_bytes}", joint)
    if recipe.allocation == "zero-sum":
        return _zero_sum(source, recipe, scoring, wanted, limit, greedy, advance)
    return Allocation(greedy, _remarks(greedy))


def _remarks(chosen: dict[str, Candidate]) -> tuple[str, ...]:
    """Says so when low rank bought nothing."""
    if any(c.form != "dense" for c in chosen.values()):
        return ()
    return ("the budget chose no low rank: every projection is stored dense",)


def chosen_plan(
    source: Source,
    recipe: Recipe,
    plan: ProjectionPlan,
    c: Candidate,
    group: SliceGroup | None,
) -> ProjectionPlan:
    """The projection's plan with a candidate in place of what it was; group: that it can be sliced
    with."""
    p, q = plan.projection, c.quantization
    storage = Storage(p, _stored_dtype(source, recipe, p), q)
    group = group if c.form == "sliced" else None
    return replace(
        plan,
        stored_shape=group and group.stored_shape(p, c.rank),
        form=c.form,
        ranks=None if c.rank is None else (c.rank,),
        limit=group.limit if group else min(p.shape),
        break_even=storage.break_even_rank(1, q.group_size if q else 1),
        quantization=q,
        factors=c.factors,
        reason="stays as it is" if c.rank is None and q is None else "",
        bytes_dense=storage.nbytes("dense", (0,)),
        bytes_after=c.nbytes,
        loss=c.loss,
    )


def _stored_dtype(source: Source, recipe: Recipe, p: Projection):
    return target_dtype(source.tensors[f"{p.module}.weight"][1], recipe.dtype)


def _within_size(source, recipe, scoring, wanted, plans, found, joint) -> dict[str, Candidate]:
    """Within a size of the whole checkpoint: what is not chosen here takes its share first."""
    size, what = recipe.budget.target_size, f"--target-size {recipe.budget.target_size}"
    if size is None:
        weights = sum(prod(shape) for shape, _ in source.tensors.values())
        size = int(recipe.budget.target_bpw * weights / 8)
        what = f"--target-bpw {recipe.budget.target_bpw}"
    units = make_units(source, recipe, plans, recipe.modules)
    rest = sum(unit.nbytes for unit in units)
    rest -= sum(plans[p.path].bytes_after for p in wanted)
    if recipe.quantize is None:
        modules = module_candidates(source, recipe.choices, recipe.dtype, scoring.calibration)
        rest -= sum(unit.nbytes for unit in units if unit.path in modules)
        found = found | modules
    return choose(found, size - rest, what, joint, rest)


def _zero_sum(
    source: Source,
    recipe: Recipe,
    scoring: Scoring,
    wanted: list[Projection],
    limit: int,
    greedy: dict[str, Candidate],
    advance: Callable[[str], None],
) -> Allocation:
    """The zero-sum selection in the first of the allowed forms that has ranks, or the greedy
    choice where the guard rejects it."""
    forms = [form for form in recipe.choices.forms if form in ("factored", "pivot")]
    if not forms:
        raise MlxSvdError("--allocation zero-sum: chooses ranks; allow --form factored or pivot")
    form = forms[0]

    def nbytes(p: Projection, rank: int | None) -> int:
        storage = Storage(p, _stored_dtype(source, recipe, p), None)
        if rank is None:
            return storage.nbytes("dense", (0,))
        return storage.nbytes(form, (max(rank, 1),))

    components = measure_components(source, wanted, scoring, nbytes, advance)
    ranks = zero_sum_ranks(components, limit)
    cost = second_order_cost(components, ranks)
    expected = second_order_cost(components, {path: c.rank for path, c in greedy.items()})
    if cost > GUARD * expected:
        remark = (
            f"the zero-sum selection was rejected: its second-order cost {cost:.3g} is more than "
            f"{GUARD} times the greedy choice's {expected:.3g}; the greedy choice is used"
        )
        return Allocation(greedy, (remark,))
    chosen = {
        p.path: Candidate(
            "dense" if ranks[p.path] is None else form,
            ranks[p.path],
            None,
            None,
            nbytes(p, ranks[p.path]),
            second_order_cost(components, {p.path: ranks[p.path]}),
        )
        for p in wanted
    }
    return Allocation(chosen)
