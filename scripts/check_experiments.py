"""How far experiments that were run here are from the published tables.

    python scripts/check_experiments.py OUT benchmarks/results/experiments

OUT: a folder of `mlx-svd experiment run`. For every experiment that is in both, one line for each
metric: how many conditions were compared, how many of them differ at all, and the largest
difference with its condition. Conditions with another number of runs are counted, not compared.
"""

import argparse
import csv
from pathlib import Path

Row = dict[str, str]


def read_rows(folder: Path) -> dict[tuple[str, str], Row]:
    """(condition, metric) -> row of the table."""
    with (folder / "results.csv").open(newline="") as file:
        return {(row["condition"], row["metric"]): row for row in csv.DictReader(file)}


def comparable(row: Row, other: Row | None) -> bool:
    """Whether both have a value, of as many runs."""
    values = other is not None and row["value"] and other["value"]
    return bool(values) and row["runs"] == other["runs"]


def compare(here: Path, published: Path) -> tuple[list[str], int]:
    """(lines of the table, rows that were not compared) of one experiment."""
    mine, theirs = read_rows(here), read_rows(published)
    by_metric: dict[str, list[tuple[float, float, str, str]]] = {}
    for (condition, metric), row in theirs.items():
        other = mine.get((condition, metric))
        if comparable(row, other):
            one, two = float(row["value"]), float(other["value"])
            entry = (abs(two - one), one, condition, other["value"])
            by_metric.setdefault(metric, []).append(entry)
    lines = []
    for metric, entries in by_metric.items():
        differing = sum(entry[0] > 0 for entry in entries)
        largest, value, condition, found = max(entries)
        where = f"{condition}: {value:.5g}, here {float(found):.5g}" if largest else ""
        lines.append(f"| {metric} | {len(entries)} | {differing} | {largest:.1e} | {where} |")
    return lines, len(theirs) - sum(map(len, by_metric.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("published", type=Path)
    arguments = parser.parse_args()
    names = sorted(
        path.parent.name
        for path in arguments.output.glob("*/results.csv")
        if (arguments.published / path.parent.name / "results.csv").is_file()
    )
    if not names:
        raise SystemExit(
            f"{arguments.output}: holds no results.csv of an experiment in {arguments.published}; "
            "give the --output folder of `mlx-svd experiment run`"
        )
    for name in names:
        lines, left = compare(arguments.output / name, arguments.published / name)
        print(f"\n{name}" + (f" (not compared: {left} values)" if left else ""))
        if lines:
            print("| metric | conditions | differ | largest difference | published, here |")
            print("|---|---|---|---|---|")
            print("\n".join(lines))


if __name__ == "__main__":
    main()
