"""Independent matrices at the same time: a bounded map over threads, one BLAS thread each.

LAPACK's eigen-solvers hardly gain from more BLAS threads, but several matrices side by side do.
One thread for each also makes the result independent of the number of workers.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from threadpoolctl import threadpool_limits

Item = TypeVar("Item")
Result = TypeVar("Result")


def default_workers() -> int:
    """One for each core, at most 4: each holds several copies of its matrix in float64."""
    return max(1, min(4, os.cpu_count() or 1))


def ordered_map(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Iterator[Result]:
    """function(item) for each item, in order; at most ``workers`` items exist at any time."""
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(workers) as pool:
        running: deque = deque()
        try:
            for item in items:
                running.append(pool.submit(function, item))
                del item
                if len(running) == workers:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()
