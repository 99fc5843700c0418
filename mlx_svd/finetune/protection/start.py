"""The checkpoint that training begins from: the model as it is, or truncated."""

from dataclasses import dataclass
from pathlib import Path

from mlx_svd.checkpoint.loader import checkpoint_section
from mlx_svd.compress import compress
from mlx_svd.errors import MlxSvdError
from mlx_svd.finetune.protection.arms import Arm
from mlx_svd.finetune.protection.frozen import nothing_left
from mlx_svd.plan.make import make_plan
from mlx_svd.plan.policy import RankPolicy
from mlx_svd.plan.recipe import Recipe, Rule
from mlx_svd.source.families import PROJECTIONS
from mlx_svd.source.resolve import CHECKPOINT_PATTERNS, resolve_model
from mlx_svd.source.source import Source, open_source, read_config


@dataclass(frozen=True)
class Start:
    """folder: a checkpoint of mlx-svd; compressed: projections truncated in it; bytes_before,
    bytes_after: of tensor data, of the model and of the checkpoint; notes: of the plan."""

    folder: Path
    compressed: int
    bytes_before: int
    bytes_after: int
    notes: tuple[str, ...] = ()


def is_compressed(model: str) -> bool:
    """Whether ``model`` is a checkpoint of mlx-svd. Raises MlxSvdError for a quantized model."""
    folder = resolve_model(model, None, CHECKPOINT_PATTERNS)
    config = read_config(folder.path)
    if config.get("quantization") or config.get("quantization_config"):
        raise MlxSvdError(
            f"{folder.path}: is quantized, and packed integers cannot be trained; give the "
            "unquantized model, and quantize what protect writes"
        )
    return "mlx_svd" in config


def check_arm(model: str, arm: Arm, stored_dtype: str | None = None) -> None:
    """Raise MlxSvdError for an arm that this model cannot have, before anything is measured: the
    files' headers are read and no weights."""
    if is_compressed(model):
        _compressed(model, arm, stored_dtype)
        return
    source = open_source(model)
    layers = _layers(source)
    if min(arm.layer_shares(layers)) >= 1:
        raise nothing_left(arm, layers)
    make_plan(source, _recipe(arm, layers, stored_dtype))


def make_start(model: str, arm: Arm, stored_dtype: str | None, folder: Path) -> Start:
    """Write the arm's checkpoint into ``folder``, or take the one that an earlier run of the same
    call wrote there; a model that mlx-svd compressed is taken as it is.

    Raises MlxSvdError for a compressed model that is to be compressed again, for a projection that
    the model lacks, and for what :func:`compress` refuses.
    """
    if is_compressed(model):
        return _compressed(model, arm, stored_dtype)
    source = open_source(model)
    plan = make_plan(source, _recipe(arm, _layers(source), stored_dtype))
    if not folder.is_dir():
        compress(source, plan, folder)
    changed = sum(p.changed for p in plan.projections)
    return Start(folder, changed, plan.bytes_before, plan.bytes_after, plan.notes)


def _layers(source: Source) -> int:
    return 1 + max(linear.projections[0].layer for linear in source.linears)


def _recipe(arm: Arm, layers: int, stored_dtype: str | None) -> Recipe:
    # All projections are listed, so that the checkpoint names them for adapters too.
    if arm.compress == "none":
        return Recipe(PROJECTIONS, rules=(Rule(skip=True),), dtype=stored_dtype)
    frozen = tuple(i for i, share in enumerate(arm.layer_shares(layers)) if share >= 1)
    if arm.compress == "frozen" and not frozen:
        raise MlxSvdError(
            f"--compress frozen: {arm.share:g} of {layers} layers is none; freeze a larger share, "
            "or use --compress all"
        )
    rule = Rule(
        layers=frozen if arm.compress == "frozen" else (),
        projections=arm.projections,
        policy=RankPolicy(rank_ratio=arm.rank_ratio),
        form=arm.form,
    )
    return Recipe(PROJECTIONS, rules=(rule,), dtype=stored_dtype)


def _compressed(model: str, arm: Arm, stored_dtype: str | None) -> Start:
    folder = resolve_model(model, None, CHECKPOINT_PATTERNS).path
    if arm.compress != "none" or stored_dtype:
        raise MlxSvdError(
            f"{folder}: is a checkpoint of mlx-svd already; use an arm that compresses nothing "
            "(--compress none) and no --stored-dtype"
        )
    section = checkpoint_section(folder)["projections"]
    known = {entry["projection"] for entry in section.values()}
    unknown = [name for name in arm.adapter_projections if name not in known]
    if arm.adapter != "none" and unknown:
        raise MlxSvdError(
            f"{folder}: does not say where its {unknown[0]} projections are; leave them out of "
            "--adapter-projections, or begin from the original model"
        )
    size = sum(path.stat().st_size for path in folder.glob("model*.safetensors"))
    return Start(folder, sum(e["ranks"] is not None for e in section.values()), size, size)
