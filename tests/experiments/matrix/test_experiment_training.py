"""Tiny models trained on the spot: sizes, determinism, factors, what is written."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_svd.checkpoint.loader import load
from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.likelihood.encode import tokens_of
from mlx_svd.experiments.matrix.kinds.compression import Compression
from mlx_svd.experiments.matrix.training import Training, descent
from mlx_svd.experiments.matrix.training.small_model import Factored, Size, factorize
from mlx_svd.finetune.trainer import learning_rate as rate
from tests.experiments.matrix.capitals import SETTINGS

TRAINING = {
    "text": {"file": "text.txt"},
    "facts": {"file": "facts.json"},
    "batch": 2,
    "length": 32,
}
SPEC = {"dim": 32, "layers": 1, "steps": 3}


def weights(folder) -> dict[str, np.ndarray]:
    model, _ = load(folder, dtype="float32")
    return {name: np.array(v) for name, v in tree_flatten(model.parameters())}


def test_parameters_are_counted_as_the_model_has_them():
    size = Size(48, 2)
    model = size.new_model(0)
    assert size.parameters == sum(v.size for _, v in tree_flatten(model.parameters()))


def test_factors_meet_the_parameters_and_are_the_best_approximation():
    size, wanted = Size(48, 1), Size(32, 1).parameters
    model = size.new_model(0)
    before = np.array(model.model.layers[0].self_attn.q_proj.weight, dtype=np.float64)
    got = factorize(model, size, wanted)
    assert got == sum(v.size for _, v in tree_flatten(model.parameters()))
    assert 0.85 * wanted < got <= wanted
    factored = model.model.layers[0].self_attn.q_proj
    assert isinstance(factored, Factored)
    u, s, v = np.linalg.svd(before)
    rank = factored.up.shape[1]
    best = (u[:, :rank] * s[:rank]) @ v[:rank]
    np.testing.assert_allclose(np.array(factored.up @ factored.down), best, atol=1e-5)


def test_the_same_seed_gives_the_same_model_and_another_one_another(places, tmp_path):
    training = Training(TRAINING, places)
    first = training.model(SPEC, 0)
    kept = weights(first.folder)
    for path in first.folder.iterdir():
        path.unlink()
    again, other = weights(training.model(SPEC, 0).folder), weights(training.model(SPEC, 1).folder)
    for name, weight in kept.items():
        np.testing.assert_array_equal(again[name], weight)
    assert np.abs(other["model.embed_tokens.weight"] - kept["model.embed_tokens.weight"]).max() > 0


def test_a_trained_model_is_not_trained_again(places, monkeypatch):
    training = Training(TRAINING, places)
    made = training.model(SPEC, 0)
    monkeypatch.setattr(Training, "_train", None)
    assert Training(TRAINING, places).model(SPEC, 0) == made


def test_training_learns(places):
    training = Training(TRAINING | {"batch": 8}, places)
    losses = [training.model(SPEC | {"steps": n}, 0).numbers["training_loss"] for n in (2, 40)]
    assert losses[1] < losses[0] - 1


def test_arms_of_equal_size_and_equal_tokens_are_so(places):
    training = Training(TRAINING, places)
    wanted = Size(32, 1).parameters
    narrow = training.model(SPEC, 0).numbers
    specs = [
        {"dim": 48, "layers": 1, "steps": 3, "parameters": {"dim": 32, "layers": 1}},
        {"dim": 48, "layers": 1, "steps": 3, "parameters": wanted, "factor_at": 0.5},
    ]
    for spec in specs:
        numbers = training.model(spec, 0).numbers
        assert numbers["parameters"] <= narrow["parameters"] == wanted
        assert numbers["training_tokens"] == narrow["training_tokens"] == 3 * 2 * 32
    taught = training.model(SPEC | {"teacher": {"dim": 48, "layers": 1, "steps": 3}}, 0)
    assert taught.numbers["training_tokens"] == narrow["training_tokens"]
    wide = {"dim": 48, "layers": 1, "steps": 3}
    same = training.model({"dim": 32, "layers": 1, "flops_of": wide}, 0).numbers
    flops = training.model(wide, 0).numbers["training_flops"]
    assert same["training_flops"] == pytest.approx(flops, rel=0.2)


def test_factors_that_begin_from_kept_matrices_are_those_trained_from_the_start(
    places, monkeypatch
):
    dense = SPEC | {"dim": 48, "steps": 10}
    spec = dense | {"parameters": {"dim": 32, "layers": 1}, "factor_at": 0.6}
    whole = Training(TRAINING, places).model(spec, 0)
    keeping = Training(TRAINING | {"keep_at": 0.6}, places)
    plain, kept = Training(TRAINING, places).model(dense, 0), keeping.model(dense, 0)
    for name, weight in weights(plain.folder).items():
        np.testing.assert_array_equal(weights(kept.folder)[name], weight)
    steps = []
    monkeypatch.setattr(descent, "learning_rate", lambda n, *a: steps.append(n) or rate(n, *a))
    short = keeping.model(spec, 0)
    assert steps == [6, 7, 8, 9]
    for name, weight in weights(whole.folder).items():
        np.testing.assert_array_equal(weights(short.folder)[name], weight)
    del whole.numbers["training_seconds"], short.numbers["training_seconds"]
    assert short.numbers == whole.numbers
    with pytest.raises(MlxSvdError, match=r"keep_at 0\.95: give a share up to 0\.9"):
        Training(TRAINING | {"keep_at": 0.95}, places)


def test_a_learning_rate_of_its_own_trains_the_model_that_the_settings_would(places):
    training = Training(TRAINING | {"lr": 0.002}, places)
    own = training.model(SPEC | {"lr": 0.01}, 0)
    shutil.rmtree(own.folder)
    elsewhere = Training(TRAINING | {"lr": 0.01}, places).model(SPEC, 0)
    usual = training.model(SPEC, 0)
    losses = [m.numbers["training_loss"] for m in (own, elsewhere, usual)]
    assert losses[0] == losses[1] != losses[2]
    # So it is trained once for both.
    assert own.folder == elsewhere.folder != usual.folder
    taught = [
        Training(TRAINING | {"lr": lr}, places).model(SPEC | {"lr": 0.01, "teacher": SPEC}, 0)
        for lr in (0.002, 0.01)
    ]
    assert taught[0].folder != taught[1].folder, "their teachers had other rates"


def test_what_is_written_is_read_by_bytes(places):
    folder = Training(TRAINING, places).model(SPEC, 0).folder
    model, tokenizer = load(folder, dtype="float32")
    text = "Zürich (1,234)\n"
    assert tokens_of(tokenizer, text) == list(text.encode())
    assert tokenizer.decode(tokens_of(tokenizer, text)) == text
    assert model(mx.array([tokens_of(tokenizer, text)])).shape[-1] == 257
    assert json.loads((folder / "training.json").read_bytes())["parameters"] > 0


def test_a_condition_trains_truncates_and_counts(places):
    settings = {k: v for k, v in SETTINGS.items() if k not in ("model", "importance")}
    kind = Compression(settings | {"training": TRAINING}, places)
    small = Size(16, 1, 2).parameters
    condition = {
        "train": SPEC,
        "steps": [{"truncate": {"projections": "all", "parameters": small + 4000}}],
    }
    kind.check(condition)
    assert kind.seeded(condition)
    measured = kind.run(condition, 0)
    assert measured.numbers["parameters"] <= small + 4000 < Size(32, 1).parameters
    assert measured.metrics["facts"].items


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"dim": 32}, "steps or flops_of"),
        ({"dim": 30, "steps": 1}, "multiple of twice the heads"),
        ({"dim": 32, "steps": 0}, "at least 1"),
        ({"dim": 32, "steps": 1, "depth": 3}, "'depth'"),
        ({"dim": 32, "steps": 1, "lr": 0}, "lr 0: must be above 0"),
        ({"dim": 32, "steps": 1, "lr": float("nan")}, "must be above 0"),
        ({"dim": 32, "steps": 1, "factor_at": 0.5}, "goes with parameters"),
        ({"dim": 32, "steps": 1, "parameters": 10**9}, "more than the dense"),
    ],
)
def test_wrong_specifications_are_refused(spec, words, places):
    with pytest.raises(MlxSvdError, match=words):
        Training(TRAINING, places).check(spec)
