"""The best choice for every projection within a number of bytes.

Each projection has candidates (bytes, expected loss). At a price per byte every projection takes
the candidate with the least loss + price * bytes, on its own; the price is raised until the total
fits (Lagrangian relaxation of the multiple-choice knapsack, the greedy over the convex hulls).
What is left over is spent on the upgrades that gain most.
"""

import math
import re
from dataclasses import dataclass

import numpy as np

from mlx_svd.errors import MlxSvdError
from mlx_svd.plan.candidates import Candidate

_STEPS = 100
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@dataclass(frozen=True)
class Budget:
    """Exactly one of: keep_bytes: share of the touched matrices' bytes; target_size: bytes of the
    whole checkpoint's tensors; target_bpw: bits per weight of the whole checkpoint."""

    keep_bytes: float | None = None
    target_size: int | None = None
    target_bpw: float | None = None

    def __post_init__(self):
        given = [name for name, value in vars(self).items() if value is not None]
        options = [f"--{name.replace('_', '-')}" for name in given]
        if len(given) != 1:
            raise MlxSvdError(
                f"{' and '.join(options)}: contradictory limits; give one"
                if given
                else "a budget needs --keep-bytes, --target-size or --target-bpw"
            )
        if getattr(self, given[0]) <= 0:
            raise MlxSvdError(f"{options[0]} {getattr(self, given[0])}: must be above 0")


def parse_budget(
    keep_bytes: float | None = None,
    target_size: str | int | None = None,
    target_bpw: float | None = None,
) -> Budget:
    """A budget from numbers as users write them: target_size may be "3.2GB" (10^9 bytes)."""
    for name, value in (("keep_bytes", keep_bytes), ("target_bpw", target_bpw)):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (number and math.isfinite(value)):
            raise MlxSvdError(f"{name}: {value!r} is not a number")
    return Budget(keep_bytes, None if target_size is None else _bytes(target_size), target_bpw)


def _bytes(text: str | int) -> int:
    match = re.fullmatch(r"\s*([0-9.]+)\s*([kKMGT]?)B?\s*", str(text))
    try:
        return int(float(match[1]) * _UNITS[match[2].upper()])
    except (TypeError, ValueError) as error:
        raise MlxSvdError(f"--target-size {text}: give bytes, or 800MB, 3.2GB") from error


def choose(
    candidates: dict[str, list[Candidate]], limit: int, what: str = "the budget"
) -> dict[str, Candidate]:
    """Path -> the candidate to take, at most ``limit`` bytes in all.

    Raises MlxSvdError that says the smallest reachable size when the limit is below it.
    """
    smallest = sum(min(c.nbytes for c in options) for options in candidates.values())
    if smallest > limit:
        raise MlxSvdError(
            f"{what}: {limit:,} bytes for the projections is below the {smallest:,} that can be "
            "reached; raise it, allow fewer bits with --bits, or touch more with --projections"
        )
    tables = {
        path: (
            np.array([c.nbytes for c in options], dtype=np.float64),
            np.array([c.loss for c in options]),
        )
        for path, options in candidates.items()
    }

    def at(price: float) -> dict[str, int]:
        return {path: int(np.argmin(loss + price * size)) for path, (size, loss) in tables.items()}

    def total(chosen: dict[str, int]) -> float:
        return sum(tables[path][0][index] for path, index in chosen.items())

    cheap, dear = 0.0, _highest_price(tables)
    if total(at(cheap)) <= limit:
        dear = cheap
    for _ in range(_STEPS):
        if dear <= cheap:
            break
        middle = (cheap * dear) ** 0.5 if cheap > 0 else dear * 1e-3
        if total(at(middle)) > limit:
            cheap = middle
        else:
            dear = middle
    chosen = at(dear)
    if total(chosen) > limit:  # equal losses hide the smallest sizes from any price
        chosen = {path: int(np.argmin(size)) for path, (size, _) in tables.items()}
    _spend(tables, chosen, limit - total(chosen))
    return {path: candidates[path][index] for path, index in chosen.items()}


def _highest_price(tables) -> float:
    """A price at which every projection takes its smallest candidate."""
    price = 1e-30
    for size, loss in tables.values():
        smallest = int(np.argmin(size))
        more = size > size[smallest]
        if more.any():
            gain = (loss[smallest] - loss[more]) / (size[more] - size[smallest])
            price = max(price, float(gain.max()))
    return 2 * price


def _spend(tables, chosen: dict[str, int], left: float) -> None:
    """Upgrade projections, the largest gain first, while they fit into ``left`` bytes."""
    while True:
        best = None
        for path, (size, loss) in tables.items():
            current = chosen[path]
            gain = loss[current] - loss
            gain = np.where(size - size[current] <= left, gain, -np.inf)
            index = int(np.argmax(gain))
            if gain[index] > 0 and (best is None or gain[index] > best[0]):
                best = (float(gain[index]), path, index)
        if best is None:
            return
        _, path, index = best
        left -= tables[path][0][index] - tables[path][0][chosen[path]]
        chosen[path] = index
