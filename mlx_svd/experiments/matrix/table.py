"""The results of an experiment as Markdown and CSV."""

import csv
import io
import json
from pathlib import Path
from typing import Any

from mlx_svd.checkpoint.disk import disk_errors, write_file

_LEGEND = (
    "Values: mean over runs [95 % interval over items]; sd: over seeds. deterministic: nothing in "
    "the condition is random, so it was run once. Differences: b - a (perplexity: the ratio b / a) "
    "on the same items and seeds; p: the larger of the p over items and the p over seeds; Holm: "
    "adjusted for all comparisons of that metric. The primary metric is the one that claims rest "
    "on; the others explore. *: the interval holds what guessing gives."
)


def markdown(results: dict[str, Any]) -> str:
    """Everything that is in the results, one table after the other."""
    lines = [f"# {results['title']}", ""]
    if results["seed_says"]:
        lines += [f"The seed says: {results['seed_says']}", ""]
    limit = f", limited to {results['limit']} items" if results.get("limit") else ""
    seeds = ", ".join(map(str, results["seeds"]))
    lines += [
        f"Experiment {results['experiment']}, kind {results['kind']}, mlx-svd "
        f"{results['version']}: {results['runs']} runs with seeds {seeds}{limit}, "
        f"{results['cpu_seconds']:.0f} CPU seconds. Primary metric: {results['primary']}.",
        "",
        _LEGEND,
        "",
    ]
    lines += ["## Values", "", *_table(*value_rows(results))]
    if results["numbers"]:
        lines += ["## Sizes and other numbers", "", *_table(*number_rows(results))]
    for metric in _primary_first(results):
        lines += [f"## Differences: {metric}", "", *_table(*comparison_rows(results, metric))]
    for name, rows in (("Correlations", _correlations), ("Interactions", _interactions)):
        found = rows(results)
        if found:
            lines += [f"## {name}", "", *found, ""]
    if results["failed"]:
        lines += ["## Runs that gave no result", ""]
        lines += [f"- {_run_name(f)}: {f['reason']}" for f in results["failed"]] + [""]
    if results["notes"]:
        lines += ["## Notes", ""]
        lines += [f"- {n['note']} (first in {n['condition']})" for n in results["notes"]] + [""]
    return "\n".join(lines)


def value_rows(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(head, rows): conditions x metrics."""
    metrics = list(dict.fromkeys(cell["metric"] for cell in results["cells"]))
    metrics.sort(key=lambda m: m != results["primary"])
    cells = {(c["condition"], c["metric"]): c for c in results["cells"]}
    rows = []
    for name in dict.fromkeys(c["condition"] for c in results["cells"]):
        have = [cells[name, m] for m in metrics if (name, m) in cells]
        count = have[0]["runs"]
        runs = f"{count} seeds" if count > 1 else "1 seed"
        runs = "deterministic" if have[0]["deterministic"] else runs
        rows.append([name, runs, *(_value(cells.get((name, m))) for m in metrics)])
    return ["condition", "runs", *metrics], rows


def number_rows(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(head, rows): conditions x numbers without items."""
    names = list(dict.fromkeys(n["number"] for n in results["numbers"]))
    found = {(n["condition"], n["number"]): n for n in results["numbers"]}
    rows = [
        [condition, *(_number(found.get((condition, name))) for name in names)]
        for condition in dict.fromkeys(n["condition"] for n in results["numbers"])
    ]
    return ["condition", *names], rows


def comparison_rows(results: dict[str, Any], metric: str) -> tuple[list[str], list[list[str]]]:
    """(head, rows) of one metric's comparisons."""
    chosen = [c for c in results["comparisons"] if c["metric"] == metric]
    verdicts = any(c["verdict"] for c in chosen)
    ratio = any(c["scale"] == "exp" for c in chosen)
    head = ["a", "b", "b / a" if ratio else "b - a", "95 % over items", "95 % over seeds"]
    head += ["n", "seeds", "p", "Holm"] + (["verdict"] if verdicts else [])
    rows = []
    for c in chosen:
        shown = [
            c["a"],
            c["b"],
            _signed(c["value"], c["scale"]),
            _interval(c["items_low"], c["items_high"], c["scale"]),
            "" if c["p_seeds"] is None else _interval(c["seeds_low"], c["seeds_high"], c["scale"]),
            str(c["items"]) + (f" ({c['left_out']} left out)" if c["left_out"] else ""),
            str(c["runs"]),
            _p(c["p"]),
            _p(c["p_holm"]),
        ]
        rows.append(shown + ([c["verdict"] or ""] if verdicts else []))
    return head, rows


def write_tables(results: dict[str, Any], folder: Path) -> None:
    """results.md and results.csv (one line a condition and metric) in the experiment's folder."""
    text = io.StringIO()
    keys = ("condition", "metric", "value", "std", "over_items", "over_seeds", "items", "runs")
    writer = csv.writer(text)
    writer.writerow(keys)
    for cell in results["cells"]:
        writer.writerow([json.dumps(cell[k]) if "over" in k else cell[k] for k in keys])
    with disk_errors(folder, "--output"):
        write_file(folder / "results.md", markdown(results).encode())
        write_file(folder / "results.csv", text.getvalue().encode())


def _primary_first(results: dict[str, Any]) -> list[str]:
    metrics = list(dict.fromkeys(c["metric"] for c in results["comparisons"]))
    return sorted(metrics, key=lambda m: m != results["primary"])


def _correlations(results: dict[str, Any]) -> list[str]:
    return [
        f"- {c['a']} and {c['b']} over {len(c['conditions'])} conditions: "
        + (
            "not defined"
            if c["rho"] is None
            else f"Spearman's rho {c['rho']:.3f} [{c['low']:.3f}, {c['high']:.3f}], p {_p(c['p'])}"
        )
        for c in results["correlations"]
    ]


def _interactions(results: dict[str, Any]) -> list[str]:
    return [
        f"- {i['name']}: slope of the difference over the base's {i['metric']}: "
        + (
            "not defined"
            if i["slope"] is None
            else f"{i['slope']:.4g} [{i['low']:.4g}, {i['high']:.4g}], p {_p(i['p'])}, "
            f"{len(i['slopes'])} seeds"
        )
        for i in results["interactions"]
    ]


def _run_name(failed: dict[str, Any]) -> str:
    return failed["condition"] + ("" if failed["seed"] is None else f", seed {failed['seed']}")


def _value(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return ""
    text = f"{_amount(cell['value'])} [{_amount(cell['over_items'][0])}, "
    text += f"{_amount(cell['over_items'][1])}]"
    if cell["std"] is not None:
        text += f", sd {cell['std']:.3g}"
    return text + (" *" if cell["at_chance"] else "")


def _amount(value: float | None) -> str:
    if value is None:
        return "inf"
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:.4g}"


def _number(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return ""
    value = entry["value"]
    text = f"{value:,.0f}" if float(value).is_integer() and abs(value) >= 10 else f"{value:.4g}"
    return text + (f" (sd {entry['std']:.2g})" if entry["std"] else "")


def _signed(value: float | None, scale: str) -> str:
    if value is None:
        return "inf"
    return f"{value:.4g}" if scale == "exp" else f"{value:+.4f}"


def _interval(low: float | None, high: float | None, scale: str) -> str:
    ends = ("-inf" if low is None else _signed(low, scale), _signed(high, scale))
    return f"[{ends[0]}, {ends[1]}]"


def _p(p: float) -> str:
    return f"{p:.4f}" if p >= 1e-4 else f"{p:.1e}"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines] + [""]
