"""Sizes of sliced groups, and what must hold between the members of one."""

from dataclasses import replace
from math import gcd, lcm

from mlx_svd.calibrate.statistics import Calibration
from mlx_svd.checkpoint.layout import Quantization
from mlx_svd.errors import MlxSvdError
from mlx_svd.plan.forms import FormChoice, Storage
from mlx_svd.plan.plan import ProjectionPlan
from mlx_svd.plan.policy import RankPolicy, round_rank
from mlx_svd.source.families import Projection
from mlx_svd.source.slices import SliceGroup, check_sliceable
from mlx_svd.source.source import Source


def size_multiple(
    group: SliceGroup, quantize: Quantization | None, rank_multiple: int | None
) -> int:
    """Sizes are multiples of this: two dimensions for each rotary pair, and an input of the
    reading projection that can be cut into quantization groups.

    quantize: of the reader (o or down)."""
    multiple = rank_multiple or 1
    if group.kind == "qk":
        return lcm(multiple, 2)
    if quantize is None:
        return multiple
    return lcm(multiple, quantize.group_size // gcd(quantize.group_size, group.heads))


def sliced_choice(
    group: SliceGroup,
    p: Projection,
    policy: RankPolicy | None,
    ranks: tuple[int, ...] | None,
    multiple: int,
) -> FormChoice:
    """The size of the group's slice, as one of its members has been asked for it.

    ranks: the exact size of a saved plan or a rule, else policy: rank or rank_ratio, of a head's
    dimensions or of the neurons. Raises MlxSvdError for an energy (it has no spectrum) and for a
    size out of range.
    """
    if ranks is not None and (len(ranks) > 1 or not 1 <= ranks[0] <= group.limit):
        raise MlxSvdError(
            f"{p.path}: ranks {list(ranks)}: form sliced takes one number from 1 to {group.limit}"
        )
    if ranks is None and policy.energy is not None:
        raise MlxSvdError(f"{p.path}: form sliced takes rank or rank_ratio, not energy")
    try:
        asked = ranks[0] if ranks else policy.choose(group.limit, 0.0, lambda: None)
    except MlxSvdError as error:
        raise MlxSvdError(f"{p.path}: {error}") from error
    size = round_rank(asked, multiple, group.limit, up=False)
    if size in (None, group.limit):
        note = "full size: nothing to slice"
        return FormChoice(
            "dense",
            None,
            note
            if asked == group.limit
            else f"{note} (asked: {asked}, rounded to a multiple of {multiple})",
        )
    rounded = f"size {asked} rounded to a multiple of {multiple}"
    return FormChoice("sliced", (size,), rounded if size != asked else "")


def sliced_storage(storage: Storage, group: SliceGroup, size: int) -> Storage:
    """How a member is stored: a dense matrix of the smaller shape."""
    p = storage.projection
    return replace(storage, projection=replace(p, shape=group.stored_shape(p, size)))


def check_slices(
    source: Source,
    groups: dict[str, SliceGroup],
    plans: dict[str, ProjectionPlan],
    calibration: Calibration | None,
) -> None:
    """Raise MlxSvdError unless every sliced group is sliced as a whole, to one size, with a
    calibration of it, in an architecture where that works."""
    checked = set()
    for plan in plans.values():
        if plan.form != "sliced" or (group := groups[plan.path]) in checked:
            continue
        checked.add(group)
        check_sliceable(source, group)
        check_calibrated(group, calibration)
        members = [plans[p.path] for p in group.members]
        sizes = {m.projection.name: m.ranks[0] for m in members if m.form == "sliced"}
        if missing := [name for name in group.names if name not in sizes]:
            raise MlxSvdError(
                f"{plan.path}: form sliced needs {'/'.join(group.names)} of a layer together; "
                f"give {' and '.join(missing)} the same form and size"
            )
        if len(set(sizes.values())) > 1:
            listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
            raise MlxSvdError(
                f"{plan.path}: form sliced needs one size for {'/'.join(group.names)}, not {listed}"
            )


def cache_note(groups: dict[str, SliceGroup], plans: dict[str, ProjectionPlan]) -> str | None:
    """A sentence if mlx-lm cannot quantize the KV cache of the sliced model, or attend fast.

    Its quantized cache holds groups of 32 to 128 values; its quantized attention with fewer KV
    heads than heads, and the fused attention of MLX on a Mac, need values as wide as keys.
    """
    unequal = odd = 0
    for group in {g for g in groups.values() if g.kind == "vo"}:
        values = plans[group.members[0].path]
        keys = next(
            p
            for p in plans.values()
            if (p.projection.name, p.projection.layer) == ("k", group.layer)
        )
        widths = [p.ranks[0] if p.form == "sliced" else group.limit for p in (keys, values)]
        unequal += widths[0] != widths[1]
        odd += widths != [group.limit] * 2 and any(width % 32 for width in widths)
    if not (unequal or odd):
        return None
    return (
        f"sliced heads: {unequal} layers keep other numbers of dimensions for values than for "
        f"keys, {odd} keep numbers that are no multiples of 32; there mlx-lm's quantized KV cache "
        "(--kv-bits) or MLX's fused attention does not work"
    )


def check_calibrated(group: SliceGroup, calibration: Calibration | None) -> None:
    """Raise MlxSvdError unless the statistics that slice this group are there."""
    if calibration is None:
        raise MlxSvdError(
            f"{group.reader.path}: form sliced needs a calibration; make one with "
            f"mlx-svd calibrate --projections {','.join(group.names)}"
        )
    for name in group.names:
        calibration.require(name)
