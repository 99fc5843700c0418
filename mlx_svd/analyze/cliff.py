"""Quality over a dense grid of ranks, from full rank down: is there a cliff?

The first point is always full rank, through the same decomposition, multiplication and model code
as all others: what it shows is the error of the method itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_svd.analyze.ablation import by_direction, by_type, energy_lost
from mlx_svd.analyze.agreement import Agreement, agreement
from mlx_svd.analyze.attention import attention_calls, compare_attention
from mlx_svd.analyze.change_point import change_point
from mlx_svd.analyze.effect import Effect, effect
from mlx_svd.analyze.subject import Subject
from mlx_svd.analyze.truncations import Ranks, Truncations
from mlx_svd.calibrate.scorers import Scoring
from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.generation.prompts import prompts_digest, read_prompts
from mlx_svd.evaluate.generation.quality import (
    GREEDY,
    GenerationSettings,
    generation_quality,
)
from mlx_svd.evaluate.generation.summary import generation_differences, generation_summary
from mlx_svd.evaluate.statistics.intervals import Estimate, estimate_of_sums
from mlx_svd.evaluate.statistics.paired import Difference
from mlx_svd.plan.policy import RankPolicy

# Shares of the singular values: fine where the seeds saw the cliff, coarser below.
DEFAULT_RATIOS = (
    0.98, 0.97, 0.95, 0.94, 0.92, 0.9, 0.875, 0.85, 0.82, 0.79, 0.76, 0.73, 0.7, 0.65, 0.6, 0.55,
    0.5, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2, 0.15, 0.1,
)  # fmt: skip
_REPETITION = ("rep_3", "rep_4", "loop")


@dataclass(frozen=True)
class CliffSettings:
    """ratios: shares of the singular values, full rank is added; projections, layers, scoring,
    per_head: as in ``layers``; at: ratio of the ablations, None for none; prompts: how many of the
    shipped ones (or of prompt_file) are continued by max_tokens tokens, 0 for none;
    attention_windows: how many windows attention is compared on, 0 for none; seed: of bootstraps,
    random directions and noise."""

    ratios: Sequence[float] = DEFAULT_RATIOS
    projections: Sequence[str] | None = ("q", "k", "v", "o")
    layers: Sequence[int] | None = None
    scoring: Scoring = field(default_factory=Scoring)
    per_head: bool = False
    at: float | None = None
    prompts: int = 32
    prompt_file: str | None = None
    max_tokens: int = 64
    attention_windows: int = 2
    seed: int = 0


@dataclass(frozen=True)
class Point:
    """One rank. ratio: share of the singular values asked for; ranks: path -> rank or heads' ranks;
    energy_lost: share of the energy of all compressed matrices that is discarded; attention_kl:
    KL(dense || compressed) of attention probabilities in nats a query and head, interval over
    windows; repetition, repetition_change: of greedy texts, and its difference to the dense
    model's, paired by prompt; agreement: with the dense model's texts."""

    ratio: float
    ranks: dict[str, Ranks]
    energy_lost: float
    effect: Effect
    attention_kl: Estimate | None
    repetition: dict[str, Estimate]
    repetition_change: dict[str, Difference]
    agreement: Agreement | None


def cliff(
    subject: Subject, settings: CliffSettings, advance: Callable[[str], None] = lambda done: None
) -> dict[str, Any]:
    """Measure every rank of the grid, the change point and the ablations; JSON values.

    advance: told "point" after each rank and "ablation" after each ablation. Raises MlxSvdError for
    ratios outside (0, 1] and for what its parts refuse.
    """
    chosen = subject.chosen(settings.projections, settings.layers)
    truncations = Truncations(subject, settings.scoring, settings.per_head)
    _ = subject.base  # of the uncompressed model
    texts = _Texts(subject, settings) if settings.prompts else None
    dense = [
        attention_calls(subject.model, w)
        for w in subject.windows.tokens[: settings.attention_windows]
    ]
    first = subject.windows.tokens[:1, :-1]
    original = np.array(subject.model(mx.array(first)).astype(mx.float32))
    control: dict[str, float] = {}
    points: list[Point] = []
    for ratio in sorted({1.0, *settings.ratios}, reverse=True):
        policy = RankPolicy(rank_ratio=ratio)
        ranks = {p.path: truncations.rank(p, policy) for p in chosen}
        if points and ranks == points[-1].ranks:
            advance("point")
            continue
        lost = energy_lost(truncations, chosen, ranks)
        with truncations.compressed(ranks):
            if ratio == 1:
                now = np.array(subject.model(mx.array(first)).astype(mx.float32))
                control["max_logit_difference"] = float(np.abs(now - original).max())
                control["max_logit"] = float(np.abs(original).max())
            attention = _attention(subject, dense) if dense else None
            generated = texts.measure() if texts else ({}, {}, None)
            points.append(Point(ratio, ranks, lost, effect(subject), attention, *generated))
        advance("point")
    ablations = {}
    if settings.at is not None:
        policy = RankPolicy(rank_ratio=settings.at)
        ablations["ratio"] = settings.at
        ablations["types"] = [
            asdict(a) for a in by_type(subject, truncations, chosen, policy, advance)
        ]
        if settings.scoring.scorer == "plain":
            seeds = tuple(settings.seed + i for i in range(3))
            found = by_direction(subject, truncations, chosen, policy, seeds, advance)
            ablations["directions"] = [asdict(a) for a in found]
    return {
        "analysis": "cliff",
        "conditions": subject.conditions(),
        "scorer": settings.scoring.scorer,
        "per_head": settings.per_head,
        "projections": [p.path for p in chosen],
        "generation": texts.conditions() if texts else None,
        "attention_windows": len(dense),
        "control": control,
        "points": [asdict(point) for point in points],
        "change_point": _change_points(points, settings.seed),
        "ablations": ablations,
    }


def _change_points(points: list[Point], seed: int) -> dict[str, Any]:
    """Over the logarithm of the energy discarded, and over the share of ranks cut."""
    cut = [p for p in points if p.energy_lost > 0 and p.ratio < 1 and p.effect.kl.value > 0]
    damage = np.array([p.effect.window_kl for p in cut])
    axes = {
        "log_energy_lost": [np.log(p.energy_lost) for p in cut],
        "ranks_cut": [1 - p.ratio for p in cut],
    }
    found: dict[str, Any] = {}
    for name, x in axes.items():
        try:
            found[name] = asdict(change_point(np.array(x), damage, seed=seed))
        except MlxSvdError as error:
            found[name] = {"verdict": "not tested", "reason": str(error)}
    return found


def _attention(subject: Subject, dense: list) -> Estimate:
    kl, queries = [], []
    for window, expected in zip(subject.windows.tokens, dense, strict=False):
        calls = attention_calls(subject.model, window)
        sums = [compare_attention(a, b) for a, b in zip(expected, calls, strict=True)]
        kl.append(sum(s.kl for s in sums))
        queries.append(sum(s.queries for s in sums))
    return estimate_of_sums(np.array(kl), np.array(queries))


class _Texts:
    """The dense model's greedy texts, which those of compressed states are compared with."""

    def __init__(self, subject: Subject, settings: CliffSettings):
        self._subject = subject
        self._prompts = read_prompts(settings.prompt_file, settings.prompts)
        self._settings = GenerationSettings(
            modes=(GREEDY,), max_tokens=settings.max_tokens, chat=False
        )
        self._ids = [list(subject.tokenizer.encode(p.text)) for p in self._prompts]
        self._dense = self._records()

    def _records(self) -> list[dict]:
        s = self._subject
        return generation_quality(s.model, s.tokenizer, self._prompts, self._settings).records

    def conditions(self) -> dict[str, Any]:
        """Of the texts, and how often the dense model repeats itself."""
        return {
            "prompts": len(self._prompts),
            "digest": prompts_digest(self._prompts),
            "max_tokens": self._settings.max_tokens,
            "dense": {k: asdict(v) for k, v in _shown(generation_summary(self._dense)).items()},
        }

    def measure(self) -> tuple[dict, dict, Agreement]:
        """(repetition, its change, agreement) of the model as it is now."""
        records = self._records()
        own, base = ([r["tokens"] for r in rows] for rows in (records, self._dense))
        return (
            _shown(generation_summary(records)),
            _shown(generation_differences(self._dense, records)),
            agreement(self._subject.model, self._ids, base, own),
        )


def _shown(metrics: dict[str, Any]) -> dict[str, Any]:
    return {m: metrics[f"{m},{GREEDY}"] for m in _REPETITION if f"{m},{GREEDY}" in metrics}
