"""The picture of an experiment holds the saved numbers."""

import pytest

from mlx_svd.errors import MlxSvdError
from mlx_svd.report.experiment_figure import experiment_figure

RESULTS = {
    "experiment": "trial",
    "title": "a trial",
    "primary": "perplexity",
    "cells": [
        {"condition": "dense", "metric": "perplexity", "scale": "exp", "value": 20.0,
         "over_items": [18.0, 23.0]},
        {"condition": "half", "metric": "perplexity", "scale": "exp", "value": 25.0,
         "over_items": [21.0, None]},
        {"condition": "half", "metric": "facts", "scale": "mean", "value": 0.5,
         "over_items": [0.4, 0.6]},
    ],
    "comparisons": [
        {"a": "dense", "b": "half", "metric": "perplexity", "scale": "exp", "value": 1.25,
         "items_low": 1.2, "items_high": 1.3, "seeds_low": 1.1, "seeds_high": 1.4},
    ],
}  # fmt: skip


def test_values_and_differences_are_those_saved():
    values, differences = experiment_figure(RESULTS).axes
    assert [t.get_text() for t in values.get_yticklabels()] == ["dense", "half"]
    interval, points = values.lines
    assert list(interval.get_xdata()) == [18.0, 23.0], "an interval without an end is not drawn"
    assert list(points.get_xdata()) == [20.0, 25.0]
    seeds, _, items, *_ = differences.lines
    assert list(seeds.get_xdata()) == [1.1, 1.4]
    assert list(items.get_xdata()) == [1.2, 1.3]
    assert values.get_xscale() == "log"


def test_results_without_the_primary_metric_are_refused():
    with pytest.raises(MlxSvdError, match="nothing to draw"):
        experiment_figure(RESULTS | {"cells": []})
