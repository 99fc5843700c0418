"""Plots of a saved ``probe-kv`` result: decay of the singular values, and cumulative energy."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from mlx_svd.report.figure import new_figure, save_figure

_CURVES = (("K", "post"), ("K", "pre"), ("K", "none"), ("V", "none"))
_LABELS = {"post": "K as cached", "pre": "K before rotation", "none": "K"}


def plot_kv_spectra(result: Path, plot: Path) -> None:
    """Centred spectra, one line a layer and activation: per head (mean energy of the heads) and
    joint over all heads, one row of panels for each text. result: JSON of ``probe-kv``."""
    probe = json.loads(result.read_bytes())
    texts = probe["texts"]
    figure, axes = new_figure(f"keys and values of {probe['model']}", 2 * len(texts), 2)
    for row, text in enumerate(texts):
        for column, joint in enumerate((False, True)):
            decay, energy = axes[4 * row + column], axes[4 * row + 2 + column]
            _draw(decay, energy, text, joint)
            heads = "all heads side by side" if joint else "per head"
            decay.set_title(f"{_short(text['text'])}\n{heads}", fontsize=9)
    save_figure(figure, plot)


def _draw(decay: Any, energy: Any, text: dict, joint: bool) -> None:
    for number, (activation, rotation) in enumerate(_CURVES):
        label = "V" if activation == "V" else _LABELS[rotation]
        for layer in text["layers"]:
            curve = _energies(layer, activation, rotation, joint)
            if curve is None:
                continue
            k = np.arange(1, len(curve) + 1)
            style = {"color": f"C{number}", "linewidth": 0.8, "alpha": 0.7}
            decay.semilogy(k, np.sqrt(curve / curve[0]), label=label, **style)
            energy.plot(k, np.cumsum(curve) / curve.sum(), label=label, **style)
            label = None
    decay.set_ylabel("singular value / largest")
    energy.set_ylabel("share of energy")
    for axis in (decay, energy):
        axis.set_xlabel("component")
        axis.grid(alpha=0.3)
    energy.axhline(0.99, color="grey", linewidth=0.6, linestyle=":")
    energy.legend(fontsize=8)


def _energies(layer: dict, activation: str, rotation: str, joint: bool) -> np.ndarray | None:
    """Mean energies over the groups, or None if the layer has no such spectrum."""
    size = layer["heads"][1] if joint else 1
    chosen = [
        np.square(s["singular_values"])
        for s in layer["spectra"]
        if (s["activation"], s["rotation"], s["heads_per_group"]) == (activation, rotation, size)
        and s["centred"]
    ]
    return np.mean(chosen, axis=0) if chosen else None


def _short(text: str) -> str:
    return text if len(text) < 48 else text[:45] + "..."
