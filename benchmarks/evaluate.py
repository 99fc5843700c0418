"""Items per second of mlx-svd's scorer and of mlx_lm.evaluate on the same prompts and choices.

Both get the same pairs of context and continuation, in float32, with the same BLAS, and take turns;
tokenization is part of the time of both, building the prompts of neither. MMLU's rows are taken
subject by subject, as a whole evaluation takes them.

"2 processes" is the same scorer as ``mlx.launch -n 2`` runs it, with one BLAS thread each.

"limit" is how many times mlx_lm.evaluate's items per second a scorer could reach on this processor
if nothing took time but the products with the weights, each token that the items have once, at the
speed of the largest of them.
"""

import os
from itertools import chain
from pathlib import Path
from statistics import median

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from benchmarks.common import (
    conditions,
    interleaved,
    parse_options,
    print_conditions,
    print_table,
    progress,
    save,
    spread,
)
from benchmarks.two_processes import TwoProcesses
from mlx_svd.checkpoint.loader import load
from mlx_svd.demo.run import DEMO_MODEL
from mlx_svd.evaluate.likelihood.batches import make_batches
from mlx_svd.evaluate.likelihood.encode import EncodedItem, Item, encode_items
from mlx_svd.evaluate.likelihood.passes import passes
from mlx_svd.evaluate.likelihood.scorer import Scorer
from mlx_svd.evaluate.likelihood.split import SplitModel
from mlx_svd.evaluate.rows.material import choice_material
from mlx_svd.evaluate.settings import EvaluateSettings
from mlx_svd.evaluate.tasks import CHOICE_TASKS

SHARED = Path(os.environ.get("MLX_SVD_SHARED", Path(__file__).resolve().parents[2] / "shared"))
# task, examples in the prompt
WORK = (("hellaswag", 0), ("arc_easy", 0), ("arc_challenge", 0), ("truthfulqa_mc2", 0),
        ("mmlu", 0), ("piqa", 0), ("arc_easy", 5), ("mmlu", 5))  # fmt: skip
MAX_LENGTH = 1024
OURS, SHARED_WORK, THEIRS = "mlx-svd", "2 processes", "mlx_lm.evaluate"


def build_items(task: str, shots: int, rows: int) -> list[Item]:
    """The first rows of a task that fit into the context, as prompts and choices."""
    settings = EvaluateSettings(num_fewshot=shots, data_dir=SHARED / "data")
    chosen = CHOICE_TASKS[task]
    material = choice_material(chosen, settings)
    taken = sorted(material.rows, key=lambda row: row.subject)[:rows]
    examples = chosen.shots(taken, material.pool, shots, 1234, own=material.own)
    return [chosen.item(row, drawn) for row, drawn in zip(taken, examples, strict=True)]


def product_seconds(split: SplitModel, items: list[EncodedItem]) -> float:
    """Of the products with all weights: of the layers for each token that the items have, of the
    vocabulary for each position that is scored."""
    tokens, positions, shared = 0, 0, set()
    for batch in make_batches(items, MAX_LENGTH):
        chosen = [items[i] for i in batch.items]
        shared.add(chosen[0].pairs[0][0][: batch.shared])
        for row in chain.from_iterable(passes(chosen, batch.shared)):
            tokens += len(row.tokens)
            positions += len({position for position, _, _ in row.wanted})
    tokens += sum(map(len, shared))
    weights = [m.weight for layer in split.model.layers for m in layer.modules() if "weight" in m]
    weights = [weight for weight in weights if weight.ndim == 2]
    width = split.hidden(mx.zeros((1, 1), dtype=mx.int32)).shape[-1]
    flops = 2 * (tokens * sum(w.size for w in weights) + positions * split.vocabulary * width)
    largest = max(weights, key=lambda weight: weight.size)
    inputs = mx.random.normal((MAX_LENGTH, largest.shape[1]))
    mx.eval(inputs)
    times = interleaved({"": lambda: mx.eval(inputs @ largest.T)}, 20)[""]
    return flops * min(times) / (2 * MAX_LENGTH * largest.size)


class Theirs:
    """mlx_lm's adapter for lm-eval, in float32."""

    def __init__(self, model: Path):
        from mlx_lm.evaluate import MLXLM

        self.lm = MLXLM(str(model))
        parameters = self.lm._model.parameters()
        floating = tree_map(
            lambda p: p.astype(mx.float32) if mx.issubdtype(p.dtype, mx.floating) else p, parameters
        )
        self.lm._model.update(floating)
        mx.eval(self.lm._model.parameters())

    def scores(self, items: list[Item]) -> np.ndarray:
        """Log-likelihoods of all pairs."""
        from lm_eval.api.instance import Instance

        pairs = chain.from_iterable(item.pairs for item in items)
        requests = [Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(pairs)]
        return np.array([value for value, _ in self.lm.loglikelihood(requests)])


class Ours:
    """The scorer that ``mlx-svd evaluate`` uses."""

    def __init__(self, model: Path):
        loaded, self.tokenizer = load(model, dtype="float32")
        self.scorer = Scorer(loaded)

    def scores(self, items: list[Item]) -> np.ndarray:
        """Log-likelihoods of all pairs."""
        encoded = encode_items(self.tokenizer, items, MAX_LENGTH)
        scores = self.scorer.scores(encoded, MAX_LENGTH)
        return np.concatenate([s.log_likelihoods for s in scores])


def measure(model: Path, rows: int, runs: int) -> list[dict]:
    """One entry for each task and number of examples."""
    with TwoProcesses(model, MAX_LENGTH) as shared_work:
        contenders = {OURS: Ours(model), SHARED_WORK: shared_work, THEIRS: Theirs(model)}
        return _measured(model.name, contenders, rows, runs)


def _measured(model: str, contenders: dict, rows: int, runs: int) -> list[dict]:
    entries = []
    for task, shots in WORK:
        progress(f"{model}: {task}, {shots} examples")
        items = build_items(task, shots, rows)
        kept = encode_items(contenders[OURS].tokenizer, items, MAX_LENGTH)
        # mlx_lm.evaluate does not cut prompts, so both get those that fit.
        items = [item for item, encoded in zip(items, kept, strict=True) if not encoded.truncated]
        found = {name: contender.scores(items) for name, contender in contenders.items()}
        fitting = [encoded for encoded in kept if not encoded.truncated]
        least = product_seconds(contenders[OURS].scorer.split, fitting)
        seconds = interleaved(
            {name: lambda c=c, i=items: c.scores(i) for name, c in contenders.items()}, runs
        )
        entries.append(
            {
                "task": task,
                "shots": shots,
                "items": len(items),
                "choices": len(found[OURS]),
                "largest_difference": {
                    name: float(np.abs(found[name] - found[THEIRS]).max())
                    for name in (OURS, SHARED_WORK)
                },
                "items_per_second": {
                    name: spread([len(items) / s for s in times]) for name, times in seconds.items()
                },
                "limit": median(seconds[THEIRS]) / least,
                "ratio": {
                    name: median(seconds[THEIRS]) / median(seconds[name])
                    for name in (OURS, SHARED_WORK)
                },
            }
        )
    return entries


def report(result: dict) -> None:
    """Print one table for each model."""
    for name, entries in result["models"].items():
        print(f"\n# evaluate: {name} in float32")
        print_conditions(result["conditions"])
        header = ["", "examples", "items", "choices"]
        header += [f"{name} /s" for name in (OURS, SHARED_WORK, THEIRS)]
        header += ["times", "2 pr. times", "limit", "diff"]
        rows = [
            [
                entry["task"],
                *(str(entry[key]) for key in ("shots", "items", "choices")),
                *(f"{each['median']:.1f}" for each in entry["items_per_second"].values()),
                *(f"{ratio:.2f}" for ratio in entry["ratio"].values()),
                f"{entry['limit']:.1f}",
                f"{max(entry['largest_difference'].values()):.1e}",
            ]
            for entry in entries
        ]
        print_table(header, rows)
        ratios = [[*entry["ratio"].values(), entry["limit"]] for entry in entries]
        means = np.exp(np.log(ratios).mean(axis=0))
        print("geometric mean {:.2f}, 2 processes {:.2f}, limit {:.1f}".format(*means))
    print("diff: largest difference of a choice's log-likelihood, in nats")


def main() -> None:
    """Measure, print and save."""
    options = parse_options(__doc__, runs=3, quick_runs=1)
    if not (SHARED / "data").is_dir():
        raise SystemExit(f"evaluate: the test material is not in {SHARED} (set MLX_SVD_SHARED)")
    models = [DEMO_MODEL] if options.quick else [DEMO_MODEL, SHARED / "models/llama-44m"]
    names = {DEMO_MODEL: "demo model (qwen2, 6.5M)"}
    rows = 3 if options.quick else 40
    result = {"models": {}}
    for model in models:
        result["models"][names.get(model, model.name)] = measure(model, rows, options.runs)
    result["conditions"] = conditions(options.runs)
    report(result)
    save("evaluate-quick" if options.quick else "evaluate", result)


if __name__ == "__main__":
    main()
