"""What an arm trains, what it leaves alone, and that what is measured is what is written."""

import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

import mlx_svd
from mlx_svd.errors import MlxSvdError
from mlx_svd.finetune.protection import ARMS, Arm, protect
from tests.evaluate.retention.conftest import PROBES
from tests.finetune.conftest import tensors
from tests.finetune.protection.conftest import SETTINGS, folder_of, of_arm

FACTORED = replace(ARMS["cf90-all"], form="factored", rank_ratio=0.4)
BY_NAME = {
    **{name: ARMS[name] for name in ("none", "cf90", "hierarchical", "lora-r8", "dora-r8")},
    "factored": FACTORED,
    "pivot": replace(FACTORED, form="pivot"),
    "kl and replay": Arm("both", kl=0.5, replay="facts"),
    "replay-text": ARMS["replay-text"],
}


@pytest.mark.parametrize("name", BY_NAME)
def test_what_is_measured_is_what_is_written(name, baseline, tmp_path):
    result = protect(baseline, tmp_path / "out", of_arm(BY_NAME[name]))
    model, _ = mlx_svd.load(tmp_path / "out", dtype="float32")
    loaded = baseline.test.ask(model, write=True)
    np.testing.assert_allclose(loaded.facts.margins, result.outcomes.facts.margins, atol=2e-4)
    np.testing.assert_allclose(result.trajectory.margins[-1], loaded.facts.margins, atol=2e-4)
    for asked, points in (
        (loaded.paraphrases.margins, result.trajectory.paraphrase_margins),
        (loaded.paraphrases.conflicts, result.trajectory.paraphrase_conflicts),
    ):
        assert points.shape == (3, len(asked)) != (3, 0)
        np.testing.assert_allclose(points[-1], asked, atol=2e-4)
    assert loaded.texts == result.outcomes.texts
    assert result.trajectory.steps == [0, 2, 4]
    start = result.trajectory.margins[0]
    assert np.abs(start - result.trajectory.margins[-1]).max() > 1e-3
    if BY_NAME[name].compress == "none":
        np.testing.assert_allclose(start, baseline.test.base.facts.margins, atol=2e-4)
    written = json.loads((tmp_path / "out" / "mlx_svd_protect.json").read_text())
    assert written == json.loads(json.dumps(result.record))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_measured_is_the_rounded_model(baseline, tmp_path):
    """Float16 keeps less than was trained; the result must know."""
    result = protect(baseline, tmp_path / "out", replace(SETTINGS, stored_dtype="float16"))
    model, _ = mlx_svd.load(tmp_path / "out", dtype="float32")
    found = baseline.test.ask(model)
    np.testing.assert_allclose(result.trajectory.margins[-1], found.facts.margins, atol=2e-4)


def changed_names(baseline, out):
    before, after = tensors(folder_of(baseline)), tensors(out)
    return {name for name in after if not mx.array_equal(before[name], after[name]).item()}


def test_frozen_layers_and_embeddings_stay_and_the_rest_learns(baseline, tmp_path):
    protect(baseline, tmp_path / "out", of_arm(ARMS["freeze-75"]))
    changed = changed_names(baseline, tmp_path / "out")
    everything = set(tensors(folder_of(baseline)))
    trained = {n for n in everything if n.startswith("model.layers.3.")} | {"model.norm.weight"}
    # A key's bias adds the same to every score of a query, so only rounding moves it.
    assert changed | {"model.layers.3.self_attn.k_proj.bias"} == trained


def test_without_freezing_the_embeddings_learn_too(baseline, tmp_path):
    protect(baseline, tmp_path / "out", of_arm(ARMS["none"]))
    assert "model.embed_tokens.weight" in changed_names(baseline, tmp_path / "out")


def test_a_separate_head_is_trained_where_embeddings_are_frozen(make, tmp_path):
    baseline = make("llama")
    protect(baseline, tmp_path / "out", of_arm(ARMS["freeze-75"]))
    changed = changed_names(baseline, tmp_path / "out")
    assert "lm_head.weight" in changed
    assert "model.embed_tokens.weight" not in changed


def test_hierarchical_freezing_keeps_a_share_of_the_rows_of_every_layer(baseline, tmp_path):
    arm = replace(ARMS["hierarchical"], early=0.75, late=0.25)
    result = protect(baseline, tmp_path / "out", of_arm(arm))
    before, after = tensors(folder_of(baseline)), tensors(tmp_path / "out")
    shares = [0.75, 0.75 - 1 / 6, 0.25 + 1 / 6, 0.25]
    total = after["model.norm.weight"].size
    for layer, share in enumerate(shares):
        for name, tensor in after.items():
            if not name.startswith(f"model.layers.{layer}."):
                continue
            rows = tensor.shape[0]
            total += (rows - int(share * rows)) * (tensor.size // rows)
            if name.endswith(("_proj.weight",)):
                same = (tensor == before[name]).all(axis=1)
                assert int(same.sum().item()) == int(share * rows), name
    assert result.record["training"]["trained"] == total


def test_truncated_layers_keep_their_rank_when_factors_are_trained(baseline, tmp_path):
    protect(baseline, tmp_path / "out", of_arm(FACTORED))
    found = tensors(tmp_path / "out")
    down = found["model.layers.3.self_attn.q_proj.down.weight"]
    up = found["model.layers.3.self_attn.q_proj.up.weight"]
    rank = int(0.4 * 64)
    assert (down.shape[0], up.shape[1]) == (rank, rank)
    section = json.loads((tmp_path / "out" / "config.json").read_text())["mlx_svd"]
    assert section["protected"]["training"]["compressed"] == 12
    assert section["protected"]["arm"]["name"] == "cf90-all"


def test_adapters_change_their_projections_by_their_rank_only(baseline, tmp_path):
    arm = replace(ARMS["lora-r8"], adapter_rank=2, adapter_projections=("q", "v"))
    result = protect(baseline, tmp_path / "out", of_arm(arm))
    changed = changed_names(baseline, tmp_path / "out")
    assert changed == {
        f"model.layers.{i}.self_attn.{p}_proj.weight" for i in range(4) for p in "qv"
    }
    before, after = tensors(folder_of(baseline)), tensors(tmp_path / "out")
    for name in changed:
        singular = np.linalg.svd(np.array(after[name] - before[name]), compute_uv=False)
        assert singular[2] < 1e-3 * singular[0]
    assert result.record["training"]["trained"] == 4 * (2 * (64 + 64) + 2 * (64 + 32))


def test_fused_projections_are_truncated_and_trained(make, tmp_path):
    baseline = make("gpt2")
    for arm in (replace(ARMS["cf90"], form="factored", rank_ratio=0.4), ARMS["lora-r8"]):
        out = tmp_path / arm.name
        result = protect(baseline, out, of_arm(arm))
        model, _ = mlx_svd.load(out, dtype="float32")
        found = baseline.test.ask(model)
        np.testing.assert_allclose(result.trajectory.margins[-1], found.facts.margins, atol=2e-4)


def test_a_compressed_checkpoint_can_be_trained_as_it_is(baseline, tmp_path):
    protect(baseline, tmp_path / "first", of_arm(replace(FACTORED, rank_ratio=0.8)))
    from mlx_svd.finetune.protection import make_baseline

    again = make_baseline(tmp_path / "first", PROBES, 2, SETTINGS)
    settings = of_arm(ARMS["freeze-75"], stored_dtype=None)
    result = protect(again, tmp_path / "second", settings)
    assert result.record["training"]["compressed"] == 12
    names = set(tensors(tmp_path / "second"))
    assert "model.layers.0.self_attn.q_proj.down.weight" in names
    with pytest.raises(MlxSvdError, match="is a checkpoint of mlx-svd already"):
        protect(again, tmp_path / "third", of_arm(FACTORED, stored_dtype=None))


def test_the_same_settings_give_the_same_numbers(baseline):
    arm = replace(ARMS["lora-r8"], adapter_dropout=0.3)
    first, second = (protect(baseline, None, of_arm(arm)) for _ in range(2))
    np.testing.assert_array_equal(first.trajectory.margins, second.trajectory.margins)
    other = protect(baseline, None, of_arm(arm, seed=1))
    assert not np.array_equal(first.trajectory.margins, other.trajectory.margins)


def test_gradient_checkpointing_changes_no_number(baseline):
    kind = type(baseline.open("float32").layers[0])
    call = kind.__call__
    plain = protect(baseline, None, of_arm(FACTORED))
    saved = protect(baseline, None, of_arm(FACTORED, grad_checkpoint=True))
    np.testing.assert_allclose(plain.trajectory.margins, saved.trajectory.margins, atol=1e-5)
    assert kind.__call__ is call


def test_training_on_rows_needs_no_conflict(make, baseline, tmp_path):
    from mlx_svd.finetune.protection import make_baseline

    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"oak number {n}"}) + "\n" for n in range(6)))
    plain = make_baseline(folder_of(baseline), baseline.test.probes, None, SETTINGS)
    result = protect(plain, None, SETTINGS, data=rows)
    assert result.record["examples"]["count"] == 6
    assert set(result.record["knowledge"]["uptake"]) == {"not_measured"}
    assert any("uptake is not measured" in note for note in result.record["notes"])
