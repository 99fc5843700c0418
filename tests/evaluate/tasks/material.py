"""Facts that the demo model knows, all but one, and an evaluation in float32."""

import json

from mlx_svd.demo import DEMO_MODEL
from mlx_svd.evaluate.evaluate import evaluate
from mlx_svd.evaluate.settings import EvaluateSettings

FACTS = [
    {"relation": "capital", "subject": c, "object": o, "prompt": f"The capital of {c} is",
     "conflict": f, "distractors": ["London", "Berlin"]}
    for c, o, f in (("France", "Paris", "Rome"), ("Italy", "Rome", "Paris"),
                    ("Spain", "Quito", "Madrid"), ("Norway", "Oslo", "Cairo"))
]  # fmt: skip


def run(tasks, output, model=DEMO_MODEL, **settings):
    settings = EvaluateSettings(**{"dtype": "float32", **settings})
    return evaluate(str(model), [str(task) for task in tasks], output, settings)


def read(path):
    return [json.loads(line) for line in path.read_text().split("\n") if line]
