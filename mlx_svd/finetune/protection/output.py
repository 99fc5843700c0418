"""The small files of a protected checkpoint: config, card, result and items."""

import json
from pathlib import Path
from typing import Any

import mlx_svd
from mlx_svd.compress.files import model_files
from mlx_svd.finetune.protection.result import ITEMS_FILE, RESULT_FILE
from mlx_svd.source.resolve import COPIED_FILES, PLAN_FILE
from mlx_svd.source.source import read_config

# What config.json keeps of the record; the rest is in RESULT_FILE.
_KEPT = ("arm", "steps", "training", "knowledge")
_SHOWN = ("uptake", "retained", "retained_conflict")


def protected_files(
    start: Path, record: dict[str, Any], items: bytes, command: str
) -> dict[str, bytes]:
    """File name -> content, for a checkpoint that begins from ``start``."""
    files = {
        path.name: path.read_bytes()
        for pattern in (*COPIED_FILES, PLAN_FILE)
        for path in sorted(start.glob(pattern))
        if path.is_file()
    }
    config = read_config(start)
    kept = {"version": mlx_svd.__version__} | {key: record[key] for key in _KEPT}
    config["mlx_svd"] = config["mlx_svd"] | {"protected": kept}
    card = start / "README.md"
    text = card.read_text(errors="replace") if card.is_file() else "# Model\n"
    files["README.md"] = f"{text.rstrip()}\n\n{_paragraph(record, command)}".encode()
    files["config.json"] = json.dumps(config, indent=4).encode()
    files[RESULT_FILE] = json.dumps(record, indent=2).encode()
    files[ITEMS_FILE] = items
    return files | model_files(config)


def _paragraph(record: dict[str, Any], command: str) -> str:
    training = record["training"]
    shares = "; ".join(
        f"{name} {entry['value']:.3f} [{entry['low']:.3f}, {entry['high']:.3f}], n = {entry['n']}"
        for name in _SHOWN
        if "value" in (entry := record["knowledge"][name])
    )
    return (
        f"## Fine-tuned\n\nmlx-svd {mlx_svd.__version__} trained {training['trained']:,} of "
        f"{training['total']:,} numbers for {record['steps']} steps (arm {record['arm']['name']}, "
        f"learning rate {record['settings']['lr']:g}). Measured on the stored tensors, 95 % "
        f"intervals: {shares}. All figures: `{RESULT_FILE}`; weight errors in config.json are "
        "those of the compression before training.\n"
        + (f"\n```\n{command}\n```\n" if command else "")
    )
