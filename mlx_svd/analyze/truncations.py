"""Compress single projections of a loaded model, measure, and put the originals back.

Every matrix (or head) is decomposed once, for all ranks and components asked for.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from mlx_svd.analyze.subject import Subject
from mlx_svd.calibrate.scorers import Scoring
from mlx_svd.errors import MlxSvdError
from mlx_svd.linalg.truncate import Decomposition
from mlx_svd.plan.policy import RankPolicy
from mlx_svd.plan.spectra import head_rows
from mlx_svd.source.families import Projection

# Decompositions kept at a time; a model of 7B parameters would need more than the model itself.
CACHE_BYTES = 4 << 30

# One rank for the matrix, or one for each head.
Ranks = int | Sequence[int]


@dataclass
class Truncations:
    """The projections of a model at any rank, under a scorer.

    scoring: which components are kept first (plain: the largest singular values); per_head: cut q,
    k and v into heads with a rank each, as seed 000 does; o, gate, up and down stay whole.
    """

    subject: Subject
    scoring: Scoring = field(default_factory=Scoring)
    per_head: bool = False
    cache_bytes: int = CACHE_BYTES
    _kept: OrderedDict = field(default_factory=OrderedDict, init=False, repr=False)

    def heads(self, projection: Projection) -> int:
        """Parts of the matrix that have a rank of their own: its heads, or 1."""
        return projection.heads if self.per_head and projection.heads else 1

    def limit(self, projection: Projection) -> int:
        """Full rank of each part: min(rows of the part, n)."""
        return min(projection.shape[0] // self.heads(projection), projection.shape[1])

    def rank(self, projection: Projection, policy: RankPolicy) -> Ranks:
        """The rank, or the heads' ranks where they have their own, that a policy asks for."""
        depth = projection.layer / max(1, self.subject.layers - 1)
        ranks = tuple(
            policy.choose(self.limit(projection), depth, lambda d=d: d.energies)
            for d in self.decompositions(projection)
        )
        return ranks if self.heads(projection) > 1 else ranks[0]

    def decompositions(self, projection: Projection, heads: int = 0) -> list[Decomposition]:
        """Of each head, or of the matrix; heads: into how many parts, 0 = as ``heads`` says.

        Of the original weights: RuntimeError for the first time while they are replaced.
        """
        heads = heads or self.heads(projection)
        key = (projection.path, heads)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        if self.subject.linear_of[projection.path].path in self.subject.changed:
            raise RuntimeError(f"{projection.path}: is replaced; decompose the original")
        weight = self.subject.weight(projection.path)
        score = self.scoring(projection, weight)
        parts, rows = head_rows(weight, heads), len(weight) // heads
        scores = [score.rows(slice(i * rows, (i + 1) * rows)) for i in range(heads)]
        found = [
            (s if heads > 1 else score).decompose(w) for s, w in zip(scores, parts, strict=True)
        ]
        self._kept[key] = found
        while len(self._kept) > 1 and sum(map(_nbytes, self._kept.values())) > self.cache_bytes:
            self._kept.popitem(last=False)
        return found

    def truncated(self, projection: Projection, ranks: Ranks) -> np.ndarray:
        """The projection (m, n) float64 at a rank, or at one rank for each head.

        At full rank it is the product of all components, not the weight itself: what is left of
        the difference is the rounding of the method. Raises MlxSvdError for an impossible rank.
        """
        ranks = (ranks,) if isinstance(ranks, int) else tuple(ranks)
        heads = len(ranks)
        if heads not in (1, projection.heads):
            raise MlxSvdError(
                f"{projection.path}: {heads} ranks for {projection.heads} heads; give one for each"
            )
        parts = self.decompositions(projection, heads)
        limit = len(parts[0].energies)
        for rank in ranks:
            if not 1 <= rank <= limit:
                raise MlxSvdError(f"{projection.path}: rank {rank} is not in 1..{limit}")
        return np.concatenate([_at_rank(d, int(r)) for d, r in zip(parts, ranks, strict=True)])

    @contextmanager
    def compressed(self, ranks: Mapping[str, Ranks]) -> Iterator[None]:
        """The model with these projections (path -> rank or heads' ranks) at these ranks."""
        chosen = {
            path: self.truncated(self.subject.projections[path], r) for path, r in ranks.items()
        }
        with replaced(self.subject, chosen):
            yield


@contextmanager
def replaced(subject: Subject, weights: Mapping[str, np.ndarray]) -> Iterator[None]:
    """The model with other weights (m, n) in some projections, by path; the originals, bit by bit,
    come back at the end. Biases stay. The rows of the other parts of a fused module stay too."""
    linears = {subject.linear_of[path].path: subject.linear_of[path] for path in weights}
    if again := subject.changed & set(linears):
        raise RuntimeError(f"{min(again)}: is replaced already")
    originals = {path: subject.modules[path].weight for path in linears}
    subject.changed.update(linears)
    try:
        for path, linear in linears.items():
            parts = linear.split(originals[path])
            for p in linear.projections:
                if p.path in weights:
                    new = mx.array(weights[p.path].astype(np.float32))
                    parts[p.name] = new.astype(originals[path].dtype)
            subject.modules[path].weight = linear.join(parts)
        mx.eval([subject.modules[path].weight for path in linears])
        yield
    finally:
        for path, weight in originals.items():
            subject.modules[path].weight = weight
        subject.changed.difference_update(linears)


def _at_rank(d: Decomposition, rank: int) -> np.ndarray:
    if rank < len(d.energies):
        return d.truncated(rank)
    up, down = d.factors(rank)
    return up @ down


def _nbytes(parts: list[Decomposition]) -> int:
    return sum(d.weight.nbytes + d.basis.nbytes for d in parts)
