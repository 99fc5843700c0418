"""The healed checkpoint: the student's tensors, some with new values, and its small files."""

import json
from pathlib import Path

import mlx.core as mx

import mlx_svd
from mlx_svd.checkpoint.stored import Units, stored_tensors
from mlx_svd.checkpoint.writer import CheckpointWriter
from mlx_svd.compress.files import model_files
from mlx_svd.compress.store import check_range
from mlx_svd.finetune.pair import Pair
from mlx_svd.source.headers import TensorHeader, read_headers
from mlx_svd.source.resolve import COPIED_FILES, PLAN_FILE


def write_healed(
    writer: CheckpointWriter,
    units: Units,
    folder: Path,
    trained: dict[str, mx.array],
    files: dict[str, bytes],
) -> None:
    """Write the student of ``folder`` with the values of ``trained`` (name -> tensor in the
    stored dtype) in place of its own. Raises MlxSvdError for a value beyond the dtype's range."""
    tensors = stored_tensors(folder)
    for module, specs in units:
        if module in writer.done:
            continue
        values = []
        for spec in specs:
            value = tensors.pop(spec.name)
            if spec.name in trained:
                value = trained[spec.name]
                check_range(spec.name, [value], spec.dtype)
            values.append(value)
        writer.write(module, values, {})
    writer.finish(files)
    if _layout(writer.target) != _layout(folder):
        raise AssertionError(f"{writer.target}: its tensors are not those of {folder}")


def _layout(folder: Path) -> dict[str, tuple]:
    def of(header: TensorHeader) -> tuple:
        return header.dtype, header.shape, header.nbytes

    return {name: of(header) for name, header in read_headers(folder).items()}


def healed_files(pair: Pair, record: dict, command: str) -> dict[str, bytes]:
    """File name -> content. record: how it was healed and what that gave; kept in config.json as
    ``mlx_svd.healed``, or as ``mlx_svd_healed`` for a student that mlx-lm quantized."""
    folder = pair.student_folder.path
    files = {
        path.name: path.read_bytes()
        for pattern in (*COPIED_FILES, PLAN_FILE)
        for path in sorted(folder.glob(pattern))
        if path.is_file()
    }
    config = dict(pair.config)
    if pair.section:
        config["mlx_svd"] = pair.section | {"healed": _with_earlier(pair.section, "healed", record)}
    else:
        config["mlx_svd_healed"] = _with_earlier(config, "mlx_svd_healed", record)
    card = folder / "README.md"
    text = card.read_text(errors="replace") if card.is_file() else f"# {pair.student_folder.name}\n"
    files["README.md"] = f"{text.rstrip()}\n\n{_paragraph(record, command)}".encode()
    files["config.json"] = json.dumps(config, indent=4).encode()
    return files | model_files(config)


def _with_earlier(section: dict, key: str, record: dict) -> dict:
    """A student that was healed before keeps the record of that."""
    return record | ({"earlier": section[key]} if key in section else {})


def _paragraph(record: dict, command: str) -> str:
    held_out = f"{record['held_out_windows']} held-out windows of the same text"
    before, after = record["kl_before"], record["kl_after"]
    if record["best_step"]:
        result = (
            f"On {held_out} the KL divergence from the teacher went from {before:.4f} to "
            f"{after:.4f} nats per token (best at step {record['best_step']})."
        )
    else:
        result = (
            f"It did not lower the KL divergence from the teacher on {held_out} ({before:.4f} "
            "nats per token), so the tensors are those from before."
        )
    return (
        f"## Healed\n\nmlx-svd {mlx_svd.__version__} trained {record['trained_tensors']} tensors "
        f"({record['train']}) of this checkpoint for {record['steps']} steps to follow "
        f"{record['teacher']}, on {record['training_windows']} windows of {record['length']} "
        f"tokens of {record['text']}. {result} Names, shapes and bytes are unchanged; weight "
        "errors in config.json are those of the compression.\n"
        + (f"\n```\n{command}\n```\n" if command else "")
    )
