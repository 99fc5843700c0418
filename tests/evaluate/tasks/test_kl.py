"""Divergence from a base model, against plain computations."""

import mlx.core as mx
import numpy as np
import pytest
from scipy.stats import sem

from mlx_svd.checkpoint.loader import load
from mlx_svd.demo import DEMO_MODEL
from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.likelihood.scorer import Scorer
from mlx_svd.evaluate.tasks import kl
from tests.evaluate.reference import log_probs
from tests.evaluate.tasks.material import read, run


def test_kl_and_first_divergence_are_those_of_single_windows(data, tmp_path, demo, shared):
    base, tokenizer = demo
    other, _ = load(shared / "models/qwen2-16m", dtype="float32")
    results = run(
        ["kl"], tmp_path / "out", shared / "models/qwen2-16m", data_dir=data, limit=2,
        base=str(DEMO_MODEL),
    )  # fmt: skip
    records = read(tmp_path / "out/samples_kl.jsonl")
    from mlx_svd.evaluate.rows.wikitext import detokenized

    stored = (data / "wikitext-2.test.txt").read_text()
    tokens = tokenizer.encode(detokenized(stored), verbose=False)
    for number, record in enumerate(records):
        window = tokens[number * 512 : (number + 1) * 512]
        p, q = log_probs(base, window), log_probs(other, window)
        assert record["kl"] == pytest.approx((np.exp(p) * (p - q)).sum(1).mean(), rel=1e-3)
        agreement = (p.argmax(1) == q.argmax(1)).mean()
        assert record["agreement"] == pytest.approx(agreement, abs=0.005)
        text, parted = window[:32], 64
        for step in range(64):
            best = [int(mx.argmax(m(mx.array(text)[None])[0, -1]).item()) for m in (base, other)]
            if best[0] != best[1]:
                parted = step
                break
            text = [*text, best[0]]
        assert record["first_divergence"] == parted
    for key in ("kl", "agreement", "first_divergence"):
        values = [r[key] for r in records]
        assert results["results"]["kl"][f"{key},none"] == pytest.approx(np.mean(values))
        assert results["results"]["kl"][f"{key}_stderr,none"] == pytest.approx(sem(values))


def test_a_model_whose_logits_are_not_finite_is_named_with_its_window(data, tmp_path, monkeypatch):
    original = kl.window_divergences

    def broken(model, *arguments):
        model.model.norm.weight = model.model.norm.weight * mx.nan
        return original(model, *arguments)

    monkeypatch.setattr(kl, "window_divergences", broken)
    settings = {"data_dir": data, "limit": 2, "base": str(DEMO_MODEL)}
    with pytest.raises(MlxSvdError, match=r"kl: window-0: .* not finite; the model overflows"):
        run(["kl"], tmp_path / "out", **settings)


def test_a_model_does_not_diverge_from_itself(data, tmp_path):
    results = run(["kl"], tmp_path / "out", data_dir=data, limit=1, base=str(DEMO_MODEL))
    found = results["results"]["kl"]
    assert found["kl,none"] == pytest.approx(0, abs=1e-6)
    assert found["agreement,none"] == 1
    assert found["first_divergence,none"] == 64


def test_a_base_of_another_tokenizer_is_refused_before_anything_is_scored(
    data, tmp_path, shared, monkeypatch
):
    monkeypatch.setattr(Scorer, "score_batch", lambda *_: pytest.fail("something was scored"))
    base = str(shared / "models/llama-44m")
    with pytest.raises(MlxSvdError, match="kl: the model and --base tokenize the text differently"):
        run(["kl"], tmp_path / "out", data_dir=data, limit=1, base=base)
    assert not list((tmp_path / "out").glob("samples_*"))


def test_kl_without_a_base_model_says_what_to_give_before_anything_is_run(data, tmp_path):
    with pytest.raises(MlxSvdError, match="--base MODEL"):
        run(["facts", "kl"], tmp_path / "out", data_dir=data)
    assert not (tmp_path / "out").exists()
    run(["reasoning"], tmp_path / "base", limit=1)
    with pytest.raises(MlxSvdError, match="--base MODEL in place of the results in"):
        run(["reasoning", "kl"], tmp_path / "out", data_dir=data, base=str(tmp_path / "base"))
    assert not (tmp_path / "out").exists()
