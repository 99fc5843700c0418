"""Decay of the singular values and cumulative energy of every projection type."""

from typing import Any

import numpy as np

from mlx_svd.report.figure import new_figure

_KINDS = (("weight", "W"), ("weighted", "W C^1/2"))


def spectrum_figure(result: dict[str, Any]):
    """Above the decay, below the cumulative energy; one column for the weights and one for the
    weights times activations, one line for each layer, coloured by projection type."""
    rows = result["projections"]
    kinds = [kind for kind in _KINDS if any(row[kind[0]] for row in rows)]
    names = list(dict.fromkeys(row["projection"]["name"] for row in rows))
    figure, axes = new_figure(f"spectra: {result['conditions']['model']}", 2, len(kinds))
    for column, (kind, title) in enumerate(kinds):
        decay, energy = axes[column], axes[len(kinds) + column]
        drawn = set()
        for row in rows:
            name = row["projection"]["name"]
            values = np.array(row[kind]["singular_values"])
            share = np.arange(1, len(values) + 1) / len(values)
            style = {"color": f"C{names.index(name)}", "linewidth": 0.8, "alpha": 0.7}
            label = None if name in drawn else name
            drawn.add(name)
            positive = values > values[0] * 1e-7 if values[0] > 0 else values > 0
            decay.semilogy(
                share[positive], (values / (values[0] or 1.0))[positive], label=label, **style
            )
            energy.plot(share, np.cumsum(values**2) / ((values**2).sum() or 1.0), **style)
        decay.set_title(title)
        decay.set_ylabel("singular value / largest")
        energy.set_ylabel("share of the energy")
        energy.set_xlabel("share of the rank")
        decay.legend(fontsize="small")
    return figure
