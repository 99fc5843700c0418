"""Plan, compress in every form, load, score and generate, on the embedded 6.5M-parameter model."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from mlx_svd.checkpoint.layout import quantization
from mlx_svd.checkpoint.loader import load
from mlx_svd.compress import compress
from mlx_svd.evaluate.generation.generate import generate
from mlx_svd.evaluate.perplexity import Perplexity, perplexity
from mlx_svd.plan.make import make_plan
from mlx_svd.plan.plan import Plan
from mlx_svd.plan.policy import RankPolicy
from mlx_svd.plan.recipe import Recipe, Rule
from mlx_svd.source.source import Source, open_source

DEMO_MODEL = Path(__file__).with_name("model")
# Written for this demo, so the model cannot have seen it.
PASSAGE = Path(__file__).with_name("passage.txt")
PROMPT = "It was a dark night, and the old man"

_HIGH, _LOW = RankPolicy(rank_ratio=0.7), RankPolicy(rank_ratio=0.4)
_Q8 = quantization(8)
RECIPES = {
    "dense, 70 % of the ranks": Recipe(policy=_HIGH, form="dense"),
    "factored, 70 %": Recipe(policy=_HIGH, form="factored"),
    "pivot, 70 %": Recipe(policy=_HIGH, form="pivot"),
    "factored, 40 %": Recipe(policy=_LOW, form="factored"),
    "pivot, 40 %": Recipe(policy=_LOW, form="pivot"),
    "auto, 40 %, 8 bits": Recipe(policy=_LOW, quantize=_Q8),
    "8 bits alone": Recipe(rules=(Rule(skip=True),), quantize=_Q8),
}


@dataclass(frozen=True)
class DemoRow:
    """One model: bytes of tensor data; of the truncated projections before and after;
    perplexity on the passage; tokens generated per second (median of 3 runs); the text."""

    name: str
    nbytes: int
    touched_before: int
    touched_after: int
    perplexity: Perplexity
    generation_tps: float
    text: str


def demo_plan() -> tuple[Source, Plan]:
    """The embedded model and the plan of the command in the README (70 % of the ranks, auto)."""
    source = open_source(str(DEMO_MODEL))
    return source, make_plan(source, Recipe(policy=_HIGH))


def demo(folder: Path, dtype: str | None) -> Iterator[DemoRow]:
    """Compress the embedded model in every form into new folders below ``folder``; yields the
    uncompressed model first, then each checkpoint. dtype: cast for running it (float32 is
    fast on a CPU, None keeps bfloat16)."""
    source = open_source(str(DEMO_MODEL))
    size = sum(header.nbytes for header in source.headers.values())
    yield _measure("uncompressed", DEMO_MODEL, size, 0, 0, dtype)
    for number, (name, recipe) in enumerate(RECIPES.items()):
        plan = make_plan(source, recipe)
        path = compress(source, plan, folder / f"checkpoint-{number + 1}")
        touched = [p for p in plan.projections if p.changed]
        before, after = (
            sum(getattr(p, key) for p in touched) for key in ("bytes_before", "bytes_after")
        )
        yield _measure(name, path, plan.bytes_after, before, after, dtype)


def _measure(
    name: str, path: Path, nbytes: int, before: int, after: int, dtype: str | None
) -> DemoRow:
    model, tokenizer = load(path, dtype=dtype)
    paragraphs = PASSAGE.read_text().splitlines(keepends=True)
    scored = perplexity(model, [t for p in paragraphs for t in tokenizer.encode(p)], window=256)
    runs = [generate(model, tokenizer, PROMPT, max_tokens=32) for _ in range(4)]
    speed = median(run.generation_tps for run in runs[1:])  # the first warms up
    return DemoRow(name, nbytes, before, after, scored, speed, runs[0].text)
