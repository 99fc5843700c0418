"""Progress bars with the time left, on standard error."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

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
