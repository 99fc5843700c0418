"""The loop: AdamW as published, KL and replay that pull, resume, divergence, freezing all."""

import json
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import mlx_svd
from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.divergence import kl_divergence
from mlx_svd.finetune.protection import ARMS, Arm, Diverged, protect
from mlx_svd.finetune.protection.examples import Batches, fact_examples
from tests.finetune.conftest import contents, tensors
from tests.finetune.protection.conftest import SETTINGS, of_arm


def test_two_steps_are_adamw_of_the_masked_loss(baseline, tmp_path):
    """Loshchilov and Hutter (1711.05101), in numpy, from gradients of an independent loss."""
    settings = replace(SETTINGS, steps=2, weight_decay=0.1)
    protect(baseline, tmp_path / "out", settings)
    examples = fact_examples(baseline.tokenizer, baseline.test.conflict, "conflict")
    batches = Batches(examples, 2, 0, stream=2, pad_token=0, longest=128)
    model = baseline.open("float32")

    def loss(model, rows):
        total = sum(
            nn.losses.cross_entropy(model(row[None, :-1])[0], row[1:]).sum() for row in rows
        )
        return total / sum(len(row) - 1 for row in rows)

    name = "model.layers.2.mlp.up_proj.weight"
    m = v = 0.0
    values = dict(mlx_svd.finetune.protection.student.tree_flatten(model.parameters()))
    moments = {key: (0.0, 0.0) for key in values}
    for step in range(2):
        tokens, mask = batches.batch(step)
        rows = [mx.array(t[: int(k.sum()) + 1]) for t, k in zip(tokens, mask, strict=True)]
        gradients = dict(
            mlx_svd.finetune.protection.student.tree_flatten(
                nn.value_and_grad(model, loss)(model, rows)[1]
            )
        )
        for key, gradient in gradients.items():
            g = np.array(gradient, dtype=np.float64)
            m, v = moments[key]
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            moments[key] = (m, v)
            scaled = m / (1 - 0.9 ** (step + 1))
            spread = np.sqrt(v / (1 - 0.999 ** (step + 1)))
            old = np.array(values[key], dtype=np.float64)
            new = old * (1 - settings.lr * 0.1) - settings.lr * scaled / (spread + 1e-8)
            values[key] = mx.array(new.astype(np.float32))
        model.load_weights(list(values.items()))
    found = tensors(tmp_path / "out")[name]
    away = np.abs(np.array(found) - np.array(values[name]))
    # Where a gradient is all rounding, which is the processor's, Adam makes it a whole first step,
    # and the second one sees that.
    assert away.max() < settings.lr / 30
    assert np.median(away) < 2e-6, "less than what the weight decay takes"


def test_kl_keeps_the_model_nearer_to_the_base_on_its_text(baseline, tmp_path):
    near = {}
    for name, arm in (("none", ARMS["none"]), ("kl", Arm("kl", kl=20.0))):
        protect(baseline, tmp_path / name, of_arm(arm, steps=16, lr=1e-3, measure_every=16))
        model, _ = mlx_svd.load(tmp_path / name, dtype="float32")
        near[name] = kl_divergence(model, baseline.open("float32"), baseline.data.training).kl
    assert near["kl"] < 0.7 * near["none"]


def test_replay_trains_facts_that_are_never_measured(baseline):
    asked = {probe.fact.prompt for probe in baseline.test.probes}
    assert baseline.test.replay
    assert not asked & {fact.prompt for fact in baseline.test.replay}
    plain = protect(baseline, None, of_arm(ARMS["none"]))
    replayed = protect(baseline, None, of_arm(ARMS["replay"]))
    assert not np.array_equal(plain.trajectory.margins, replayed.trajectory.margins)


class Stop(BaseException):
    """Stands for a signal."""


def run(baseline, target, stop=None, settings=SETTINGS):
    told = []

    def advance(step):
        told.append(step.step)
        if step.step == stop:
            raise Stop

    protect(baseline, target, settings, advance=advance)
    return told


@pytest.mark.parametrize("arm", ["cf90", "lora-r8", "hierarchical"])
def test_a_stopped_run_continues_and_ends_with_the_same_bytes(arm, baseline, tmp_path):
    settings = of_arm(ARMS[arm])
    assert run(baseline, tmp_path / "whole", settings=settings) == [0, 1, 2, 3, 4]
    for stop, begins in ((1, 0), (3, 2)):
        target = tmp_path / f"stopped-{stop}"
        with pytest.raises(Stop):
            run(baseline, target, stop, settings)
        assert run(baseline, target, settings=settings)[0] == begins
        assert contents(target) == contents(tmp_path / "whole")
        assert [p.name for p in tmp_path.glob(f"stopped-{stop}*")] == [target.name]


def test_a_state_of_another_run_is_refused(baseline, tmp_path):
    with pytest.raises(Stop):
        run(baseline, tmp_path / "out", 3)
    with pytest.raises(MlxSvdError, match="holds an unfinished protecting with other settings"):
        run(baseline, tmp_path / "out", settings=replace(SETTINGS, lr=1e-3))


def test_after_divergence_the_last_good_state_can_be_written(baseline, tmp_path, monkeypatch):
    settings, target = replace(SETTINGS, steps=6), tmp_path / "out"
    whole = protect(baseline, tmp_path / "whole", replace(settings, steps=2))
    from mlx_svd.finetune.protection import trainer

    real, calls = trainer.masked_loss, []

    def broken(model, tokens, mask):
        calls.append(0)
        return real(model, tokens, mask) * (float("nan") if len(calls) > 3 else 1.0)

    monkeypatch.setattr(trainer, "masked_loss", broken)
    with pytest.raises(Diverged, match=r"not a number at step 4 of 6 .*: --steps 2 writes it") as e:
        protect(baseline, target, settings)
    assert not target.exists()
    assert [point["step"] for point in e.value.state.points] == [0, 2]
    monkeypatch.setattr(trainer, "masked_loss", real)
    saved = protect(baseline, target, replace(settings, steps=2))
    np.testing.assert_array_equal(saved.trajectory.margins, whole.trajectory.margins)
    assert contents(target) == contents(tmp_path / "whole")


def test_a_huge_learning_rate_diverges_by_name(baseline):
    with pytest.raises(Diverged, match="train with a smaller --lr"):
        protect(baseline, None, replace(SETTINGS, lr=1e30))


def test_freezing_everything_is_refused(baseline):
    for freeze, share in (("bottom", 1.0), ("top", 1.0)):
        with pytest.raises(MlxSvdError, match="all 4 layers are frozen, which leaves nothing"):
            protect(baseline, None, of_arm(Arm(freeze=freeze, share=share)))
    with pytest.raises(MlxSvdError, match=r"0.1 of 4 layers is none"):
        protect(baseline, None, of_arm(Arm(compress="frozen", freeze="bottom", share=0.1)))


def test_quantized_models_are_refused(baseline, tmp_path):
    import shutil

    from mlx_svd.finetune.protection import make_baseline

    folder = tmp_path / "quantized"
    shutil.copytree(baseline.folder.path, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization": {"bits": 4}}))
    with pytest.raises(MlxSvdError, match="is quantized, and packed integers cannot be trained"):
        make_baseline(folder, baseline.test.probes, 2, SETTINGS)
