"""How errors travel through the blocks, and how they grow with the number of compressed layers."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_svd.analyze.ablation import energy_lost
from mlx_svd.analyze.attention import attention_calls, compare_attention
from mlx_svd.analyze.logits import DenseLogits, LogitError, logit_error
from mlx_svd.analyze.output_error import Jackknifed, jackknife
from mlx_svd.analyze.power_law import PowerLaw, power_law
from mlx_svd.analyze.subject import Subject
from mlx_svd.analyze.truncations import Ranks, Truncations
from mlx_svd.calibrate.blocks import block_list, recorded
from mlx_svd.calibrate.scorers import Scoring
from mlx_svd.errors import MlxSvdError
from mlx_svd.plan.policy import RankPolicy

# Up to so many layers every number of them is compressed; every number costs a pass per layer.
_EVERY = 8


@dataclass(frozen=True)
class DepthSettings:
    """policy: one rank (label, policy); projections, layers, scoring, per_head: as in ``layers``;
    counts: numbers of layers to compress together, None: all, or with more than eight layers the
    powers of two and all; attention_windows: how many windows attention is compared on, 0 for none;
    seed: of the first order and of bootstraps."""

    policy: tuple[str, RankPolicy] = ("ratio 0.5", RankPolicy(rank_ratio=0.5))
    projections: Sequence[str] | None = ("q", "k", "v", "o")
    layers: Sequence[int] | None = None
    scoring: Scoring = field(default_factory=Scoring)
    per_head: bool = False
    counts: Sequence[int] | None = None
    attention_windows: int = 2
    seed: int = 0


@dataclass(frozen=True)
class Growth:
    """compressed: the layers that are; after: relative error ||h' - h|| / ||h|| of the residual
    stream after each block of the model; logits: of the model's output."""

    compressed: list[int]
    after: list[Jackknifed]
    logits: LogitError


@dataclass(frozen=True)
class AttentionError:
    """One layer, all chosen layers compressed: relative errors of the scores Q K^T (centred over
    the visible keys), the probabilities, and the output of attention before o; probability_kl in
    nats a query and head."""

    layer: int
    scores: float
    probabilities: float
    output: float
    probability_kl: float


@dataclass(frozen=True)
class LayerCount:
    """layers: how many are compressed; error: mean over the chains of the logits' errors."""

    layers: int
    cosine: float
    mean_removed_cosine: float
    relative_error: float
    kl: float


def depth(
    subject: Subject, settings: DepthSettings, advance: Callable[[str], None] = lambda done: None
) -> dict[str, Any]:
    """Compress all layers, every layer alone, and growing sets of layers; JSON values.

    advance: told "growth" after each of the first two, "chain" after each set. Keeps the dense
    model's logits and hidden states of all windows in memory. Raises MlxSvdError for fewer than
    three layers, and for what its parts refuse.
    """
    chosen = subject.chosen(settings.projections, settings.layers)
    numbers = sorted({p.layer for p in chosen})
    if len(numbers) < 3:
        raise MlxSvdError(
            f"depth: {len(numbers)} layers; the law of growth needs three or more, see --layers"
        )
    label, policy = settings.policy
    counts = layer_counts(len(numbers), settings.counts)
    truncations = Truncations(subject, settings.scoring, settings.per_head)
    ranks = {n: {p.path: truncations.rank(p, policy) for p in chosen if p.layer == n}
             for n in numbers}  # fmt: skip
    every = {path: r for group in ranks.values() for path, r in group.items()}
    logits = DenseLogits(subject)
    stream = _Stream(subject)
    dense = [
        attention_calls(subject.model, w)
        for w in subject.windows.tokens[: settings.attention_windows]
    ]
    growth = []
    attention: list[AttentionError] = []
    for group in (numbers, *([n] for n in numbers)):
        with truncations.compressed(_of(ranks, group)):
            growth.append(Growth(group, stream.errors(), logits.error()))
            if group is numbers and dense:
                attention = _attention(subject, dense)
        advance("growth")
    sums = _chains(truncations, ranks, logits, counts, settings.seed, advance)
    tokens = subject.windows.tokens.shape[1] - 1
    law, kl_law = _laws(sums, counts, tokens, settings.seed)
    lost = energy_lost(truncations, chosen, every)
    return {
        "analysis": "depth",
        "conditions": subject.conditions(),
        "scorer": settings.scoring.scorer,
        "per_head": settings.per_head,
        "rank_label": label,
        "ranks": every,
        "projections": [p.path for p in chosen],
        "white_input": _white(truncations, chosen, every, lost),
        "growth": [asdict(g) for g in growth],
        "attention": [asdict(a) for a in attention],
        "layer_counts": [asdict(c) for c in _counts(sums, counts, tokens)],
        "law": asdict(law),
        "kl_law": asdict(kl_law),
        "averaging": _averaging(law, counts[-1]),
    }


def _of(ranks: Mapping[int, dict[str, Ranks]], layers: Sequence[int]) -> dict[str, Ranks]:
    return {path: r for n in layers for path, r in ranks[n].items()}


def _white(truncations, chosen, ranks, lost: float) -> dict[str, float]:
    """What the seeds call the error of a layer: its matrices alone on white noise, where the
    relative error is sqrt(energy lost), whatever the model; means over the matrices."""
    shares = [energy_lost(truncations, [p], ranks) for p in chosen]
    return {
        "energy_lost": lost,
        "mean_cosine": float(np.mean([math.sqrt(1 - s) for s in shares])),
        "mean_relative_error": float(np.mean([math.sqrt(s) for s in shares])),
    }


class _Stream:
    """The residual stream of the dense model after each block, of every window."""

    def __init__(self, subject: Subject):
        self._subject = subject
        self._dense = [self._after(w) for w in subject.windows.tokens]

    def _after(self, window: np.ndarray) -> list[mx.array]:
        s = self._subject
        with recorded(block_list(s.model, s.source.config["model_type"])) as calls:
            s.model(mx.array(window[:-1])[None])
        found = [call.output.astype(mx.float32) for call in calls]
        mx.eval(found)
        return found

    def errors(self) -> list[Jackknifed]:
        """Relative error after each block, of the model as it is now."""
        sums = []
        for window, dense in zip(self._subject.windows.tokens, self._dense, strict=True):
            now = self._after(window)
            sums.append([(_square(h - g), _square(h)) for h, g in zip(dense, now, strict=True)])
        blocks = np.array(sums).swapaxes(0, 1)
        return [jackknife(block, lambda s: math.sqrt(s[0] / s[1])) for block in blocks]


def _square(values: mx.array) -> float:
    return float(np.array((values * values).sum(axis=-1), dtype=np.float64).sum())


def _attention(subject: Subject, dense: list) -> list[AttentionError]:
    windows = [
        [compare_attention(a, b) for a, b in zip(d, attention_calls(subject.model, w), strict=True)]
        for w, d in zip(subject.windows.tokens, dense, strict=False)
    ]
    found = []
    for layer, sums in enumerate(zip(*windows, strict=True)):
        relative = [
            math.sqrt(sum(getattr(s, k)[0] for s in sums) / sum(getattr(s, k)[1] for s in sums))
            for k in ("scores", "probabilities", "output")
        ]
        kl = sum(s.kl for s in sums) / sum(s.queries for s in sums)
        found.append(AttentionError(layer, *relative, kl))
    return found


def layer_counts(layers: int, asked: Sequence[int] | None) -> list[int]:
    """The numbers of layers k that are compressed together, ascending. Raises MlxSvdError for fewer
    than three, or one that is not in 1..layers."""
    if asked is None:
        powers = [k for k in (2**i for i in range(layers.bit_length())) if k < layers]
        asked = range(1, layers + 1) if layers <= _EVERY else (*powers, layers)
    counts = sorted({*asked, 1, layers})
    if len(counts) < 3 or counts[0] < 1 or counts[-1] > layers:
        raise MlxSvdError(
            f"--counts: 1 and {layers} are always measured; give at least one number between them"
        )
    return counts


def chains(layers: Sequence[int], seed: int) -> list[list[int]]:
    """Orders in which the layers are added: all rotations of one random order. For every k each
    layer is among the first k of exactly k chains, so that no number favours a layer."""
    order = np.random.default_rng(seed).permutation(layers).tolist()
    return [order[i:] + order[:i] for i in range(len(order))]


def _chains(truncations, ranks, logits: DenseLogits, counts, seed: int, advance):
    """(C, K, N, 7) sums of the logits' errors; the same set of layers is measured once."""
    known: dict[frozenset, np.ndarray] = {}
    found = []
    for chain in chains(list(ranks), seed):
        steps = []
        for k in counts:
            group = frozenset(chain[:k])
            if group not in known:
                with truncations.compressed(_of(ranks, sorted(group))):
                    known[group] = logits.sums()
            steps.append(known[group])
            advance("chain")
        found.append(steps)
    return np.array(found)


def _counts(sums: np.ndarray, counts: list[int], tokens: int) -> list[LayerCount]:
    found = []
    for place, k in enumerate(counts):
        errors = [logit_error(chain, tokens) for chain in sums[:, place]]
        means = [
            float(np.mean([getattr(e, name).value for e in errors]))
            for name in ("cosine", "mean_removed_cosine", "relative_error", "kl")
        ]
        found.append(LayerCount(k, *means))
    return found


def _laws(sums: np.ndarray, layers: list[int], tokens: int, seed: int) -> tuple[PowerLaw, PowerLaw]:
    """Of the logits' error, and of sqrt(KL), which is of the same order."""
    squares, totals = sums[..., 5], sums[0, 0, :, 3]
    kl, counts = np.maximum(sums[..., 6], 0.0), np.full(len(totals), tokens)
    return (
        power_law(squares, totals, layers, seed=seed),
        power_law(kl, counts, layers, seed=seed),
    )


def _averaging(law: PowerLaw, n: int) -> dict[str, float]:
    """The seed's claim in numbers: one layer's error over sqrt(N) against the error of all N."""
    one, every = law.error[0], law.error[-1]
    return {
        "layers": n,
        "error_of_one_layer": one,
        "if_averaged_out": one / math.sqrt(n),
        "if_independent": one * math.sqrt(n),
        "error_of_all_layers": every,
    }
