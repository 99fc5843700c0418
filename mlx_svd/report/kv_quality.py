"""Plot of a saved ``sweep-kv`` table: divergence against measured bytes per token."""

import json
from pathlib import Path
from typing import Any

from mlx_svd.report.figure import new_figure, save_figure

_KINDS = (
    ("mlx-lm, quantized", "C0", "s", lambda name: name.startswith("q")),
    ("latents", "C1", "o", lambda name: name.startswith("lowrank") and "bits=" not in name),
    ("latents, quantized", "C2", "D", lambda name: name.startswith("lowrank") and "bits=" in name),
    ("joint latents", "C3", "^", lambda name: name.startswith("mla")),
)


def plot_kv_quality(result: Path, plot: Path) -> None:
    """One point an arm, with its 95 % interval. result: table.json of ``sweep-kv``."""
    records = json.loads(result.read_bytes())
    dense = records[0]
    figure, (axis,) = new_figure(f"KV caches of {dense['model']}")
    axis.set_title(
        f"{dense['windows']} windows of {dense['length']} tokens of {dense['text']}", fontsize=8
    )
    for label, color, marker, belongs in _KINDS:
        chosen = [r for r in records[1:] if "kl" in r and belongs(r["name"])]
        if chosen:
            _points(axis, chosen, dense["bytes_per_token"], label, color, marker)
    axis.set_yscale("log")
    axis.set_xlabel("bytes per token, share of the float16 cache")
    axis.set_ylabel("KL from the dense cache, nats per token")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    save_figure(figure, plot)


def _points(axis: Any, records: list[dict], dense: float, label: str, color: str, marker: str):
    shares = [r["bytes_per_token"] / dense for r in records]
    means = [r["kl"]["mean"] for r in records]
    # A logarithmic axis has no zero: bounds below it are drawn to a tenth of the mean.
    low = [m - max(r["kl"]["low"], m / 10) for m, r in zip(means, records, strict=True)]
    high = [r["kl"]["high"] - m for m, r in zip(means, records, strict=True)]
    axis.errorbar(
        shares, means, yerr=[low, high], label=label, color=color, marker=marker, linestyle="",
        markersize=4, linewidth=0.8,
    )  # fmt: skip
