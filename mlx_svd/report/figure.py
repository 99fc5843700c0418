"""Empty figures and their files: what all plots share. matplotlib is an extra."""

from pathlib import Path
from typing import TYPE_CHECKING

from mlx_svd.checkpoint.disk import disk_errors
from mlx_svd.errors import MlxSvdError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FORMATS = (".png", ".svg", ".pdf")
_PANEL = (4.6, 3.4)  # inches


def new_figure(title: str, rows: int = 1, columns: int = 1) -> "tuple[Figure, list]":
    """(figure, its rows * columns axes in reading order).

    Drawn without a display and without pyplot's global state. Raises MlxSvdError if matplotlib is
    not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MlxSvdError(
            "plots need matplotlib, which is not installed: pip install 'mlx-svd[plot]'"
        ) from error
    figure = Figure(figsize=(_PANEL[0] * columns, _PANEL[1] * rows), layout="constrained")
    figure.suptitle(title)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def check_plot_path(path: Path) -> None:
    """Raise MlxSvdError for a file ending that is no picture's, before any work is done."""
    if path.suffix.lower() not in _FORMATS:
        raise MlxSvdError(f"{path}: a plot ends in {', '.join(_FORMATS)}; name it so")


def save_figure(figure: "Figure", path: Path) -> None:
    """Write the picture; its ending says the format."""
    check_plot_path(path)
    with disk_errors(path.parent, "--plot"):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
