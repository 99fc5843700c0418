"""One row's numbers: a checkpoint measured on the same texts and facts as all the others."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_svd.calibrate.text import Windows, read_windows
from mlx_svd.checkpoint.loader import load
from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.divergence import BaseDistribution, base_distribution, kl_divergence
from mlx_svd.evaluate.facts import Fact, FactRecall, facts_recalled, read_facts
from mlx_svd.evaluate.likelihood.forward import written_out
from mlx_svd.evaluate.perplexity import WindowLosses, perplexity_of, ratio, window_losses
from mlx_svd.evaluate.speed import measure_speeds

# A prompt of this many tokens, and as many generated ones, when speed is measured.
_PROMPT, _GENERATED = 128, 64
# Windows of the held-out text on which whole distributions are compared.
_DIVERGENCE_WINDOWS = 6


@dataclass(frozen=True)
class Material:
    """What every row is measured on. texts: name -> windows, the first is in domain; facts: may
    be empty."""

    texts: dict[str, Windows]
    facts: list[Fact]
    speed: bool

    def record(self) -> dict[str, Any]:
        """Identifies the material in a row's record."""
        return {
            "texts": {
                name: {"origin": w.origin, "digest": w.digest, "windows": len(w)}
                for name, w in self.texts.items()
            },
            "facts": len(self.facts),
            "speed": self.speed,
        }


class Measurement:
    """Measures checkpoints against the dense model, which runs once."""

    def __init__(self, dense: Path, material: Material):
        self.material = material
        model, tokenizer = load(dense, dtype="float32")
        self.losses = {name: window_losses(model, w.tokens) for name, w in material.texts.items()}
        self.base: BaseDistribution = base_distribution(model, self._compared())
        self.recall = self._facts(model, tokenizer)
        self.dense = self._row(self.losses, None, self.recall)
        # Kept to take turns with every row, so that speeds compare on a busy machine.
        self.original = model if material.speed else None
        if material.speed:
            self.dense |= self._speed(model, tokenizer)

    def _compared(self) -> np.ndarray:
        return next(iter(self.material.texts.values())).tokens[:_DIVERGENCE_WINDOWS]

    def measure(self, checkpoint: Path) -> dict[str, Any]:
        """Perplexities with intervals and paired ratios, KL, agreement, facts, tokens/s and their
        ratio to the dense model's, taken in turns."""
        # Float32 throughout: half precision is slow on CPUs, and its rounding is no part of a row.
        model, tokenizer = load(checkpoint, dtype="float32")
        speed = self._speed(model, tokenizer) if self.material.speed else {}
        model = written_out(model)
        divergence = kl_divergence(model, self.base, self._compared())
        first, *others = self.material.texts
        losses = {first: divergence.losses}  # of the windows that were compared
        if len(rest := self.material.texts[first].tokens[_DIVERGENCE_WINDOWS:]):
            losses[first] += window_losses(model, rest)
        losses |= {n: window_losses(model, self.material.texts[n].tokens) for n in others}
        return self._row(losses, divergence, self._facts(model, tokenizer)) | speed

    def _facts(self, model, tokenizer) -> FactRecall | None:
        facts = self.material.facts
        return facts_recalled(model, tokenizer, facts) if facts else None

    def _speed(self, model, tokenizer) -> dict[str, float]:
        prompt = next(iter(self.material.texts.values())).tokens[0][:_PROMPT].tolist()
        dense, speed = measure_speeds(
            [self.original, model], tokenizer, prompt, max_tokens=_GENERATED
        )
        return {
            "prefill_tps": speed.prefill_tps,
            "decode_tps": speed.decode_tps,
            "prefill_speed": speed.prefill_tps / dense.prefill_tps,
            "decode_speed": speed.decode_tps / dense.decode_tps,
        }

    def _row(self, losses: dict[str, WindowLosses], divergence, recall) -> dict[str, Any]:
        row: dict[str, Any] = {"texts": {}}
        for name, measured in losses.items():
            p, r = perplexity_of(measured), ratio(measured, self.losses[name])
            row["texts"][name] = {
                "perplexity": [p.perplexity, p.low, p.high],
                "ratio": [r.ratio, r.low, r.high],
            }
        if divergence is not None:
            row["kl"] = [divergence.kl, divergence.kl_low, divergence.kl_high]
            row["agreement"] = divergence.agreement
        if recall is not None:
            share, kept = recall.share, recall.kept(self.recall)
            row["facts"] = [share.share, share.low, share.high]
            row["facts_kept"] = [kept.share, kept.low, kept.high]
        return row


def read_material(tokenizer, settings: dict, data_dir: Path, vocab_size: int) -> Material:
    """Material from the ``heldout``, ``other``, ``facts`` and ``speed`` keys of a sweep's config.

    Raises MlxSvdError that names the file."""
    texts = {}
    for name in ("heldout", "other"):
        if entry := settings.get(name):
            texts[name] = read_windows(
                tokenizer,
                data_dir / entry["text"],
                count=entry.get("windows", 20),
                length=entry.get("length", 512),
                vocab_size=vocab_size,
            )
    if "heldout" not in texts:
        raise MlxSvdError("a sweep needs heldout: {text: FILE}; add it to the config")
    facts = []
    if entry := settings.get("facts"):
        facts = read_facts(data_dir / entry["file"])[:: entry.get("every", 1)]
    return Material(texts, facts, bool(settings.get("speed", False)))
