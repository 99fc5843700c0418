"""The scorer in two processes with one BLAS thread each, as ``mlx.launch -n 2`` runs it.

The processes stay between measurements; as in ``mlx-svd evaluate`` each tokenizes everything, and
they exchange what they found after every turn of batches.
"""

import json
import multiprocessing
import os
import socket
import tempfile
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from mlx_svd.evaluate.likelihood.encode import Item

_PROCESSES = 2


class TwoProcesses:
    """Scores items in processes of their own; closed on leaving its context."""

    def __init__(self, model: Path, max_length: int):
        self.model, self.max_length = model, max_length
        self._pipes: list[Connection] = []
        self._held = ExitStack()

    def __enter__(self) -> "TwoProcesses":
        context = multiprocessing.get_context("spawn")
        folder = Path(self._held.enter_context(tempfile.TemporaryDirectory()))
        hosts = folder / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in _free_ports()]))
        started = []
        for rank in range(_PROCESSES):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(there, self.model, self.max_length), daemon=True
            )
            with _environment(
                MLX_RANK=str(rank), MLX_HOSTFILE=str(hosts), OPENBLAS_NUM_THREADS="1"
            ):
                process.start()
            there.close()
            self._pipes.append(here)
            started.append(process)
        self._held.callback(lambda: [process.join() for process in started])
        self._held.callback(lambda: [pipe.close() for pipe in self._pipes])
        for pipe in self._pipes:
            pipe.recv()
        return self

    def __exit__(self, *_) -> None:
        self._held.close()

    def scores(self, items: list[Item]) -> np.ndarray:
        """Log-likelihoods of all pairs."""
        for pipe in self._pipes:
            pipe.send(items)
        first, *_ = [pipe.recv() for pipe in self._pipes]  # both have found everything
        return first


def _serve(pipe: Connection, model: Path, max_length: int) -> None:
    """One of the processes: score what comes until the pipe is closed."""
    from mlx_svd.checkpoint.loader import load
    from mlx_svd.evaluate.likelihood.encode import encode_items
    from mlx_svd.evaluate.likelihood.scorer import Scorer
    from mlx_svd.evaluate.processes import Processes

    processes = Processes()
    if processes.size != _PROCESSES:
        raise SystemExit(f"evaluate: {processes.size} process found the other; free its port")
    loaded, tokenizer = load(model, dtype="float32")
    scorer = Scorer(loaded)
    pipe.send("ready")
    while True:
        try:
            items = pipe.recv()
        except EOFError:
            return
        encoded = encode_items(tokenizer, items, max_length)
        batches = scorer.batches(encoded, max_length)

        def work(number: int, encoded=encoded, batches=batches) -> list[list[float]]:
            found = scorer.score_batch(encoded, batches[number])
            return [scores.log_likelihoods.tolist() for scores in found]

        found: dict[int, list[float]] = {}
        for number, values in processes.run(range(len(batches)), work):
            found |= zip(batches[number].items, values, strict=True)
        pipe.send(np.concatenate([found[i] for i in range(len(encoded))]))


def _free_ports() -> list[int]:
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(_PROCESSES)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextmanager
def _environment(**values: str):
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
