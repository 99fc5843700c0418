"""A sweep's records as Markdown and CSV."""

import csv
import io
from pathlib import Path
from typing import Any

from mlx_svd.checkpoint.disk import disk_errors, write_file

_HEAD = (
    "method",
    "bytes kept",
    "file bytes",
    "perplexity",
    "ratio to dense [95 %]",
    "ratio, other text",
    "KL",
    "facts kept",
    "tokens/s (of dense)",
    "seconds",
    "CPU s",
    "forms",
)


def table_rows(records: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """(group, cells under the head) of every record."""
    return [(record["group"], _cells(record)) for record in records]


def markdown(records: list[dict[str, Any]]) -> str:
    """Conditions, then one table for each group of rows."""
    dense = records[0]
    lines = [_conditions(dense), ""]
    shown = None
    for group, cells in table_rows(records):
        if group != shown:
            title = group or "uncompressed"
            lines += ["", f"### {title}", "", _line(_HEAD), _line(["---"] * len(_HEAD))]
            shown = group
        lines.append(_line(cells))
    return "\n".join(lines) + "\n"


def write_tables(records: list[dict[str, Any]], folder: Path) -> None:
    """sweep.json, sweep.md and sweep.csv in the sweep's folder."""
    import json

    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["group", *_HEAD])
    writer.writerows([group, *cells] for group, cells in table_rows(records))
    with disk_errors(folder, "--output"):
        write_file(folder / "sweep.json", json.dumps(records, indent=2).encode())
        write_file(folder / "sweep.md", markdown(records).encode())
        write_file(folder / "sweep.csv", text.getvalue().encode())


def _conditions(dense: dict[str, Any]) -> str:
    c, plan = dense["calibration"], dense["plan"]
    texts = "; ".join(
        f"{name}: {t['windows']} windows of {t['origin']}"
        for name, t in dense["material"]["texts"].items()
    )
    return (
        f"{dense['model']}, mlx-svd {dense['version']}. Calibration: {c['windows']} windows, "
        f"{c['tokens']} tokens of {c['origin']}; {c['cpu_seconds']:.0f} CPU seconds, peak memory "
        f"{c['peak_memory'] / 1e9:.2f} GB. A plan of all projections within a budget: "
        f"{plan['cpu_seconds']:.0f} CPU seconds, {plan['peak_memory'] / 1e9:.2f} GB. Measured "
        f"in float32 on {texts}; {dense['material']['facts']} facts."
    )


def _cells(record: dict[str, Any]) -> list[str]:
    method = record["name"].removeprefix(record["group"]).strip()
    if "reason" in record:
        return [method, *[""] * (len(_HEAD) - 2), f"did not run: {record['reason']}"]
    first, *others = record["texts"].values()
    share = ""
    if record.get("touched_before"):
        share = f"{record['touched_bytes'] / record['touched_before']:.3f}"
    ratio = first["ratio"]
    kept = record.get("facts_kept")
    forms = ", ".join(f"{n} {form}" for form, n in record.get("forms", {}).items())
    if "healed" in record:
        healed = record["healed"]
        forms += f"; healed, KL {healed['kl_before']:.3f} to {healed['kl_after']:.3f}"
    return [
        method,
        share,
        f"{record['total_bytes']:,}",
        f"{first['perplexity'][0]:.3f}",
        f"{ratio[0]:.4f} [{ratio[1]:.4f}, {ratio[2]:.4f}]",
        f"{others[0]['ratio'][0]:.4f}" if others else "",
        f"{record['kl'][0]:.4f}" if "kl" in record else "",
        f"{kept[0]:.3f}" if kept else "",
        f"{record['decode_tps']:.0f} ({record['decode_speed']:.2f})"
        if "decode_tps" in record
        else "",
        f"{record['seconds']:.1f}" if "seconds" in record else "",
        f"{record['cpu_seconds']:.1f}" if "cpu_seconds" in record else "",
        forms,
    ]


def _line(cells) -> str:
    return "| " + " | ".join(cells) + " |"
