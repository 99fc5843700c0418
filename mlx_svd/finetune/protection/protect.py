"""Fine-tune on a user's text while protecting what the model knows, and measure both."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mlx_svd import __version__
from mlx_svd.checkpoint.stored import stored_units
from mlx_svd.checkpoint.writer import CheckpointWriter
from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.likelihood.encode import context_length
from mlx_svd.finetune.output import write_healed
from mlx_svd.finetune.protection.baseline import Baseline
from mlx_svd.finetune.protection.examples import Batches, data_examples, fact_examples
from mlx_svd.finetune.protection.guards import warnings_for
from mlx_svd.finetune.protection.output import protected_files
from mlx_svd.finetune.protection.result import (
    ProtectResult,
    item_lines,
    trajectory_of,
)
from mlx_svd.finetune.protection.run import ArmRun
from mlx_svd.finetune.protection.settings import ProtectSettings
from mlx_svd.finetune.protection.start import make_start
from mlx_svd.finetune.protection.trainer import ProtectState, ProtectStep
from mlx_svd.finetune.state import StateFolder

_STATE = "protecting"


def protect(
    baseline: Baseline,
    mlx_path: str | Path | None,
    settings: ProtectSettings | None = None,
    *,
    data: str | Path | None = None,
    command: str = "",
    advance: Callable[[ProtectStep], None] = lambda step: None,
) -> ProtectResult:
    """Train one arm from ``baseline`` and measure it; write it as ``mlx_path`` (None: nowhere).

    Trained are the baseline's conflict facts and ``data``, a .jsonl file in mlx-lm's formats. The
    trajectory has a point before training, one every ``settings.measure_every`` steps and one at
    the end, always of the tensors as they would be stored. A run that was killed is continued by
    the same call from its last point (``MLX_PATH.protecting``) and ends with the same bytes.

    Raises MlxSvdError for what the arm, :func:`make_start` and the guard rails refuse, an existing
    mlx_path, a state of another run; Diverged when a loss is not a number.
    """
    settings = settings or ProtectSettings()
    target = None if mlx_path is None else Path(mlx_path)
    if target is not None and os.path.lexists(target):
        raise MlxSvdError(f"{target}: exists already; delete it or give another --mlx-path")
    examples, replay = _batches(baseline, settings, data)
    count = len(examples.examples)
    warnings = warnings_for(settings, count)
    steps = settings.count_steps(count)
    with ExitStack() as stack:
        digest = _run_digest(baseline, settings, examples)
        if target is None:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            states = None
        else:
            states = StateFolder(target, digest, _STATE, ProtectState)
            work = states.path.with_name(f"{target.name}.{_STATE}-start")
            work.mkdir(parents=True, exist_ok=True)
        saved = states.load() if states else None
        start = make_start(baseline.model, settings.arm, settings.stored_dtype, work / digest[:16])
        run = ArmRun(baseline, settings, start, examples, replay, steps)
        state = run.train(saved, states.save if states else lambda state: None, advance)
        record, outcomes = run.finish(state, warnings)
        trajectory = trajectory_of(state.points)
        if target is not None:
            items = item_lines(baseline.test, outcomes, trajectory)
            _write(target, f"{digest}-{state.step}", run, state, record, items, command)
            states.remove()
            _remove(work)
    return ProtectResult(
        None if target is None else str(target),
        record,
        baseline.test,
        outcomes,
        trajectory,
        warnings,
    )


def _batches(
    baseline: Baseline, settings: ProtectSettings, data: str | Path | None
) -> tuple[Batches, Batches | None]:
    """(examples, replayed facts)."""
    tokenizer, arm = baseline.tokenizer, settings.arm
    answers_only = settings.loss_on == "answer"
    examples = fact_examples(tokenizer, baseline.test.conflict, "conflict")
    if data is not None:
        examples += data_examples(tokenizer, data, answers_only)
    options: dict[str, Any] = {
        "pad_token": min(tokenizer.eos_token_ids),
        "longest": context_length(baseline.config, tokenizer),
        "answers_only": answers_only,
        "mask_padding": settings.mask_padding,
        "pad_to": settings.pad_to,
    }
    batches = Batches(examples, settings.batch_size, settings.seed, stream=2, **options)
    if arm.replay != "facts":
        return batches, None
    if not baseline.test.replay:
        raise MlxSvdError("--replay facts: no known fact is set aside; give more facts")
    known = fact_examples(tokenizer, baseline.test.replay, "object")
    return batches, Batches(known, settings.batch_size, settings.seed, stream=3, **options)


def _write(
    target: Path,
    digest: str,
    run: ArmRun,
    state: ProtectState,
    record: dict,
    items: bytes,
    command: str,
) -> None:
    """The checkpoint of ``state``. digest: identifies it, for a writing that was killed."""
    folder = run.start.folder
    units = stored_units(folder)
    writer = CheckpointWriter(target, units, digest)
    try:
        stored = run.student.stored(state.arrays["values"])
        files = protected_files(folder, record, items, command)
        write_healed(writer, units, folder, stored, files)
    finally:
        writer.close()


def _remove(folder: Path) -> None:
    """The truncated start of a run that is finished."""
    shutil.rmtree(folder)


def _run_digest(baseline: Baseline, settings: ProtectSettings, examples: Batches) -> str:
    """Identifies what every step depends on. Not how many steps there are: see ``trainer``."""
    chosen = settings.to_json()
    for name in ("steps", "epochs", "accept", "strict", "prompts", "max_tokens"):
        del chosen[name]
    paths = sorted(
        path
        for pattern in ("config.json", "model*.safetensors")
        for path in baseline.folder.path.glob(pattern)
    )
    files = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in paths]
    facts = [
        __version__, chosen, baseline.test.digest, examples.digest, baseline.windows.digest, files
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
