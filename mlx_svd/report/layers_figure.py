"""Errors and effects of single projections over the layers, and the sensitivity scans."""

from typing import Any

import numpy as np

from mlx_svd.report.figure import new_figure

_MAX_GROUPS = 40


def layers_figure(result: dict[str, Any]):
    """For each rank: cosine on real inputs and KL of each projection alone; then each scan."""
    rows, scans = result["projections"], result["scans"]
    labels = result["ranks"] if rows else []
    effects = any(row["effect"] for row in rows)
    panels = len(labels) * (2 if effects else 1) + len(scans)
    wide = min(panels, 2 if effects else 3)
    title = f"projections alone: {result['conditions']['model']}, {result['scorer']}"
    figure, axes = new_figure(title, -(-panels // wide), wide)
    left = iter(axes)
    for label in labels:
        mine = [row for row in rows if row["rank_label"] == label]
        _lines(next(left), mine, lambda r: r["real"]["cosine"], f"{label}: output cosine")
        if effects:
            axis = next(left)
            _lines(axis, mine, lambda r: r["effect"]["kl"], f"{label}: KL (nats/token)")
            axis.set_yscale("log", nonpositive="clip")
    for scan in scans:
        _scan(next(left), scan)
    for axis in left:
        axis.set_axis_off()
    return figure


def _lines(axis, rows, value, title: str) -> None:
    for index, name in enumerate(dict.fromkeys(r["projection"]["name"] for r in rows)):
        mine = [r for r in rows if r["projection"]["name"] == name]
        found = [value(r) for r in mine]
        axis.errorbar(
            [r["projection"]["layer"] for r in mine],
            [f["value"] for f in found],
            yerr=_ends(found),
            label=name,
            color=f"C{index}",
            marker="o",
            markersize=3,
            linewidth=0.8,
        )
    axis.set_title(title, fontsize="medium")
    axis.set_xlabel("layer")
    axis.legend(fontsize="small")


def _scan(axis, scan: dict[str, Any]) -> None:
    groups = scan["groups"][:_MAX_GROUPS]
    found = [g["gain"] or g["effect"]["kl"] for g in groups]
    places = np.arange(len(groups))
    axis.barh(places, [f["value"] for f in found], xerr=_ends(found))
    axis.set_yticks(places, [g["group"] for g in groups], fontsize="small")
    axis.invert_yaxis()
    axis.set_xlabel("KL saved" if scan["leave"] == "dense" else "KL (nats/token)")
    title = f"{scan['rank_label']}: one {scan['by']} left {scan['leave']}"
    more = len(scan["groups"]) - len(groups)
    axis.set_title(title + (f" (first {len(groups)})" if more else ""), fontsize="medium")


def _ends(found: list[dict]):
    """Lengths of the error bars (2, n); none where there is no interval."""
    pairs = [
        (0.0, 0.0) if f["low"] is None else (f["value"] - f["low"], f["high"] - f["value"])
        for f in found
    ]
    return np.maximum(np.array(pairs).T, 0.0)
