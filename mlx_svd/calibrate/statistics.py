"""What is measured for each projection, and the folder that keeps it.

A calibration folder holds ``calibration.json`` (model, text, settings, digests), ``windows.npy``
(the text's tokens) and one ``layer-NNN.safetensors`` for each layer, float64, written when the
layer is complete.
"""

import hashlib
import io
import json
import os
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from mlx_svd.calibrate.text import Windows
from mlx_svd.checkpoint.disk import disk_errors, replace_file, write_file
from mlx_svd.errors import MlxSvdError
from mlx_svd.source.families import Projection
from mlx_svd.source.headers import TensorHeader
from mlx_svd.source.source import Source

CALIBRATION_FORMAT = 1
CALIBRATION_FILE = "calibration.json"
WINDOWS_FILE = "windows.npy"
# Names the calibration that a folder is for, from its beginning.
_MARKER = "digest"
# What can be measured: of the inputs (forward pass), and of the gradients (backward pass).
MOMENTS = ("input", "output", "gradient")
# Names of ``Statistics``: what projections with one input share, and what each has of its own.
INPUT_MOMENTS = ("second", "mean", "mean_abs")
GRADIENT_MOMENTS = ("output_second", "gradient", "abs_gradient", "row_fisher")
# Of a sequential calibration.
DRIFT = "drift"
# Share of the mean diagonal that is added to E[x x^T] before it is inverted for the target. Of
# 0.001, 0.01, 0.1 and 1 the best on the demo model at 0.8, 0.5 and 0.157 of the bytes.
TARGET_DAMPING = 0.1
# The mean loss on the text, kept with every layer whose gradients were measured.
LOSS = "loss"
# The projections that see the same input.
_INPUT_GROUPS = {"q": "qkv", "k": "qkv", "v": "qkv", "o": "o", "gate": "mlp", "up": "mlp"}
# Of each weight file, this many evenly spaced pieces of this size enter the model's digest.
_PIECES, _PIECE_BYTES = 64, 1 << 16


@dataclass(frozen=True)
class Statistics:
    """Means over the calibration tokens for one projection W (m, n), y = W x, float64.

    second: E[x x^T] (n, n); mean: E[x] (n,); mean_abs: E|x| (n,); output_second: E[g g^T] (m, m)
    of g = dL/dy; of the gradient G of each window's mean loss: gradient: E[G], abs_gradient:
    E|G| (m, n), row_fisher: E[sum_j G_ij^2] (m,); drift: E[(z - x) x^T] (n, n), where z is the
    original model's input in place of x. None: not measured.
    """

    second: np.ndarray
    mean: np.ndarray
    mean_abs: np.ndarray
    output_second: np.ndarray | None = None
    gradient: np.ndarray | None = None
    abs_gradient: np.ndarray | None = None
    row_fisher: np.ndarray | None = None
    drift: np.ndarray | None = None

    def target(self, weight: np.ndarray) -> np.ndarray:
        """The matrix (m, n) float64 that makes of the inputs x, in least squares, what W (m, n)
        makes of the original model's inputs: W (I + E[(z - x) x^T] E[x x^T]^-1); W without drift.
        As in GPTAQ (arXiv 2504.02692)."""
        if self.drift is None:
            return weight
        ridge = TARGET_DAMPING * np.trace(self.second) / len(self.second)
        damped = self.second + ridge * np.eye(len(self.second))
        return weight + np.linalg.solve(damped, (weight @ self.drift).T).T


@dataclass(frozen=True)
class CalibrationInfo:
    """What a calibration was made of. model, text, digest: SHA-256; tokens: how many entered;
    loss: mean negative log-likelihood on them; moments, projections: what was measured;
    module_losses: module without projections (embedding, head) -> bits -> KL divergence from the
    original when it is quantized (group size 64), in nats a token; sequential: digest of the plan
    by which everything before a projection was compressed when its input was measured, None = the
    model was the original."""

    base_model: str
    revision: str | None
    model: str
    origin: str
    text: str
    windows: int
    length: int
    tokens: int
    moments: tuple[str, ...]
    projections: tuple[str, ...]
    dtype: str
    layers: int
    loss: float | None = None
    module_losses: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_memory: int = 0
    sequential: str | None = None

    @cached_property
    def digest(self) -> str:
        """Equal digests: the same model, text and settings."""
        settings = ("model", "text", "windows", "length", "moments", "projections", "dtype")
        kept = {name: getattr(self, name) for name in settings}
        if self.sequential:
            kept["sequential"] = self.sequential
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Calibration:
    """A finished calibration folder."""

    folder: Path
    info: CalibrationInfo

    def statistics(self, projection: Projection) -> Statistics:
        """Read one projection's statistics; MlxSvdError if it was not calibrated."""
        self.require(projection.name)
        path = self.folder / layer_file(projection.layer)
        group = input_group(projection)
        with safe_open(str(path), framework="numpy") as file:
            names = set(file.keys())

            def read(name: str) -> np.ndarray | None:
                return file.get_tensor(name) if name in names else None

            return Statistics(
                **{name: file.get_tensor(f"{group}.{name}") for name in INPUT_MOMENTS},
                **{name: read(f"{projection.name}.{name}") for name in GRADIENT_MOMENTS},
                drift=read(f"{group}.{DRIFT}"),
            )

    @cached_property
    def windows(self) -> Windows:
        """The text that it was measured on."""
        path = self.folder / WINDOWS_FILE
        try:
            tokens = np.load(path)
        except (OSError, ValueError) as error:
            raise MlxSvdError(
                f"{path}: is missing or damaged; delete the folder and calibrate again"
            ) from error
        return Windows(tokens, self.info.origin, self.info.text, len(tokens))

    def require(self, name: str) -> None:
        """Raise MlxSvdError unless there are statistics of the projections of this name."""
        if name not in self.info.projections:
            raise MlxSvdError(
                f"{self.folder}: holds no statistics of {name} projections; calibrate again with "
                f"--projections {','.join((*self.info.projections, name))}"
            )

    def check(self, source: Source, moments: tuple[str, ...]) -> None:
        """Raise MlxSvdError if this is a calibration of another model, or lacks ``moments``."""
        if self.info.model != model_digest(source):
            raise MlxSvdError(
                f"{self.folder}: is a calibration of another model ({self.info.base_model}); "
                f"calibrate {source.name} into another folder"
            )
        if missing := [name for name in moments if name not in self.info.moments]:
            raise MlxSvdError(
                f"{self.folder}: lacks the {' and '.join(missing)} moments; calibrate again with "
                f"--moments {','.join(MOMENTS[: 1 + max(map(MOMENTS.index, missing))])}"
            )


def input_group(projection: Projection) -> str:
    """The name under which a projection's input is stored; q, k, v share one, gate and up too."""
    return _INPUT_GROUPS.get(projection.name, projection.name)


def layer_file(layer: int) -> str:
    return f"layer-{layer:03d}.safetensors"


def save_layer(folder: Path, layer: int, arrays: dict[str, np.ndarray]) -> None:
    """Write one layer's statistics; the file appears when it is complete."""
    replace_file(folder / layer_file(layer), save(arrays))


def saved_loss(folder: Path, layer: int) -> float | None:
    """The mean loss of the passes that measured this layer; None if only inputs were measured."""
    with safe_open(str(folder / layer_file(layer)), framework="numpy") as file:
        return file.get_tensor(LOSS).item() if LOSS in file.keys() else None  # noqa: SIM118


def save_info(folder: Path, info: CalibrationInfo) -> None:
    """Written last: a folder with this file is complete."""
    content = {"calibration_format": CALIBRATION_FORMAT, "digest": info.digest, **asdict(info)}
    with disk_errors(folder, "--output"):
        write_file(folder / CALIBRATION_FILE, json.dumps(content, indent=2).encode())


def load_calibration(folder: Path) -> Calibration:
    """Open a calibration folder; MlxSvdError if it is none, damaged or of a newer format."""
    path = folder / CALIBRATION_FILE
    if not path.is_file():
        raise MlxSvdError(
            f"{folder}: no finished calibration here; make one with mlx-svd calibrate --output"
        )
    try:
        content = json.loads(path.read_bytes())
        version, digest = content.pop("calibration_format"), content.pop("digest")
        for key in ("moments", "projections"):
            content[key] = tuple(content[key])
        info = CalibrationInfo(**content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise MlxSvdError(f"{path}: is damaged; delete the folder and calibrate again") from error
    if version != CALIBRATION_FORMAT or digest != info.digest:
        raise MlxSvdError(
            f"{path}: was made by another version of mlx-svd; delete the folder and calibrate again"
        )
    if missing := [i for i in range(info.layers) if not (folder / layer_file(i)).is_file()]:
        raise MlxSvdError(
            f"{folder}: {layer_file(missing[0])} is missing; delete the folder and calibrate again"
        )
    return Calibration(folder, info)


def finished(folder: Path, info: CalibrationInfo) -> Calibration | None:
    """The calibration in ``folder`` if it is this one and complete; None if it is to be made or
    continued. Raises MlxSvdError if the folder holds something else."""
    marker = folder / _MARKER
    if marker.is_file() and marker.read_text() == info.digest:
        return load_calibration(folder) if (folder / CALIBRATION_FILE).is_file() else None
    if folder.exists() and not folder.is_dir():
        raise MlxSvdError(f"{folder}: is a file; give a folder")
    if folder.exists() and any(folder.iterdir()):
        raise MlxSvdError(
            f"{folder}: holds something else (another model, text or settings); delete it or give "
            "another folder"
        )
    return None


def begin(folder: Path, info: CalibrationInfo, windows: Windows) -> None:
    """Mark a new or unfinished folder as that of this calibration, and keep its text."""
    tokens = io.BytesIO()
    np.save(tokens, windows.tokens)
    with disk_errors(folder, "--output"):
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / _MARKER, info.digest.encode())
        write_file(folder / WINDOWS_FILE, tokens.getvalue())


def cache_folder(info: CalibrationInfo) -> Path:
    """Where a calibration is kept that was given no folder: MLX_SVD_CACHE, by default
    ~/.cache/mlx-svd."""
    root = Path(os.environ.get("MLX_SVD_CACHE", "~/.cache/mlx-svd")).expanduser()
    return root / "calibration" / info.digest[:16]


def model_digest(source: Source) -> str:
    """SHA-256 of the config, the tensors' headers and pieces of every weight file."""
    return digest_of(source.config, source.headers)


def digest_of(config: dict, headers: dict[str, TensorHeader]) -> str:
    """``model_digest`` from the parts of a source."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    files = sorted({header.file for header in headers.values()})
    for name, header in sorted(headers.items()):
        digest.update(f"{name} {header.nbytes} {header.file.name}".encode())
    for file in files:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            for piece in range(_PIECES):
                stream.seek(piece * max(0, size - _PIECE_BYTES) // (_PIECES - 1))
                digest.update(stream.read(_PIECE_BYTES))
    return digest.hexdigest()
