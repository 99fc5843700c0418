"""What each projection could become: form, rank and bits with exact bytes and expected loss."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import mlx.core as mx
import numpy as np

from mlx_svd import __version__
from mlx_svd.calibrate.fit import Form, dense, fit, rounding_to
from mlx_svd.calibrate.scorers import Score, Scoring
from mlx_svd.calibrate.statistics import Calibration
from mlx_svd.checkpoint.disk import replace_file
from mlx_svd.checkpoint.layout import (
    PIVOT_MIN_BITS,
    Quantization,
    linear_tensors,
    total_bytes,
)
from mlx_svd.parallel import default_workers, ordered_map
from mlx_svd.plan.choices import UNQUANTIZED_BITS, Choices
from mlx_svd.plan.forms import Storage
from mlx_svd.plan.plan import target_dtype
from mlx_svd.plan.spectra import projection_weights
from mlx_svd.source.families import Projection
from mlx_svd.source.source import Source

# Quantized ranks are multiples of the group size; at most this many are measured per matrix.
_MEASURED_RANKS = 8
# Noise of quantized factors is measured at these bits; at others it follows the noise of the
# dense matrix, to which it is proportional.
_NOISE_BITS = 4
# Raised when candidates are measured differently, so that older ones are not read again.
_CANDIDATES_FORMAT = 1
_CORRECTION_RANKS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
_FACTOR_BITS, _FACTOR_GROUP = 8, 32


@dataclass(frozen=True)
class Candidate:
    """One way to store a projection. rank: None = not truncated; loss: what it is expected to
    cost, in the scorer's units."""

    form: str
    rank: int | None
    quantization: Quantization | None
    factors: Quantization | None
    nbytes: int
    loss: float


def measure_candidates(
    source: Source,
    wanted: list[Projection],
    choices: Choices,
    scoring: Scoring,
    dtype: str | None,
    advance: Callable[[str], None] = lambda path: None,
) -> dict[str, list[Candidate]]:
    """Candidates of every wanted projection, by path; one decomposition serves all ranks and bits.

    With a calibration they are kept in its folder, so that the next budget costs seconds.
    """
    cache = _cache_file(choices, scoring, dtype, [p.path for p in wanted])
    if cache is not None and cache.is_file():
        for projection in wanted:
            advance(projection.path)
        return _read(cache)

    def measure(item: tuple[Projection, np.ndarray]) -> tuple[str, list[Candidate]]:
        p, weight = item
        stored = target_dtype(source.tensors[f"{p.module}.weight"][1], dtype)
        return p.path, _Measuring(p, weight, scoring(p, weight), choices, stored).candidates()

    weights = projection_weights(source, {p.path for p in wanted})
    found = {}
    for path, candidates in ordered_map(measure, weights, default_workers()):
        found[path] = candidates
        advance(path)
    if cache is not None:
        _write(cache, found)
    return found


def module_candidates(
    source: Source, choices: Choices, dtype: str | None, calibration: Calibration | None
) -> dict[str, list[Candidate]]:
    """Bits for the embedding and the head, whose losses the calibration has measured by running
    the model; none without a calibration of the loss."""
    found = {}
    for path, losses in (calibration.info.module_losses if calibration else {}).items():
        shape, stored = source.tensors[f"{path}.weight"]
        stored = target_dtype(stored, dtype)
        found[path] = [
            Candidate(
                "dense",
                None,
                q := choices.quantization(bits),
                None,
                total_bytes(linear_tensors(path, shape, stored, q)),
                0.0 if q is None else losses[str(bits)],
            )
            for bits in choices.bits
            if bits == UNQUANTIZED_BITS or str(bits) in losses
        ]
    return {path: options for path, options in found.items() if options}


class _Measuring:
    """The candidates of one projection W (m, n)."""

    def __init__(
        self, p: Projection, weight: np.ndarray, score: Score, choices: Choices, dtype: mx.Dtype
    ):
        self.p, self.score, self.choices, self.dtype = p, score, choices, dtype
        # Without statistics nothing can be compensated: rounding is to the nearest code.
        nearest = score.second is None
        self.rounding = replace(score, second=np.eye(p.shape[1])) if nearest else score
        self.weight = weight.astype(np.float64)
        self.d = score.decompose(self.weight)
        # What is lost when the first r components are kept.
        ends = np.cumsum(self.d.energies[::-1])[::-1]
        self.tail = np.append(ends, 0.0)
        self.noise = {bits: self._rounding_loss(bits) for bits in choices.bits}
        self.dense_bytes = self._nbytes("dense", None, None)

    def candidates(self) -> list[Candidate]:
        found = [
            self._candidate("dense", None, self.choices.quantization(bits), None, loss)
            for bits, loss in self.noise.items()
            if loss is not None
        ]
        for form in self.choices.forms:
            if form in ("factored", "pivot"):
                found += self._unquantized(form) if UNQUANTIZED_BITS in self.noise else []
                found += self._quantized(form)
            elif form == "corrected":
                found += self._corrected()
        return found

    def _candidate(self, form, rank, q, factors, loss: float) -> Candidate:
        nbytes = self._nbytes(form, q, factors, rank or 0)
        return Candidate(form, rank, q, factors, nbytes, float(loss))

    def _nbytes(self, form, q, factors, rank: int = 0) -> int:
        return Storage(self.p, self.dtype, q, factors).nbytes(form, (rank,))

    def _fits(self) -> bool:
        return self.p.shape[1] % self.choices.group_size == 0

    def _rounding_loss(self, bits: int) -> float | None:
        """Loss of the dense matrix at these bits; None where it cannot be quantized."""
        if bits == UNQUANTIZED_BITS:
            return 0.0
        return self._error("dense", None, self.choices.quantization(bits)) if self._fits() else None

    def _error(self, form: str, rank: int | None, q: Quantization | None) -> float:
        """Loss of the matrix as it would be stored."""
        return self.score.loss(self._missed(form, rank, q))

    def _missed(self, form: str, rank: int | None, q: Quantization | None) -> np.ndarray:
        """W minus what a reader would get back, (m, n)."""
        stored = Form(form, rank, q, None, rounding_to(self.dtype))
        return self.weight - dense(fit(self.weight, stored, self.rounding, self.p.path))

    def _unquantized(self, form: str) -> list[Candidate]:
        ranks = range(self.choices.rank_multiple, min(self.p.shape), self.choices.rank_multiple)
        found = [self._candidate(form, r, None, None, self.tail[r]) for r in ranks]
        return [c for c in found if c.nbytes < self.dense_bytes]

    def _quantized(self, form: str) -> list[Candidate]:
        allowed = [
            bits
            for bits in self.noise
            if bits != UNQUANTIZED_BITS and (form == "factored" or bits >= PIVOT_MIN_BITS)
        ]
        if not allowed or not self._fits():
            return []
        # Measured where the noise is neither lost in rounding nor out of proportion.
        at = min(allowed, key=lambda bits: abs(bits - _NOISE_BITS))
        found = []
        for rank in self._ranks():
            q = self.choices.quantization(at)
            noise = max(0.0, self._error(form, rank, q) - self.tail[rank])
            for bits in allowed:
                loss = self.tail[rank] + noise * self.noise[bits] / max(self.noise[at], 1e-300)
                found.append(
                    self._candidate(form, rank, self.choices.quantization(bits), None, loss)
                )
        return found

    def _ranks(self) -> list[int]:
        """Multiples of the group size below full rank, at most a fixed number, evenly spread."""
        ranks = np.arange(self.choices.group_size, min(self.p.shape), self.choices.group_size)
        if len(ranks) > _MEASURED_RANKS:
            ranks = ranks[np.linspace(0, len(ranks) - 1, _MEASURED_RANKS).round().astype(int)]
        return ranks.tolist()

    def _corrected(self) -> list[Candidate]:
        found = []
        if not self._fits():
            return found
        total = self.score.loss(self.weight)
        ranks = [r for r in _CORRECTION_RANKS if r < min(self.p.shape) // 2]
        for bits in self.noise:
            if bits >= PIVOT_MIN_BITS:  # nothing worth correcting is left
                continue
            q = self.choices.quantization(bits)
            energies = self.score.decompose(self._missed("dense", None, q)).energies
            tail = np.append(np.cumsum(energies[::-1])[::-1], 0.0)
            noise = self.noise.get(_FACTOR_BITS)
            for rank in ranks:
                found.append(self._candidate("corrected", rank, q, None, tail[rank]))
                if noise is not None and rank % _FACTOR_GROUP == 0:
                    both = rank % 64 == 0 and self.p.shape[1] % 64 == 0
                    group = 64 if both else _FACTOR_GROUP
                    factors = Quantization(group, _FACTOR_BITS)
                    share = noise / total if total > 0 else 0.0
                    loss = tail[rank] + 2 * share * (tail[0] - tail[rank])
                    found.append(self._candidate("corrected", rank, q, factors, loss))
        return [c for c in found if c.nbytes < self.dense_bytes]


def _cache_file(choices: Choices, scoring: Scoring, dtype: str | None, paths: list[str]):
    if scoring.calibration is None:
        return None
    key = [_CANDIDATES_FORMAT, __version__, scoring.calibration.info.digest]
    key += [asdict(choices), scoring.scorer, scoring.window, dtype, paths]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    return scoring.calibration.folder / f"candidates-{digest}.json"


def _write(path, found: dict[str, list[Candidate]]) -> None:
    content = {p: [asdict(c) for c in candidates] for p, candidates in found.items()}
    replace_file(path, json.dumps(content).encode())


def _read(path) -> dict[str, list[Candidate]]:
    def quantization(entry: dict | None) -> Quantization | None:
        return Quantization(**entry) if entry else None

    return {
        p: [
            Candidate(
                **{
                    **c,
                    "quantization": quantization(c["quantization"]),
                    "factors": quantization(c["factors"]),
                }
            )
            for c in candidates
        ]
        for p, candidates in json.loads(path.read_bytes()).items()
    }
