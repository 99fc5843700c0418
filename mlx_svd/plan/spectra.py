"""The energies of the components of every projection that an energy policy asks about."""

from collections.abc import Callable, Iterator

import mlx.core as mx
import numpy as np

from mlx_svd.calibrate.scorers import Scoring
from mlx_svd.linalg.spectrum import component_energies
from mlx_svd.parallel import default_workers, ordered_map
from mlx_svd.source.families import Projection
from mlx_svd.source.source import Source


def head_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """(m, n) -> (heads, m / heads, n): the rows of each head; heads = 1: the whole matrix."""
    return weight.reshape(heads, -1, weight.shape[1])


def projection_weights(source: Source, paths: set[str]) -> Iterator[tuple[Projection, np.ndarray]]:
    """Projections and their weights (m, n) float32, read one module at a time."""
    stream = source.stream()
    for linear in source.linears:
        if not any(p.path in paths for p in linear.projections):
            continue
        parts = linear.split(stream.take(f"{linear.path}.weight"))
        for projection in linear.projections:
            part = parts.pop(projection.name)
            if projection.path in paths:
                yield projection, np.array(part.astype(mx.float32))


def measure_spectra(
    source: Source,
    wanted: dict[str, int],
    scoring: Scoring,
    advance: Callable[[str], None] = lambda path: None,
) -> dict[str, list[np.ndarray]]:
    """Projection path -> one spectrum for the matrix, or one for each head.

    wanted: path -> 1 for the whole matrix, or the number of heads; advance: told each path when
    it is done. Weights are read one at a time. The energies are those of the scorer.
    """

    def measure(item: tuple[Projection, np.ndarray]) -> tuple[str, list[np.ndarray]]:
        projection, weight = item
        heads = head_rows(weight, wanted[projection.path])
        if scoring.scorer == "plain":
            return projection.path, [component_energies(head) for head in heads]
        scored, rows = scoring(projection, weight), len(heads[0])
        parts = [scored.rows(slice(i * rows, (i + 1) * rows)) for i in range(len(heads))]
        spectra = [p.decompose(h).energies for p, h in zip(parts, heads, strict=True)]
        return projection.path, spectra

    spectra = {}
    for path, energies in ordered_map(
        measure, projection_weights(source, set(wanted)), default_workers()
    ):
        spectra[path] = energies
        advance(path)
    return spectra
