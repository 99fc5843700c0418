"""Statistics of an experiment, against statsmodels and plain formulas."""

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from mlx_svd.evaluate.statistics.intervals import wilson
from mlx_svd.experiments.matrix.config import load_experiment
from mlx_svd.experiments.matrix.record import EXP, Measured, metric_of, to_json
from mlx_svd.experiments.matrix.relations import correlate, interact
from mlx_svd.experiments.matrix.summary import summarize
from mlx_svd.experiments.matrix.table import markdown

N = 60
IDS = [str(i) for i in range(N)]


def record(condition, seed, share, level) -> dict:
    """A run with so many right answers and such losses."""
    generator = np.random.default_rng([seed or 0, sum(map(ord, condition))])
    measured = Measured(
        {
            "facts": metric_of(IDS, generator.random(N) < share, chance=0.25),
            "perplexity": metric_of(
                IDS, generator.normal(level, 1, N), np.full(N, 8), scale=EXP, better=False
            ),
        },
        {"bytes": 100.0 * level},
    )
    return {"condition": condition, "seed": seed, "seconds": 1.0, "cpu_seconds": 1.0} | to_json(
        measured
    )


CONDITIONS = [{"name": "dense"}, {"name": "mild"}, {"name": "hard"}, {"name": "worst"}]
RECORDS = [record("dense", None, 0.9, 20)] + [
    record(name, seed, share, level)
    for name, share, level in (("mild", 0.8, 21), ("hard", 0.6, 24), ("worst", 0.2, 40))
    for seed in (0, 1, 2)
]


@pytest.fixture
def results(experiment_file):
    path = experiment_file(
        CONDITIONS,
        baseline="dense",
        primary="perplexity",
        correlations=[["perplexity", "facts"]],
        verdicts=[[1.5, "small"], [None, "large"]],
        seeds=[0, 1, 2],
    )
    return summarize(load_experiment(path), RECORDS)


def cell(results, condition, metric):
    (found,) = (c for c in results["cells"] if (c["condition"], c["metric"]) == (condition, metric))
    return found


def test_values_are_means_over_runs_with_the_deviation_of_the_seeds(results):
    found = cell(results, "hard", "facts")
    values = [np.mean(r["metrics"]["facts"]["values"]) for r in RECORDS if r["condition"] == "hard"]
    assert found["value"] == pytest.approx(np.mean(values))
    assert found["std"] == pytest.approx(np.std(values, ddof=1))
    t = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert found["over_seeds"] == pytest.approx([t.low, t.high])
    assert (found["items"], found["runs"], found["deterministic"]) == (N, 3, False)


def test_a_run_of_which_nothing_is_random_counts_once_and_has_wilsons_interval(results):
    found = cell(results, "dense", "facts")
    right = int(sum(RECORDS[0]["metrics"]["facts"]["values"]))
    assert found["deterministic"]
    assert found["std"] is None
    assert found["over_items"] == pytest.approx(wilson(right, N))


def test_numbers_that_happen_to_be_zero_are_no_share(experiment_file):
    path = experiment_file([{"name": "dense"}], primary="margin")
    measured = Measured(
        {"margin": metric_of(IDS, np.zeros(N)), "lost": metric_of(IDS, [False] * N)}
    )
    entry = {"condition": "dense", "seed": None, "seconds": 1.0, "cpu_seconds": 1.0}
    results = summarize(load_experiment(path), [entry | to_json(measured)])
    assert cell(results, "dense", "margin")["over_items"] == [0, 0]
    assert cell(results, "dense", "lost")["over_items"] == pytest.approx(wilson(0, N))


def test_what_guessing_gives_is_marked(results):
    assert not cell(results, "mild", "facts")["at_chance"]
    assert cell(results, "worst", "facts")["at_chance"]


def test_p_values_are_adjusted_by_holm_within_a_metric(results):
    for metric in ("facts", "perplexity"):
        family = [c for c in results["comparisons"] if c["metric"] == metric]
        expected = multipletests([c["p"] for c in family], method="holm")[1]
        assert [c["p_holm"] for c in family] == pytest.approx(expected)
        assert [c["family"] for c in family] == [3, 3, 3]


def test_a_verdict_is_read_off_the_bad_end_of_the_interval(results):
    for c in results["comparisons"]:
        if c["metric"] == "perplexity":
            assert c["verdict"] == (
                "small" if max(c["items_high"], c["seeds_high"]) <= 1.5 else "large"
            )
        else:
            assert c["verdict"] is None
    assert {c["verdict"] for c in results["comparisons"]} == {"small", "large", None}


def test_correlation_is_spearmans_over_conditions(results):
    (found,) = results["correlations"]
    names = [c["name"] for c in CONDITIONS]
    x = [cell(results, n, "perplexity")["value"] for n in names]
    y = [cell(results, n, "facts")["value"] for n in names]
    assert found["rho"] == pytest.approx(stats.spearmanr(x, y).statistic)
    assert found["low"] <= found["rho"] <= found["high"]


def test_three_conditions_have_no_correlation():
    runs = {n: {0: Measured({"m": metric_of(["a"], [i])})} for i, n in enumerate("abc")}
    assert correlate("m", "m", runs)["rho"] is None


def test_an_interaction_is_the_slope_over_the_bases_value_in_each_seed(experiment_file):
    conditions = [{"name": f"{k}{i}"} for k in ("base", "a", "b") for i in range(3)]
    points = [{"base": f"base{i}", "a": f"a{i}", "b": f"b{i}"} for i in range(3)]
    path = experiment_file(conditions, interactions=[{"name": "gain", "points": points}])
    (interaction,) = load_experiment(path).interactions
    runs = {}
    for seed in (0, 1, 2):
        for i in range(3):
            base = 0.2 * i
            for kind, value in (("base", base), ("a", 0.1), ("b", 0.1 + (2 + seed) * base)):
                measured = Measured({"facts": metric_of(["x"], [value])})
                runs.setdefault(f"{kind}{i}", {})[seed] = measured
    found = interact(interaction, "facts", runs)
    assert found["slopes"] == pytest.approx([2, 3, 4])
    assert found["slope"] == pytest.approx(3)
    assert found["p"] == pytest.approx(stats.ttest_1samp([2, 3, 4], 0).pvalue)


def test_the_table_names_conditions_failures_and_notes(experiment_file):
    path = experiment_file([{"name": "dense"}, {"name": "broken"}], baseline="dense")
    failed = {"condition": "broken", "seed": 1, "reason": "no budget", "seconds": 1.0}
    results = summarize(load_experiment(path), [RECORDS[0], failed | {"cpu_seconds": 1.0}])
    text = markdown(results)
    assert "deterministic" in text
    assert "broken, seed 1: no budget" in text


def test_two_metrics_of_the_same_runs_are_paired(experiment_file):
    path = experiment_file([{"name": "a"}], within=[["before", "after"]], primary="before")
    found = [
        {"condition": "a", "seed": s, "seconds": 1.0, "cpu_seconds": 1.0}
        | to_json(
            Measured(
                {
                    "before": metric_of(IDS, np.arange(N) % 2),
                    "after": metric_of(IDS, np.zeros(N)),
                }
            )
        )
        for s in (0, 1)
    ]
    (entry,) = summarize(load_experiment(path), found)["comparisons"]
    assert entry["metric"] == "before, then after"
    assert entry["value"] == pytest.approx(-0.5)
