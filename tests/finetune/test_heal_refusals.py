"""Bad input is one MlxSvdError of one line that names the culprit and the remedy."""

import json
import shutil
from dataclasses import replace

import mlx.core as mx
import pytest

from mlx_svd.errors import MlxSvdError
from mlx_svd.finetune import HealSettings, heal
from mlx_svd.plan.recipe import Recipe, Rule
from tests.finetune.conftest import (
    CHARACTERS,
    SETTINGS,
    tensors,
    write_teacher,
    write_tokenizer,
)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"lr": 0.0}, "--lr 0.0: must be a number above 0"),
        ({"lr": -1e-3}, "--lr -0.001: must be a number above 0"),
        ({"lr": float("nan")}, "--lr nan"),
        ({"lr": float("inf")}, "--lr inf"),
        ({"steps": 0}, "--steps 0: must be at least 1"),
        ({"epochs": 0}, "--epochs 0: must be at least 1"),
        ({"epochs": 1, "steps": 1}, "--epochs and --steps: give one"),
        ({"windows": 1}, "--windows 1: must be at least 2"),
        ({"length": 1}, "--length 1: must be at least 2"),
        ({"batch_size": 0}, "--batch-size 0: must be at least 1"),
        ({"save_every": 0}, "--save-every 0: must be at least 1"),
        ({"seed": -1}, "--seed -1: must not be negative"),
        ({"train": "biases"}, "--train biases: use one of all, factors, norms, scales"),
        ({"dtype": "int8"}, "--dtype int8: use one of float32"),
    ],
)
def test_settings_that_cannot_work(values, words):
    with pytest.raises(MlxSvdError) as error:
        HealSettings(**values)
    assert words in str(error.value)


@pytest.fixture
def refused(material, tmp_path):
    """(student, teacher, ...) replaced by options -> the message; nothing may be left behind."""
    data = material()

    def run(settings=SETTINGS, **options) -> str:
        given = {"model": data.student, "teacher": data.teacher, "text": data.text} | options
        with pytest.raises(MlxSvdError) as error:
            heal(given["model"], given["teacher"], tmp_path / "out", settings, text=given["text"])
        assert "\n" not in str(error.value)
        assert not list(tmp_path.glob("out*"))
        return str(error.value)

    run.data = data
    return run


def test_missing_teacher_and_student(refused, tmp_path):
    assert "missing: no such folder" in refused(teacher=tmp_path / "missing")
    assert "missing: no such folder" in refused(model=tmp_path / "missing")
    assert "--teacher: is empty" in refused(teacher="")


def test_student_that_is_neither_compressed_nor_quantized(refused):
    assert "neither compressed by mlx-svd nor quantized" in refused(model=refused.data.teacher)


def test_teacher_that_is_compressed_itself(refused):
    message = refused(teacher=refused.data.student)
    assert "checkpoint-1: is compressed or quantized itself (mlx_svd" in message


def test_teacher_that_is_quantized_itself(refused, compressed):
    path = refused.data.teacher / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"quantization": {"group_size": 64, "bits": 4}}))
    assert "is compressed or quantized itself (quantization" in refused()


@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        ("llama", {}, "its model_type is llama, the student's qwen2"),
        ("qwen2", {"vocab_size": 97}, "its vocab_size is 97, the student's 96"),
        ("qwen2", {"num_hidden_layers": 3}, "it has 3 layers, not 2"),
        (
            "qwen2",
            {"hidden_size": 32},
            "q_proj.weight is (32, 32) there and (64, 64) in the student",
        ),
        ("qwen2", {"intermediate_size": 128}, "mlp."),
        ("qwen2", {"num_key_value_heads": 4}, "k_proj"),
    ],
)
def test_teacher_of_another_shape(family, options, words, refused, tmp_path):
    message = refused(teacher=write_teacher(tmp_path / "other", family, **options))
    assert "other: is not the student's base model" in message
    assert words in message


def test_teacher_with_another_tokenizer(refused):
    write_tokenizer(refused.data.teacher, CHARACTERS[::-1])
    assert "teacher: is not the student's base model: its tokenizer" in refused()


def test_text_that_is_missing_empty_or_too_short(refused, tmp_path):
    assert "no such text file" in refused(text=tmp_path / "missing.txt")
    text = refused.data.text
    text.write_text(" ")
    assert "text.txt: is empty" in refused()
    text.write_text("abc")
    assert "less than one window of 24" in refused()
    text.write_text("abc" * 10)
    assert "has 1 window of 24 tokens" in refused()


def test_checkpoint_with_nothing_to_train(refused, compressed):
    skipped, _ = compressed(refused.data.teacher, Recipe(rules=(Rule(skip=True),)))
    message = refused(replace(SETTINGS, train="factors"), model=skipped)
    assert f"{skipped}: has nothing to train with --train factors" in message
    assert "use --train all or norms" in message


def test_existing_target_is_refused_and_kept(material, tmp_path):
    data, target = material(), tmp_path / "out"
    target.mkdir()
    (target / "mine.txt").write_text("mine")
    with pytest.raises(MlxSvdError, match=r"out: exists already; delete it"):
        heal(data.student, data.teacher, target, SETTINGS, text=data.text)
    assert (target / "mine.txt").read_text() == "mine"


def test_damaged_student_is_named(refused, tmp_path):
    broken = shutil.copytree(refused.data.student, tmp_path / "broken")
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    assert "model.safetensors: truncated or corrupt" in refused(model=broken)


def test_student_with_a_tensor_that_is_not_a_number(refused, tmp_path):
    broken = shutil.copytree(refused.data.student, tmp_path / "broken")
    found = tensors(broken)
    name = "model.norm.weight"
    found[name] = mx.full(found[name].shape, mx.nan, dtype=found[name].dtype)
    mx.eval(found)
    (broken / "model.safetensors").unlink()
    mx.save_safetensors(str(broken / "model.safetensors"), found)
    assert "not a number before any training" in refused(model=broken)
