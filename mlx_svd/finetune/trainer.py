"""The training loop: teacher's logits on the fly, Adam, validation, best state.

Not ``mlx_lm.quant.dwq.dwq_quantize``: that trains scales and biases of leaves below 8 bits only,
takes a step per batch in bfloat16, keeps the last state and not the best, and cannot be resumed.

A trained tensor is ``start + share * rms(start) * delta``: Adam moves the deltas, so that one
learning rate, a relative one, serves every tensor of every model (the parameter scaling of
Adafactor, 1804.04235). Deltas begin at zero: an untrained tensor is exactly the stored one. A
scale moves a whole group of weights, so its share is smaller (measured: docs/healing.md).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
from mlx.utils import tree_unflatten

from mlx_svd.errors import MlxSvdError
from mlx_svd.finetune.data import HealingData
from mlx_svd.finetune.loss import mean_kl, teacher_log_probabilities, validation_kl
from mlx_svd.finetune.settings import HealSettings
from mlx_svd.finetune.state import TrainingState
from mlx_svd.x86 import numpy_exponentials

# Adafactor's floor under the root mean square: biases may be zero.
_SMALLEST_RMS = 1e-3
_SHARES = {"factors": 1.0, "norms": 1.0, "scales": 0.3}
_WARM_UP_SHARE, _LAST_LR_SHARE, _LARGEST_GRADIENT = 0.1, 0.05, 1.0


@dataclass(frozen=True)
class HealStep:
    """One finished step of ``steps``. loss: mean KL of its batch before its update (None for step
    0); kl: validation KL after it, where it was measured."""

    step: int
    steps: int
    loss: float | None
    kl: float | None


def learning_rate(step: int, steps: int, lr: float) -> float:
    """Of step 0, 1, ...: linear warm-up over a tenth of the steps, then half a cosine down to a
    twentieth of ``lr``."""
    warm_up = max(1, round(_WARM_UP_SHARE * steps))
    if step < warm_up:
        return lr * (step + 1) / warm_up
    done = (step - warm_up) / max(1, steps - warm_up)
    return lr * (_LAST_LR_SHARE + (1 - _LAST_LR_SHARE) * (1 + math.cos(math.pi * done)) / 2)


class Trainer:
    """Trains ``start`` (parameter name -> stored tensor) of ``student`` against ``teacher``.

    groups: parameter name -> its group, as :func:`trainable` gives it.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        start: dict[str, mx.array],
        groups: dict[str, str],
        data: HealingData,
        settings: HealSettings,
    ):
        self.student, self.teacher = student, teacher
        self.data, self.settings = data, settings
        self.steps = settings.count_steps(len(data.training))
        self._stored = start
        self._start = {name: tensor.astype(mx.float32) for name, tensor in start.items()}
        self._unit = {
            name: mx.maximum(mx.sqrt(mx.square(tensor).mean()), _SMALLEST_RMS)
            * _SHARES[groups[name]]
            for name, tensor in self._start.items()
        }
        self._dtype = getattr(mx, settings.dtype)
        self._optimizer = optimizers.Adam(settings.lr, bias_correction=True)
        self._gradient = mx.value_and_grad(self._loss)

    # -- values ---------------------------------------------------------------------------

    def _values(self, deltas: dict[str, mx.array]) -> dict[str, mx.array]:
        return {name: self._start[name] + self._unit[name] * d for name, d in deltas.items()}

    def stored(self, deltas: dict[str, mx.array]) -> dict[str, mx.array]:
        """The tensors that these deltas make, in the dtypes of the checkpoint."""
        return {n: v.astype(self._stored[n].dtype) for n, v in self._values(deltas).items()}

    def _put(self, tensors: dict[str, mx.array]) -> None:
        cast = [(name, tensor.astype(self._dtype)) for name, tensor in tensors.items()]
        self.student.update(tree_unflatten(cast))

    def _loss(self, deltas: dict, tokens: mx.array, targets: mx.array) -> mx.array:
        self._put(self._values(deltas))
        return mean_kl(targets, self.student(tokens[None]))

    def validate(self, deltas: dict[str, mx.array]) -> float:
        """Held-out KL (nats per token) of what would be stored, its rounding included."""
        self._put(self.stored(deltas))
        with numpy_exponentials(self.teacher, self.student):
            return validation_kl(self.teacher, self.student, self.data.held_out)

    # -- training -------------------------------------------------------------------------

    def run(
        self,
        state: TrainingState | None,
        save: Callable[[TrainingState], None],
        advance: Callable[[HealStep], None],
    ) -> TrainingState:
        """From ``state`` (None: from the start) to the last step; ``save`` gets every validated
        state. Raises MlxSvdError when the loss is not a number; the last saved state stays."""
        state = self._begin(state)
        kl = state.kl_start if not state.step else None
        advance(HealStep(state.step, self.steps, None, kl))
        while state.step < self.steps:
            loss = self._step(state)
            kl = None
            if state.step % self.settings.save_every == 0 or state.step == self.steps:
                kl = self._checked(self.validate(state.arrays["delta"]), state.step)
                if kl < state.kl_best:
                    state.kl_best, state.best_step = kl, state.step
                    state.arrays["best"] = dict(state.arrays["delta"])
                save(state)
            advance(HealStep(state.step, self.steps, loss, kl))
        return state

    def _begin(self, state: TrainingState | None) -> TrainingState:
        if state is None:
            zeros = {name: mx.zeros_like(tensor) for name, tensor in self._start.items()}
            kl = self._checked(self.validate(zeros), 0)
            arrays = {"delta": zeros, "m": dict(zeros), "v": dict(zeros), "best": {}}
            state = TrainingState(kl, kl, arrays=arrays)
        moments = {
            name: {kind: state.arrays[kind][name] for kind in ("m", "v")} for name in self._start
        }
        self._optimizer.state = {"step": mx.array(state.step, mx.uint64), **moments}
        return state

    def _step(self, state: TrainingState) -> float:
        """One update of ``state``; the batch's windows one by one, to hold one window's logits."""
        deltas = state.arrays["delta"]
        batch = self.data.batch(state.step, self.settings.batch_size)
        total, sums = 0.0, {name: mx.zeros_like(d) for name, d in deltas.items()}
        for window in batch:
            tokens = mx.array(window)
            with numpy_exponentials(self.teacher, self.student):
                targets = teacher_log_probabilities(self.teacher, tokens)
                loss, gradients = self._gradient(deltas, tokens, targets)
            sums = {name: sums[name] + gradients[name] / len(batch) for name in sums}
            mx.eval(loss, sums)
            total += float(loss.item())
        loss = self._checked(total / len(batch), state.step + 1)
        clipped, _ = optimizers.clip_grad_norm(sums, _LARGEST_GRADIENT)
        self._optimizer.learning_rate = learning_rate(state.step, self.steps, self.settings.lr)
        deltas = self._optimizer.apply_gradients(clipped, deltas)
        state.arrays["delta"] = deltas
        for kind in ("m", "v"):
            state.arrays[kind] = {name: self._optimizer.state[name][kind] for name in deltas}
        mx.eval(state.arrays)
        state.step += 1
        return loss

    def _checked(self, kl: float, step: int) -> float:
        if math.isfinite(kl):
            return kl
        if not step:
            raise MlxSvdError(
                "the KL divergence between teacher and student is not a number before any "
                "training; use --dtype float32, and check both models with mlx-svd generate"
            )
        raise MlxSvdError(
            f"the loss is not a number at step {step} of {self.steps} (--lr {self.settings.lr}); "
            "the last saved state is kept; delete the .healing folder beside --mlx-path and heal "
            "with a smaller --lr"
        )
