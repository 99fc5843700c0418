"""The state of a healing run on disk: a killed run continues from the last one saved."""

import json
import os
import shutil
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from mlx_svd.checkpoint.disk import disk_errors, sync_folder, write_file
from mlx_svd.errors import MlxSvdError

_FILE = "state.json"


@dataclass
class TrainingState:
    """step: optimizer steps done; kl_start, kl_best: validation KL (nats per token) of step 0 and
    of the best step; arrays: "delta", "m", "v" (of the next step) and "best" (delta of the best
    step, empty if that is step 0), each parameter name -> float32."""

    kl_start: float
    kl_best: float
    step: int = 0
    best_step: int = 0
    arrays: dict[str, dict[str, mx.array]] = field(default_factory=dict)


class StateFolder:
    """``NAME.healing`` beside the target ``NAME``.

    digest: identifies the run; kind: what it is called, and the folder's ending; state: the
    dataclass that is kept: numbers, lists and ``arrays``. Each save writes a safetensors file of
    its own and then replaces the JSON that names it, so a kill leaves the state before or the one
    after.
    """

    def __init__(
        self, target: Path, digest: str, kind: str = "healing", state: type = TrainingState
    ):
        self.path = target.with_name(f"{target.name}.{kind}")
        self._digest, self._kind, self._state = digest, kind, state

    def load(self) -> Any | None:
        """The last saved state, None for a new run. Raises MlxSvdError for a state of another run,
        a damaged one, and a path that is not a state folder."""
        file = self.path / _FILE
        if not file.is_file():
            self._refuse_foreign()
            return None
        remedy = "delete it to begin again"
        try:
            record = json.loads(file.read_bytes())
            if record["digest"] != self._digest:
                raise MlxSvdError(
                    f"{self.path}: holds an unfinished {self._kind} with other settings, models or "
                    "text; delete it, or repeat the command that began it"
                )
            data = (self.path / record["tensors"]).read_bytes()
            if zlib.crc32(data) != record["crc"]:
                raise ValueError(f"{record['tensors']} has changed")
            arrays: dict[str, dict[str, mx.array]] = {"best": {}}
            for name, array in load_safetensors(data).items():
                kind, _, parameter = name.partition("/")
                arrays.setdefault(kind, {})[parameter] = mx.array(array)
            return self._state(**record["state"], arrays=arrays)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise MlxSvdError(f"{self.path}: damaged state ({error}); {remedy}") from error

    def save(self, state: Any) -> None:
        """Replace the saved state; on disk when this returns."""
        tensors = {
            f"{kind}/{name}": np.array(array)
            for kind, arrays in state.arrays.items()
            for name, array in arrays.items()
        }
        data = save_safetensors(tensors)
        name = f"step-{state.step:06d}.safetensors"
        numbers = {k: v for k, v in vars(state).items() if k != "arrays"}
        record = {"digest": self._digest, "state": numbers, "tensors": name}
        record["crc"] = zlib.crc32(data)
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            write_file(self.path / name, data)
            write_file(self.path / f"{_FILE}.new", json.dumps(record, indent=2).encode())
            sync_folder(self.path)
            os.replace(self.path / f"{_FILE}.new", self.path / _FILE)
            sync_folder(self.path)
            for other in self.path.glob("step-*.safetensors"):
                if other.name != name:
                    other.unlink()

    def remove(self) -> None:
        """After the checkpoint is complete."""
        with disk_errors(self.path):
            shutil.rmtree(self.path)

    def _refuse_foreign(self) -> None:
        """Killed in its first save, a run leaves no JSON; anything else there is not ours."""
        if not self.path.exists():
            return
        if not self.path.is_dir() or any(
            not path.name.startswith(("step-", _FILE)) for path in self.path.iterdir()
        ):
            raise MlxSvdError(
                f"{self.path}: is in the way, and not an unfinished {self._kind} that can be "
                "continued; delete it or give another --mlx-path"
            )
