"""The results of the analyses as tables on the terminal."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from mlx_svd.cli.tables import console

Record = dict[str, Any]


def print_spectrum(result: Record) -> None:
    """Whole matrices of weights, and beside them weighted by the inputs; heads as means."""
    head = ["projection", "shape", "break-even"]
    for label in result["ranks"]:
        head += [f"{label}: rank", "energy", "weighted"]
    head += ["rank for 90/95/99 %", "weighted", "heads", "eff. rank", "weighted", "condition"]
    rows = []
    for row in result["projections"]:
        w, x, heads = row["weight"], row["weighted"], row["heads"]
        cells = [row["projection"]["path"], _shape(row), str(w["break_even_rank"])]
        for label in result["ranks"]:
            rank, energy = w["energy"][label]
            cells += [str(rank), f"{energy:.4f}", f"{x['energy'][label][1]:.4f}" if x else "-"]
        cells += [
            _ranks(w),
            _ranks(x) if x else "-",
            _mean_ranks(heads) if heads else "-",
            f"{w['effective_rank']:.1f}",
            f"{x['effective_rank']:.1f}" if x else "-",
            f"{w['condition_number']:.3g}" if w["condition_number"] else "inf",
        ]
        rows.append(cells)
    columns(head, rows)
    if any(row["heads"] for row in result["projections"]):
        console().print("heads: mean over the heads of a head's own ranks")


def _ranks(spectrum: Record) -> str:
    return "/".join(str(r) for r in spectrum["rank_for_energy"].values())


def _mean_ranks(heads: Sequence[Record]) -> str:
    each = [list(h["rank_for_energy"].values()) for h in heads]
    return "/".join(f"{sum(r) / len(each):.1f}" for r in zip(*each, strict=True))


def _shape(row: Record) -> str:
    return "x".join(map(str, row["projection"]["shape"]))


def print_layers(result: Record) -> None:
    """One row for each projection and rank, means, then the scans."""
    head = ["projection", "rank", "even", "energy", "cosine", "rel. error", "max diff.", "verdict"]
    head += ["Gaussian: cosine", "rel. error", "verdict", "KL", "PPL ratio"]
    rows = []
    for row in result["projections"]:
        real, noise, done = row["real"], row["gaussian"], row["effect"]
        rows.append(
            [
                row["projection"]["path"],
                _rank(row["ranks"]),
                str(row["break_even_rank"]),
                f"{row['energy']:.4f}",
                f"{real['cosine']['value']:.4f}",
                f"{real['relative_error']['value']:.4f}",
                f"{real['max_difference']:.3g}",
                row["verdict"],
                f"{noise['cosine']['value']:.4f}",
                f"{noise['relative_error']['value']:.4f}",
                row["gaussian_verdict"],
                _interval(done["kl"], 5) if done else "-",
                _ratio(done["perplexity_ratio"]) if done else "-",
            ]
        )
    if rows:
        columns(head, rows)
    out = console()
    for s in result["summary"]:
        out.print(
            f"{s['rank_label']}: mean cosine {s['real_cosine']:.4f}, relative error "
            f"{s['real_relative_error']:.4f} on real inputs; {s['gaussian_cosine']:.4f}, "
            f"{s['gaussian_relative_error']:.4f} on Gaussian ones; verdicts {s['verdicts']}",
            markup=False,
        )
        for name in ("energy_lost", "relative_error_real"):
            if rho := s.get(f"rank_correlation_kl_{name}"):
                what = name.replace("_", " ")
                out.print(
                    f"  rank correlation of KL with {what}: {rho['rho']:.2f} "
                    f"({rho['low']:.2f} to {rho['high']:.2f}, n = {rho['n']})",
                    markup=False,
                )
    for scan in result["scans"]:
        _print_scan(scan)


def _print_scan(scan: Record) -> None:
    out = console()
    out.print(
        f"\nby {scan['by']}, {scan['rank_label']}, one left {scan['leave']}; all compressed: KL "
        f"{_interval(scan['everything']['kl'], 4)}, PPL ratio "
        f"{_ratio(scan['everything']['perplexity_ratio'])}",
        markup=False,
    )
    rows = [
        [
            f"{g['place']} ({g['place_low']}-{g['place_high']})",
            g["group"],
            _interval(g["effect"]["kl"], 5),
            _ratio(g["effect"]["perplexity_ratio"]),
            _interval(g["gain"], 5) if g["gain"] else "-",
        ]
        for g in scan["groups"]
    ]
    columns(["place", scan["by"], "KL", "PPL ratio", "KL saved"], rows)


def print_cliff(result: Record) -> None:
    """One row for each rank, the change point, then the ablations."""
    head = ["ratio", "ranks", "energy lost", "KL", "PPL ratio", "attention KL"]
    head += ["rep-4", "loops", "teacher-forced", "first diff."]
    rows = []
    for p in result["points"]:
        each = [r for ranks in p["ranks"].values() for r in (ranks if isinstance(ranks, list) else
                [ranks])]  # fmt: skip
        rep, told = p["repetition"], p["agreement"]
        rows.append(
            [
                f"{p['ratio']:g}",
                f"{min(each)}-{max(each)}" if min(each) < max(each) else str(each[0]),
                f"{p['energy_lost']:.5f}",
                _interval(p["effect"]["kl"], 5),
                _ratio(p["effect"]["perplexity_ratio"]),
                f"{p['attention_kl']['value']:.5f}" if p["attention_kl"] else "-",
                _interval(rep["rep_4"], 3) if "rep_4" in rep else "-",
                _interval(rep["loop"], 3) if "loop" in rep else "-",
                f"{told['teacher_forced']['value']:.3f}" if told else "-",
                f"{told['first_difference']:g}" if told else "-",
            ]
        )
    columns(head, rows)
    out = console()
    control = result["control"]
    out.print(
        f"full rank through the same path: logits differ by at most "
        f"{control['max_logit_difference']:.2g} of {control['max_logit']:.3g}"
    )
    if result["generation"]:
        dense = result["generation"]["dense"]
        shown = ", ".join(f"{name} {_interval(value, 3)}" for name, value in dense.items())
        out.print(f"dense model on {result['generation']['prompts']} prompts: {shown}")
    for name, found in result["change_point"].items():
        if "factor" not in found:
            out.print(f"{name}: {found['verdict']}: {found['reason']}", markup=False)
            continue
        out.print(
            f"{name}: {found['verdict']}; straight line of slope {_interval(found['slope'], 2)}; "
            f"break at {_interval(found['break_x'], 3)}, slope {_interval(found['before'], 2)} "
            f"before, {_interval(found['after'], 2)} after, factor {_interval(found['factor'], 2)}",
            markup=False,
        )
    for name in ("types", "directions"):
        if found := result["ablations"].get(name):
            out.print(f"\nat ratio {result['ablations']['ratio']:g}, {name}:")
            _print_ablations(found)


def _print_ablations(found: Sequence[Record]) -> None:
    rows = [
        [
            a["what"],
            "-" if a["seed"] is None else str(a["seed"]),
            f"{a['energy_lost']:.5f}",
            _interval(a["effect"]["kl"], 5),
            _ratio(a["effect"]["perplexity_ratio"]),
        ]
        for a in found
    ]
    columns(["what", "seed", "energy lost", "KL", "PPL ratio"], rows)


def print_depth(result: Record) -> None:
    """Errors after each block, attention, then the law of growth."""
    blocks = len(result["growth"][0]["after"])
    head = ["compressed", *(f"block {b}" for b in range(blocks))]
    head += ["logits", "cosine", "mean removed", "KL"]
    rows = []
    for g in result["growth"]:
        done = g["logits"]
        rows.append(
            [
                "all" if len(g["compressed"]) > 1 else str(g["compressed"][0]),
                *(f"{e['value']:.4f}" for e in g["after"]),
                f"{done['relative_error']['value']:.4f}",
                f"{done['cosine']['value']:.4f}",
                f"{done['mean_removed_cosine']['value']:.4f}",
                _interval(done["kl"], 4),
            ]
        )
    columns(head, rows)
    if result["attention"]:
        names = ("scores", "probabilities", "output")
        shown = [
            [str(x["layer"]), *(f"{x[n]:.4f}" for n in names), f"{x['probability_kl']:.5f}"]
            for x in result["attention"]
        ]
        console().print("\nattention, all compressed; relative errors:")
        columns(["layer", *names, "KL of probabilities"], shown)
    console().print("\nlogits with k layers compressed, means over the chains:")
    rows = [
        [
            str(c["layers"]),
            f"{c['relative_error']:.4f}",
            f"{c['cosine']:.4f}",
            f"{c['mean_removed_cosine']:.4f}",
            f"{c['kl']:.4f}",
        ]
        for c in result["layer_counts"]
    ]
    columns(["layers", "rel. error", "cosine", "mean removed", "KL"], rows)
    out = console()
    white, law, averaged = result["white_input"], result["law"], result["averaging"]
    out.print(
        f"matrices alone on white noise: cosine {white['mean_cosine']:.4f}, relative error "
        f"{white['mean_relative_error']:.4f}; energy lost {white['energy_lost']:.4f}"
    )
    out.print(
        f"logit error ~ k^p, p = {_interval(law['exponent'], 2)}; inside: "
        f"{'; '.join(law['contained']) or 'none of -1/2, 0, 1/2, 1'}",
        markup=False,
    )
    out.print(
        f"one layer {averaged['error_of_one_layer']:.4f}; all {averaged['layers']}: averaged out "
        f"they would be {averaged['if_averaged_out']:.4f}, independent "
        f"{averaged['if_independent']:.4f}, measured {averaged['error_of_all_layers']:.4f}"
    )


def columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table, the first column to the left, as wide as it must be: numbers are not cut off."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, name in enumerate(head):
        table.add_column(name, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    out = console()
    widths = [max(map(len, column)) + 2 for column in zip(head, *rows, strict=True)]
    out.width = max(out.width, sum(widths))
    out.print(table)


def _rank(ranks: int | Sequence[int]) -> str:
    if isinstance(ranks, int):
        return str(ranks)
    low, high = min(ranks), max(ranks)
    return f"{len(ranks)} x {low}" if low == high else f"{len(ranks)} x {low}-{high}"


def _interval(found: Record, digits: int) -> str:
    # Adding 0 takes the sign off what rounds to zero.
    value, low, high = (
        None if found[key] is None else round(found[key], digits) + 0.0
        for key in ("value", "low", "high")
    )
    ends = "no interval" if low is None else f"{low:.{digits}f} to {high:.{digits}f}"
    return f"{value:.{digits}f} ({ends})"


def _ratio(found: Record) -> str:
    if found["high"] is None:
        return f"{found['ratio']:.3f}"
    return f"{found['ratio']:.3f} ({found['low']:.3f} to {found['high']:.3f})"
