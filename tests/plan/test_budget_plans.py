"""Budgets of whole models: bytes on disk, saved plans, cached candidates, calibrations."""

import json

import mlx.core as mx
import numpy as np
import pytest

from mlx_svd.calibrate.scorers import SCORERS
from mlx_svd.checkpoint.layout import Quantization
from mlx_svd.checkpoint.loader import load_model, tensor_bytes
from mlx_svd.compress import compress
from mlx_svd.errors import MlxSvdError
from mlx_svd.plan.budget import Budget
from mlx_svd.plan.choices import Choices
from mlx_svd.plan.make import make_plan
from mlx_svd.plan.recipe import Recipe, Rule
from mlx_svd.plan.recipe_file import load_recipe_fields
from mlx_svd.source.families import PROJECTIONS
from mlx_svd.source.source import TensorStream, open_source
from tests.calibrate.material import calibrated, random_windows, tiny_model
from tests.conftest import source_weights
from tests.tiny import write_tiny

WIDE = {"hidden_size": 96, "head_dim": 32, "intermediate_size": 128, "dtype": mx.bfloat16}
CHOICES = Choices(group_size=32)


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A bfloat16 llama, calibrated: (source, calibration)."""
    folder = tmp_path_factory.mktemp("budget")
    source, model = tiny_model("llama", folder / "model", **WIDE)
    windows = random_windows(6)
    return source, calibrated(source, model, folder / "c", windows, projections=PROJECTIONS)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """One whose embedding is wide enough for a calibration to quantize it in groups of 64."""
    folder = tmp_path_factory.mktemp("small")
    source, model = tiny_model("llama", folder / "model", dtype=mx.bfloat16)
    return source, calibrated(source, model, folder / "c", projections=PROJECTIONS)


def recipe(budget: Budget, scorer: str = "two-sided", **options) -> Recipe:
    options = {"projections": PROJECTIONS, "choices": CHOICES, **options}
    return Recipe(scorer=scorer, budget=budget, **options)


def decisions(plan) -> list[tuple]:
    return [(p.path, p.form, p.ranks, p.quantization, p.factors, p.bytes_after)
            for p in plan.projections]  # fmt: skip


def parameters(source) -> int:
    return sum(int(np.prod(shape)) for shape, _ in source.tensors.values())


@pytest.mark.parametrize("share", [0.3, 0.9])
@pytest.mark.parametrize("scorer", SCORERS)
def test_keep_bytes_is_kept_on_disk_and_used_up(scorer, share, material, tmp_path):
    source, calibration = material
    chosen = recipe(Budget(share), scorer, projections=("q", "o", "up"))
    plan = make_plan(source, chosen, calibration=calibration)
    folder = compress(source, plan, tmp_path / "out", calibration=calibration)
    load_model(folder)  # strict: names and shapes are the model's
    touched = (".q_proj.", ".o_proj.", ".up_proj.")
    before, stored = (
        sum(size for name, size in tensor_bytes(f).items() if any(t in name for t in touched))
        for f in (source.folder, folder)
    )
    assert 0.95 * share * before < stored <= share * before
    assert stored == sum(
        p.bytes_after for p in plan.projections if p.projection.name in ("q", "o", "up")
    )
    assert sum(tensor_bytes(folder).values()) == plan.bytes_after


@pytest.mark.parametrize("limit", ["target_size", "target_bpw"])
@pytest.mark.parametrize("bpw", [1.4, 4.2, 11.0])
def test_the_size_of_the_whole_checkpoint_is_kept_on_disk_and_used_up(limit, bpw, tmp_path):
    source, model = tiny_model("llama", tmp_path / "model", dtype=mx.bfloat16)
    calibration = calibrated(source, model, tmp_path / "c", projections=PROJECTIONS)
    size = int(bpw * parameters(source) / 8)
    budget = Budget(target_size=size) if limit == "target_size" else Budget(target_bpw=bpw)
    plan = make_plan(source, recipe(budget), calibration=calibration)
    folder = compress(source, plan, tmp_path / "out", calibration=calibration)
    load_model(folder)
    on_disk = sum(tensor_bytes(folder).values())
    assert 0.97 * size < on_disk <= size
    assert on_disk == plan.bytes_after
    if bpw < 2:  # the embedding and the head pay their share
        assert any(q is not None for q in plan.modules.values())
        assert any(name.endswith("embed_tokens.scales") for name in tensor_bytes(folder))


def test_the_budget_mixes_forms_bits_and_ranks(material):
    source, calibration = material
    plans = [make_plan(source, recipe(Budget(share)), calibration=calibration)
             for share in (0.2, 0.3, 0.5, 0.7, 0.9)]  # fmt: skip
    chosen = [p for plan in plans for p in plan.projections]
    assert len({p.form for p in chosen}) >= 3
    assert len({p.quantization for p in chosen}) >= 4
    losses = [sum(p.loss for p in plan.projections) for plan in plans]
    assert losses == sorted(losses, reverse=True)  # more bytes never cost more


def test_a_fused_module_counts_the_bytes_of_its_parts(tmp_path):
    source, model = tiny_model("phi3", tmp_path / "model")
    calibration = calibrated(source, model, tmp_path / "c", random_windows(6))
    chosen = recipe(Budget(0.5), projections=("q", "k", "v", "o"))
    plan = make_plan(source, chosen, calibration=calibration)
    folder = compress(source, plan, tmp_path / "out", calibration=calibration)
    load_model(folder)
    touched = [p for p in plan.projections if p.projection.name in "qkvo"]
    assert sum(p.bytes_after for p in touched) <= 0.5 * sum(p.bytes_before for p in touched)
    assert sum(tensor_bytes(folder).values()) == plan.bytes_after


def test_everything_stays_dense_when_the_budget_allows_it(material, tmp_path):
    source, calibration = material
    plan = make_plan(source, recipe(Budget(1.0)), calibration=calibration)
    assert {(p.form, p.ranks, p.quantization) for p in plan.projections} == {("dense", None, None)}
    assert {p.reason for p in plan.projections} == {"stays as it is"}
    folder = compress(source, plan, tmp_path / "out", calibration=calibration)
    kept = source_weights(folder_without_section(folder))
    for path, weight in source_weights(source.folder).items():
        np.testing.assert_array_equal(kept[path], weight)


def folder_without_section(folder):
    """All-dense checkpoints are plain models but for our notes in their config."""
    config = json.loads((folder / "config.json").read_text())
    assert "model_file" not in config
    del config["mlx_svd"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_unreachable_budgets_say_the_smallest_size(material):
    source, calibration = material
    with pytest.raises(MlxSvdError, match=r"--keep-bytes 0\.001: .* that can be reached") as error:
        make_plan(source, recipe(Budget(0.001)), calibration=calibration)
    smallest = int(str(error.value).split("below the ")[1].split(" ")[0].replace(",", ""))
    before = sum(p.bytes_before for p in make_plan(
        source, recipe(Budget(1.0)), calibration=calibration).projections)  # fmt: skip
    reached = make_plan(
        source, recipe(Budget((smallest + 0.5) / before)), calibration=calibration
    ).projections
    assert sum(p.bytes_after for p in reached) == smallest
    with pytest.raises(MlxSvdError, match="--target-size 10000: "):
        make_plan(source, recipe(Budget(target_size=10_000)), calibration=calibration)


def test_skipped_projections_are_left_out_of_the_budget(material):
    source, calibration = material
    rules = (Rule(projections=("down",), skip=True),)
    plan = make_plan(source, recipe(Budget(0.4), rules=rules), calibration=calibration)
    down = [p for p in plan.projections if p.projection.name == "down"]
    others = [p for p in plan.projections if p.projection.name != "down"]
    assert all(p.bytes_after == p.bytes_before for p in down)
    assert sum(p.bytes_after for p in others) <= 0.4 * sum(p.bytes_before for p in others)


@pytest.mark.parametrize("options", [
    {"budget": Budget(0.3)},
    {"budget": Budget(target_bpw=5.0)},
    {"budget": Budget(0.5), "choices": Choices(("corrected",), (8, 3, 2), 32)},
    {"budget": Budget(0.6), "choices": Choices(("factored", "pivot"), (16, 8), 32)},
    {"budget": Budget(0.6), "dtype": "float16", "rules": (Rule(projections=("v",), skip=True),)},
    {"budget": Budget(0.5), "quantize": Quantization(64, 8)},
])  # fmt: skip
def test_a_saved_plan_repeats_the_choice_exactly(options, material, tmp_path):
    source, calibration = material
    first = make_plan(source, recipe(**options), calibration=calibration)
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(first.to_json()))
    again = make_plan(source, Recipe(**load_recipe_fields(file)), calibration=calibration)
    assert decisions(again) == decisions(first)
    assert again.tensors == first.tensors
    assert again.calibration == first.calibration
    assert (again.scorer, again.modules) == (first.scorer, first.modules)
    if options.get("choices", CHOICES).forms == ("corrected",):
        assert any(p.form == "corrected" and p.ranks[0] % 32 for p in first.projections)
        assert any(p.form == "corrected" and p.factors for p in first.projections)


def test_candidates_are_kept_and_the_next_budget_reads_no_weights(tmp_path, monkeypatch):
    source, model = tiny_model("llama", tmp_path / "model", **WIDE)
    calibration = calibrated(source, model, tmp_path / "c")
    attention = {"projections": ("q", "k", "v", "o")}
    first = make_plan(source, recipe(Budget(0.4), **attention), calibration=calibration)
    told: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(TensorStream, "take", lambda self, name: pytest.fail(f"{name} was read"))
        again = make_plan(source, recipe(Budget(0.4), **attention), told.append, calibration)
        other = make_plan(source, recipe(Budget(0.6), **attention), calibration=calibration)
    assert again.to_json() == first.to_json()
    assert told == [p.path for p in first.projections if p.projection.name in "qkvo"]
    assert sum(p.loss or 0 for p in other.projections) < sum(p.loss or 0 for p in first.projections)
    taken: list[str] = []
    take = TensorStream.take
    monkeypatch.setattr(
        TensorStream, "take", lambda self, name: (taken.append(name), take(self, name))[1]
    )
    # Whatever the candidates depend on measures them anew.
    changes = [{"scorer": "whitened"}, {"projections": ("q",)}, {"dtype": "float32"}]
    changes += [{"choices": Choices(bits=bits, group_size=64)} for bits in ((16, 4), (16,))]
    for change in changes:
        taken.clear()
        make_plan(source, recipe(Budget(0.7), **{**attention, **change}), calibration=calibration)
        assert taken, change


def test_calibrations_of_another_model_or_of_another_plan_are_refused(material, tmp_path):
    source, calibration = material
    plan = make_plan(source, recipe(Budget(0.5)), calibration=calibration)
    target = tmp_path / "out"
    other_source, other_model = tiny_model("llama", tmp_path / "other", seed=1, **WIDE)
    foreign = calibrated(other_source, other_model, tmp_path / "foreign", projections=PROJECTIONS)
    model = load_model(source.folder)[0]
    options = {"projections": PROJECTIONS}
    own = calibrated(source, model, tmp_path / "own", random_windows(2, seed=4), **options)
    with pytest.raises(MlxSvdError, match="foreign: is a calibration of another model"):
        make_plan(source, recipe(Budget(0.5)), calibration=foreign)
    for wrong in (foreign, own):
        with pytest.raises(MlxSvdError, match="is not the calibration that the plan was made with"):
            compress(source, plan, target, calibration=wrong)
    with pytest.raises(MlxSvdError, match="the plan rests on a calibration; give it with"):
        compress(source, plan, target)
    plain = make_plan(source, recipe(Budget(0.5), "plain"))
    assert plain.calibration is None
    with pytest.raises(MlxSvdError, match="is not the calibration that the plan was made with"):
        compress(source, plain, target, calibration=calibration)
    assert not target.exists()
    compress(source, plain, target)


def test_a_budget_without_calibration_uses_the_weights_alone(tmp_path):
    source = open_source(str(write_tiny("gpt2", tmp_path / "model")))
    chosen = recipe(Budget(0.5), "plain", projections=("q", "o", "up", "down"))
    plan = make_plan(source, chosen)
    folder = compress(source, plan, tmp_path / "out")
    load_model(folder)
    assert sum(tensor_bytes(folder).values()) == plan.bytes_after
