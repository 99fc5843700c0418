"""Picture of an experiment: its primary metric and the differences, from results.json."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_svd.errors import MlxSvdError
from mlx_svd.report.figure import new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Inches of a line, and of title and axis.
_LINE, _AROUND, _WIDTH = 0.24, 1.2, 7.0


def experiment_figure(results: dict[str, Any]) -> "Figure":
    """Left: the primary metric of each condition with its interval over items; right: its
    differences (ratios of perplexities), with the intervals over items, and over seeds in grey.
    Raises MlxSvdError for results without values."""
    metric = results["primary"]
    cells = [c for c in results["cells"] if c["metric"] == metric and c["value"] is not None]
    pairs = [c for c in results["comparisons"] if c["metric"] == metric and c["value"] is not None]
    if not cells:
        raise MlxSvdError(f"{results['experiment']}: no run measured {metric}, nothing to draw")
    figure, (values, differences) = new_figure(results["title"], columns=2)
    figure.set_size_inches(2 * _WIDTH, _AROUND + _LINE * max(len(cells), len(pairs)))
    _lines(values, [c["condition"] for c in cells], f"{metric}, 95 % over items")
    _points(values, cells, [c["over_items"] for c in cells], "C0")
    ratio = any(c["scale"] == "exp" for c in pairs)
    sign = "/" if ratio else "-"
    labels = [f"{c['b']}  {sign}  {c['a']}" for c in pairs]
    _lines(differences, labels, f"{metric}, b {sign} a; grey: over seeds")
    over_seeds = [(c["seeds_low"], c["seeds_high"]) for c in pairs]
    _points(differences, pairs, over_seeds, "0.7", width=4)
    _points(differences, pairs, [(c["items_low"], c["items_high"]) for c in pairs], "C1")
    differences.axvline(1 if ratio else 0, color="0.5", linewidth=0.8)
    for axes, shown in ((values, cells), (differences, pairs)):
        if shown and all(entry["scale"] == "exp" for entry in shown):
            axes.set_xscale("log")
    return figure


def plot_experiment(results: dict[str, Any], path: Path) -> None:
    """Write the picture; its ending says the format."""
    save_figure(experiment_figure(results), path)


def _lines(axes, labels: list[str], title: str) -> None:
    """One line for each label, the first on top."""
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlabel(title)
    axes.grid(axis="x", linewidth=0.3)


def _points(axes, entries: list[dict], intervals: list, color: str, width: float = 1.2) -> None:
    """Values with the ends of their intervals; None: no such end."""
    for line, ends in enumerate(intervals):
        if None not in ends:
            axes.plot(ends, (line, line), color=color, linewidth=width, zorder=1)
    x = np.array([entry["value"] for entry in entries])
    axes.plot(x, np.arange(len(x)), "o", color=color, markersize=3, zorder=2)
