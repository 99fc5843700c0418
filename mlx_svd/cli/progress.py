"""Progress bars with the time left, on standard error."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mlx_svd.cli.tables import progress_console


@contextmanager
def progress(title: str, work: dict[str, float]) -> Iterator[Callable[[str], None]]:
    """Gives a function to be told each finished name; ``work`` weighs the names."""
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[name]}"),
    ]
    console = progress_console()
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(title, total=sum(work.values()), name="")
        yield lambda name: bar.update(task, advance=work.get(name, 0.0), name=name)


def unit_work(plan) -> dict[str, float]:
    """Rough seconds of each unit of a plan: k^3 for a decomposition, bytes for reading and
    writing. Only ratios matter."""
    work = {}
    parts: dict[str, list] = {}
    for p in plan.projections:
        parts.setdefault(p.projection.module, []).append(p)
    for unit in plan.units:
        copied = sum(spec.nbytes for spec in unit.tensors) / 2e8
        solved = sum(
            max(1, len(p.ranks)) * p.limit**2 * (10 * p.limit + 4 * max(p.projection.shape)) / 5e10
            for p in parts.get(unit.path, [])
            if p.changed
        )
        work[unit.path] = copied + solved
    return work


class StepProgress:
    """Progress bar of a training, begun when the number of steps is known, and a line for each step
    that ``said`` has something to say about. ``stack`` ends the bar."""

    def __init__(self, stack: ExitStack, title: str, said: Callable[[Any], str | None]):
        self._stack, self._title, self._said = stack, title, said
        self._advance, self._done = None, 0

    def __call__(self, step: Any) -> None:
        if self._advance is None:
            work = {f"step {n}": 1.0 for n in range(1, step.steps + 1)}
            self._advance = self._stack.enter_context(progress(self._title, work))
            if step.step:
                progress_console().print(f"continuing after step {step.step} of {step.steps}")
        while self._done < step.step:
            self._done += 1
            self._advance(f"step {self._done}")
        if line := self._said(step):
            progress_console().print(f"step {step.step} of {step.steps}: {line}")
