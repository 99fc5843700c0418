"""A corrected checkpoint -> a quantized model for stock mlx-lm and a LoRA adapter for it.

Neither needs code of ours. mlx-lm's LoRA layer computes ``y = linear x + scale (x lora_a) lora_b``,
so with scale 1, lora_a = down^T and lora_b = up^T it is a corrected projection. Its config has one
rank for all layers; smaller corrections are filled up with zeros, which changes nothing.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlx_svd import __version__
from mlx_svd.checkpoint.adapter_card import adapter_cards
from mlx_svd.checkpoint.layout import TensorSpec, total_bytes
from mlx_svd.checkpoint.loader import checkpoint_section
from mlx_svd.checkpoint.stock_modules import StockModule, stock_config, stock_modules
from mlx_svd.checkpoint.stored import Units, stored_tensors, stored_units
from mlx_svd.checkpoint.writer import CheckpointWriter
from mlx_svd.errors import MlxSvdError
from mlx_svd.models import own_architecture
from mlx_svd.source.families import FAMILIES
from mlx_svd.source.resolve import CHECKPOINT_PATTERNS, COPIED_FILES, resolve_model
from mlx_svd.source.source import BAD_VALUE, read_config

ADAPTER_FILE, ADAPTER_CONFIG = "adapters.safetensors", "adapter_config.json"


@dataclass(frozen=True)
class ExportedAdapter:
    """model, adapter: the two folders; rank: of every LoRA layer; modules: how many there are;
    padding_bytes: of adapter_bytes, zeros that fill corrections up to ``rank`` and to the size of
    their fused module; checkpoint_bytes: tensor data of the corrected checkpoint."""

    model: Path
    adapter: Path
    rank: int
    modules: int
    model_bytes: int
    adapter_bytes: int
    padding_bytes: int
    checkpoint_bytes: int


def export_adapter(
    checkpoint: str | Path, mlx_path: str | Path, command: str = ""
) -> ExportedAdapter:
    """Write ``mlx_path``/model and ``mlx_path``/adapter from a checkpoint with corrected
    projections, the others dense.

    Each folder appears when it is complete, the model's last; a killed run is continued by the
    same call. command: for the cards. Raises MlxSvdError that names the projection for other forms
    and quantized factors, the folder for a checkpoint without corrections, of an architecture that
    mlx-lm lacks, or already exported to ``mlx_path``.
    """
    folder, target = resolve_model(str(checkpoint), None, CHECKPOINT_PATTERNS).path, Path(mlx_path)
    section, config = checkpoint_section(folder), read_config(folder)
    if own_architecture(config["model_type"]).is_file():
        raise MlxSvdError(
            f"{folder}: stock mlx-lm has no {config['model_type']} architecture, with or without "
            "an adapter; use the checkpoint as it is"
        )
    stored = stored_units(folder)
    try:
        modules = stock_modules(folder, section, dict(stored))
    except BAD_VALUE as error:
        raise MlxSvdError(
            f"{folder / 'config.json'}: its mlx_svd section is damaged; copy or download the "
            "checkpoint again"
        ) from error
    units = _model_units(stored, modules)
    corrected = [module for module in modules if module.rank]
    rank = max(module.rank for module in corrected)
    adapter_units = [(module.path, _lora_specs(module, rank)) for module in corrected]
    used = sum(_factor_bytes(module) for module in corrected)
    adapter_bytes = sum(total_bytes(specs) for _, specs in adapter_units)
    exported = ExportedAdapter(
        model=target / "model",
        adapter=target / "adapter",
        rank=rank,
        modules=len(corrected),
        model_bytes=sum(total_bytes(specs) for _, specs in units),
        adapter_bytes=adapter_bytes,
        padding_bytes=adapter_bytes - used,
        checkpoint_bytes=sum(total_bytes(specs) for _, specs in stored),
    )
    digest = _digest(folder)
    model_card, adapter_card = adapter_cards(folder, section, exported, command)
    by_path = {module.path: module for module in modules}
    cache_limit = mx.set_cache_limit(0)
    # Opened first: its lock keeps a second run away from both folders.
    writer = CheckpointWriter(exported.model, units, digest)
    try:
        adapter_config = _adapter_config(config, corrected, rank, dict(stored), digest)
        files = {ADAPTER_CONFIG: _json(adapter_config), "README.md": adapter_card.encode()}
        _write_adapter(exported, adapter_units, by_path, folder, digest, files)
        take = _Taker(folder)
        for path, specs in units:
            if path in writer.done:
                continue
            module = by_path.get(path)
            tensors = module.weights(take) if module else [take(spec.name) for spec in specs]
            writer.write(path, tensors, {})
        files = {
            path.name: path.read_bytes()
            for pattern in COPIED_FILES
            for path in sorted(folder.glob(pattern))
            if path.is_file()
        }
        files["config.json"] = _json(stock_config(config, modules))
        writer.finish(files | {"README.md": model_card.encode()})
    finally:
        writer.close()
        mx.set_cache_limit(cache_limit)
    return exported


class _Taker:
    """Name -> tensor of a checkpoint, each once, so that dropping it frees it."""

    def __init__(self, folder: Path):
        self._lazy = stored_tensors(folder)

    def __call__(self, name: str) -> mx.array:
        return self._lazy.pop(name)


def _model_units(stored: Units, modules: list[StockModule]) -> Units:
    """The stock checkpoint's modules, in the order of the corrected one's files."""
    holder = {part.holder: module for module in modules for part in module.parts}
    factors = {
        f"{part.path}.{name}"
        for module in modules
        for part in module.parts
        if part.rank
        for name in ("down", "up")
    }
    units: dict[str, tuple[TensorSpec, ...]] = {}
    for path, specs in stored:
        if module := holder.get(path):
            units.setdefault(module.path, module.specs)
        elif path not in factors:
            units[path] = specs
    return list(units.items())


def _lora_specs(module: StockModule, rank: int) -> tuple[TensorSpec, ...]:
    rows, columns = module.shape
    return (
        TensorSpec(f"{module.path}.lora_a", (columns, rank), module.dtype),
        TensorSpec(f"{module.path}.lora_b", (rank, rows), module.dtype),
    )


def _factor_bytes(module: StockModule) -> int:
    """Of the factors without zeros, in the adapter's dtype."""
    return sum(part.rank * sum(part.shape) for part in module.parts) * module.dtype.size


def _write_adapter(
    exported: ExportedAdapter,
    units: Units,
    modules: dict[str, StockModule],
    folder: Path,
    digest: str,
    files: dict[str, bytes],
) -> None:
    if _is_written(exported.adapter, digest):
        return
    writer = CheckpointWriter(
        exported.adapter, units, digest, single_file=ADAPTER_FILE, last_file=ADAPTER_CONFIG
    )
    try:
        take = _Taker(folder)
        for path, _ in units:
            if path not in writer.done:
                writer.write(path, modules[path].lora(exported.rank, take), {})
        writer.finish(files)
    finally:
        writer.close()


def _is_written(adapter: Path, digest: str) -> bool:
    """Whether a killed run of the same export has finished the adapter."""
    try:
        return json.loads((adapter / ADAPTER_CONFIG).read_bytes())["mlx_svd"]["digest"] == digest
    except (OSError, *BAD_VALUE):
        return False


def _adapter_config(
    config: dict,
    corrected: list[StockModule],
    rank: int,
    stored: dict[str, tuple[TensorSpec, ...]],
    digest: str,
) -> dict:
    """What mlx-lm's load_adapters reads, and what identifies the export.

    A key that is a path in a layer stands for that module in every layer, which is the usual way;
    where only some layers have a correction, mlx-lm takes full paths.
    """
    layers = f"{FAMILIES[config['model_type']].layers}."
    count = 1 + max(
        int(path.removeprefix(layers).split(".")[0]) for path in stored if path.startswith(layers)
    )
    inner: dict[str, list[str]] = {}
    for module in corrected:
        inner.setdefault(module.path.removeprefix(layers).split(".", 1)[1], []).append(module.path)
    keys = [
        key for name, paths in inner.items() for key in ([name] if len(paths) == count else paths)
    ]
    return {
        "fine_tune_type": "lora",
        "num_layers": count,
        "lora_parameters": {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": sorted(keys)},
        "mlx_svd": {"version": __version__, "digest": digest},
    }


def _digest(folder: Path) -> str:
    """Identifies checkpoint and program; a run is resumed only with the same of both."""
    files = sorted(folder.glob("model*.safetensors"))
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    config = (folder / "config.json").read_text()
    return hashlib.sha256(json.dumps([__version__, config, stats]).encode()).hexdigest()


def _json(content: dict) -> bytes:
    return json.dumps(content, indent=4).encode()
