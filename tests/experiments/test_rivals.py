"""Rivals are what mlx-lm itself would store, on our windows, and load in stock mlx-lm."""

import hashlib
import json
import shutil

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.divergence import kl_divergence
from mlx_svd.evaluate.likelihood.forward import written_out
from mlx_svd.experiments.rivals import RivalRecord, make_rival
from mlx_svd.source.headers import read_headers
from tests.experiments.conftest import VOCAB

CALIBRATED = ["gptq2", "awq4", "dwq2", "dynamic_quant@2.56"]
DWQ = {"batch_size": 1, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def rival(tiny, windows, tmp_path_factory):
    """name, family -> its record, made on first use."""
    folder, made = tmp_path_factory.mktemp("rivals"), {}

    def make(name: str, family: str = "llama") -> RivalRecord:
        if (name, family) not in made:
            out = folder / f"{family}-{name}"
            made[name, family] = make_rival(name, tiny(family), out, windows, **DWQ)
        return made[name, family]

    return make


def stock(folder):
    """Loaded by stock mlx-lm, then cast: half precision is slow on a CPU."""
    model, _ = mlx_lm.load(str(folder))
    model.set_dtype(mx.float32)
    return written_out(model)


def assert_same_checkpoint(folder, expected):
    ours, theirs = (mx.load(str(f / "model.safetensors")) for f in (folder, expected))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype, name
        assert mx.array_equal(ours[name], theirs[name]), name
    config = [json.loads((f / "config.json").read_text()) for f in (folder, expected)]
    assert config[0]["quantization"] == config[1]["quantization"]


@pytest.mark.parametrize(
    ("name", "flags"), [("q3", {"q_bits": 3}), ("mixed_2_6", {"quant_predicate": "mixed_2_6"})]
)
def test_rivals_without_text_are_what_mlx_lm_convert_writes(name, flags, rival, tiny, tmp_path):
    record = rival(name)
    mlx_lm.convert(str(tiny()), tmp_path / "stock", quantize=True, q_group_size=64, **flags)
    assert_same_checkpoint(record.folder, tmp_path / "stock")
    assert (record.windows, record.digest) == (0, None)


def test_rivals_without_text_are_stored_in_the_dtype_that_the_config_names(tiny, tmp_path):
    model = shutil.copytree(tiny(), tmp_path / "model")  # stored in bfloat16
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"torch_dtype": "float16"}))
    record = make_rival("q4", model, tmp_path / "out")
    mlx_lm.convert(str(model), tmp_path / "stock", quantize=True, q_group_size=64, q_bits=4)
    assert_same_checkpoint(record.folder, tmp_path / "stock")
    assert {h.dtype for h in read_headers(record.folder).values()} == {"F16", "U32"}


def test_a_record_counts_the_bytes_on_disk(rival):
    record = rival("q3")
    parameters = VOCAB * 64 + 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128) + 5 * 64
    parameters += 2 * (64 + 32 + 32 + 64)  # biases of q, k, v, o
    assert record.nbytes == sum(h.nbytes for h in read_headers(record.folder).values())
    assert record.bits_per_weight == pytest.approx(8 * record.nbytes / parameters)
    assert record.bits_per_weight == pytest.approx(3.5, rel=0.02)  # scales and biases: half a bit
    assert record.reason is None
    assert record.cpu_seconds > 0
    assert record.seconds > 0
    assert record.peak_memory_bytes > 1e7


@pytest.mark.parametrize("name", CALIBRATED)
def test_calibrated_rivals_load_in_stock_mlx_lm_in_the_dtype_of_the_source(name, rival, windows):
    record = rival(name)
    assert record.reason is None
    assert {h.dtype for h in read_headers(record.folder).values()} == {"BF16", "U32"}
    assert np.isfinite(kl_divergence(stock(record.folder), stock(record.folder), windows).kl)
    assert record.windows == 8
    assert record.digest == hashlib.sha256(windows.tobytes()).hexdigest()


@pytest.mark.parametrize(
    ("name", "worse"), [("gptq2", "q2"), ("dwq2", "q2"), ("dynamic_quant@2.56", "q2")]
)
def test_looking_at_the_text_brings_a_rival_nearer_to_the_dense_model(
    name, worse, rival, tiny, windows
):
    dense = stock(tiny())
    better = kl_divergence(stock(rival(name).folder), dense, windows)
    assert better.kl < 0.9 * kl_divergence(stock(rival(worse).folder), dense, windows).kl


def test_dwq_reports_a_validation_loss_that_fell(rival):
    settings = rival("dwq2").settings
    assert settings["steps"] == 7
    assert settings["validation_windows"] == 1
    assert settings["validation_loss_after"] < settings["validation_loss_before"]
    assert settings["learning_rate"] == 1e-3


def test_dynamic_quant_hits_its_target_in_bits_that_are_stored(rival):
    record = rival("dynamic_quant@2.56")
    # Counted with scales of float32, even all layers in 2 bits would be above the target.
    assert 2.52 < record.bits_per_weight < 2.575
    assert 0 < record.settings["layers_in_high_bits"] < record.settings["layers"]


def test_one_seed_gives_one_checkpoint(rival, tiny, windows, tmp_path):
    again = make_rival("dwq2", tiny(), tmp_path / "again", windows, **DWQ)
    assert_same_checkpoint(again.folder, rival("dwq2").folder)


def test_a_model_whose_config_mlx_lm_cannot_read_gives_a_checkpoint_that_it_can(
    rival, tiny, windows
):
    with pytest.raises(TypeError, match="n_ctx"):
        mlx_lm.load(str(tiny("gpt2")))
    record = rival("q4", "gpt2")
    assert record.reason is None
    assert stock(record.folder)(mx.array(windows[:1])).shape == (1, 32, VOCAB)


@pytest.mark.parametrize(
    ("name", "family", "reason"),
    [
        ("q4", "gpt_neo", "mlx-lm has no model type gpt_neo"),
        ("awq4", "gpt2", "mlx-lm's awq has no rules for model type gpt2"),
        ("mixed_2_6", "gpt2", "ValueError: Model does not have expected keys for mixed quant."),
    ],
)
def test_a_rival_that_does_not_run_says_why_and_leaves_no_folder(name, family, reason, rival):
    record = rival(name, family)
    assert record.reason.startswith(reason)
    assert "\n" not in record.reason
    assert record.folder is None
    assert record.nbytes is None


def test_a_process_that_is_killed_becomes_a_reason(tiny, windows, tmp_path):
    record = make_rival("q4", tiny(), tmp_path / "out", windows, timeout=0.05)
    assert record.reason == "took longer than 0.05 seconds"
    assert list(tmp_path.iterdir()) == []


def test_the_process_runs_this_package_whatever_the_working_directory_holds(
    tiny, tmp_path, monkeypatch
):
    (tmp_path / "mlx_svd").mkdir()
    (tmp_path / "mlx_svd/__init__.py").write_text("raise SystemExit('another package')")
    monkeypatch.chdir(tmp_path)
    assert make_rival("q4", tiny(), tmp_path / "out").reason is None


def test_ids_beyond_the_vocabulary_become_a_reason(tiny, tmp_path):
    record = make_rival("gptq4", tiny(), tmp_path / "out", np.full((1, 8), VOCAB, np.int32))
    assert record.reason.startswith(f"windows: token id {VOCAB} is beyond")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"windows": None}, "looks at text"),
        ({"windows": np.zeros(5, np.int32)}, "looks at text"),
        ({"model_folder": "missing"}, "no such folder"),
        ({"out_folder": "."}, "exists already"),
        ({"name": "gptq3"}, "no such quantizer"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(change, message, tiny, windows, tmp_path):
    right = {"name": "gptq4", "model_folder": tiny(), "out_folder": tmp_path / "out"}
    with pytest.raises(MlxSvdError, match=message) as error:
        make_rival(**{"windows": windows, **right, **change})
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_quantized_already_is_refused(rival, tmp_path):
    copied = shutil.copytree(rival("q3").folder, tmp_path / "model")
    with pytest.raises(MlxSvdError, match="is compressed already"):
        make_rival("q2", copied, tmp_path / "out")
