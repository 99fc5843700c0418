"""Tokens per second of decoding with latent KV caches, against mlx-lm's dense and quantized ones.

One token a step after 256, 512 and 1024 cached ones, in float32. The caches take turns, so that
whatever else the machine does meets all of them; a ratio is that of the medians of a turn.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache, QuantizedKVCache, make_prompt_cache

from benchmarks.common import (
    conditions,
    parse_options,
    print_conditions,
    print_table,
    progress,
    save,
)
from mlx_svd.checkpoint.loader import load_model
from mlx_svd.demo.run import DEMO_MODEL
from mlx_svd.evaluate.statistics.intervals import mean_interval
from mlx_svd.kv.attach import attach
from mlx_svd.kv.bases import kv_bases
from mlx_svd.kv.mla import attach_mla
from mlx_svd.kv.settings import KVSettings

SHARED = Path(os.environ.get("MLX_SVD_SHARED", Path(__file__).resolve().parents[2] / "shared"))
CONTEXTS = (256, 512, 1024)
STEPS = 8
DENSE = "dense"


def contenders(model: Path) -> dict[str, tuple[Any, Callable[[], list]]]:
    """name -> (model, its caches). Every latent has a model of its own, loaded once."""
    dense, config = load_model(model, dtype="float32")
    layers = len(dense.layers)
    bases = kv_bases(str(model), None, windows=8, length=256)
    head_dim = bases.layers[0].head_dim
    settings = {
        "latents, per head, half": KVSettings(rank=head_dim // 2),
        "the same, values folded": KVSettings(rank=head_dim // 2, fold=True),
        "latents, all heads, half": KVSettings(rank=head_dim // 2, heads_per_group=None),
        "latents, all heads, 8 bits": KVSettings(heads_per_group=None, bits=8),
        "latents, all heads, 4 bits": KVSettings(heads_per_group=None, bits=4),
    }
    found = {
        DENSE: (dense, lambda: [KVCache() for _ in range(layers)]),
        "mlx-lm, 8 bits": (dense, lambda: [QuantizedKVCache(64, 8) for _ in range(layers)]),
        "mlx-lm, 4 bits": (dense, lambda: [QuantizedKVCache(64, 4) for _ in range(layers)]),
    }
    for name, chosen in settings.items():
        loaded, _ = load_model(model, dtype="float32")
        attach(loaded, config["model_type"], bases, chosen)
        found[name] = (loaded, lambda m=loaded: make_prompt_cache(m))
    loaded, _ = load_model(model, dtype="float32")
    pairs = head_dim // 4 if bases.layers[0].rotary else 0
    rank = bases.layers[0].heads[1] * head_dim
    attach_mla(loaded, config["model_type"], bases, rank, pairs)
    found["joint latent"] = (loaded, lambda: make_prompt_cache(loaded))
    return found


def measure(model: Path, runs: int) -> list[dict]:
    """One entry for each cache and number of cached tokens."""
    found = contenders(model)
    tokens = mx.array(np.random.default_rng(0).integers(0, 1000, (1, max(CONTEXTS))))
    entries = []
    for context in CONTEXTS:
        filled = {}
        for name, (loaded, make) in found.items():
            progress(f"{model.name}: filling {name} with {context} tokens")
            caches = make()
            # The steps themselves stay within the model's context.
            mx.eval(loaded(tokens[:, : context - STEPS], cache=caches))
            filled[name] = (loaded, caches)
        seconds: dict[str, list[float]] = {name: [] for name in filled}
        for run in range(runs + 1):
            for name, (loaded, caches) in filled.items():
                progress(f"{model.name}, {context} tokens, run {run}/{runs}: {name}")
                taken = _decode(loaded, caches, tokens)
                if run:  # the first compiles and allocates
                    seconds[name].append(taken)
        for name, times in seconds.items():
            # Log ratios of each turn: both sides met the same machine.
            logs = np.log(np.array(seconds[DENSE]) / np.array(times))
            mean, low, high = mean_interval(logs, np.ones(len(logs)))
            entries.append(
                {
                    "cache": name,
                    "context": context,
                    "tokens_per_second": 1 / median(times),
                    "ratio": {"mean": float(np.exp(mean)), "low": float(np.exp(low)),
                              "high": float(np.exp(high)), "turns": len(logs)},
                    "bytes_per_token": sum(c.nbytes for c in filled[name][1])
                    / _allocated(context),
                }
            )  # fmt: skip
    return entries


def _decode(model: Any, caches: list, tokens: mx.array) -> float:
    """Median seconds of a step; the caches are trimmed back afterwards."""
    times = []
    for step in range(STEPS):
        start = time.perf_counter()
        mx.eval(model(tokens[:, step : step + 1], cache=caches))
        times.append(time.perf_counter() - start)
    for cache in caches:
        cache.trim(STEPS)
    return median(times)


def _allocated(context: int) -> int:
    return -(-context // 256) * 256


def report(result: dict) -> None:
    """Print one table for each model."""
    for name, entries in result["models"].items():
        print(f"\n# kv: {name} in float32, one token a step")
        print_conditions(result["conditions"])
        header = ["", "cached", "bytes/token", "tokens/s", "ratio to dense", "95 %"]
        rows = [
            [
                e["cache"],
                str(e["context"]),
                f"{e['bytes_per_token']:.0f}",
                f"{e['tokens_per_second']:.1f}",
                f"{e['ratio']['mean']:.3f}",
                f"{e['ratio']['low']:.3f} to {e['ratio']['high']:.3f}",
            ]
            for e in entries
        ]
        print_table(header, rows)


def main() -> None:
    """Measure, print and save."""
    options = parse_options(__doc__, runs=20, quick_runs=2)
    models = {"demo model (qwen2, 6.5M)": DEMO_MODEL}
    if not options.quick and (SHARED / "models").is_dir():
        models |= {n: SHARED / "models" / n for n in ("qwen2-16m", "llama-44m")}
    result = {"models": {name: measure(path, options.runs) for name, path in models.items()}}
    result["conditions"] = conditions(options.runs)
    report(result)
    save("kv-quick" if options.quick else "kv", result)


if __name__ == "__main__":
    main()
