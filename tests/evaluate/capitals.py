"""Ten questions that the demo model can answer, and an evaluation of it in tiny batches."""

import json

from mlx_svd.demo import DEMO_MODEL
from mlx_svd.evaluate.evaluate import evaluate
from mlx_svd.evaluate.settings import EvaluateSettings

CAPITALS = [("France", "Paris"), ("Italy", "Rome"), ("Spain", "Madrid"), ("Russia", "Moscow"),
            ("Egypt", "Cairo"), ("Greece", "Athens"), ("Norway", "Oslo"), ("Peru", "Lima"),
            ("Cuba", "Havana"), ("Austria", "Vienna")]  # fmt: skip


def choice_rows():
    rows = []
    for n, (country, capital) in enumerate(CAPITALS):
        others = [c for _, c in CAPITALS if c != capital]
        choices = [others[n % 9], others[(n + 3) % 9]]
        choices.insert(n % 3, capital)
        question = f"The capital of {country} is"
        rows.append({"id": f"c{n}", "question": question, "choices": choices, "label": n % 3})
    return rows


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def run(tasks, output, **settings):
    settings = EvaluateSettings(**{"dtype": "float32", "batch_tokens": 16, **settings})
    return evaluate(str(DEMO_MODEL), [str(task) for task in tasks], output, settings)
