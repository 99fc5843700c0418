"""Batches shared between the processes of ``mlx.launch``.

Whole batches go to one process or the other, never parts of them: every batch is computed as one
process alone would compute it, and its records travel as the text that goes into the file. So the
numbers are the same bits, however many processes there are.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_svd.errors import MlxSvdError


class Processes:
    """The processes of this run: one, or those that mlx.launch started."""

    def __init__(self):
        self.group = mx.distributed.init()
        self.size, self.rank = self.group.size(), self.group.rank()

    @property
    def first(self) -> bool:
        """This process writes files and prints."""
        return self.rank == 0

    def from_first(self, function: Callable[[], Any]) -> Any:
        """What the function returns in the first process, in all of them; JSON's types.

        Files of a run are on that process's machine only. If it fails, all do.
        """
        return self._together(function if self.first else None)[0]["result"]

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in their order; JSON's types."""
        if self.size == 1:
            return [value]
        data = np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)
        lengths = self._all(np.array([len(data)], dtype=np.uint32))[:, 0]
        padded = np.zeros(int(lengths.max()), dtype=np.uint8)
        padded[: len(data)] = data
        rows = self._all(padded)
        return [json.loads(row[:n].tobytes()) for row, n in zip(rows, lengths, strict=True)]

    def _all(self, array: np.ndarray) -> np.ndarray:
        """(processes, ...) of an array that has the same shape in all of them."""
        # On the CPU: the ring exchanges what is in memory, also beside a GPU.
        parts = mx.distributed.all_gather(mx.array(array)[None], group=self.group, stream=mx.cpu)
        return np.array(parts)

    def run(self, batches: Sequence[int], work: Callable[[int], Any]) -> Iterator[tuple[int, Any]]:
        """(batch, work(batch)) of all batches, in their order, in every process.

        The processes take turns and exchange results after every turn. If one fails, all do.
        """
        for start in range(0, len(batches), self.size):
            turn = batches[start : start + self.size]
            own = partial(work, turn[self.rank]) if self.rank < len(turn) else None
            found = self._together(own)
            yield from ((b, each["result"]) for b, each in zip(turn, found, strict=False))

    def _together(self, function: Callable[[], Any] | None) -> list[dict[str, Any]]:
        """What the function returns ({} where a process has none) in every process.

        An error in one is raised in all, or they would wait for it: where it happened as it is,
        elsewhere as MlxSvdError.
        """
        found, failure = {}, None
        try:
            found = {"result": function()} if function else {}
        except Exception as error:
            if self.size == 1:
                raise
            said = str(error) if isinstance(error, MlxSvdError) else repr(error)
            found, failure = {"error": said}, error
        gathered = self.gather(found)
        if failure:
            raise failure
        for rank, each in enumerate(gathered):
            if "error" in each:
                raise MlxSvdError(f"process {rank}: {each['error']}")
        return gathered
