"""Open student and teacher, and refuse two models that do not belong together."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_svd.checkpoint.loader import checkpoint_section, load
from mlx_svd.errors import MlxSvdError
from mlx_svd.finetune.dequantize import multiply_dequantized
from mlx_svd.source.resolve import CHECKPOINT_PATTERNS, ModelFolder, resolve_model
from mlx_svd.source.source import read_config

# Cut up the same way by equal vocabularies with equal merges and equal pre-tokenizers.
_SAMPLE = "The old man's 1,024 naïve déjà-vu tests:\n\tif x != y: return 3.14  # 北京 Ω"


@dataclass(frozen=True)
class Pair:
    """student, teacher: models, lazy until they are used; section: the student's ``mlx_svd``
    section, None for one that mlx-lm quantized; tokenizer: the teacher's, which is the student's
    too."""

    student: nn.Module
    teacher: nn.Module
    student_folder: ModelFolder
    teacher_folder: ModelFolder
    config: dict
    section: dict | None
    tokenizer: Any
    vocab_size: int | None


def open_pair(model: str, teacher: str, dtype: str) -> Pair:
    """Both models with floating-point parameters in ``dtype``.

    Raises MlxSvdError that names the folder: nothing to heal in the student, a teacher that is
    compressed or quantized itself, or of another architecture, shape, vocabulary or tokenizer.
    """
    student_folder = resolve_model(model, None, CHECKPOINT_PATTERNS)
    if not teacher:
        raise MlxSvdError("--teacher: is empty; give the base model that the student was made from")
    teacher_folder = resolve_model(teacher, None, CHECKPOINT_PATTERNS)
    config = read_config(student_folder.path)
    compressed = "mlx_svd" in config
    if not (compressed or config.get("quantization")):
        raise MlxSvdError(
            f"{student_folder.path}: is neither compressed by mlx-svd nor quantized by mlx-lm; "
            "give a checkpoint that lost something"
        )
    teacher_config = read_config(teacher_folder.path)
    for key in ("mlx_svd", "quantization", "quantization_config"):
        if teacher_config.get(key):
            raise MlxSvdError(
                f"{teacher_folder.path}: is compressed or quantized itself ({key} in its "
                "config.json); give the original model as --teacher"
            )
    for key in ("model_type", "vocab_size"):
        ours, theirs = config.get(key), teacher_config.get(key)
        if ours != theirs:
            raise _other(teacher_folder.path, f"its {key} is {theirs}, the student's {ours}")
    section = checkpoint_section(student_folder.path) if compressed else None
    student_model, student_tokenizer = load(student_folder.path, dtype=dtype, lazy=True)
    teacher_model, tokenizer = load(teacher_folder.path, dtype=dtype, lazy=True)
    _check_shapes(teacher_folder.path, student_model, teacher_model, section)
    _check_tokenizers(teacher_folder.path, student_tokenizer, tokenizer)
    multiply_dequantized(student_model)
    return Pair(
        student_model,
        teacher_model,
        student_folder,
        teacher_folder,
        config,
        section,
        tokenizer,
        config.get("vocab_size"),
    )


def _other(teacher: Path, why: str) -> MlxSvdError:
    return MlxSvdError(
        f"{teacher}: is not the student's base model: {why}; give the model that was compressed "
        "as --teacher"
    )


def _check_shapes(
    folder: Path, student: nn.Module, teacher: nn.Module, section: dict | None
) -> None:
    """Every parameter that both have under one name, and every replaced projection."""
    theirs = {n: p.shape for n, p in tree_flatten(teacher.parameters())}
    ours = {n: p for n, p in tree_flatten(student.parameters())}
    if len(student.layers) != len(teacher.layers):
        raise _other(folder, f"it has {len(teacher.layers)} layers, not {len(student.layers)}")
    expected = {
        f"{path}.weight": tuple(entry["shape"])
        for path, entry in (section["projections"] if section else {}).items()
    }
    for name, parameter in ours.items():
        # Of a packed matrix only the number of rows is left.
        packed = not mx.issubdtype(parameter.dtype, mx.floating)
        expected.setdefault(name, parameter.shape[:1] if packed else parameter.shape)
    for name, shape in expected.items():
        if name in theirs and theirs[name][: len(shape)] != shape:
            raise _other(folder, f"{name} is {theirs[name]} there and {shape} in the student")


def _check_tokenizers(folder: Path, student: Any, teacher: Any) -> None:
    if student.get_vocab() != teacher.get_vocab() or (
        student.encode(_SAMPLE) != teacher.encode(_SAMPLE)
    ):
        raise _other(folder, "its tokenizer is another one")
