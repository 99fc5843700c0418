"""Tokens per second of a random model in every stored form, and the bytes of each.

The model is shaped like a Qwen2 and its weights are random in every form: speed depends on the
shapes alone, so nothing is decomposed here. Float32, because half precision is slow on a CPU.
"""

import gc
import json
import tempfile
from pathlib import Path
from statistics import median

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.generate import stream_generate

import mlx_svd
from benchmarks.common import (
    conditions,
    parse_options,
    print_conditions,
    print_table,
    progress,
    save,
    spread,
)
from mlx_svd.checkpoint.layout import TensorSpec, quantization
from mlx_svd.compress.files import checkpoint_files
from mlx_svd.demo.run import DEMO_MODEL
from mlx_svd.models.modeling_mlx_svd import base_module
from mlx_svd.plan.make import make_plan
from mlx_svd.plan.plan import Plan
from mlx_svd.plan.policy import RankPolicy
from mlx_svd.plan.recipe import Recipe, Rule
from mlx_svd.source.source import Source, open_source

RANK_RATIOS = (0.25, 0.5, 0.7, 0.9)
PROJECTIONS = {
    "q,k,o": ("q", "k", "o"),
    "all": ("q", "k", "v", "o", "gate", "up", "down"),
}
BASELINE = "dense"
_UNTOUCHED = (Rule(skip=True),)


def model_config(layers: int, hidden: int, intermediate: int, heads: int, kv: int) -> dict:
    """A Qwen2 that uses the vocabulary of the demo model."""
    config = json.loads((DEMO_MODEL / "config.json").read_text())
    changed = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "layer_types": ["full_attention"] * layers,
        "max_window_layers": layers,
    }
    return config | changed


def write_random(folder: Path, tensors: list[TensorSpec], files: dict[str, bytes]) -> None:
    """A checkpoint with these tensors; an ``order`` is a permutation, packed integers any bits."""
    folder.mkdir()
    values = {}
    for number, spec in enumerate(tensors):
        key = mx.random.key(number)
        if spec.name.endswith(".order"):
            value = mx.random.permutation(spec.shape[0], key=key)
        elif spec.dtype == mx.uint32:
            value = mx.random.randint(0, 2**31 - 1, spec.shape, key=key)
        else:
            value = 0.02 * mx.random.normal(spec.shape, key=key)
        values[spec.name] = value.astype(spec.dtype)
    mx.save_safetensors(str(folder / "model.safetensors"), values, {"format": "mlx"})
    for name, data in files.items():
        (folder / name).write_bytes(data)


def write_source(folder: Path, config: dict) -> Source:
    """The uncompressed model in float32."""
    skeleton_specs = _source_specs(config)
    files = {p.name: p.read_bytes() for p in DEMO_MODEL.glob("token*.json")}
    config = config | {"dtype": "float32"}
    write_random(folder, skeleton_specs, files | {"config.json": json.dumps(config).encode()})
    return open_source(str(folder))


def _source_specs(config: dict) -> list[TensorSpec]:
    base = base_module(config["model_type"])
    model = base.Model(base.ModelArgs.from_dict(config))
    parameters = tree_flatten(model.parameters())
    return [TensorSpec(name, tuple(value.shape), mx.float32) for name, value in parameters]


def recipes(ratio: float, projections: tuple[str, ...]) -> dict[str, Recipe]:
    """Every form at one rank; the dense form has the speed of the uncompressed model."""
    policy = RankPolicy(rank_ratio=ratio)
    given = {"projections": projections, "policy": policy}
    return {
        "factored": Recipe(**given, form="factored"),
        "pivot": Recipe(**given, form="pivot"),
        "factored, 8 bits": Recipe(**given, form="factored", quantize=quantization(8)),
        "factored, 4 bits": Recipe(**given, form="factored", quantize=quantization(4)),
    }


def baselines() -> dict[str, Recipe]:
    """No rank: the uncompressed model, and it quantized."""
    return {
        BASELINE: Recipe(rules=_UNTOUCHED),
        "dense, 8 bits": Recipe(rules=_UNTOUCHED, quantize=quantization(8)),
        "dense, 4 bits": Recipe(rules=_UNTOUCHED, quantize=quantization(4)),
    }


def plan_bytes(plan: Plan, projections: tuple[str, ...]) -> dict[str, float]:
    """Bytes over those of the uncompressed model: of these projections and of the file."""
    touched = [p for p in plan.projections if p.projection.name in projections]
    before, after = (sum(getattr(p, f"bytes_{k}") for p in touched) for k in ("before", "after"))
    ratio = after / before if touched else None
    return {"touched": ratio, "file": plan.bytes_after / plan.bytes_before}


class Contender:
    """One loaded model and what was measured on it."""

    def __init__(self, source: Source, plan: Plan, folder: Path):
        if not folder.exists():
            records = {p.path: {"energy": 1.0, "relative_error": 0.0} for p in plan.projections}
            files = checkpoint_files(source, plan, records, "benchmark with random weights")
            write_random(folder, plan.tensors, files)
        self.model, self.tokenizer = mlx_svd.load(folder)
        self.tokenizer.eos_token_ids = ()  # random weights would stop anywhere
        self.prompt_tps: list[float] = []
        self.generation_tps: list[float] = []

    def run(self, prompt: list[int], tokens: int, keep: bool = True) -> None:
        """Read the prompt, generate greedily; keep: count the speeds (not when warming up)."""
        last = None
        for response in stream_generate(self.model, self.tokenizer, prompt, max_tokens=tokens):
            last = response
        if keep:
            self.prompt_tps.append(last.prompt_tps)
            self.generation_tps.append(last.generation_tps)


def measure_group(
    source: Source, plans: dict[str, Plan], folder: Path, prompt: int, tokens: int, runs: int
) -> dict[str, dict]:
    """All these models in memory, in turns; name -> speeds, each with its ratio to dense."""
    contenders = {}
    for name, plan in plans.items():
        progress(f"writing and loading {name}")
        contenders[name] = Contender(source, plan, folder / plan.digest)
    tokenized = [1 + i % 8000 for i in range(prompt)]
    for run in range(-1, runs):
        for name, contender in contenders.items():
            progress(f"run {run + 1}/{runs}: {name}")
            contender.run(tokenized, tokens, keep=run >= 0)
    progress("")
    dense = contenders[BASELINE]
    return {
        name: {
            key: spread(getattr(c, key))
            | {"ratio": median(getattr(c, key)) / median(getattr(dense, key))}
            for key in ("prompt_tps", "generation_tps")
        }
        for name, c in contenders.items()
    }


def measure(size: dict, prompt: int, tokens: int, runs: int) -> dict:
    """A group of models for each rank and each set of projections, the dense one in each."""
    groups = []
    with tempfile.TemporaryDirectory(prefix="mlx-svd-bench-") as temporary:
        folder = Path(temporary)
        source = write_source(folder / "source", model_config(**size))
        first = {name: make_plan(source, recipe) for name, recipe in baselines().items()}
        dense = first[BASELINE]
        groups.append(_group("no truncation", None, "", first))
        for label, projections in PROJECTIONS.items():
            for ratio in RANK_RATIOS:
                plans = {n: make_plan(source, r) for n, r in recipes(ratio, projections).items()}
                groups.append(_group(f"{label} at {ratio:.0%}", ratio, label, plans))
        for group in groups:
            plans = {BASELINE: dense} | group.pop("plans")
            group["speeds"] = measure_group(source, plans, folder, prompt, tokens, runs)
            gc.collect()
    return {
        "conditions": conditions(runs),
        "model": size,
        "dtype": "float32",
        "prompt_tokens": prompt,
        "generated_tokens": tokens,
        "groups": groups,
    }


def _group(title: str, ratio: float | None, label: str, plans: dict[str, Plan]) -> dict:
    sizes = {name: plan_bytes(plan, PROJECTIONS.get(label, ())) for name, plan in plans.items()}
    return {
        "title": title,
        "rank_ratio": ratio,
        "projections": label,
        "bytes_ratio": {BASELINE: {"touched": 1.0, "file": 1.0}} | sizes,
        "plans": plans,
    }


def report(result: dict) -> None:
    """Print one table, with the dense model of the same group above each group."""
    print(f"\n# speed: random Qwen2 in float32, {result['model']}")
    print_conditions(result["conditions"])
    print(f"prompt {result['prompt_tokens']}, generated {result['generated_tokens']} tokens\n")
    header = ["", "bytes", "of file", "generated/s", "min-max", "/ dense", "prompt/s", "/ dense"]
    rows = []
    for group in result["groups"]:
        rows.append([group["title"], *[""] * (len(header) - 1)])
        rows += [
            _row(
                f"  {name}",
                group["bytes_ratio"][name],
                speed["generation_tps"],
                speed["prompt_tps"],
            )
            for name, speed in group["speeds"].items()
        ]
    print_table(header, rows)
    print(
        "bytes: of the truncated projections, of file: of all tensor data, both over float32\n"
        "(over bfloat16, the 8- and 4-bit ratios are about twice as large).\n"
        "/ dense: speed over that of the dense model in turns with it; below 1 is slower.\n"
        "MLX's quantized product is a scalar loop on x86 CPUs: there, the 8- and 4-bit speeds\n"
        "say nothing about a Mac or a GPU, their bytes do."
    )


def _row(name: str, size: dict, generated: dict, prompt: dict) -> list[str]:
    return [
        name,
        f"{size['touched']:.2f}" if size["touched"] else "",
        f"{size['file']:.2f}",
        f"{generated['median']:.1f}",
        f"{generated['min']:.1f}-{generated['max']:.1f}",
        f"{generated['ratio']:.2f}",
        f"{prompt['median']:.0f}",
        f"{prompt['ratio']:.2f}",
    ]


def main() -> None:
    """Measure, print and save."""
    options = parse_options(__doc__, runs=3, quick_runs=1)
    if options.quick:
        size, prompt, tokens = _size(1, 128, 256, heads=4, kv=2), 8, 4
    else:
        size, prompt, tokens = _size(8, 1024, 2816, heads=16, kv=4), 16, 8
    result = measure(size, prompt, tokens, options.runs)
    report(result)
    save("speed-quick" if options.quick else "speed", result)


def _size(layers: int, hidden: int, intermediate: int, heads: int, kv: int) -> dict[str, int]:
    return {
        "layers": layers,
        "hidden": hidden,
        "intermediate": intermediate,
        "heads": heads,
        "kv": kv,
    }


if __name__ == "__main__":
    main()
