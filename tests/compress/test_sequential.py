"""Sequential calibration: inputs are those that the compressed model really has."""

import numpy as np
import pytest

from mlx_svd.calibrate.calibrate import calibrate
from mlx_svd.calibrate.statistics import load_calibration
from mlx_svd.calibrate.text import read_windows
from mlx_svd.checkpoint.layout import quantization
from mlx_svd.checkpoint.loader import load, load_model
from mlx_svd.compress import compress
from mlx_svd.compress.sequential import calibrate_sequentially
from mlx_svd.demo.run import DEMO_MODEL, PASSAGE
from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.divergence import kl_divergence
from mlx_svd.plan.make import make_plan
from mlx_svd.plan.policy import RankPolicy
from mlx_svd.plan.recipe import Recipe, Rule
from mlx_svd.source.families import FAMILIES, PROJECTIONS
from mlx_svd.source.source import open_source
from tests.calibrate.material import calibrated, inputs_by_hand, tiny_model
from tests.compress.test_resume import contents

HALF = RankPolicy(rank_ratio=0.5)


def prepared(family: str, folder, scorer: str = "whitened", **recipe):
    """(source, opener of a new model, plan, calibration) of a tiny model."""
    source, model = tiny_model(family, folder / "model")
    present = {p.name for m in source.linears for p in m.projections}
    names = tuple(p for p in PROJECTIONS if p in present)
    moments = ("input",) if scorer == "whitened" else ("input", "output")
    calibration = calibrated(source, model, folder / "base", projections=names, moments=moments)
    recipe = {"policy": HALF, **recipe}
    plan = make_plan(source, Recipe(names, scorer=scorer, **recipe), calibration=calibration)
    return source, lambda: load_model(folder / "model", lazy=True)[0], plan, calibration


@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_are_those_of_the_compressed_checkpoint(family, tmp_path, monkeypatch):
    # Dense, so that every module of the checkpoint can be watched under its own name.
    source, opener, plan, base = prepared(family, tmp_path, form="dense")
    plan, calibration = calibrate_sequentially(source, opener, plan, base, tmp_path / "again")
    folder = compress(source, plan, tmp_path / "out", calibration=calibration)
    model = load_model(folder)[0]
    seen = inputs_by_hand(model, base.windows, monkeypatch)
    found, original = [], []  # how far from the checkpoint's inputs
    for linear in source.linears:
        for p in linear.projections:
            expected = seen[linear.path].T @ seen[linear.path] / len(seen[linear.path])
            for kind, errors in ((calibration, found), (base, original)):
                difference = kind.statistics(p).second - expected
                errors.append(np.abs(difference).max() / np.abs(expected).max())
    assert max(found) < 2e-3  # rounding to bfloat16 activations
    assert max(found) < 0.1 * max(original)


@pytest.mark.parametrize("form", ["factored", "pivot"])
def test_the_plan_keeps_its_forms_and_bytes_and_the_checkpoint_loads(form, tmp_path):
    source, opener, plan, base = prepared("qwen2", tmp_path, form=form)
    again, calibration = calibrate_sequentially(source, opener, plan, base, tmp_path / "again")
    assert [p.to_json() for p in again.projections] == [p.to_json() for p in plan.projections]
    assert again.bytes_after == plan.bytes_after
    assert again.digest != plan.digest
    folder = compress(source, again, tmp_path / "out", calibration=calibration)
    tokens = base.windows.tokens
    whole = load_model(tmp_path / "model")[0]
    assert np.isfinite(kl_divergence(load_model(folder)[0], whole, tokens).kl)
    with pytest.raises(MlxSvdError, match="not the calibration that the plan was made with"):
        compress(source, again, tmp_path / "other", calibration=base)


def test_gradient_moments_are_those_of_the_base(tmp_path):
    source, opener, plan, base = prepared("llama", tmp_path, scorer="two-sided")
    _, calibration = calibrate_sequentially(source, opener, plan, base, tmp_path / "again")
    for linear in source.linears:
        p = linear.projections[0]
        expected, found = base.statistics(p), calibration.statistics(p)
        np.testing.assert_array_equal(found.output_second, expected.output_second)
    assert calibration.info.loss == base.info.loss


def test_a_quantized_embedding_is_in_the_first_inputs(tmp_path, monkeypatch):
    source, opener, plan, base = prepared("llama", tmp_path, quantize=quantization(2, 32))
    _, calibration = calibrate_sequentially(source, opener, plan, base, tmp_path / "again")
    q = source.linears[0].projections[0]
    difference = np.abs(calibration.statistics(q).second - base.statistics(q).second).max()
    assert difference > 0.01


class Interrupted(BaseException):
    """Stands for a signal."""


@pytest.mark.parametrize("after", [1, 6, 7, 8])
def test_an_interrupted_run_ends_with_the_same_checkpoint(after, tmp_path):
    source, opener, plan, base = prepared("llama", tmp_path)
    whole_plan, whole = calibrate_sequentially(source, opener, plan, base, tmp_path / "whole")
    told = []

    def stop(path):
        told.append(path)
        if len(told) == after:
            raise Interrupted

    with pytest.raises(Interrupted):
        calibrate_sequentially(source, opener, plan, base, tmp_path / "again", stop)
    with pytest.raises(MlxSvdError, match="no finished calibration"):
        load_calibration(tmp_path / "again")
    again_plan, again = calibrate_sequentially(source, opener, plan, base, tmp_path / "again")
    assert again_plan.digest == whole_plan.digest
    expected = compress(source, whole_plan, tmp_path / "a", calibration=whole)
    found = compress(source, again_plan, tmp_path / "b", calibration=again)
    assert contents(found) == contents(expected)


def test_a_finished_one_is_found_again_and_another_plan_is_refused(tmp_path):
    source, opener, plan, base = prepared("llama", tmp_path)
    calibrate_sequentially(source, opener, plan, base, tmp_path / "again")

    def never():
        pytest.fail("the model was opened")

    calibrate_sequentially(source, never, plan, base, tmp_path / "again")
    other = make_plan(
        source,
        Recipe(("q",), RankPolicy(rank_ratio=0.25), scorer="whitened"),
        calibration=base,
    )
    with pytest.raises(MlxSvdError, match="again: holds something else"):
        calibrate_sequentially(source, opener, other, base, tmp_path / "again")


def test_slices_are_refused_by_name(tmp_path):
    rules = (Rule(projections=("v", "o"), form="sliced", policy=HALF),)
    source, opener, plan, base = prepared("llama", tmp_path, rules=rules, form="factored")
    with pytest.raises(MlxSvdError, match=r"v_proj: a slice needs .* leave out --sequential"):
        calibrate_sequentially(source, opener, plan, base, tmp_path / "again")


def test_a_trained_model_is_nearer_to_the_original_than_without(tmp_path):
    source = open_source(str(DEMO_MODEL))

    def opener():
        return load_model(DEMO_MODEL, dtype="float32", lazy=True)[0]

    model, tokenizer = load(DEMO_MODEL, dtype="float32")
    windows = read_windows(tokenizer, PASSAGE, length=64)
    base = calibrate(source, opener, windows, tmp_path / "base", projections=PROJECTIONS,
                     moments=("input",))  # fmt: skip
    recipe = Recipe(PROJECTIONS, HALF, scorer="whitened", form="factored")
    plan = make_plan(source, recipe, calibration=base)
    again = calibrate_sequentially(source, opener, plan, base, tmp_path / "again")
    losses = []
    for number, (used, calibration) in enumerate([(plan, base), again]):
        folder = compress(source, used, tmp_path / str(number), calibration=calibration)
        compressed = load_model(folder, dtype="float32")[0]
        losses.append(kl_divergence(compressed, model, windows.tokens).kl)
    assert losses[1] < 0.9 * losses[0]
