"""Errors through the blocks, and the law of growth with the number of compressed layers."""

from typing import Any

import numpy as np

from mlx_svd.report.figure import new_figure


def depth_figure(result: dict[str, Any]):
    """Residual stream after each block; attention; the logits' error over the number of layers."""
    title = f"depth: {result['conditions']['model']}, {result['rank_label']}"
    figure, (stream, attention, law) = new_figure(title, 1, 3)
    for index, grown in enumerate(result["growth"]):
        every = index == 0
        values = [e["value"] for e in grown["after"]]
        label = "all" if every else f"only {grown['compressed'][0]}"
        style = {"color": "k", "linewidth": 2} if every else {"linewidth": 0.9}
        stream.plot(values, marker="o", markersize=3, label=label, **style)
    stream.set_xlabel("after block")
    stream.set_ylabel("relative error of the residual stream")
    stream.legend(fontsize="x-small", ncols=2)
    for name in ("scores", "probabilities", "output"):
        if rows := result["attention"]:
            attention.plot([r["layer"] for r in rows], [r[name] for r in rows], "o-", label=name)
            attention.legend(fontsize="small")
    attention.set_xlabel("layer")
    attention.set_ylabel("relative error in attention")
    found = result["law"]
    error = np.array(found["error"])
    k = np.array(found["layers"], dtype=float)
    law.loglog(k, error, "ko", label="measured")
    for power, label in ((-0.5, "averaged out"), (0.5, "independent"), (1.0, "one direction")):
        law.loglog(k, error[0] * k**power, "--", linewidth=0.9, label=label)
    p = found["exponent"]
    law.set_title(f"p = {p['value']:.2f} ({p['low']:.2f} to {p['high']:.2f})", fontsize="medium")
    law.set_xlabel("compressed layers k")
    law.set_ylabel("relative error of the logits")
    law.legend(fontsize="small")
    return figure
