"""Slices as candidates of a budget: choices that several projections of a layer make together."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict

import mlx.core as mx
import numpy as np

from mlx_svd import __version__
from mlx_svd.calibrate.scorers import Scoring
from mlx_svd.calibrate.sliced import Affine, slicing_losses
from mlx_svd.checkpoint.disk import replace_file
from mlx_svd.errors import MlxSvdError
from mlx_svd.parallel import default_workers, ordered_map
from mlx_svd.plan.candidates import Candidate
from mlx_svd.plan.choices import Choices
from mlx_svd.plan.forms import Storage
from mlx_svd.plan.plan import target_dtype
from mlx_svd.plan.slicing import check_calibrated, size_multiple, sliced_storage
from mlx_svd.source.slices import SliceGroup, check_sliceable, slice_groups
from mlx_svd.source.source import Source

# Scorers whose costs are errors of the outputs on real inputs: only there a slice compares.
SLICING_SCORERS = ("whitened", "two-sided")
# Sizes are multiples of this share of a head or of the neurons, where the format allows it.
_STEPS = 16
# path -> candidate of every member of a group.
Joint = dict[str, Candidate]


def sliceable_groups(source: Source, paths: set[str], scoring: Scoring) -> list[SliceGroup]:
    """The groups of which a budget that decides about ``paths`` may slice every member.

    Raises MlxSvdError that says why if there is none: the scorer, a missing partner, the
    architecture, the calibration.
    """
    if scoring.scorer not in SLICING_SCORERS:
        raise MlxSvdError(
            f"form sliced: a budget compares it under --scorer {' or '.join(SLICING_SCORERS)} "
            f"only, not {scoring.scorer}"
        )
    found = []
    reason = "needs q and k, v and o, or gate, up and down together in --projections"
    refused = MlxSvdError(f"form sliced: {reason}")
    for group in dict.fromkeys(slice_groups(source.linears).values()):
        if all(p.path in paths for p in group.members):
            try:
                check_sliceable(source, group)
                check_calibrated(group, scoring.calibration)
                found.append(group)
            except MlxSvdError as error:
                refused = error
    if not found:
        raise refused
    return found


def measure_joint(
    source: Source,
    groups: list[SliceGroup],
    single: dict[str, list[Candidate]],
    choices: Choices,
    scoring: Scoring,
    dtype: str | None,
) -> list[list[Joint]]:
    """For each group the slices it may take, all members at the same bits.

    single: the members' own candidates, whose dense ones say what rounding costs. The loss of the
    slice stands at the reader (q and k: half at each); rounding adds what it costs the whole
    matrix, which is a little too much for a part of it.
    """
    losses = _losses(source, groups, choices, scoring, dtype)
    return [_options(source, g, losses[g.reader.path], single, choices, dtype) for g in groups]


def _sizes(group: SliceGroup, choices: Choices) -> list[int]:
    """Of all bits: every size that some of them allows."""
    found: set[int] = set()
    for bits in choices.bits:
        step = size_multiple(group, choices.quantization(bits), choices.rank_multiple)
        step *= max(1, group.limit // _STEPS // step)
        found |= set(range(step, group.limit, step))
    return sorted(found)


def _options(
    source: Source,
    group: SliceGroup,
    losses: dict[int, float],
    single: dict[str, list[Candidate]],
    choices: Choices,
    dtype: str | None,
) -> list[Joint]:
    shares = {"qk": {"q": 0.5, "k": 0.5}, "vo": {"o": 1.0}, "mlp": {"down": 1.0}}[group.kind]
    noise = {
        p.path: {c.quantization: c.loss for c in single[p.path] if _is_rounded_only(c)}
        for p in group.members
    }
    found = []
    for bits in choices.bits:
        q = choices.quantization(bits)
        multiple = size_multiple(group, q, choices.rank_multiple)
        if any(q not in noise[p.path] for p in group.members):
            continue
        for size, loss in losses.items():
            if size % multiple:
                continue
            option = {}
            for p in group.members:
                stored = target_dtype(source.tensors[f"{p.module}.weight"][1], dtype)
                storage = sliced_storage(Storage(p, stored, q), group, size)
                cost = loss * shares.get(p.name, 0.0) + noise[p.path][q]
                nbytes = storage.nbytes("sliced", (size,))
                option[p.path] = Candidate("sliced", size, q, None, nbytes, cost)
            found.append(option)
    return found


def _is_rounded_only(candidate: Candidate) -> bool:
    return candidate.form == "dense" and candidate.rank is None


def _losses(
    source: Source,
    groups: list[SliceGroup],
    choices: Choices,
    scoring: Scoring,
    dtype: str | None,
) -> dict[str, dict[int, float]]:
    """Path of a group's reader -> size -> loss; kept in the calibration's folder."""
    key = [__version__, asdict(choices), scoring.scorer, dtype, [g.reader.path for g in groups]]
    digest = hashlib.sha256(json.dumps([*key, scoring.calibration.info.digest]).encode())
    cache = scoring.calibration.folder / f"slices-{digest.hexdigest()[:16]}.json"
    if cache.is_file():
        content = json.loads(cache.read_bytes())
        return {path: {int(k): v for k, v in losses.items()} for path, losses in content.items()}

    def measure(item) -> tuple[SliceGroup, dict[int, float]]:
        group, matrices = item
        scores = {n: scoring(group.member(n), a.weight) for n, a in matrices.items()}
        statistics, sizes = scoring.calibration.statistics, _sizes(group, choices)
        return group, slicing_losses(group, sizes, matrices, statistics, scores)

    found = {}
    for group, losses in ordered_map(measure, _matrices(source, groups), default_workers()):
        found[group.reader.path] = losses
    replace_file(cache, json.dumps(found).encode())
    return found


def _matrices(
    source: Source, groups: list[SliceGroup]
) -> Iterator[tuple[SliceGroup, dict[str, Affine]]]:
    """Each group with the matrices that its losses depend on."""
    stream = source.stream()
    linears = {linear.path: linear for linear in source.linears}

    def read(group: SliceGroup, name: str) -> Affine:
        p = group.member(name)
        # Readers and the q and k that can be sliced are never parts of a fused module.
        weight = linears[p.module].split(stream.take(f"{p.module}.weight"))[name]
        bias = stream.take(f"{p.module}.bias") if p.bias else None
        return Affine(
            np.array(weight.astype(mx.float32)),
            None if bias is None else np.array(bias.astype(mx.float32)),
        )

    for group in groups:
        names = ("q", "k") if group.kind == "qk" else (group.reader.name,)
        yield group, {name: read(group, name) for name in names}
