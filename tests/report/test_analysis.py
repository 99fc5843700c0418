"""Pictures of analyses hold the saved numbers."""

import pytest

from mlx_svd.errors import MlxSvdError
from mlx_svd.report.analysis import plot_analysis
from mlx_svd.report.depth_figure import depth_figure
from mlx_svd.report.spectrum_figure import spectrum_figure


def spectrum_row(name, values):
    return {"projection": {"name": name}, "weight": {"singular_values": values}, "weighted": None}


def test_decay_and_cumulative_energy_are_those_saved():
    result = {
        "conditions": {"model": "m"},
        "projections": [spectrum_row("q", [4.0, 2.0, 0.0]), spectrum_row("k", [3.0, 3.0])],
    }
    decay, energy = spectrum_figure(result).axes
    assert [list(line.get_ydata()) for line in decay.lines] == [[1.0, 0.5], [1.0, 1.0]]
    assert list(energy.lines[0].get_ydata()) == [0.8, 1.0, 1.0]
    assert list(energy.lines[1].get_ydata()) == [0.5, 1.0]


def test_the_law_shows_the_measured_errors():
    error = [0.1, 0.15, 0.17]
    result = {
        "conditions": {"model": "m"},
        "rank_label": "rank 3",
        "growth": [{"compressed": [0, 1], "after": [{"value": 0.1}, {"value": 0.3}]}],
        "attention": [],
        "law": {
            "error": error,
            "layers": [1, 2, 3],
            "exponent": {"value": 0.5, "low": 0.4, "high": 0.6},
        },
    }
    stream, _, law = depth_figure(result).axes
    assert list(stream.lines[0].get_ydata()) == [0.1, 0.3]
    assert list(law.lines[0].get_ydata()) == error
    assert law.get_title() == "p = 0.50 (0.40 to 0.60)"


def test_an_unknown_result_is_refused(tmp_path):
    with pytest.raises(MlxSvdError, match="no picture for analysis 'x'"):
        plot_analysis({"analysis": "x"}, tmp_path / "a.png")
