"""Calibrations that are interrupted, reused, refused or damaged, and the model they leave."""

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_svd.calibrate import calibrate as module
from mlx_svd.calibrate.calibrate import steps, too_few_tokens
from mlx_svd.calibrate.statistics import load_calibration
from mlx_svd.compress import compress
from mlx_svd.errors import MlxSvdError
from mlx_svd.plan.make import make_plan
from mlx_svd.plan.policy import RankPolicy
from mlx_svd.plan.recipe import Recipe
from mlx_svd.source.source import open_source
from tests.calibrate.material import calibrated, random_windows, tiny_model
from tests.conftest import logits
from tests.tiny import tiny_config, tiny_tensors, write_shards, write_tiny

MEASURED_TIME = ("seconds", "cpu_seconds", "peak_memory")


class Interrupted(BaseException):
    """Stands for a signal."""


@pytest.fixture
def llama(tmp_path):
    return tiny_model("llama", tmp_path / "model", num_hidden_layers=3)


def layer_bytes(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def info(folder) -> dict:
    content = json.loads((folder / "calibration.json").read_text())
    return {k: v for k, v in content.items() if k not in MEASURED_TIME}


def stop_after(count: int):
    told = []

    def advance(done):
        told.append(done)
        if len(told) == count:
            raise Interrupted

    return advance


@pytest.mark.parametrize("after", [1, 3, 4, 8, 9])
def test_a_run_interrupted_after_any_window_ends_with_the_same_files(llama, after, tmp_path):
    calibrated(*llama, tmp_path / "whole", max_accumulator_bytes=1)
    with pytest.raises(Interrupted):
        calibrated(*llama, tmp_path / "c", max_accumulator_bytes=1, advance=stop_after(after))
    finished = layer_bytes(tmp_path / "c")
    # A layer whose last window was run when the signal came is not on disk yet.
    assert len(finished) == (after - 1) // 3
    with pytest.raises(MlxSvdError, match="no finished calibration"):
        load_calibration(tmp_path / "c")
    told = []
    calibrated(*llama, tmp_path / "c", max_accumulator_bytes=1, advance=told.append)
    assert len(told) == 9 - 3 * len(finished)  # finished layers are not measured again
    assert layer_bytes(tmp_path / "c") == layer_bytes(tmp_path / "whole")
    assert info(tmp_path / "c") == info(tmp_path / "whole")


def test_a_run_interrupted_after_its_last_layer_still_knows_the_loss(llama, tmp_path, monkeypatch):
    calibrated(*llama, tmp_path / "whole")

    def stop(*_):
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(module, "module_losses", stop)
        with pytest.raises(Interrupted):
            calibrated(*llama, tmp_path / "c")
    calibrated(*llama, tmp_path / "c")
    assert info(tmp_path / "c") == info(tmp_path / "whole")
    assert info(tmp_path / "c")["loss"] > 1


def test_a_finished_folder_is_reused_without_running_the_model(llama, tmp_path, monkeypatch):
    source, model = llama
    first = calibrated(source, model, tmp_path / "c")
    before = layer_bytes(tmp_path / "c")
    monkeypatch.setattr(type(model), "__call__", lambda *_: pytest.fail("the model was run"))
    again = calibrated(source, model, tmp_path / "c")
    assert again.info == first.info == load_calibration(tmp_path / "c").info
    assert layer_bytes(tmp_path / "c") == before


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    "other",
    [{"windows": random_windows(seed=1)}, {"windows": random_windows(2)}, {"moments": ("output",)},
     {"windows": random_windows(6, 16)}, {"projections": ("q",)}],
    ids=["text", "count", "moments", "length", "projections"],
)  # fmt: skip
def test_a_folder_of_another_text_or_other_settings_is_refused(llama, finished, other, tmp_path):
    if finished:
        calibrated(*llama, tmp_path / "c")
    else:
        with pytest.raises(Interrupted):
            calibrated(*llama, tmp_path / "c", advance=stop_after(1))
    before = layer_bytes(tmp_path / "c")
    with pytest.raises(MlxSvdError, match="c: holds something else"):
        calibrated(*llama, tmp_path / "c", **other)
    assert layer_bytes(tmp_path / "c") == before


def test_a_folder_of_another_model_is_refused(llama, tmp_path):
    calibrated(*llama, tmp_path / "c")
    other = tiny_model("llama", tmp_path / "other", num_hidden_layers=3, seed=1)
    with pytest.raises(MlxSvdError, match="c: holds something else"):
        calibrated(*other, tmp_path / "c")


def test_folders_and_files_of_others_are_refused(llama, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    with pytest.raises(MlxSvdError, match="notes: holds something else"):
        calibrated(*llama, tmp_path / "notes")
    with pytest.raises(MlxSvdError, match=r"mine\.txt: is a file"):
        calibrated(*llama, tmp_path / "notes" / "mine.txt")
    assert [p.name for p in (tmp_path / "notes").iterdir()] == ["mine.txt"]


def test_projections_that_the_model_lacks_are_refused(tmp_path):
    with pytest.raises(MlxSvdError, match="gpt2 model has no gate projection"):
        calibrated(*tiny_model("gpt2", tmp_path / "model"), tmp_path / "c", projections=("gate",))


@pytest.mark.parametrize("moments", [("input",), ("input", "output", "gradient")])
def test_nan_names_the_first_module_that_sees_it_and_the_model_is_whole(moments, llama, tmp_path):
    source, model = llama
    attention = model.layers[1].self_attn
    modules = {path: type(m) for path, m in model.named_modules()}
    weight = attention.v_proj.weight
    attention.v_proj.weight = weight * float("nan")
    with pytest.raises(
        MlxSvdError, match=r"tensor model\.layers\.1\.self_attn\.v_proj\.weight holds"
    ):
        calibrated(source, model, tmp_path / "c", moments=moments)
    attention.v_proj.weight = weight / mx.abs(weight).max() * 3e38  # finite, its products are not
    with pytest.raises(MlxSvdError, match=r"^model\.layers\.1\.self_attn\.o_proj: its activations"):
        calibrated(source, model, tmp_path / "c", moments=moments)
    assert {path: type(m) for path, m in model.named_modules()} == modules
    attention.v_proj.weight = weight
    calibrated(source, model, tmp_path / "c", moments=moments)  # repaired, it goes on


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_the_model_is_left_as_it_was(family, tmp_path):
    source, model = tiny_model(family, tmp_path / "model")
    before = {n: np.array(p) for n, p in tree_flatten(model.parameters())}
    modules = {path: id(m) for path, m in model.named_modules()}
    calibrated(source, model, tmp_path / "c")
    assert {path: id(m) for path, m in model.named_modules()} == modules
    after = dict(tree_flatten(model.parameters()))
    assert list(after) == list(before)
    for name, parameter in before.items():
        np.testing.assert_array_equal(np.array(after[name]), parameter)


def test_too_few_tokens_are_said(llama, tmp_path):
    source, model = llama
    few = calibrated(source, model, tmp_path / "few", random_windows(2))
    assert "62 tokens, fewer than the 64 inputs" in too_few_tokens(few.info, source)
    enough = calibrated(source, model, tmp_path / "enough", random_windows(3))
    assert too_few_tokens(enough.info, source) is None
    down = calibrated(source, model, tmp_path / "down", projections=("down",), moments=("input",))
    assert "93 tokens, fewer than the 96 inputs" in too_few_tokens(down.info, source)


@pytest.mark.parametrize("scorer", ["whitened", "two-sided", "activation"])
def test_a_singular_calibration_still_compresses(scorer, llama, tmp_path, monkeypatch):
    source, model = llama
    windows = random_windows(1, 6)
    calibration = calibrated(source, model, tmp_path / "c", windows)
    plan = make_plan(
        source, Recipe(policy=RankPolicy(rank=5), scorer=scorer), calibration=calibration
    )
    folder = compress(source, plan, tmp_path / "out", calibration=calibration)
    assert np.isfinite(logits(folder)).all()
    if scorer == "whitened":  # five tokens, rank 5: nothing is lost on them
        from mlx_svd.checkpoint.loader import load_model

        tokens = mx.array(windows.tokens[0, :-1])[None]
        small, full = (np.array(m(tokens)) for m in (load_model(folder)[0], model))
        np.testing.assert_allclose(small, full, atol=2e-3 * np.abs(full).max())


def test_damaged_and_incomplete_folders_are_named(llama, tmp_path):
    calibrated(*llama, tmp_path / "c")
    content = (tmp_path / "c" / "calibration.json").read_text()
    other = content.replace('"windows": 3', '"windows": 4')
    for text, message in (("{", "is damaged"), ("[]", "is damaged"), (other, "another version")):
        (tmp_path / "c" / "calibration.json").write_text(text)
        with pytest.raises(MlxSvdError, match=f"calibration.json: .*{message}"):
            load_calibration(tmp_path / "c")
    (tmp_path / "c" / "calibration.json").write_text(content)
    (tmp_path / "c" / "layer-001.safetensors").unlink()
    with pytest.raises(MlxSvdError, match=r"layer-001.safetensors is missing"):
        load_calibration(tmp_path / "c")


def test_a_changed_weight_makes_another_model_and_a_copy_does_not(tmp_path):
    config = tiny_config("llama")
    source, model = tiny_model("llama", tmp_path / "model")
    calibration = calibrated(source, model, tmp_path / "c")
    write_tiny("llama", tmp_path / "copy")
    calibration.check(open_source(str(tmp_path / "copy")), ("input", "gradient"))
    tensors = tiny_tensors(config)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 7] += 0.5
    write_shards(tmp_path / "copy", {n: mx.array(t) for n, t in tensors.items()}, 1)
    with pytest.raises(MlxSvdError, match="c: is a calibration of another model"):
        calibration.check(open_source(str(tmp_path / "copy")), ())


@pytest.mark.parametrize("moments", [("input",), ("input", "output")])
@pytest.mark.parametrize("layers_at_once", [1, 2, 3])
def test_steps_are_what_a_run_tells_one_by_one(moments, layers_at_once, llama, tmp_path):
    source, _ = llama
    # In a layer: the input of q, k, v and that of o, and the outputs of q, k, v, o.
    inputs, outputs = 2 * 64 * 64, 64 * 64 + 32 * 32 + 32 * 32 + 64 * 64
    limit = layers_at_once * 8 * (inputs + ("output" in moments) * outputs)
    expected = steps(source, ("q", "k", "v", "o"), moments, 3, limit)
    told = []
    options = {"moments": moments, "max_accumulator_bytes": limit, "advance": told.append}
    calibrated(*llama, tmp_path / "c", **options)
    assert told == expected
    # Inputs alone are measured block by block, in one pass over the text.
    rounds = 3 if moments == ("input",) else -(-3 // layers_at_once)
    assert len(told) == 3 * rounds


@pytest.mark.parametrize("after", [1, 3, 4, 8, 9])
def test_inputs_of_an_interrupted_run_end_as_the_same_files(llama, after, tmp_path):
    options = {"moments": ("input",)}
    calibrated(*llama, tmp_path / "whole", **options)
    with pytest.raises(Interrupted):
        calibrated(*llama, tmp_path / "c", advance=stop_after(after), **options)
    finished = layer_bytes(tmp_path / "c")
    assert len(finished) == (after - 1) // 3
    told = []
    calibrated(*llama, tmp_path / "c", advance=told.append, **options)
    assert len(told) == 9 - 3 * len(finished)
    assert layer_bytes(tmp_path / "c") == layer_bytes(tmp_path / "whole")
    assert info(tmp_path / "c") == info(tmp_path / "whole")


def test_the_text_is_kept_and_its_loss_is_named(llama, tmp_path):
    windows = random_windows()
    calibration = calibrated(*llama, tmp_path / "c", windows)
    kept = load_calibration(tmp_path / "c").windows
    np.testing.assert_array_equal(kept.tokens, windows.tokens)
    assert (kept.origin, kept.digest) == (windows.origin, windows.digest)
    (tmp_path / "c" / "windows.npy").unlink()
    with pytest.raises(MlxSvdError, match=r"windows\.npy: is missing or damaged"):
        _ = load_calibration(calibration.folder).windows
