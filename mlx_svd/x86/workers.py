"""numpy on all cores: parts of one array side by side, each part on one thread."""

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from threadpoolctl import ThreadpoolController

Part = TypeVar("Part")


def in_parts(function: Callable[[Part], None], parts: Sequence[Part]) -> None:
    """function(part) for every part, which writes its result itself. numpy lets other threads run
    while it computes. BLAS keeps to one thread: the parts are parallel already, and its waiting
    threads would spin on the cores that MLX's own BLAS needs."""
    pool = _pool() if len(parts) > 1 else None
    quiet = _quiet(function)
    with _blas().limit(limits=1, user_api="blas"):
        for _ in pool.map(quiet, parts) if pool else map(quiet, parts):
            pass


def in_blocks(function: Callable[[slice], None], size: int, block: int) -> None:
    """function(slice) for consecutive slices of ``size`` places, ``block`` in each; a thread goes
    through neighbouring ones."""

    @_quiet
    def stretch(blocks: range) -> None:
        for start in blocks:
            function(slice(start, min(start + block, size)))

    blocks = range(0, size, block)
    pool = _pool() if len(blocks) > 1 else None
    if pool is None:
        stretch(blocks)
        return
    each = -(-len(blocks) // pool.threads)
    for _ in pool.map(stretch, [blocks[i : i + each] for i in range(0, len(blocks), each)]):
        pass


def _quiet(function: Callable[[Part], None]) -> Callable[[Part], None]:
    """NaN and infinity go on without a warning, as in MLX; who looks at the result names them."""

    def run(part: Part) -> None:
        # Each thread has settings of its own.
        with np.errstate(over="ignore", invalid="ignore"):
            function(part)

    return run


class _Pool(ThreadPoolExecutor):
    def __init__(self, threads: int):
        super().__init__(threads, thread_name_prefix="numpy")
        self.threads = threads


@functools.cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController()


@functools.cache
def _pool() -> _Pool | None:
    """As many threads as BLAS may use, which is how a machine is shared; None: one."""
    threads = max((library["num_threads"] for library in _blas().info()), default=1)
    return _Pool(threads) if threads > 1 else None
