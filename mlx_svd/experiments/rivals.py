"""Quantized checkpoints of the dense model, made by mlx-lm's own code: what a low-rank checkpoint
has to beat at equal bytes."""

import hashlib
import importlib.util
import json
import re
import signal
import subprocess
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlx_svd.calibrate.text import Windows
from mlx_svd.checkpoint.loader import tensor_bytes
from mlx_svd.errors import MlxSvdError
from mlx_svd.experiments.child import child_environment, python_module
from mlx_svd.experiments.rival_spec import BATCH_SIZE, LEARNING_RATE, RivalSpec, rival_spec
from mlx_svd.source.headers import read_headers
from mlx_svd.source.source import read_config

_EXCEPTION = re.compile(r"^[\w.]*(?:Error|Exception|Interrupt|Exit)\b.*", re.MULTILINE)


@dataclass(frozen=True)
class RivalRecord:
    """One rival. command: the mlx-lm command that it stands for; windows: how many windows of
    tokens it was calibrated on, digest: their SHA-256; folder: the checkpoint; nbytes: of all
    tensors on disk; bits_per_weight: those bytes over the dense model's parameters; seconds,
    cpu_seconds, peak_memory_bytes: of loading, quantizing and saving, the imports' memory
    included; settings: bits, learning rate and so on, and what the method reports about itself.

    reason: None, or in one line why it did not run; the numbers are then None.
    """

    name: str
    command: str
    windows: int
    digest: str | None
    seed: int
    folder: Path | None = None
    nbytes: int | None = None
    bits_per_weight: float | None = None
    seconds: float | None = None
    cpu_seconds: float | None = None
    peak_memory_bytes: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    reason: str | None = None


def make_rival(
    name: str,
    model_folder: str | Path,
    out_folder: str | Path,
    windows: Windows | np.ndarray | None = None,
    *,
    seed: int = 0,
    group_size: int = 64,
    learning_rate: float = LEARNING_RATE,
    batch_size: int = BATCH_SIZE,
    timeout: float | None = None,
) -> RivalRecord:
    """Quantize a dense model with one of mlx-lm's methods into a new folder.

    name: see :func:`rival_spec`; windows: (N, L) token ids, for methods that look at text;
    learning_rate and batch_size: dwq only; timeout: seconds after which it counts as not run.
    The method runs in a process of its own; whatever ends that process becomes the record's
    ``reason``, and the folder appears only if the checkpoint is complete. Raises MlxSvdError for
    bad input: unknown name, a folder that is no dense model, an output folder that exists,
    missing windows.
    """
    spec = rival_spec(
        name, group_size=group_size, learning_rate=learning_rate, batch_size=batch_size
    )
    model, out = Path(model_folder), Path(out_folder)
    tokens = windows.tokens if isinstance(windows, Windows) else windows
    config = _check_input(spec, model, out, tokens)
    tokens = np.ascontiguousarray(tokens, dtype=np.int32) if spec.calibrated else None
    head: dict[str, Any] = {"name": name, "command": spec.command, "seed": seed}
    head["windows"] = 0 if tokens is None else len(tokens)
    head["digest"] = None if tokens is None else hashlib.sha256(tokens.tobytes()).hexdigest()
    if reason := _missing_model_type(config):
        return RivalRecord(**head, reason=reason)
    out.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the finished folder only has to be renamed.
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as work:
        request: dict[str, Any] = {"spec": asdict(spec), "model": str(model), "seed": seed}
        request |= {"windows": None, "out": f"{work}/model", "result": f"{work}/result.json"}
        if tokens is not None:
            request["windows"] = f"{work}/windows.npy"
            np.save(request["windows"], tokens)
        if reason := _run(request, timeout):
            return RivalRecord(**head, reason=reason)
        result = json.loads(Path(request["result"]).read_text())
        Path(request["out"]).rename(out)
    nbytes = sum(tensor_bytes(out).values())
    bits_per_weight = 8 * nbytes / result.pop("parameters")
    return RivalRecord(**head, folder=out, nbytes=nbytes, bits_per_weight=bits_per_weight, **result)


def _check_input(spec: RivalSpec, model: Path, out: Path, tokens: np.ndarray | None) -> dict:
    """config.json of the dense model."""
    if not model.is_dir():
        raise MlxSvdError(f"{model}: no such folder; give the folder of the dense model")
    config = read_config(model)
    read_headers(model)
    if {"quantization", "quantization_config", "mlx_svd"} & config.keys():
        raise MlxSvdError(f"{model}: is compressed already; rivals are made from the dense model")
    if out.exists():
        raise MlxSvdError(f"{out}: exists already; delete it or give another folder")
    if spec.calibrated and (tokens is None or np.ndim(tokens) != 2 or not len(tokens)):
        raise MlxSvdError(f"rival {spec.name!r} looks at text; give windows of tokens (N, L)")
    return config


def _missing_model_type(config: dict) -> str | None:
    """Why no quantizer of mlx-lm can run at all."""
    from mlx_lm.utils import MODEL_REMAPPING

    kind = config.get("model_type")
    if importlib.util.find_spec(f"mlx_lm.models.{MODEL_REMAPPING.get(kind, kind)}") is None:
        return f"mlx-lm has no model type {kind}"
    return None


def _run(request: dict[str, Any], timeout: float | None) -> str | None:
    """Run the child to its end; None, or why it failed."""
    command = python_module("mlx_svd.experiments.rival_runner")
    try:
        done = subprocess.run(
            [*command, json.dumps(request)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            env=child_environment(),
        )
    except subprocess.TimeoutExpired:
        return f"took longer than {timeout:g} seconds"
    if done.returncode == 0:
        return None
    if done.returncode < 0:
        return f"ended by {signal.Signals(-done.returncode).name}"
    raised = _EXCEPTION.findall(done.stderr)
    lines = done.stderr.split("\n")
    reason = raised[-1] if raised else next((x for x in reversed(lines) if x.strip()), "")
    reason = reason.removeprefix("mlx_svd.errors.MlxSvdError: ")
    return " ".join(reason.split())[:300] or f"ended with exit status {done.returncode}"
