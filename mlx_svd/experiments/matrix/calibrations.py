"""Calibrations that several runs share: made once for each model, seed and set of moments."""

from typing import Any

from mlx_svd.calibrate.calibrate import calibrate
from mlx_svd.calibrate.statistics import Calibration, model_digest
from mlx_svd.checkpoint.loader import load_model
from mlx_svd.errors import MlxSvdError
from mlx_svd.experiments.matrix.locks import only_one
from mlx_svd.experiments.matrix.material import drawn_windows
from mlx_svd.experiments.matrix.places import Places
from mlx_svd.source.source import Source


def drawn_calibration(
    source: Source,
    tokenizer: Any,
    entry: dict[str, Any] | None,
    places: Places,
    seed: int,
    moments: tuple[str, ...],
) -> Calibration:
    """Of all projections, on windows of ``{file, windows, length}`` that the seed draws. Raises
    MlxSvdError without an entry."""
    if not entry:
        raise MlxSvdError("calibration: give {file, windows, length} in the settings")
    windows = drawn_windows(entry, places, tokenizer, source.config.get("vocab_size"), seed)
    name = "-".join((model_digest(source)[:12], windows.digest[:12], *moments))
    folder = places.shared / "calibrations" / name
    names = {p.name for linear in source.linears for p in linear.projections}
    with only_one(folder):
        return calibrate(
            source,
            lambda: load_model(source.folder, dtype="float32", lazy=True)[0],
            windows,
            folder,
            projections=tuple(sorted(names)),
            moments=moments,
        )
