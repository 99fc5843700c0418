"""``mlx-svd sweep-kv``: perplexity and divergence of caches at measured bytes per token."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache, QuantizedKVCache, make_prompt_cache

from mlx_svd import __version__
from mlx_svd.calibrate.text import Windows, read_windows
from mlx_svd.checkpoint.disk import disk_errors, replace_file
from mlx_svd.checkpoint.loader import load, load_model
from mlx_svd.conditions import conditions
from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.divergence import base_distribution, window_divergences
from mlx_svd.evaluate.perplexity import WindowLosses, perplexity_of, ratio, window_losses
from mlx_svd.evaluate.statistics.intervals import mean_interval
from mlx_svd.experiments.methods import slug
from mlx_svd.kv.arms import QUANTIZED, Arm, parse_arm, settings_of
from mlx_svd.kv.attach import attach, check_plain_caches
from mlx_svd.kv.bases_file import Bases, load_bases
from mlx_svd.kv.mla import attach_mla
from mlx_svd.kv.with_cache import WithCache, WrittenOutKVCache, measured_bytes
from mlx_svd.source.resolve import CHECKPOINT_PATTERNS, resolve_model

# mlx-lm's own default for --kv-group-size.
_GROUP = 64


def sweep_kv(
    model: str,
    bases: Path,
    heldout: str | Path,
    output: Path,
    arms: list[str],
    *,
    windows: int = 8,
    length: int = 1024,
    advance: Callable[[str, int, int], None] = lambda arm, done, arms: None,
) -> list[dict[str, Any]]:
    """One record for each arm (see ``kv.arms``), the dense cache's first.

    Every window is scored in one pass through the arm's own caches, in float32; quantized caches
    hold their numbers written out there. Bytes per token are read from the arrays of the real
    caches in float16. A record in ``output`` of the same conditions is not made again. An arm that
    cannot be made has a ``reason`` in place of numbers. Raises MlxSvdError for bad input.
    """
    parsed = [parse_arm(name) for name in arms if name != "dense"]
    folder = resolve_model(model, None, CHECKPOINT_PATTERNS).path
    known = load_bases(bases, folder)
    _, tokenizer = load(folder, lazy=True)
    loaded, config = load_model(folder, dtype="float32")
    read = read_windows(
        tokenizer, heldout, count=windows, length=length, vocab_size=config["vocab_size"]
    )
    sweep = _Sweep(loaded, config["model_type"], known, read, output)
    records = [sweep.dense_record()]
    for number, arm in enumerate(parsed):
        advance(arm.name, number, len(parsed))
        records.append(sweep.record(arm))
    return records


class _Sweep:
    def __init__(self, model, model_type: str, bases: Bases, windows: Windows, output: Path):
        self.model, self.model_type, self.bases = model, model_type, bases
        self.windows, self.output = windows, output
        self.heads = [(m.heads[1], m.head_dim) for m in bases.layers]
        self.budgets = {
            name: self._bytes([QuantizedKVCache(_GROUP, bits) for _ in self.heads])
            for name, bits in QUANTIZED.items()
            if all(dim % _GROUP == 0 for _, dim in self.heads)
        }
        self._base = self._losses = None
        with disk_errors(output, "--output"):
            output.mkdir(parents=True, exist_ok=True)

    def _bytes(self, caches: list[Any]) -> float:
        return measured_bytes(caches, self.heads, mx.float16)

    def base(self):
        """The dense model's predictions and losses on the windows. Call it before anything is
        attached: what is kept here is what the model computes at the first call."""
        if self._base is None:
            check_plain_caches(self.model)
            self._base = base_distribution(self.model, self.windows.tokens)
            self._losses = window_losses(self.model, self.windows.tokens)
        return self._base, self._losses

    def dense_record(self) -> dict[str, Any]:
        def make() -> dict[str, Any]:
            _, losses = self.base()
            nbytes = self._bytes([KVCache() for _ in self.heads])
            return {
                "bytes_per_token": nbytes,
                "perplexity": asdict(perplexity_of(losses)),
                "text": self.windows.origin,
                "windows": len(self.windows),
                "length": self.windows.tokens.shape[1],
            }

        return self._kept("dense", make)

    def record(self, arm: Arm) -> dict[str, Any]:
        """The arm's numbers, from disk if they are there."""
        return self._kept(arm.name, lambda: self._measure(arm))

    def _kept(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        path = self.output / f"{slug(name)}.json"
        info = self.bases.info
        key = hashlib.sha256(
            json.dumps([__version__, name, info.digest, info.text, self.windows.digest]).encode()
        ).hexdigest()
        if path.is_file() and (found := json.loads(path.read_bytes())).get("key") == key:
            return found
        record: dict[str, Any] = {"name": name, "model": info.model, "key": key}
        try:
            record |= make()
        except MlxSvdError as error:
            record["reason"] = str(error)
        record |= {"bases": asdict(info), "conditions": conditions()}
        replace_file(path, json.dumps(record, indent=2).encode())
        return record

    def _measure(self, arm: Arm) -> dict[str, Any]:
        self.base()  # a continued sweep has not run the dense model yet
        if arm.kind == "quantized":
            bits = arm.options["bits"]
            if arm.name not in self.budgets:
                raise MlxSvdError(f"heads of {self.heads[0][1]} are no multiple of {_GROUP}")
            nbytes = self.budgets[arm.name]
            scored = lambda: [WrittenOutKVCache(bits, _GROUP) for _ in self.heads]  # noqa: E731
            return {"bytes_per_token": nbytes} | self._quality(scored)
        attachment = self._attach(arm)
        try:
            real = make_prompt_cache(self.model)
            bits, group_size = arm.options.get("bits"), arm.options.get("gs", _GROUP)
            scored = self.model.make_cache
            if bits:
                scored = lambda: [  # noqa: E731
                    WrittenOutKVCache(bits, group_size, basis) for basis in attachment.bases
                ]
            return {
                "bytes_per_token": self._bytes(real),
                "ranks": attachment.ranks if arm.kind == "lowrank" else None,
            } | self._quality(scored)
        finally:
            attachment.detach()

    def _attach(self, arm: Arm):
        if arm.kind == "lowrank":
            settings = settings_of(arm, self.heads[0][1], self.budgets)
            return attach(
                self.model, self.model_type, self.bases, settings, itemsize=mx.float16.size
            )
        o = arm.options
        n, dim = self.heads[0]
        pairs = o.get("pairs", 0)
        rank = o.get("rank") or round(o.get("share", 1.0) * (2 * n * dim - 2 * pairs * n))
        options = {"bits": o.get("bits"), "group_size": o.get("gs", _GROUP)}
        return attach_mla(self.model, self.model_type, self.bases, rank, pairs, **options)

    def _quality(self, make_cache: Callable[[], list[Any]]) -> dict[str, Any]:
        base, losses = self.base()
        model = WithCache(self.model, make_cache)
        kl, agree, sums = window_divergences(model, base, self.windows.tokens)
        counts = np.full(len(kl), self.windows.tokens.shape[1] - 1)
        found = WindowLosses(sums, counts)
        names = ("mean", "low", "high")
        return {
            "perplexity": asdict(perplexity_of(found)),
            "perplexity_ratio": asdict(ratio(found, losses)),
            "kl": dict(zip(names, mean_interval(kl, counts), strict=True)),
            "agreement": dict(zip(names, mean_interval(agree, counts), strict=True)),
            "windows": len(kl),
            "length": self.windows.tokens.shape[1],
        }


def kv_table(records: list[dict[str, Any]]) -> str:
    """A Markdown table, ordered by bytes."""
    lines = [
        "| cache | bytes/token | share | perplexity ratio (95 %) | KL, nats/token (95 %) | top-1 |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    dense = records[0]
    lines.append(
        f"| dense | {dense['bytes_per_token']:.0f} | 1.000 | 1 (perplexity "
        f"{dense['perplexity']['perplexity']:.2f}) | 0 | 1 |"
    )
    for record in sorted(records[1:], key=lambda r: -r.get("bytes_per_token", 0)):
        if "reason" in record:
            lines.append(f"| {record['name']} | - | - | {record['reason']} | - | - |")
            continue
        r, kl = record["perplexity_ratio"], record["kl"]
        lines.append(
            f"| {record['name']} | {record['bytes_per_token']:.0f} "
            f"| {record['bytes_per_token'] / dense['bytes_per_token']:.3f} "
            f"| {r['ratio']:.4f} ({r['low']:.4f} to {r['high']:.4f}) "
            f"| {kl['mean']:.4f} ({max(0, kl['low']):.4f} to {kl['high']:.4f}) "
            f"| {record['agreement']['mean']:.3f} |"
        )
    return "\n".join(lines) + "\n"
