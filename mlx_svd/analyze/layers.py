"""Every projection compressed alone: the error of its outputs, and what it does to the model."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
from scipy.stats import bootstrap, spearmanr

from mlx_svd.analyze.effect import Effect, effect
from mlx_svd.analyze.output_error import OutputError, OutputErrors
from mlx_svd.analyze.ranks import break_even
from mlx_svd.analyze.sensitivity import Scan, scan
from mlx_svd.analyze.subject import Subject, describe
from mlx_svd.analyze.truncations import Ranks, Truncations
from mlx_svd.analyze.verdict import PRESETS, Bands
from mlx_svd.calibrate.blocks import Blocks
from mlx_svd.calibrate.scorers import Scoring
from mlx_svd.calibrate.taps import inputs_of, tapped
from mlx_svd.errors import MlxSvdError
from mlx_svd.plan.policy import RankPolicy
from mlx_svd.source.families import Projection

# Rows of Gaussian input, in as many windows as the text has; the seeds drew 8 rows in all.
GAUSSIAN_ROWS = 256


@dataclass(frozen=True)
class LayersSettings:
    """policies: label -> rank; projections, layers: which (None: all); scoring, per_head: as in
    ``Truncations``; bands: of the verdicts; alone: measure every projection alone, not only the
    scans; effects: KL and perplexity of each projection alone too; scans: what to compress or leave
    dense in groups (layer, type, head); leave: compressed, dense or both; seed: of the Gaussian
    input and of bootstraps."""

    policies: dict[str, RankPolicy]
    projections: Sequence[str] | None = None
    layers: Sequence[int] | None = None
    scoring: Scoring = field(default_factory=Scoring)
    per_head: bool = False
    bands: Bands = PRESETS["seed-001"]
    alone: bool = True
    effects: bool = True
    scans: Sequence[str] = ()
    leave: Sequence[str] = ("compressed", "dense")
    seed: int = 0


@dataclass(frozen=True)
class ProjectionError:
    """One projection at one rank, alone. ranks: of the matrix, or of each head; energy: share of
    the squared singular values (in the scorer's metric) kept; real, gaussian: errors of its outputs
    on the text's inputs and on white noise; effect: on the model, None if not measured."""

    projection: dict
    rank_label: str
    ranks: Ranks
    break_even_rank: int
    energy: float
    real: OutputError
    gaussian: OutputError
    verdict: str
    gaussian_verdict: str
    effect: Effect | None


def layers(
    subject: Subject, settings: LayersSettings, advance: Callable[[str], None] = lambda done: None
) -> dict[str, Any]:
    """Measure every chosen projection alone at every rank, and the scans asked for; JSON values.

    advance: told "path" per projection and rank, and "scan" per group. Raises MlxSvdError for a
    projection or layer that the model lacks, and a rank over the limit of one of them.
    """
    chosen = subject.chosen(settings.projections, settings.layers)
    truncations = Truncations(subject, settings.scoring, settings.per_head)
    if not settings.alone and not settings.scans:
        raise MlxSvdError("layers: neither projections alone nor a scan was asked for")
    if settings.alone and settings.effects:
        _ = subject.base  # of the uncompressed model
    found = []
    alone = _output_errors(subject, settings, chosen, truncations) if settings.alone else ()
    for path, label, ranks, energy, real, gaussian in alone:
        p = subject.projections[path]
        done = None
        if settings.effects:
            with truncations.compressed({path: ranks}):
                done = effect(subject)
        bands = settings.bands
        words = bands.verdict(real.cosine.value), bands.verdict(gaussian.cosine.value)
        rows = p.shape[0] // truncations.heads(p)
        even = break_even(rows, p.shape[1])
        found.append(
            ProjectionError(describe(p), label, ranks, even, energy, real, gaussian, *words, done)
        )
        advance("projection")
    scans: list[Scan] = []
    for by in settings.scans:
        for label, policy in settings.policies.items():
            scans += scan(
                subject, truncations, chosen, by, (label, policy), settings.leave, advance,
                seed=settings.seed,
            )  # fmt: skip
    return {
        "analysis": "layers",
        "conditions": subject.conditions(),
        "scorer": settings.scoring.scorer,
        "per_head": settings.per_head,
        "bands": asdict(settings.bands),
        "ranks": list(settings.policies),
        "projections": [asdict(row) for row in found],
        "summary": [_summary(label, found, settings.seed) for label in settings.policies]
        if found
        else [],
        "scans": [asdict(s) for s in scans],
    }


def _output_errors(subject, settings, chosen: list[Projection], truncations: Truncations):
    """(path, label, ranks, energy, real, gaussian) block by block: one block's inputs of one
    window are in memory at a time."""
    tokens = subject.windows.tokens[:, :-1]
    blocks = Blocks(lambda: subject.model, subject.source.config["model_type"], tokens)
    for layer in range(1 + max(p.layer for p in chosen)):
        model, block = blocks.open(layer)
        here = [p for p in chosen if p.layer == layer]
        if not here:
            blocks.advance(layer, block)
            continue
        sums = []
        for p in here:
            weight = subject.weight(p.path)
            for label, policy in settings.policies.items():
                ranks = truncations.rank(p, policy)
                changed = truncations.truncated(p, ranks)
                kept = _energy(truncations.decompositions(p), ranks)
                pair = OutputErrors(weight, changed), OutputErrors(weight, changed)
                sums.append((p.path, label, ranks, kept, *pair))
        linears = [m for m in subject.source.linears if m.projections[0].layer == layer]
        with tapped(model, linears) as taps:
            for window, output in enumerate(blocks.outputs(layer, block)):
                mx.eval(output)
                inputs = dict(zip([m.path for m in linears], inputs_of(taps), strict=True))
                for path, _, _, _, real, _ in sums:
                    real.add(inputs[subject.linear_of[path].path])
                blocks.hidden[window] = output
        for path, label, ranks, kept, real, gaussian in sums:
            rng = np.random.default_rng(settings.seed)
            width = subject.projections[path].shape[1]
            for _ in tokens:
                noise = rng.standard_normal((GAUSSIAN_ROWS, width), dtype=np.float32)
                gaussian.add(mx.array(noise))
            yield path, label, ranks, kept, real.result(), gaussian.result()


def _energy(parts, ranks: Ranks) -> float:
    ranks = (ranks,) * len(parts) if isinstance(ranks, int) else ranks
    kept = sum(float(d.energies[:r].sum()) for d, r in zip(parts, ranks, strict=True))
    total = sum(float(d.energies.sum()) for d in parts)
    return kept / total if total > 0 else 1.0


def _summary(label: str, found: list[ProjectionError], seed: int) -> dict[str, Any]:
    """Means over the projections at one rank, and what predicts the damage of each."""
    rows = [row for row in found if row.rank_label == label]
    words = [row.verdict for row in rows]
    summary: dict[str, Any] = {"rank_label": label, "projections": len(rows)}
    for kind in ("real", "gaussian"):
        errors = [getattr(row, kind) for row in rows]
        summary[f"{kind}_cosine"] = float(np.mean([e.cosine.value for e in errors]))
        summary[f"{kind}_relative_error"] = float(np.mean([e.relative_error.value for e in errors]))
    summary["verdicts"] = {word: words.count(word) for word in dict.fromkeys(words)}
    measured = [row for row in rows if row.effect is not None]
    if len(measured) > 2:
        kl = [row.effect.kl.value for row in measured]
        for name, values in (
            ("energy_lost", [1 - row.energy for row in measured]),
            ("relative_error_real", [row.real.relative_error.value for row in measured]),
        ):
            summary[f"rank_correlation_kl_{name}"] = rank_correlation(values, kl, seed)
    return summary


def rank_correlation(a: Sequence[float], b: Sequence[float], seed: int = 0) -> dict[str, Any]:
    """Spearman's rho of n pairs with a 95 % percentile bootstrap interval over the pairs; p: that
    there is none. Raises MlxSvdError for fewer than three pairs."""
    if len(a) < 3:
        raise MlxSvdError(f"a rank correlation of {len(a)} pairs says nothing; give three or more")
    found = spearmanr(a, b)

    def rho(x, y):
        return spearmanr(x, y).statistic if len(set(x)) > 1 and len(set(y)) > 1 else 0.0

    interval = bootstrap(
        (np.array(a), np.array(b)), rho, paired=True, vectorized=False, method="percentile",
        n_resamples=999, rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return {
        "rho": float(found.statistic),
        "low": float(interval.low),
        "high": float(interval.high),
        "p": float(found.pvalue),
        "n": len(a),
    }
