"""Quality over the ranks: KL over the energy discarded with both fits, perplexity, repetition,
attention and agreement over the share of the ranks."""

from typing import Any

import numpy as np

from mlx_svd.report.figure import new_figure


def cliff_figure(result: dict[str, Any]):
    """Four panels, of what the result holds."""
    points = result["points"]
    ratios = [p["ratio"] for p in points]
    title = f"rank grid: {result['conditions']['model']}, {result['scorer']}"
    figure, (damage, quality, texts, agreement) = new_figure(title, 2, 2)
    _damage(damage, points, result["change_point"]["log_energy_lost"])
    _band(quality, ratios, [p["effect"]["perplexity_ratio"] for p in points], "PPL ratio", "ratio")
    quality.set_yscale("log")
    quality.set_ylabel("perplexity / dense")
    if any(p["attention_kl"] for p in points):
        other = quality.twinx()
        other.plot(ratios, [p["attention_kl"]["value"] for p in points], "C3--")
        other.set_ylabel("attention KL (dashed)")
    for name, color in (("rep_4", "C0"), ("loop", "C1")):
        have = [p for p in points if name in p["repetition"]]
        values = [p["repetition"][name] for p in have]
        _band(texts, [p["ratio"] for p in have], values, name, color=color)
    texts.set_ylabel("greedy texts")
    told = [p for p in points if p["agreement"]]
    for name in ("teacher_forced", "identical"):
        values = [p["agreement"][name] for p in told]
        _band(agreement, [p["ratio"] for p in told], values, name.replace("_", "-"))
    agreement.set_ylabel("agreement with dense texts")
    for axis in (quality, texts, agreement):
        axis.set_xlabel("share of the singular values kept")
        axis.invert_xaxis()
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize="small")
    return figure


def _damage(axis, points: list[dict], test: dict[str, Any]) -> None:
    cut = [p for p in points if p["energy_lost"] > 0 and p["effect"]["kl"]["value"] > 0]
    x = np.array([p["energy_lost"] for p in cut])
    y = np.array([p["effect"]["kl"]["value"] for p in cut])
    axis.loglog(x, y, "o", markersize=3)
    if "factor" in test:
        at, before, after = (test[k]["value"] for k in ("break_x", "before", "after"))
        stick = before * np.log(x) + (after - before) * np.maximum(np.log(x) - at, 0)
        line = test["slope"]["value"] * np.log(x)
        for fit, style, label in ((line, "--", "straight"), (stick, "-", "broken stick")):
            axis.loglog(x, np.exp(fit + (np.log(y) - fit).mean()), style, label=label)
        axis.legend(fontsize="small")
    axis.set_title(f"verdict: {test['verdict']}", fontsize="medium")
    axis.set_xlabel("share of the energy discarded")
    axis.set_ylabel("KL (nats/token)")


def _band(axis, x, found: list[dict], label: str, key: str = "value", color: str = "C0") -> None:
    if label == "identical":
        color = "C1"
    values = [f[key] for f in found]
    axis.plot(x, values, marker="o", markersize=3, label=label, color=color)
    low, high = ([f[end] for f in found] for end in ("low", "high"))
    if found and None not in (*low, *high):
        axis.fill_between(x, low, high, alpha=0.2, color=color)
