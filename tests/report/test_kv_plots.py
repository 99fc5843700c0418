"""What the KV plots draw is what the JSON holds."""

import json

import numpy as np
import pytest

from mlx_svd.report import kv_quality, kv_spectra


@pytest.fixture
def drawn(monkeypatch):
    """The figures that would have been saved."""
    figures = []
    for module in (kv_quality, kv_spectra):
        monkeypatch.setattr(module, "save_figure", lambda figure, path: figures.append(figure))
    return figures


def test_divergence_is_drawn_against_the_share_of_bytes(drawn, tmp_path):
    def arm(name, nbytes, mean):
        kl = {"mean": mean, "low": mean / 2, "high": mean * 2}
        return {"name": name, "bytes_per_token": nbytes, "kl": kl}

    dense = {"name": "dense", "model": "m", "windows": 4, "length": 8, "text": "t"}
    records = [
        dense | {"bytes_per_token": 200},
        arm("q8", 106, 0.001),
        arm("lowrank:bits=4", 56, 0.01),
        arm("mla:rank=4", 50, 0.1),
        {"name": "lowrank:rank=3", "reason": "does not fit"},
    ]
    path = tmp_path / "table.json"
    path.write_text(json.dumps(records))
    kv_quality.plot_kv_quality(path, tmp_path / "a.png")
    (axis,) = drawn[0].axes
    points = [tuple(c.lines[0].get_xydata()[0]) for c in axis.containers]
    assert points == [(0.53, 0.001), (0.28, 0.01), (0.25, 0.1)]


def test_spectra_are_drawn_from_all_singular_values(drawn, tmp_path):
    def spectrum(activation, size, values):
        return {
            "activation": activation, "rotation": "none", "centred": True, "heads_per_group": size,
            "group": 0, "singular_values": values,
        }  # fmt: skip

    spectra = [spectrum("K", 1, [4.0, 2.0]), spectrum("K", 1, [2.0, 0.0])]
    spectra += [spectrum("K", 2, [5.0, 3.0, 2.0, 1.0])]
    layer = {"layer": 0, "heads": [2, 2], "spectra": spectra}
    path = tmp_path / "probe.json"
    path.write_text(json.dumps({"model": "m", "texts": [{"text": "t", "layers": [layer]}]}))
    kv_spectra.plot_kv_spectra(path, tmp_path / "a.png")
    decay, joint, energy, _ = drawn[0].axes
    # The energies of the two heads are averaged: (16 + 4) / 2 and (4 + 0) / 2.
    np.testing.assert_allclose(decay.lines[0].get_ydata(), [1, np.sqrt(0.2)])
    np.testing.assert_allclose(energy.lines[0].get_ydata(), [10 / 12, 1])
    np.testing.assert_allclose(joint.lines[0].get_ydata(), [1, 0.6, 0.4, 0.2])
