"""The training loop of an arm: masked loss, KL to base, replay, frozen rows, resume, divergence.

Examples, LoRA and DoRA layers, gradient checkpointing and the masked loss are mlx-lm's (its
``default_loss`` trains the same tokens). Its loop is not: it cannot continue a killed run, keeps
going after NaN, and orders batches by numpy's global state.

The learning rate is constant, so the first k steps do not depend on how many follow: a run can be
cut short or prolonged, and every point of its trajectory is a finished run of so many steps.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np

from mlx_svd.errors import MlxSvdError
from mlx_svd.finetune.data import HealingData
from mlx_svd.finetune.loss import log_softmax, mean_kl
from mlx_svd.finetune.protection.examples import Batches
from mlx_svd.finetune.protection.settings import ProtectSettings
from mlx_svd.finetune.protection.student import Student, checkpointed
from mlx_svd.x86 import cross_entropy, numpy_exponentials


class Diverged(MlxSvdError):
    """The loss is not a number. step: of it; state: the last good one."""

    def __init__(self, message: str, step: int, state: "ProtectState"):
        super().__init__(message)
        self.step, self.state = step, state


@dataclass
class ProtectState:
    """step: optimizer steps done; points: of the trajectory so far; arrays: "values" (parameter
    name -> float32), "m" and "v" of AdamW."""

    step: int = 0
    points: list[dict[str, Any]] = field(default_factory=list)
    arrays: dict[str, dict[str, mx.array]] = field(default_factory=dict)


@dataclass(frozen=True)
class ProtectStep:
    """One finished step of ``steps``. loss: of its examples before the update, in nats per trained
    token (None for the first call); point: what was measured after it, if anything."""

    step: int
    steps: int
    loss: float | None
    point: dict[str, Any] | None


def masked_loss(model: nn.Module, tokens: mx.array, mask: mx.array) -> mx.array:
    """Mean negative log-likelihood in nats of the tokens that ``mask`` (b, L - 1) selects from
    tokens (b, L)."""
    logits = model(tokens[:, :-1]).astype(mx.float32)
    losses = cross_entropy(logits, tokens[:, 1:])
    return (losses * mask).sum() / mask.sum()


class Trainer:
    """Trains ``student`` for ``steps`` steps.

    examples, replay: batches, replay None without; text: windows for KL and replay of text; base:
    the model that KL keeps near to, None without.
    """

    def __init__(
        self,
        student: Student,
        examples: Batches,
        replay: Batches | None,
        text: HealingData | None,
        base: nn.Module | None,
        settings: ProtectSettings,
        steps: int,
    ):
        self.student, self.settings, self.steps = student, settings, steps
        self._examples, self._replay, self._text, self._base = examples, replay, text, base
        self._optimizer = optimizers.AdamW(
            settings.lr, weight_decay=settings.weight_decay, bias_correction=True
        )
        self._gradient = mx.value_and_grad(self._loss)

    def run(
        self,
        state: ProtectState | None,
        measure: Callable[[ProtectState, float | None], dict[str, Any]],
        save: Callable[[ProtectState], None],
        advance: Callable[[ProtectStep], None],
    ) -> ProtectState:
        """From ``state`` (None: from the start) to the last step.

        measure: (state, mean loss since the last point) -> a new point; save gets the
        state after each point. Raises Diverged when a loss or a value is not a number, and
        MlxSvdError for a saved state beyond the last step.
        """
        state = self._begin(state)
        if not state.points:
            state.points.append(measure(state, None))
            save(state)
        advance(ProtectStep(state.step, self.steps, None, state.points[-1]))
        losses: list[float] = []
        with checkpointed(self.student.model, self.settings.grad_checkpoint):
            while state.step < self.steps:
                loss, point = self._step(state), None
                losses.append(loss)
                if state.step % self.settings.measure_every == 0 or state.step == self.steps:
                    self._check_values(state)
                    point = measure(state, float(np.mean(losses)))
                    state.points.append(point)
                    losses = []
                    save(state)
                advance(ProtectStep(state.step, self.steps, loss, point))
        return state

    def _begin(self, state: ProtectState | None) -> ProtectState:
        if state is None:
            zeros = {name: mx.zeros_like(value) for name, value in self.student.start.items()}
            arrays = {"values": dict(self.student.start), "m": zeros, "v": dict(zeros)}
            state = ProtectState(arrays=arrays)
        if state.step > self.steps:
            raise MlxSvdError(
                f"the saved state is of step {state.step}, after the {self.steps} steps asked for; "
                f"give --steps {state.step} or more, or delete the .protecting folder"
            )
        moments = {
            name: {kind: state.arrays[kind][name] for kind in ("m", "v")}
            for name in state.arrays["values"]
        }
        self._optimizer.state = {"step": mx.array(state.step, mx.uint64), **moments}
        self._optimizer.learning_rate = self.settings.lr
        return state

    def _step(self, state: ProtectState) -> float:
        # Dropout of this step, also in a run that is continued here.
        key = np.random.SeedSequence([self.settings.seed, 5, state.step])
        mx.random.seed(int(key.generate_state(1)[0]))
        values = state.arrays["values"]
        self.student.model.train()
        inputs = self._inputs(state.step)
        with numpy_exponentials(self.student.model):
            (_, loss), gradients = self._gradient(values, *inputs)
        updated = self._optimizer.apply_gradients(gradients, values)
        for name, mask in self.student.masks.items():
            updated[name] = mx.where(mask, updated[name], values[name])
        mx.eval(loss, updated, self._optimizer.state)
        found = float(loss.item())
        if not math.isfinite(found):
            raise self._diverged(state)
        state.arrays["values"] = updated
        for kind in ("m", "v"):
            state.arrays[kind] = {name: self._optimizer.state[name][kind] for name in updated}
        state.step += 1
        return found

    def _inputs(self, step: int) -> tuple:
        """(examples, replay, text windows, the base model's log-probabilities on them)."""
        examples = tuple(map(mx.array, self._examples.batch(step)))
        replay = tuple(map(mx.array, self._replay.batch(step))) if self._replay else None
        windows = targets = None
        if self._text is not None:
            windows = mx.array(self._text.batch(step, self.settings.text_batch))
        if self._base is not None:
            with numpy_exponentials(self._base):
                targets = log_softmax(self._base(windows))
            mx.eval(targets)
        return examples, replay, windows, targets

    def _loss(self, values: dict, examples: tuple, replay, windows, targets) -> tuple:
        """(what is minimized, the loss of the examples alone)."""
        self.student.put(values)
        model, arm = self.student.model, self.student.arm
        loss = total = masked_loss(model, *examples)
        if replay is not None:
            total = total + arm.replay_weight * masked_loss(model, *replay)
        if arm.replay == "text":
            whole = mx.ones((windows.shape[0], windows.shape[1] - 1))
            total = total + arm.replay_weight * masked_loss(model, windows, whole)
        if targets is not None:
            total = total + arm.kl * mean_kl(targets, model(windows))
        return total, loss

    def _check_values(self, state: ProtectState) -> None:
        """An update may overflow after a loss that was still a number."""
        sums = mx.stack([mx.isfinite(v).all() for v in state.arrays["values"].values()])
        if not mx.all(sums).item():
            raise self._diverged(state)

    def _diverged(self, state: ProtectState) -> Diverged:
        last = state.points[-1]["step"]
        kept = f"the state of step {last} is kept: --steps {last} writes it, or " if last else ""
        return Diverged(
            f"the loss is not a number at step {state.step + 1} of {self.steps} (--lr "
            f"{self.settings.lr:g}); {kept}delete the .protecting folder beside --mlx-path and "
            "train with a smaller --lr",
            state.step + 1,
            state,
        )
