"""The loop: learning rate, size of the steps, best state, a loss that is not a number."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_svd.calibrate.text import read_windows
from mlx_svd.checkpoint.stored import stored_tensors
from mlx_svd.errors import MlxSvdError
from mlx_svd.finetune.data import split_windows
from mlx_svd.finetune.pair import open_pair
from mlx_svd.finetune.trainable import trainable
from mlx_svd.finetune.trainer import Trainer, learning_rate
from tests.finetune.conftest import SETTINGS, equal


def trainer_of(material, settings=SETTINGS) -> Trainer:
    pair = open_pair(str(material.student), str(material.teacher), settings.dtype)
    groups = trainable(pair.student, pair.section, settings.train, "student")
    tokens = read_windows(
        pair.tokenizer, material.text, count=settings.windows, length=settings.length
    )
    stored = stored_tensors(material.student)
    start = {name: stored[name] for name in groups}
    data = split_windows(tokens, 0)
    return Trainer(pair.student, pair.teacher, start, groups, data, settings)


def run(trainer, state=None):
    saved, told = [], []
    end = trainer.run(
        state, lambda s: saved.append((s.step, s.kl_best)), lambda step: told.append(step)
    )
    return end, saved, told


@pytest.mark.parametrize("steps", [1, 2, 10, 100])
def test_learning_rate_warms_up_to_its_largest_value_and_falls_to_a_twentieth(steps):
    rates = [learning_rate(step, steps, 2.0) for step in range(steps)]
    warm_up = max(1, round(steps / 10))
    assert rates[warm_up - 1] == max(rates) == 2.0
    assert np.allclose(np.diff(rates[:warm_up]), 2.0 / warm_up)
    assert all(a >= b for a, b in zip(rates[warm_up:], rates[warm_up + 1 :], strict=False))
    assert min(rates) >= 0.1
    if steps == 100:
        assert rates[-1] == pytest.approx(0.1, abs=0.01)


def test_deltas_of_zero_are_the_stored_tensors(material):
    trainer = trainer_of(material())
    zeros = {name: mx.zeros(tensor.shape) for name, tensor in trainer._stored.items()}
    stored = trainer.stored(zeros)
    assert all(equal(stored[name], tensor) for name, tensor in trainer._stored.items())


def test_a_step_moves_a_tensor_by_the_learning_rate_times_its_rms(material):
    settings = replace(SETTINGS, steps=1, lr=0.05)
    trainer = trainer_of(material(dtype=mx.float32), settings)
    state, *_ = run(trainer)
    values = trainer.stored(state.arrays["delta"])
    for name, start in trainer._stored.items():
        move, rms = mx.abs(values[name] - start).max(), mx.sqrt(mx.square(start).mean())
        # The first step of Adam is the learning rate, whatever the gradient.
        assert float(move / rms) == pytest.approx(0.05, rel=1e-2), name


def test_training_lowers_the_validation_kl_and_moves_every_trained_tensor(material):
    trainer = trainer_of(material())
    state, saved, told = run(trainer)
    assert state.kl_best < 0.9 * state.kl_start
    assert state.kl_best == min(step.kl for step in told if step.kl is not None)
    assert [step for step, _ in saved] == [2, 4, 6]
    assert [step.step for step in told] == list(range(7))
    assert [step.kl is not None for step in told] == [True, False, True, False, True, False, True]
    for name, delta in state.arrays["best"].items():
        assert float(mx.abs(delta).max()) > 0, name


def test_validation_scores_the_rounded_tensors(material):
    trainer = trainer_of(material())
    # Smaller than bfloat16 can show, so the stored tensors stay as they are.
    deltas = {name: mx.full(t.shape, 1e-6) for name, t in trainer._stored.items()}
    zeros = {name: mx.zeros(t.shape) for name, t in trainer._stored.items()}
    gains = [n for n in deltas if "norm" in n]
    assert all(equal(trainer.stored(deltas)[n], trainer._stored[n]) for n in gains)
    only_gains = zeros | {n: deltas[n] for n in gains}
    assert trainer.validate(only_gains) == trainer.validate(zeros)


def test_frozen_parameters_do_not_change(material):
    trainer = trainer_of(material(), replace(SETTINGS, train="norms"))
    before = {n: mx.array(p) for n, p in tree_flatten(trainer.student.parameters())}
    mx.eval(before)
    run(trainer)
    after = dict(tree_flatten(trainer.student.parameters()))
    changed = {name for name in before if not equal(before[name], after[name])}
    assert changed <= set(trainer._stored)
    assert changed


def test_state_that_is_worse_than_the_start_is_not_the_best(material):
    trainer = trainer_of(material(), replace(SETTINGS, lr=30.0))
    state, _, told = run(trainer)
    assert told[-1].kl > state.kl_start
    assert state.best_step == 0
    assert state.kl_best == state.kl_start
    assert state.arrays["best"] == {}


def test_best_state_is_kept_while_later_ones_are_worse(material):
    trainer = trainer_of(material())
    state, *_ = run(trainer)
    best, kl, step = dict(state.arrays["best"]), state.kl_best, state.best_step
    trainer.steps, trainer.settings = 8, replace(trainer.settings, lr=1000.0)
    state, _, told = run(trainer, state)
    assert told[-1].kl > kl
    assert (state.best_step, state.kl_best) == (step, kl)
    assert step
    assert all(equal(best[name], state.arrays["best"][name]) for name in best)


def test_loss_that_is_not_a_number_stops_and_keeps_the_last_saved_state(material):
    trainer = trainer_of(material())
    real, calls, saved = trainer._gradient, [], []

    def broken(deltas, tokens, targets):
        calls.append(1)
        loss, gradients = real(deltas, tokens, targets)
        return (loss * mx.nan if len(calls) > 6 else loss), gradients

    trainer._gradient = broken
    with pytest.raises(MlxSvdError, match=r"not a number at step 4 of 6 \(--lr 0.005\).*smaller"):
        trainer.run(None, lambda state: saved.append(state.step), lambda step: None)
    assert saved == [2]


def test_student_that_gives_no_numbers_is_an_error_before_training(material):
    trainer = trainer_of(material())
    trainer.teacher.model.norm.weight = mx.full(trainer.teacher.model.norm.weight.shape, mx.nan)
    with pytest.raises(MlxSvdError, match=r"not a number before any training"):
        run(trainer)


def test_batch_gradient_is_the_mean_over_its_windows(material):
    """Two windows in one step are one step with the mean of their gradients."""
    trainer = trainer_of(material(dtype=mx.float32), replace(SETTINGS, steps=1))
    windows = trainer.data.batch(0, 2)
    zeros = {name: mx.zeros(t.shape) for name, t in trainer._stored.items()}
    from mlx_svd.finetune.loss import teacher_log_probabilities

    losses, gradients = zip(
        *(
            trainer._gradient(zeros, mx.array(w), teacher_log_probabilities(trainer.teacher, w))
            for w in map(mx.array, windows)
        ),
        strict=True,
    )
    state, _, told = run(trainer)
    assert told[1].loss == pytest.approx(float(sum(losses)) / 2, rel=1e-5)
    mean = {name: (gradients[0][name] + gradients[1][name]) / 2 for name in zeros}
    norm = float(mx.sqrt(sum(mx.square(g).sum() for g in mean.values())))
    for name, moment in state.arrays["m"].items():
        expected = 0.1 * mean[name] * min(1.0, 1.0 / norm)
        assert mx.allclose(moment, expected, rtol=1e-3, atol=1e-7), name
