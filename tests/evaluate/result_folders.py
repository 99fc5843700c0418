"""Small result folders, as mlx-svd evaluate and lm-eval write them."""

import json
from pathlib import Path

import numpy as np

from mlx_svd.evaluate.generation.repetition import loops, repetition

DATE = "2026-01-31T10-20-30.123456"


def write_run(folder: Path, tasks: dict[str, list[dict]], **results) -> Path:
    """samples_TASK.jsonl and results.json of one run."""
    folder.mkdir(parents=True)
    for task, rows in tasks.items():
        lines = [json.dumps({"task": task, **row}) for row in rows]
        (folder / f"samples_{task}.jsonl").write_text("\n".join(lines) + "\n")
    content = {"results": {}, "model_name": folder.name, **results}
    (folder / "results_1.json").write_text(json.dumps(content))
    return folder


def answers(right, task="piqa", metric="acc"):
    """Rows of a multiple-choice task from right (1) and wrong (0) answers."""
    return [{"doc_id": i, "id": f"{task}-{i}", metric: int(r)} for i, r in enumerate(right)]


def flipped(n, lost, gained, right=0.6):
    """(a, b): n answers of which lost become wrong and gained become right."""
    a = (np.arange(n) < right * n).astype(int)
    b = a.copy()
    b[:lost] = 0
    b[n - gained :] = 1
    return a, b


def losses(shift=0.0, n=40, seed=0, tokens=100):
    """Rows of a perplexity task; shift: more nats per token, with noise of its own."""
    rng = np.random.default_rng(seed)
    base = 3 + 0.3 * rng.standard_normal(n)
    noise = 0.01 * np.random.default_rng(seed + 1).standard_normal(n)
    own = noise * (shift != 0)
    return [
        {
            "doc_id": i, "id": f"w{i}", "loglikelihood": -tokens * float(x),
            "num_tokens": tokens, "num_bytes": 4 * tokens,
        }
        for i, x in enumerate(base + shift + own)
    ]  # fmt: skip


def write_lm_eval_run(folder: Path, right, log_likelihoods, model="model", date=DATE) -> Path:
    """What lm-eval 0.4.13 writes with --log_samples, shortened to the keys that matter."""
    place = folder / model
    place.mkdir(parents=True, exist_ok=True)
    common = {"filter": "none", "prompt_hash": "p", "target_hash": "t"}
    mine = [
        {"doc_id": i, "doc": {"label": 0}, "resps": [[["-1.0", "False"]]], "target": "0", **common,
         "metrics": ["acc", "acc_norm"], "doc_hash": f"d{i}", "acc": float(r), "acc_norm": float(r)}
        for i, r in enumerate(right)
    ]  # fmt: skip
    text = [
        {"doc_id": i, "doc_hash": f"d{i}", **common, "word_perplexity": [x, 10],
         "metrics": ["word_perplexity", "byte_perplexity", "bits_per_byte"],
         "byte_perplexity": [x, 46], "bits_per_byte": [x, 46]}
        for i, x in enumerate(log_likelihoods)
    ]  # fmt: skip
    for task, rows in (("my_piqa", mine), ("mytext", text)):
        path = place / f"samples_{task}_{date}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    better = {"my_piqa": {"acc": True, "acc_norm": True}, "mytext": {"bits_per_byte": False}}
    content = {
        "results": {}, "model_name": model, "higher_is_better": better,
        "task_hashes": {"my_piqa": "x", "mytext": "y"}, "n-shot": {"my_piqa": 0, "mytext": 0},
        "versions": {"my_piqa": 1.0, "mytext": 2.0},
    }  # fmt: skip
    (place / f"results_{date}.json").write_text(json.dumps(content))
    return folder


def text_record(number, tokens, kind="greedy", seed=None, ended=0):
    """What generation_quality would write about a text with these tokens."""
    return {
        "doc_id": number, "id": f"p{number}", "task": "generation", "filter": kind, "seed": seed,
        "prompt": f"prompt {number}", "text": "", "tokens": tokens,
        **{f"rep_{n}": repetition(tokens, n) for n in (2, 3, 4)},
        "loop": int(loops(tokens)), "length": len(tokens), "ended": ended,
    }  # fmt: skip


def texts(looping, n=200, kind="greedy", length=40):
    """n texts of random tokens of which the first ``looping`` end in a loop."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, 5000, (n, length)).tolist()
    drawn = [t[: length - 12] + [1, 2, 3, 4] * 3 if i < looping else t for i, t in enumerate(drawn)]
    return [text_record(i, t, kind) for i, t in enumerate(drawn)]
