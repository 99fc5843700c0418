"""How an error grows with the number of compressed layers: error = a k^p.

Seed 001 says that the errors of N layers average out, error / sqrt(N): p = -1/2. Independent errors
that add up give p = +1/2, errors of one direction p = +1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlx_svd.analyze.change_point import Bounded
from mlx_svd.errors import MlxSvdError

_RESAMPLES = 2000
_LAWS = {
    -0.5: "errors average out (error / sqrt(k))",
    0.0: "the error does not depend on the number of layers",
    0.5: "errors add up like independent ones (error * sqrt(k))",
    1.0: "errors add up in one direction (error * k)",
}


@dataclass(frozen=True)
class PowerLaw:
    """exponent p of a k^p with its 95 % bootstrap interval over windows and chains; error: the root
    mean square at each k of layers; excluded, contained: which of the laws -1/2, 0, 1/2 and 1 lie
    outside and inside the interval; residual: root mean square of the fit in natural logarithms."""

    exponent: Bounded
    layers: list[int]
    error: list[float]
    contained: list[str]
    excluded: list[str]
    residual: float
    windows: int
    chains: int


def power_law(
    squares: np.ndarray, totals: np.ndarray, layers: Sequence[int], *, seed: int = 0
) -> PowerLaw:
    """squares (C, K, N): squared error of chain c with layers[i] layers compressed on window n;
    totals (N,): what it is relative to; layers (K,): ascending. Raises MlxSvdError for fewer than
    three k, or no error."""
    chains, steps, windows = squares.shape
    if steps < 3:
        raise MlxSvdError(f"power law: {steps} numbers of layers; compress three layers or more")
    if not (squares.mean(axis=(0, 2)) > 0).all():
        raise MlxSvdError("power law: a step has no error; choose a lower rank")
    rng = np.random.default_rng(seed)
    log_k = np.log(np.asarray(layers, dtype=np.float64))
    slope = (log_k - log_k.mean()) / ((log_k - log_k.mean()) ** 2).sum()
    error = np.sqrt(squares.mean(axis=0).sum(axis=1) / totals.sum())
    value = float(slope @ np.log(error))
    drawn = []
    for _ in range(_RESAMPLES):
        w, c = rng.integers(0, windows, windows), rng.integers(0, chains, chains)
        square = squares[c].mean(axis=0)[:, w].sum(axis=1) / totals[w].sum()
        drawn.append(float(slope @ np.log(square)) / 2)
    low, high = np.quantile(drawn, (0.025, 0.975))
    inside = {p: low <= p <= high for p in _LAWS}
    fit = np.log(error).mean() + value * (log_k - log_k.mean())
    return PowerLaw(
        Bounded(value, float(low), float(high)),
        list(layers),
        error.tolist(),
        [text for p, text in _LAWS.items() if inside[p]],
        [text for p, text in _LAWS.items() if not inside[p]],
        float(np.sqrt(((np.log(error) - fit) ** 2).mean())),
        windows,
        chains,
    )
