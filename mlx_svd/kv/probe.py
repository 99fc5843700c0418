"""``mlx-svd probe-kv``: are a model's keys and values of low rank, on which text, seen how?"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from mlx_svd.calibrate.text import read_windows
from mlx_svd.checkpoint.loader import load
from mlx_svd.conditions import conditions
from mlx_svd.errors import MlxSvdError
from mlx_svd.kv.bases_file import folder_digest
from mlx_svd.kv.moments import LayerMoments, measure_moments
from mlx_svd.kv.spectra import Spectrum, layer_spectra
from mlx_svd.kv.toy_text import LENGTH, SAMPLES, SENTENCES, default_layers, toy_windows
from mlx_svd.source.resolve import CHECKPOINT_PATTERNS, resolve_model
from mlx_svd.source.source import read_config

# Above this share in the 32 largest, of keys or of values, the seed says "compressible".
_SEED_RULE = 0.8


@dataclass(frozen=True)
class ProbedLayer:
    """layer: its number; heads: (query, key-value); head_dim; spectra: see ``Spectrum``."""

    layer: int
    heads: tuple[int, int]
    head_dim: int
    spectra: list[Spectrum]


@dataclass(frozen=True)
class ProbedText:
    """text: its origin; tokens: windows x length; different_tokens: how many ids occur in it;
    layers; summary: means over the layers for each activation, rotation, centring and grouping;
    seed: the columns of seed document 003 on the layers that its probe would take."""

    text: str
    windows: int
    length: int
    tokens: int
    different_tokens: int
    layers: list[ProbedLayer]
    summary: list[dict[str, Any]]
    seed: dict[str, Any]


@dataclass(frozen=True)
class Probe:
    """model; digest: of its folder; texts: the text given and, with ``toy``, the seed's."""

    model: str
    digest: str
    texts: list[ProbedText]
    conditions: dict[str, Any]


def probe_kv(
    model: str,
    *,
    text: str | Path | None = None,
    windows: int | None = 32,
    length: int = 512,
    layers: list[int] | None = None,
    toy: bool = True,
    revision: str | None = None,
    dtype: str | None = "float32",
    advance: Callable[[str], None] = lambda done: None,
) -> Probe:
    """Spectra of the keys (before and after the rotation) and values of ``model``, per head, in
    pairs of heads and joint over all heads, centred and not.

    text, windows, length: as :func:`read_windows`; toy: also on the four sentences of the seed's
    probe; layers: numbers of the layers, None: all. ``advance`` is told each finished window.
    Raises MlxSvdError for a bad text, model or layer.
    """
    resolved = resolve_model(model, revision, CHECKPOINT_PATTERNS)
    # Before the weights are read: a wrong layer is a typing error.
    count = _layer_count(read_config(resolved.path))
    if bad := [n for n in layers or [] if not 0 <= n < count]:
        raise MlxSvdError(f"--layers {bad[0]}: the model has layers 0 to {count - 1}")
    loaded, tokenizer = load(resolved.path, dtype=dtype)
    config = read_config(resolved.path)
    read = read_windows(
        tokenizer, text, count=windows, length=length, vocab_size=config["vocab_size"]
    )
    material = [(read.origin, read.tokens, 1)]
    if toy:
        name = f"the four sentences of seed 003, {SAMPLES} x {LENGTH} tokens"
        # Copies add nothing to a mean: one of each sentence is run.
        copies = SAMPLES // len(SENTENCES)
        material.append((name, toy_windows(tokenizer, len(SENTENCES)), copies))
    texts = []
    for name, tokens, copies in material:
        moments = [
            replace(m, tokens=m.tokens * copies)
            for m in measure_moments(loaded, config["model_type"], tokens, advance)
        ]
        texts.append(_probed(name, np.repeat(tokens, copies, axis=0), moments, layers))
    return Probe(resolved.name, folder_digest(resolved.path), texts, conditions())


def _layer_count(config: dict) -> int:
    names = ("num_hidden_layers", "n_layer", "num_layers")
    return next(config[k] for k in names if config.get(k))


def _probed(
    name: str, tokens: np.ndarray, moments: list[LayerMoments], chosen: list[int] | None
) -> ProbedText:
    n_kv_heads = moments[0].heads[1]
    sizes = tuple(sorted({1, n_kv_heads} | ({2} if n_kv_heads % 2 == 0 else set())))
    numbers = sorted(set(range(len(moments)) if chosen is None else chosen))
    probed = [
        ProbedLayer(n, moments[n].heads, moments[n].head_dim, layer_spectra(moments[n], sizes))
        for n in numbers
    ]
    seed_layers = default_layers(len(moments)) if chosen is None else numbers
    return ProbedText(
        text=name,
        windows=len(tokens),
        length=tokens.shape[1],
        tokens=tokens.size,
        different_tokens=len(set(tokens.flat)),
        layers=probed,
        summary=_summary(probed),
        seed=seed_columns([layer for layer in probed if layer.layer in seed_layers]),
    )


def _summary(layers: list[ProbedLayer]) -> list[dict[str, Any]]:
    """Means over the layers and groups of each kind of spectrum."""
    kinds: dict[tuple, list[Spectrum]] = {}
    for layer in layers:
        for s in layer.spectra:
            key = (s.activation, s.rotation, s.centred, s.heads_per_group)
            kinds.setdefault(key, []).append(s)
    return [
        {
            "activation": activation,
            "rotation": rotation,
            "centred": centred,
            "heads_per_group": size,
            "dimensions": len(group[0].singular_values),
            "spectra": len(group),
            "energy_at": {k: fmean(s.energy_at[k] for s in group) for k in group[0].energy_at},
            "effective_rank": {
                k: fmean(s.effective_rank[k] for s in group) for k in group[0].effective_rank
            },
        }
        for (activation, rotation, centred, size), group in kinds.items()
    ]


def seed_columns(layers: list[ProbedLayer]) -> dict[str, Any]:
    """The numbers of seed document 003, as its probe computes them: keys as cached and values, all
    heads side by side, centred; means, smallest and largest over the layers."""
    columns: dict[str, Any] = {"layers": [layer.layer for layer in layers]}
    for name in ("K", "V"):
        chosen = [
            s
            for layer in layers
            for s in layer.spectra
            if s.activation == name
            and s.rotation != "pre"
            and s.centred
            and s.heads_per_group == layer.heads[1]
        ]
        energies = [s.energy_at["32"] for s in chosen]
        known = [s.condition_number for s in chosen if s.condition_number is not None]
        columns[name] = {
            "avg_effective_rank_99": fmean(s.effective_rank["0.99"] for s in chosen),
            "avg_energy_in_top_32": fmean(energies),
            "min_energy_in_top_32": min(energies),
            "max_energy_in_top_32": max(energies),
            "avg_condition_number": fmean(known) if known else None,
            "num_dims": len(chosen[0].singular_values),
        }
    high = any(columns[n]["avg_energy_in_top_32"] > _SEED_RULE for n in ("K", "V"))
    columns["assessment"] = "Compressible" if high else "not compressible"
    return columns


def probe_json(probe: Probe) -> dict[str, Any]:
    """What is written to disk."""
    return asdict(probe)
