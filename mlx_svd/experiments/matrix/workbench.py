"""A loaded model with its decompositions under any scorer, each made once for all conditions."""

import zlib
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np

from mlx_svd.analyze.subject import Subject
from mlx_svd.calibrate.scorers import SCORERS, Scoring, component_importance
from mlx_svd.calibrate.statistics import Calibration, Statistics
from mlx_svd.errors import MlxSvdError
from mlx_svd.experiments.matrix.calibrations import drawn_calibration
from mlx_svd.experiments.matrix.importance import (
    PROMPTS,
    mean_absolute_gradients,
    prompt_sentences,
)
from mlx_svd.experiments.matrix.material import Facts
from mlx_svd.experiments.matrix.places import Places
from mlx_svd.linalg.truncate import Decomposition, decompose, reordered
from mlx_svd.source.families import Projection

# Keeps random components, whatever their size: what any choice must beat.
RANDOM = "random"
METHODS = (*SCORERS, RANDOM)
# Decompositions and gradients of so many (scorer, seed) are kept.
_KEPT = 3


class Workbench:
    """subject: the original model; facts: where importance takes its prompts from; settings:
    ``calibration`` {file, windows, length}, ``importance`` {prompts, window}."""

    def __init__(
        self, subject: Subject, facts: Facts | None, settings: dict[str, Any], places: Places
    ):
        self.subject, self.facts = subject, facts
        self.settings, self.places = settings, places
        self.originals = {path: subject.weight(path) for path in subject.projections}
        self._plain: dict[str, Decomposition] = {}
        self._made: OrderedDict[tuple, Any] = OrderedDict()

    def decomposition(
        self,
        projection: Projection,
        weight: np.ndarray,
        scorer: str,
        seed: int,
        rank: int | None = None,
        *,
        leaky: bool = False,
    ) -> Decomposition:
        """The components of a weight (m, n) in the order in which a scorer keeps them. Statistics
        and gradients are those of the original model; rank: only the seeds' window needs it."""
        path = projection.path
        original = weight is self.originals[path]
        if scorer not in ("plain", "importance", RANDOM):
            if not original:
                score = Scoring(scorer, None, self.calibration(scorer, seed))(projection, weight)
                return score.decompose(weight)
            kept = self._kept((scorer, seed), dict)
            if path not in kept:
                scoring = Scoring(scorer, None, self.calibration(scorer, seed))
                kept[path] = scoring(projection, weight).decompose(weight)
            return kept[path]
        if original and path not in self._plain:
            self._plain[path] = decompose(weight)
        plain = self._plain[path] if original else decompose(weight)
        if scorer == "plain":
            return plain
        if scorer == RANDOM:
            return reordered(plain, generator(seed, path).random(len(plain.energies)))
        scores = component_importance(plain, self._gradients(seed, leaky)[path])
        window = self.settings.get("importance", {}).get("window")
        if window and rank is not None:
            scores[window * rank :] = 0.0
        return reordered(plain, scores)

    def _gradients(self, seed: int, leaky: bool) -> dict[str, np.ndarray]:
        if self.facts is None:
            raise MlxSvdError("scorer importance: takes its prompts from facts; give facts")
        wanted = self.settings.get("importance", {}).get("prompts", PROMPTS)
        count = self.places.limited(wanted)

        def make() -> dict[str, np.ndarray]:
            sentences = prompt_sentences(self.facts, seed, count, leaky=leaky)
            return mean_absolute_gradients(self.subject, sentences)

        return self._kept(("gradients", seed, leaky), make)

    def statistics(self, projection: Projection, seed: int) -> Statistics:
        """Of a projection's input, on the calibration text of this seed."""
        return self.calibration("whitened", seed).statistics(projection)

    def calibration(self, scorer: str, seed: int) -> Calibration:
        """On windows of the calibration text that the seed draws; made once, kept on disk."""
        moments = tuple(dict.fromkeys(("input", *SCORERS[scorer])))
        subject, entry = self.subject, self.settings.get("calibration")

        def make() -> Calibration:
            return drawn_calibration(
                subject.source, subject.tokenizer, entry, self.places, seed, moments
            )

        return self._kept(("calibration", seed, moments), make)

    def _kept(self, key: tuple, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
            while len(self._made) > _KEPT:
                self._made.popitem(last=False)
        self._made.move_to_end(key)
        return self._made[key]


def generator(seed: int, path: str) -> np.random.Generator:
    """Random numbers of one projection, the same in whatever order projections come."""
    return np.random.default_rng([seed, zlib.crc32(path.encode())])
