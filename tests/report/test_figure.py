"""Empty figures and where they go."""

import sys

import pytest

from mlx_svd.errors import MlxSvdError
from mlx_svd.report.figure import new_figure, save_figure


def test_a_figure_has_the_panels_asked_for_and_its_file_the_format_of_its_ending(tmp_path):
    figure, axes = new_figure("two by three", 2, 3)
    assert len(axes) == 6
    axes[0].plot([1, 2], [3, 4])
    save_figure(figure, tmp_path / "new" / "a.png")
    save_figure(figure, tmp_path / "new" / "a.svg")
    assert (tmp_path / "new" / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "new" / "a.svg").read_text()


def test_a_plot_of_no_picture_format_is_refused(tmp_path):
    with pytest.raises(MlxSvdError, match=r"a\.txt: a plot ends in \.png"):
        save_figure(None, tmp_path / "a.txt")


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MlxSvdError, match=r"pip install 'mlx-svd\[plot\]'"):
        new_figure("none")
