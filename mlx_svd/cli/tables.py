"""Tables on the terminal, and plain columns when piped."""

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from mlx_svd.checkpoint.inspect import Inspection
    from mlx_svd.evaluate.comparison.compare import Comparison
    from mlx_svd.finetune.protection import ProtectResult
    from mlx_svd.plan.plan import Plan


def console() -> Console:
    """Standard output; as wide as it needs to be when it is not a terminal."""
    out = Console(highlight=False)
    return out if out.is_terminal else Console(highlight=False, width=160)


def progress_console() -> Console:
    """Standard error, for progress and remarks."""
    return Console(stderr=True, highlight=False)


def size(nbytes: int) -> str:
    """Exact up to a megabyte, then in MB or GB (10^6, 10^9 bytes)."""
    if nbytes < 10**6:
        return f"{nbytes:,}"
    return f"{nbytes / 1e9:.3f} GB" if nbytes >= 10**9 else f"{nbytes / 1e6:.2f} MB"


def share(after: int, before: int) -> str:
    """after / before, '-' for an empty whole."""
    return f"{after / before:.3f}" if before else "-"


def print_plan(plan: "Plan") -> None:
    """One row for each projection that was asked for, then the totals."""
    table = _table(
        ["projection", "shape", "form", "rank", "break-even", "bits", "before", "after"],
        numbers={3, 4, 5, 6, 7},
    )
    table.add_column("why", overflow="fold")
    shown = [p for p in plan.projections if p.projection.name in plan.compressible]
    for p in shown:
        bits = str(p.quantization.bits) if p.quantization else "-"
        table.add_row(
            p.path,
            "x".join(map(str, p.projection.shape)),
            p.form,
            p.rank_text(),
            str(p.break_even),
            bits,
            f"{p.bytes_before:,}",
            f"{p.bytes_after:,}",
            p.reason,
        )
    out = console()
    out.print(table)
    out.print(touched_bytes(plan))
    out.print(
        f"whole checkpoint: {plan.bytes_before:,} -> {plan.bytes_after:,} bytes of tensor data "
        f"({share(plan.bytes_after, plan.bytes_before)})"
    )
    for note in plan.notes:
        out.print(f"note: {note}")


def touched_bytes(plan: "Plan") -> str:
    """What became of the projections that could be compressed."""
    asked = [p for p in plan.projections if p.projection.name in plan.compressible]
    before, after = (sum(getattr(p, k) for p in asked) for k in ("bytes_before", "bytes_after"))
    truncated = sum(p.changed for p in asked)
    quantized = sum(p.quantization is not None for p in asked)
    return (
        f"{','.join(plan.compressible)}: {truncated} of {len(asked)} projections truncated, "
        f"{quantized} quantized, {before:,} -> {after:,} bytes ({share(after, before)})"
    )


def print_inspection(inspection: "Inspection") -> None:
    """One row for each projection, then the totals."""
    table = _table(
        ["projection", "shape", "form", "rank", "energy kept", "weight error", "bytes"],
        numbers={3, 4, 5, 6},
    )
    again = False
    for p in inspection.projections:
        mark = "*" if p.saved_again else ""
        again |= p.saved_again
        table.add_row(
            p.path,
            "x".join(map(str, p.shape)),
            p.form,
            p.rank_text(),
            f"{p.energy:.4f}",
            f"{p.relative_error:.4f}{mark}",
            f"{p.nbytes:,}",
        )
    out = console()
    out.print(table)
    source = inspection.base_model + (f" @ {inspection.revision}" if inspection.revision else "")
    out.print(f"base model: {source}; mlx-svd {inspection.version}")
    out.print(f"tensor data on disk: {inspection.nbytes:,} bytes")
    if healed := inspection.healed:
        result = f"KL {healed['kl_before']:.4f} -> {healed['kl_after']:.4f} nats per token"
        out.print(
            f"healed: {healed['steps']} steps from {healed['teacher']} on {healed['text']}, "
            f"{result}; the weight errors are those before"
        )
    if again:
        out.print("* saved again by another program since: the error is that of the compression")


def print_comparison(comparison: "Comparison") -> None:
    """One row for each metric, then what the numbers mean and what they cannot show."""
    from mlx_svd.evaluate.comparison.table import HEAD, legend, remarks, table_rows

    table = _table(list(HEAD), numbers=set(range(2, len(HEAD))) - {10})
    rows = table_rows(comparison)
    for cells in rows:
        table.add_row(*cells)
    out = console()
    # Numbers cut off to fit into a narrow window are worse than lines that wrap.
    widths = [max(map(len, column)) + 2 for column in zip(HEAD, *rows, strict=True)]
    out.width = max(out.width, sum(widths))
    out.print(table)
    for line in (legend(comparison), *remarks(comparison)):
        out.print(line, markup=False, soft_wrap=True)


def print_protected(result: "ProtectResult") -> None:
    """Uptake and retention before and after, quality, guard rails, and what must be known."""
    out, record = console(), result.record
    training = record["training"]
    for warning in result.warnings:
        mark = "accepted" if warning.accepted else f"warning ({warning.name})"
        out.print(f"{mark}: {warning.text}", markup=False, soft_wrap=True)
    out.print(
        f"arm {record['arm']['name']}: trained {training['trained']:,} of {training['total']:,} "
        f"numbers for {record['steps']} steps, {training['frozen_layers']} of "
        f"{training['layers']} layers frozen, {training['compressed']} projections truncated",
        markup=False,
        soft_wrap=True,
    )
    table = _table(["", "base", "start", "trained", "95 % interval", "n"], numbers={1, 2, 3, 4, 5})
    rows = {k: (record["base"]["knowledge"][k], v) for k, v in record["knowledge"].items()}
    quality, before = record["quality"], record["base"]["quality"]
    for name, (base, entry) in rows.items():
        table.add_row(
            name, _cell(base), _cell(record["trajectory"][0].get(name, {})), *_cells(entry)
        )
    for name in ("perplexity", "conversation_perplexity"):
        table.add_row(name, _cell(before[name]), "-", *_cells(quality[name]))
    for name, entry in quality["generation"].items():
        if isinstance(entry, dict):
            table.add_row(name, _cell(before["generation"][name]), "-", *_cells(entry))
    out.print(table)
    for note in record["notes"]:
        out.print(f"note: {note}", markup=False, soft_wrap=True)
    if result.mlx_path:
        out.print(
            f"{result.mlx_path}: written, {training['bytes_before']:,} -> "
            f"{training['bytes_after']:,} bytes of tensor data",
            markup=False,
            soft_wrap=True,
        )


def _cell(entry: dict) -> str:
    """The value of an entry of a result, '-' where it was not measured."""
    value = entry.get("value", entry.get("perplexity"))
    return "-" if value is None else f"{value:.3f}"


def _cells(entry: dict) -> list[str]:
    """Value, interval and number of items."""
    if _cell(entry) == "-":
        return ["not measured", "", ""]
    low, high = ("-" if entry.get(k) is None else f"{entry[k]:.3f}" for k in ("low", "high"))
    return [_cell(entry), f"[{low}, {high}]", f"{entry.get('n', entry.get('tokens')):,}"]


def _table(columns: list[str], numbers: set[int]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index in numbers else "left", no_wrap=True)
    return table


def print_scores(results: dict) -> None:
    """One row for each metric of an evaluation, then what must be known about them."""
    from mlx_svd.evaluate.results.table import HEADER, legend, score_rows

    table = _table(list(HEADER), numbers={1, 3, 5, 6, 7})
    for row in score_rows(results):
        table.add_row(*row)
    out = console()
    out.print(table)
    for line in legend(results):
        out.print(line, markup=False)
    for note in results["notes"]:
        out.print(f"note: {note}", markup=False)
