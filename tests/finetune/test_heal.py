"""The healed checkpoint: better, of equal bytes, complete, and as recorded."""

import json
from dataclasses import replace

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.convert import convert

import mlx_svd
from mlx_svd.calibrate.text import read_windows
from mlx_svd.checkpoint.layout import quantization
from mlx_svd.finetune import heal
from mlx_svd.finetune.data import split_windows
from mlx_svd.plan.recipe import Recipe, Rule
from mlx_svd.source.families import PROJECTIONS
from mlx_svd.source.headers import read_headers
from tests.conftest import logits, relative_difference
from tests.finetune.conftest import FACTORED, HALF, QUARTER, SETTINGS, contents, equal, tensors
from tests.finetune.test_loss import numpy_kl

_ALL = {"projections": PROJECTIONS, "policy": QUARTER}
RECIPES = {
    "factored": FACTORED,
    "pivot": Recipe(form="pivot", **_ALL),
    "per head": Recipe(form="factored", per_head=True, **_ALL),
    "dense": Recipe(form="dense", **_ALL),
    "factored, 3 bits": Recipe(PROJECTIONS, HALF, form="factored", quantize=quantization(3, 32)),
    "pivot, 8 bits": Recipe(PROJECTIONS, HALF, form="pivot", quantize=quantization(8, 32)),
}


def layout(folder):
    return {n: (h.dtype, h.shape, h.nbytes) for n, h in read_headers(folder).items()}


def held_out_kl(student, material, settings=SETTINGS) -> float:
    """Measured from the files, in numpy."""
    ours, tokenizer = mlx_svd.load(student, dtype="float32")
    teacher, _ = mlx_svd.load(material.teacher, dtype="float32")
    windows = read_windows(tokenizer, material.text, count=settings.windows, length=settings.length)
    tokens = mx.array(split_windows(windows, settings.seed).held_out)
    return float(numpy_kl(*(np.array(model(tokens)) for model in (teacher, ours))).mean())


@pytest.mark.parametrize("recipe", RECIPES)
def test_healed_checkpoint_is_closer_to_the_teacher_at_the_same_bytes(recipe, material, tmp_path):
    data = material(RECIPES[recipe])
    healed = heal(data.student, data.teacher, tmp_path / "out", SETTINGS, text=data.text)
    assert healed.best_step
    assert healed.kl_after < healed.kl_before
    assert held_out_kl(data.student, data) == pytest.approx(healed.kl_before, rel=1e-3, abs=1e-6)
    assert held_out_kl(tmp_path / "out", data) == pytest.approx(healed.kl_after, rel=1e-3, abs=1e-6)
    assert layout(tmp_path / "out") == layout(data.student)
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert size == (data.student / "model.safetensors").stat().st_size
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith("out")) == ["out"]


@pytest.mark.parametrize("train", ["factors", "norms", "scales"])
def test_only_the_chosen_tensors_change(train, material, tmp_path):
    rules = (Rule(projections=("q",), bits=16),)
    data = material(
        Recipe(("q", "k"), HALF, form="factored", rules=rules, quantize=quantization(3, 32))
    )
    out = tmp_path / "out"
    settings = replace(SETTINGS, train=train, lr=0.002)
    healed = heal(data.student, data.teacher, out, settings, text=data.text)
    before, after = tensors(data.student), tensors(out)
    changed = {name for name in before if not equal(before[name], after[name])}
    endings = {
        "factors": ("q_proj.down.weight", "q_proj.up.weight"),
        "norms": ("norm.weight", ".bias"),
        "scales": (".scales", ".biases"),
    }
    assert changed
    assert all(name.endswith(endings[train]) for name in changed)
    assert all(before[name].dtype != mx.uint32 for name in changed)
    assert len(changed) <= healed.trained_tensors


def test_packed_weights_embeddings_and_order_never_change(material, tmp_path):
    data = material(Recipe(policy=QUARTER, form="pivot"))
    assert heal(data.student, data.teacher, tmp_path / "out", SETTINGS, text=data.text).best_step
    before, after = tensors(data.student), tensors(tmp_path / "out")
    frozen = [n for n in before if n.endswith(".order") or "embed" in n or "mlp" in n]
    assert len(frozen) == 1 + 2 * 3 + 2 * 3  # embedding, three orders a layer, three mlp weights
    assert all(equal(before[name], after[name]) for name in frozen)


def test_start_is_written_when_no_step_is_better(material, tmp_path):
    data = material()
    out = tmp_path / "out"
    settings = replace(SETTINGS, lr=30.0)
    healed = heal(data.student, data.teacher, out, settings, text=data.text)
    assert (healed.best_step, healed.kl_after) == (0, healed.kl_before)
    file = "model.safetensors"
    assert (out / file).read_bytes() == (data.student / file).read_bytes()
    assert "It did not lower the KL divergence" in (out / "README.md").read_text()


def test_small_files_are_the_students_and_config_and_card_tell_of_the_healing(material, tmp_path):
    data, out = material(), tmp_path / "out"
    healed = heal(
        data.student, data.teacher, out, SETTINGS, text=data.text, command="mlx-svd heal --x"
    )
    before, after = contents(data.student), contents(out)
    assert set(before) == set(after)
    told = {"config.json", "README.md", "model.safetensors"}
    assert {name for name in before if before[name] != after[name]} == told
    config = json.loads(after["config.json"])
    record = config["mlx_svd"].pop("healed")
    assert config == json.loads(before["config.json"])
    assert record["teacher"] == "teacher"
    assert record["text"] == "text.txt"
    assert record["text_digest"] == healed.text_digest
    assert (record["kl_before"], record["kl_after"]) == (healed.kl_before, healed.kl_after)
    assert (record["lr"], record["steps"], record["seed"]) == (0.005, 6, 0)
    card = after["README.md"].decode()
    assert card.startswith(before["README.md"].decode().rstrip())
    assert f"{healed.kl_before:.4f} to {healed.kl_after:.4f} nats per token" in card
    assert "mlx-svd heal --x" in card
    assert str(tmp_path) not in json.dumps(config) + json.dumps(record) + card


def test_inspect_tells_that_it_was_healed(material, tmp_path):
    data = material()
    healed = heal(data.student, data.teacher, tmp_path / "out", SETTINGS, text=data.text)
    before, after = mlx_svd.inspect(data.student), mlx_svd.inspect(tmp_path / "out")
    assert before.healed is None
    assert after.healed["kl_after"] == healed.kl_after
    assert after.projections == before.projections
    assert not any(p.saved_again for p in after.projections)


@pytest.mark.parametrize("recipe", ["factored", "pivot, 8 bits"])
def test_stock_mlx_lm_loads_it_and_computes_the_same(recipe, material, tmp_path):
    data = material(RECIPES[recipe])
    heal(data.student, data.teacher, tmp_path / "out", SETTINGS, text=data.text)
    ours, _ = mlx_svd.load(tmp_path / "out")
    stock, _ = mlx_lm.load(str(tmp_path / "out"), trust_remote_code=True)
    tokens = mx.array([[5, 17, 40, 2]])
    assert equal(ours(tokens), stock(tokens))


def test_checkpoint_quantized_by_mlx_lm_is_healed_by_its_scales(material, tmp_path):
    data, quantized, out = (
        material(rms_norm_eps=1e-6, rope_theta=10000.0),
        tmp_path / "quantized",
        tmp_path / "out",
    )
    convert(str(data.teacher), str(quantized), quantize=True, q_bits=3, q_group_size=32)
    healed = heal(quantized, data.teacher, out, replace(SETTINGS, lr=0.002), text=data.text)
    assert healed.kl_after < healed.kl_before
    assert layout(out) == layout(quantized)
    config = json.loads((out / "config.json").read_text())
    record = config.pop("mlx_svd_healed")
    assert record["kl_after"] == healed.kl_after
    assert config == json.loads((quantized / "config.json").read_text())
    before, after = tensors(quantized), tensors(out)
    changed = {name for name in before if not equal(before[name], after[name])}
    assert any(name.endswith(".scales") for name in changed)
    assert not any(name.endswith(".weight") and "norm" not in name for name in changed)
    stock, _ = mlx_lm.load(str(out))
    ours, _ = mlx_svd.load(out)
    assert equal(stock(mx.array([[1, 2]])), ours(mx.array([[1, 2]])))


def test_healing_again_keeps_the_record_of_the_first_time(material, tmp_path):
    data = material()
    first = heal(data.student, data.teacher, tmp_path / "one", SETTINGS, text=data.text)
    second = heal(tmp_path / "one", data.teacher, tmp_path / "two", SETTINGS, text=data.text)
    assert second.kl_before == pytest.approx(first.kl_after, rel=1e-6)
    record = mlx_svd.inspect(tmp_path / "two").healed
    assert record["kl_after"] == second.kl_after
    assert record["earlier"]["kl_after"] == first.kl_after


@pytest.mark.parametrize("family", ["gpt2", "phi3", "gpt_neox", "gpt_neo", "gemma2"])
def test_every_kind_of_architecture_heals(family, material, tmp_path):
    data = material(RECIPES["factored"], family)
    healed = heal(data.student, data.teacher, tmp_path / "out", SETTINGS, text=data.text)
    assert healed.kl_after < healed.kl_before
    assert relative_difference(logits(tmp_path / "out"), logits(data.student)) > 1e-3


def test_dtype_of_the_forward_passes_is_the_one_given(material, tmp_path):
    data, results = material(), {}
    for dtype in ("float32", "bfloat16"):
        settings = replace(SETTINGS, dtype=dtype)
        results[dtype] = heal(
            data.student, data.teacher, tmp_path / dtype, settings, text=data.text
        )
    assert results["float32"].kl_before != results["bfloat16"].kl_before
    assert results["bfloat16"].kl_after < results["bfloat16"].kl_before
