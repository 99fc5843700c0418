"""The kinds of experiments, by name."""

from collections.abc import Callable
from typing import Any

from mlx_svd.errors import MlxSvdError
from mlx_svd.experiments.matrix.config import Experiment
from mlx_svd.experiments.matrix.kinds.base import Kind
from mlx_svd.experiments.matrix.kinds.checkpoints import Checkpoints
from mlx_svd.experiments.matrix.kinds.compression import Compression
from mlx_svd.experiments.matrix.kinds.protection import Protection
from mlx_svd.experiments.matrix.places import Places

KINDS: dict[str, Callable[[dict[str, Any], Places], Kind]] = {
    "compression": Compression,
    "checkpoints": Checkpoints,
    "protection": Protection,
}


def make_kind(experiment: Experiment, places: Places) -> Kind:
    """The kind of an experiment. Raises MlxSvdError for an unknown one, and for its settings."""
    if experiment.kind not in KINDS:
        raise MlxSvdError(f"kind {experiment.kind!r}: use {', '.join(KINDS)}")
    return KINDS[experiment.kind](experiment.settings, places)
