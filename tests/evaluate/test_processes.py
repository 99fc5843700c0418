"""Processes that share work: what fails in one stops all, and names where."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.processes import Processes


class Member(Processes):
    """One of several processes, here a thread; it exchanges values through a list."""

    def __init__(self, rank, size, values, barrier):
        self.rank, self.size, self._values, self._barrier = rank, size, values, barrier

    def gather(self, value):
        self._values[self.rank] = value
        self._barrier.wait(timeout=20)
        found = list(self._values)
        self._barrier.wait(timeout=20)
        return found


def in_all(function, size=3):
    """What the function of a member returns or raises, in every one of them."""
    values, barrier = [None] * size, threading.Barrier(size)
    members = [Member(rank, size, values, barrier) for rank in range(size)]
    with ThreadPoolExecutor(size) as pool:
        done = [pool.submit(function, member) for member in members]
    return [future.exception() or future.result() for future in done]


def test_batches_come_in_their_order_in_every_process():
    found = in_all(lambda p: list(p.run([4, 7, 1, 9], lambda batch: [p.rank, batch])))
    assert found == [[(4, [0, 4]), (7, [1, 7]), (1, [2, 1]), (9, [0, 9])]] * 3


@pytest.mark.parametrize("error", [MlxSvdError("item 7: NaN"), TypeError("a defect")])
def test_an_error_in_one_process_is_raised_in_all(error):
    def work(batch):
        if batch == 7:
            raise error
        return batch

    first, second, third = in_all(lambda p: list(p.run([4, 7, 1, 9], work)))
    assert second is error
    for other in (first, third):
        assert isinstance(other, MlxSvdError)
        assert str(other).startswith("process 1: ")
        assert str(error) in str(other)


def test_what_fails_in_the_first_process_stops_the_others():
    def write():
        raise OSError("disk is gone")

    first, second, third = in_all(lambda p: p.from_first(write))
    assert isinstance(first, OSError)
    assert isinstance(second, MlxSvdError)
    assert str(second) == str(third) == "process 0: OSError('disk is gone')"


def test_only_the_first_process_runs_what_is_its_own():
    ran = []

    def read(rank):
        ran.append(rank)
        return {"rows": 3}

    assert in_all(lambda p: p.from_first(lambda: read(p.rank))) == [{"rows": 3}] * 3
    assert ran == [0]
