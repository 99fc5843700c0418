"""Ranks for a byte budget from the gradient: the zero-sum selection (ZS-SVD, arXiv 2602.02848).

To first order, leaving out component i changes the loss by -<G, up_i down_i>, which may be
negative. Every projection offers its cheapest remaining component; the one with the smallest
change whose sign opposes the running sum goes next, so that the changes cancel. At deep compression
the first order no longer holds and the selection collapses: the guard estimates the loss of both
to second order and takes the greedy budget when the selection costs too much.
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mlx_svd.calibrate.scorers import Scoring
from mlx_svd.errors import MlxSvdError
from mlx_svd.parallel import default_workers, ordered_map
from mlx_svd.plan.spectra import projection_weights
from mlx_svd.source.families import Projection
from mlx_svd.source.source import Source

# The selection is kept while its second-order cost is at most this multiple of the greedy's.
GUARD = 1.5


@dataclass(frozen=True)
class Components:
    """Of one projection, in the order in which they are kept: changes (k,) of the loss to first
    order and costs (k,) to second order, in nats a token; nbytes (k + 1,) by rank, the last dense.
    """

    costs: np.ndarray
    changes: np.ndarray
    nbytes: np.ndarray


def measure_components(
    source: Source,
    wanted: list[Projection],
    scoring: Scoring,
    nbytes: Callable[[Projection, int | None], int],
    advance: Callable[[str], None] = lambda path: None,
) -> dict[str, Components]:
    """Components of every wanted projection, by path. nbytes: of a projection at a rank, None for
    dense. The calibration must hold output and gradient moments."""

    def measure(item) -> tuple[str, Components]:
        p, weight = item
        d = scoring(p, weight).decompose(weight.astype(np.float64))
        known = scoring.calibration.statistics(p)
        up, down = d.factors(len(d.energies))
        changes = -np.einsum("mk,mk->k", up, known.gradient @ down.T)
        # 1/2 tr(L E C E^T) of each component alone; whitened ones have no cross terms.
        outputs = np.einsum("mk,mk->k", up, known.output_second @ up)
        costs = outputs * np.einsum("kn,kn->k", down, down @ known.second) / 2
        sizes = [nbytes(p, rank) for rank in range(len(d.energies))] + [nbytes(p, None)]
        return p.path, Components(costs, changes, np.array(sizes))

    weights = projection_weights(source, {p.path for p in wanted})
    found = {}
    for path, components in ordered_map(measure, weights, default_workers()):
        found[path] = components
        advance(path)
    return found


def zero_sum_ranks(components: dict[str, Components], limit: int) -> dict[str, int | None]:
    """Path -> rank, None = stays dense, at most ``limit`` bytes in all.

    Raises MlxSvdError when even rank 1 everywhere is over the limit.
    """
    ranks = {path: len(c.costs) for path, c in components.items()}
    total = sum(int(c.nbytes[-1]) for c in components.values())
    # Smallest change first, one heap for each sign.
    heaps: tuple[list, list] = ([], [])

    def offer(path: str) -> None:
        if ranks[path] > 1:
            change = float(components[path].changes[ranks[path] - 1])
            heapq.heappush(heaps[change >= 0], (abs(change), path))

    for path in components:
        offer(path)
    running = 0.0
    while total > limit:
        heap = heaps[running < 0] or heaps[running >= 0]
        if not heap:
            raise MlxSvdError(
                f"the budget of {limit:,} bytes for the projections is below the {total:,} that "
                "rank 1 takes; raise it"
            )
        _, path = heapq.heappop(heap)
        c = components[path]
        running += float(c.changes[ranks[path] - 1])
        before = min(int(c.nbytes[ranks[path]]), int(c.nbytes[-1]))
        ranks[path] -= 1
        total += min(int(c.nbytes[ranks[path]]), int(c.nbytes[-1])) - before
        offer(path)
    return {
        path: rank if components[path].nbytes[rank] < components[path].nbytes[-1] else None
        for path, rank in ranks.items()
    }


def second_order_cost(components: dict[str, Components], ranks: dict[str, int | None]) -> float:
    """Estimated loss of all components that are left out, in nats a token."""
    return sum(
        float(components[path].costs[rank:].sum())
        for path, rank in ranks.items()
        if rank is not None
    )
