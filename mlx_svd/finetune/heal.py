"""Distil the dense model into its compressed checkpoint, at the same bytes."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import mlx.core as mx

from mlx_svd import __version__
from mlx_svd.calibrate.text import Windows, read_windows
from mlx_svd.checkpoint.stored import stored_tensors, stored_units
from mlx_svd.checkpoint.writer import CheckpointWriter
from mlx_svd.errors import MlxSvdError
from mlx_svd.finetune.data import HealingData, split_windows
from mlx_svd.finetune.output import healed_files, write_healed
from mlx_svd.finetune.pair import Pair, open_pair
from mlx_svd.finetune.settings import HealSettings
from mlx_svd.finetune.state import StateFolder, TrainingState
from mlx_svd.finetune.trainable import trainable
from mlx_svd.finetune.trainer import HealStep, Trainer
from mlx_svd.source.resolve import ModelFolder


@dataclass(frozen=True)
class Healed:
    """kl_before, kl_after: KL(teacher || student) in nats per token on the held-out windows, of
    the student and of what was written; best_step: the step that was written, 0: the student as
    it was, because no step was better; trained_tensors, trained_parameters: how many."""

    mlx_path: str
    kl_before: float
    kl_after: float
    steps: int
    best_step: int
    trained_tensors: int
    trained_parameters: int
    training_windows: int
    held_out_windows: int
    text: str
    text_digest: str


def heal(
    model: str | Path,
    teacher: str | Path,
    mlx_path: str | Path,
    settings: HealSettings | None = None,
    *,
    text: str | Path | None = None,
    command: str = "",
    advance: Callable[[HealStep], None] = lambda step: None,
) -> Healed:
    """Train the checkpoint ``model`` to follow ``teacher`` and write it as ``mlx_path``.

    model: a checkpoint of mlx-svd, or one that mlx-lm quantized; teacher: the dense model it was
    made from; both are in memory. text: as for ``read_windows``; a share of its windows is held
    out, and the state with the smallest KL divergence on them is written. A run that was killed
    is continued by the same call from its last saved state (``MLX_PATH.healing``) and ends with
    the same bytes. ``advance`` is told every step, and step 0 or the one continued from first.
    Raises MlxSvdError for what :func:`open_pair`, :func:`trainable` and :func:`read_windows`
    refuse, an existing mlx_path, a state of another run, and a loss that is not a number.
    """
    settings = settings or HealSettings()
    target = Path(mlx_path)
    # The writer refuses it too, but only after the text was read.
    if os.path.lexists(target):
        raise MlxSvdError(f"{target}: exists already; delete it or give another --mlx-path")
    pair = open_pair(str(model), str(teacher), settings.dtype)
    folder = pair.student_folder.path
    groups = trainable(pair.student, pair.section, settings.train, str(folder))
    windows = read_windows(
        pair.tokenizer,
        text,
        count=settings.windows,
        length=settings.length,
        vocab_size=pair.vocab_size,
    )
    data = split_windows(windows, settings.seed)
    units = stored_units(folder)
    digest = _run_digest(pair, settings, windows)
    # Opened first: it locks the target, and refuses a run to another place or on a full disk
    # before anything is trained.
    writer = CheckpointWriter(target, units, digest)
    try:
        states = StateFolder(target, digest)
        saved = states.load()
        start = _start(folder, list(groups))
        trainer = Trainer(pair.student, pair.teacher, start, groups, data, settings)
        state = trainer.run(saved, states.save, advance)
        healed = _summary(target, trainer, state, start, data, windows)
        trained = trainer.stored(state.arrays["best"])
        files = healed_files(pair, _record(pair, settings, healed), command)
        write_healed(writer, units, folder, trained, files)
        states.remove()
    finally:
        writer.close()
    return healed


def _start(folder: Path, names: list[str]) -> dict[str, mx.array]:
    """The tensors to train, as stored."""
    tensors = stored_tensors(folder)
    for name in names:
        if name not in tensors:
            raise MlxSvdError(
                f"{folder}: tensor {name} is stored under another name; give a checkpoint as "
                "mlx-svd or mlx-lm wrote it"
            )
    return {name: tensors[name] for name in names}


def _summary(
    target: Path,
    trainer: Trainer,
    state: TrainingState,
    start: dict[str, mx.array],
    data: HealingData,
    windows: Windows,
) -> Healed:
    return Healed(
        mlx_path=str(target),
        kl_before=state.kl_start,
        kl_after=state.kl_best,
        steps=trainer.steps,
        best_step=state.best_step,
        trained_tensors=len(start),
        trained_parameters=sum(tensor.size for tensor in start.values()),
        training_windows=len(data.training),
        held_out_windows=len(data.held_out),
        text=windows.origin,
        text_digest=windows.digest,
    )


def _record(pair: Pair, settings: HealSettings, healed: Healed) -> dict:
    """What config.json keeps: the conditions and the result, no path of this machine."""
    result = {k: v for k, v in asdict(healed).items() if k != "mlx_path"}
    chosen = {
        name: getattr(settings, name)
        for name in ("train", "length", "lr", "batch_size", "dtype", "seed", "save_every")
    }
    source = {
        "version": __version__,
        "teacher": pair.teacher_folder.name,
        "teacher_revision": pair.teacher_folder.revision,
    }
    return source | chosen | result


def _run_digest(pair: Pair, settings: HealSettings, windows: Windows) -> str:
    """Identifies models, text, settings and program; a state is continued only with the same."""
    facts = [
        __version__,
        settings.to_json(),
        windows.digest,
        _files(pair.student_folder),
        _files(pair.teacher_folder),
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _files(folder: ModelFolder) -> list:
    """Name, size and time of every file that makes a model."""
    patterns = ("config.json", "model*.safetensors")
    paths = sorted(path for pattern in patterns for path in folder.path.glob(pattern))
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
