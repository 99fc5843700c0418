"""The model that is analyzed: loaded once, with its projections and the text it is measured on."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_svd.calibrate.statistics import model_digest
from mlx_svd.calibrate.text import Windows, read_windows
from mlx_svd.checkpoint.loader import load
from mlx_svd.conditions import conditions
from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.divergence import BaseDistribution, base_distribution
from mlx_svd.evaluate.likelihood.forward import vocabulary_size
from mlx_svd.source.families import LinearModule, Projection
from mlx_svd.source.source import Source, open_source

# Of the kept predictions, up to which they are float32.
BASE_BYTES = 1 << 30


@dataclass(frozen=True)
class Subject:
    """source: the opened model folder; model: the same, loaded; windows: of the text (N, L)."""

    source: Source
    model: nn.Module
    tokenizer: Any
    windows: Windows
    dtype: str
    modules: dict[str, nn.Module] = field(init=False, repr=False)
    # Paths of the modules whose weights are replaced at present.
    changed: set[str] = field(init=False, repr=False, default_factory=set)

    def __post_init__(self):
        object.__setattr__(self, "modules", dict(self.model.named_modules()))

    @property
    def layers(self) -> int:
        """How many transformer blocks the model has."""
        return 1 + max(p.layer for p in self.projections.values())

    @cached_property
    def projections(self) -> dict[str, Projection]:
        """Every projection of the model by its path, layer by layer."""
        return {p.path: p for linear in self.source.linears for p in linear.projections}

    @cached_property
    def linear_of(self) -> dict[str, LinearModule]:
        """Path of a projection -> the module that holds it, alone or with others."""
        return {p.path: linear for linear in self.source.linears for p in linear.projections}

    @cached_property
    def base(self) -> BaseDistribution:
        """What the uncompressed model predicts on the windows; run once. Must be asked for the
        first time before anything is compressed: RuntimeError otherwise."""
        if self.changed:
            raise RuntimeError("the base predictions must be taken before weights are replaced")
        count, length = self.windows.tokens.shape
        nbytes = 4 * count * (length - 1) * vocabulary_size(self.model)
        # Rounded to float16 it limits a KL divergence to about 1e-6 from below.
        dtype = np.float32 if nbytes <= BASE_BYTES else np.float16
        return base_distribution(self.model, self.windows.tokens, dtype)

    def weight(self, path: str) -> np.ndarray:
        """The matrix (m, n) of a projection, float32, as it is in the model now."""
        linear = self.linear_of[path]
        rows = linear.split(self.modules[linear.path].weight)[self.projections[path].name]
        return np.array(rows.astype(mx.float32))

    def chosen(
        self, projections: Sequence[str] | None = None, layers: Sequence[int] | None = None
    ) -> list[Projection]:
        """The projections with these names (q, k, v, o, gate, up, down) in these layers; None: all.

        Raises MlxSvdError for a layer that the model lacks, and if nothing is left.
        """
        for layer in layers or ():
            if not 0 <= layer < self.layers:
                raise MlxSvdError(
                    f"--layers {layer}: {self.source.name} has layers 0 to {self.layers - 1}"
                )
        found = [
            p
            for p in self.projections.values()
            if (projections is None or p.name in projections)
            and (layers is None or p.layer in layers)
        ]
        if not found:
            raise MlxSvdError(
                f"a {self.source.config['model_type']} model has no "
                f"{', '.join(projections or ())} projection; change --projections"
            )
        return found

    def conditions(self) -> dict[str, Any]:
        """What every result of this model and text depends on; JSON values only."""
        w = self.windows
        text = {"origin": w.origin, "digest": w.digest, "windows": len(w)}
        return conditions() | {
            "model": self.source.name,
            "revision": self.source.revision,
            "model_digest": model_digest(self.source),
            "dtype": self.dtype,
            "text": text | {"length": int(w.tokens.shape[1]), "windows_of_text": w.available},
        }


def open_subject(
    model: str,
    *,
    revision: str | None = None,
    text: str | None = None,
    windows: int = 8,
    length: int = 512,
    dtype: str | None = None,
) -> Subject:
    """Open and load a model, and read ``windows`` windows of ``length`` tokens of ``text`` (a file,
    a hub data set, or None for the text shipped with the package).

    dtype: of the parameters; None: float32 on a CPU, else as stored. Raises MlxSvdError for what
    ``open_source`` and ``read_windows`` refuse.
    """
    source = open_source(model, revision)
    if dtype is None and mx.default_device() == mx.Device(mx.cpu):
        dtype = "float32"
    loaded, tokenizer = load(source.folder, dtype=dtype)
    chosen = read_windows(
        tokenizer, text, count=windows, length=length, vocab_size=source.config.get("vocab_size")
    )
    first = next(iter(dict(loaded.named_modules())[source.linears[0].path].parameters().values()))
    return Subject(source, loaded, tokenizer, chosen, str(first.dtype).removeprefix("mlx.core."))


def parse_layers(text: str | None) -> list[int] | None:
    """'0,6,12' or '0-5,11' -> layer numbers; None -> None (all)."""
    if text is None:
        return None
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        try:
            layers += range(int(first), int(last if dash else first) + 1)
        except ValueError as error:
            raise MlxSvdError(f"--layers {text}: give numbers such as 0,6,12 or 0-5") from error
    if not layers:
        raise MlxSvdError(f"--layers {text}: names no layer; give numbers such as 0,6,12 or 0-5")
    return sorted(set(layers))


def describe(projection: Projection) -> dict[str, Any]:
    """A projection as it is named in every result."""
    known = asdict(projection)
    return {key: known[key] for key in ("path", "name", "layer", "heads")} | {
        "shape": list(projection.shape)
    }
