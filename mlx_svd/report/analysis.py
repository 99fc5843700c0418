"""Pictures of the results of ``mlx-svd analyze``, from their saved JSON values alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_svd.errors import MlxSvdError
from mlx_svd.report.cliff_figure import cliff_figure
from mlx_svd.report.depth_figure import depth_figure
from mlx_svd.report.figure import save_figure
from mlx_svd.report.layers_figure import layers_figure
from mlx_svd.report.spectrum_figure import spectrum_figure

FIGURES: dict[str, Callable] = {
    "spectrum": spectrum_figure,
    "layers": layers_figure,
    "cliff": cliff_figure,
    "depth": depth_figure,
}


def plot_analysis(result: dict[str, Any], path: Path) -> None:
    """Draw a result as saved. Raises MlxSvdError for one that is unknown."""
    kind = result.get("analysis")
    if kind not in FIGURES:
        raise MlxSvdError(f"no picture for analysis {kind!r}; use {', '.join(FIGURES)}")
    save_figure(FIGURES[kind](result), path)
