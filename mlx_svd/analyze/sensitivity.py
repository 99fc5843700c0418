"""Which group of projections matters: compress one group alone, or all groups but one.

A group is a layer, a projection type over all layers, or a head (in grouped-query attention a key
head with the query heads that read it; q, k and v only).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mlx_svd.analyze.effect import Effect, effect
from mlx_svd.analyze.subject import Subject
from mlx_svd.analyze.truncations import Ranks, Truncations
from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.statistics.intervals import Estimate, estimate_of_sums
from mlx_svd.plan.policy import RankPolicy
from mlx_svd.source.families import Projection

GROUPINGS = ("layer", "type", "head")
LEAVE = ("compressed", "dense")
_RESAMPLES = 2000


@dataclass(frozen=True)
class GroupEffect:
    """effect: of the model with this group compressed alone, or with everything but this group;
    gain: KL that leaving this group dense saves against compressing everything, in nats a token,
    paired by window (leave dense only); place: 1 = the most sensitive group, with the 95 % interval
    of the place when windows are resampled."""

    group: str
    effect: Effect
    gain: Estimate | None
    place: int
    place_low: int
    place_high: int


@dataclass(frozen=True)
class Scan:
    """by: layer, type or head; leave: the group left compressed, or left dense; everything: the
    effect of compressing all groups; groups: from the most sensitive to the least."""

    by: str
    leave: str
    rank_label: str
    everything: Effect
    groups: list[GroupEffect]


def scan(
    subject: Subject,
    truncations: Truncations,
    projections: Sequence[Projection],
    by: str,
    policy: tuple[str, RankPolicy],
    leave: Sequence[str] = LEAVE,
    advance: Callable[[str], None] = lambda done: None,
    *,
    seed: int = 0,
) -> list[Scan]:
    """Scan the groups of ``projections`` at one rank (label, policy); one scan for each of
    ``leave``. advance: told "scan" after each measurement. Raises MlxSvdError for names that are
    no grouping."""
    check_scan(by, leave)
    label, chosen = policy
    _ = subject.base  # of the uncompressed model
    local = replace(truncations, per_head=True) if by == "head" else truncations
    groups = group_ranks(local, projections, by, chosen)
    everything = {path: r for group in groups.values() for path, r in group.items()}
    if by == "head":
        everything = _merged(list(groups.values()))
    with local.compressed(everything):
        all_effect = effect(subject)
    advance("scan")
    scans = []
    for kind in leave:
        effects = {}
        for name, group in groups.items():
            others = [g for n, g in groups.items() if n != name]
            ranks = group if kind == "compressed" else _merged(others)
            with local.compressed(ranks):
                effects[name] = effect(subject)
            advance("scan")
        scans.append(Scan(by, kind, label, all_effect, _ranked(effects, all_effect, kind, seed)))
    return scans


def check_scan(by: str, leave: Sequence[str]) -> None:
    """Raise MlxSvdError for names that are no grouping, or nothing to leave."""
    if by not in GROUPINGS:
        raise MlxSvdError(f"scan {by!r}: use {', '.join(GROUPINGS)}")
    if not leave or not set(leave) <= set(LEAVE):
        raise MlxSvdError(f"scan: leave {', '.join(leave)!r}: use {' or '.join(LEAVE)}, or both")


def group_ranks(
    truncations: Truncations, projections: Sequence[Projection], by: str, policy: RankPolicy
) -> dict[str, dict[str, Ranks]]:
    """Group -> path -> ranks; heads outside a head's group have full rank."""
    groups: dict[str, dict[str, Ranks]] = {}
    if by != "head":
        for p in projections:
            name = str(p.layer) if by == "layer" else p.name
            groups.setdefault(name, {})[p.path] = truncations.rank(p, policy)
        return groups
    key_heads = {
        p.layer: p.heads for p in truncations.subject.projections.values() if p.name == "k"
    }
    for p in (p for p in projections if p.heads):
        ranks, full = truncations.rank(p, policy), truncations.limit(p)
        ranks = (ranks,) if isinstance(ranks, int) else ranks
        shared = p.heads // key_heads[p.layer]
        for head in range(key_heads[p.layer]):
            inside = range(head * shared, (head + 1) * shared)
            groups.setdefault(f"{p.layer}.{head}", {})[p.path] = tuple(
                r if i in inside else full for i, r in enumerate(ranks)
            )
    if not groups:
        raise MlxSvdError("scan by head: cuts q, k and v; none of them was chosen")
    return groups


def _merged(groups: list[dict[str, Ranks]]) -> dict[str, Ranks]:
    """The lower of the ranks where groups share a projection."""
    merged: dict[str, Ranks] = {}
    for group in groups:
        for path, ranks in group.items():
            known = merged.get(path)
            if known is not None and not isinstance(ranks, int):
                ranks = tuple(map(min, known, ranks))
            merged[path] = ranks
    return merged


def _ranked(effects: dict[str, Effect], everything: Effect, kind: str, seed: int):
    """Groups with their places; most sensitive: the most KL alone, or the most saved when dense."""
    names = list(effects)
    kl = np.array([effects[name].window_kl for name in names])
    harm = kl if kind == "compressed" else np.array(everything.window_kl) - kl
    drawn = np.random.default_rng(seed).integers(0, kl.shape[1], (_RESAMPLES, kl.shape[1]))
    resampled = np.stack([row[drawn].mean(axis=1) for row in harm])
    places = 1 + np.argsort(np.argsort(-resampled, axis=0, kind="stable"), axis=0)
    low, high = np.quantile(places, (0.025, 0.975), axis=1, method="nearest")
    order = np.argsort(-harm.mean(axis=1), kind="stable")
    gains = [estimate_of_sums(row, np.ones(len(row))) if kind == "dense" else None for row in harm]
    return [
        GroupEffect(names[i], effects[names[i]], gains[i], place, int(low[i]), int(high[i]))
        for place, i in enumerate(order, 1)
    ]
