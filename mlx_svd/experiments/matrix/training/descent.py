"""Optimizer steps of one tiny model: AdamW, clipped gradients, warm-up and then a cosine."""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers

from mlx_svd.errors import MlxSvdError
from mlx_svd.finetune.loss import log_softmax
from mlx_svd.finetune.trainer import learning_rate
from mlx_svd.x86 import cross_entropy, numpy_exponentials

_LARGEST_GRADIENT, _WEIGHT_DECAY = 1.0, 0.01


class Descent:
    """Steps 0 to ``steps`` of ``model``, at most at ``rate``; teacher: a model whose predictions
    are learned in place of the text's next bytes. losses: of the steps taken, nats a byte."""

    def __init__(self, model: nn.Module, teacher: nn.Module | None, steps: int, rate: float):
        self.model, self.teacher, self.steps, self.rate = model, teacher, steps, rate
        self.losses: list[float] = []
        self.restart()

    def restart(self) -> None:
        """Forget the optimizer's state: from here on the model has other parameters."""
        self._optimizer = optimizers.AdamW(learning_rate=0.0, weight_decay=_WEIGHT_DECAY)
        self._gradient = nn.value_and_grad(self.model, _loss)

    def take(self, step: int, batch: mx.array) -> None:
        """One step on (rows, length + 1) bytes. Raises MlxSvdError if the loss is not a number."""
        self._optimizer.learning_rate = learning_rate(step, self.steps, self.rate)
        with numpy_exponentials(*filter(None, (self.model, self.teacher))):
            loss, gradients = self._gradient(self.model, batch, self.teacher)
        gradients, _ = optimizers.clip_grad_norm(gradients, _LARGEST_GRADIENT)
        self._optimizer.update(self.model, gradients)
        mx.eval(self.model.parameters(), self._optimizer.state, loss)
        self.losses.append(loss.item())
        if not self.losses[-1] < float("inf"):
            raise MlxSvdError(f"training: the loss of step {step} is {self.losses[-1]}; lower lr")


def _loss(model: nn.Module, tokens: mx.array, teacher: nn.Module | None) -> mx.array:
    """Cross-entropy with the next byte, or with the teacher's distribution, nats a byte."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    logits = model(inputs)
    if teacher is None:
        return cross_entropy(logits, targets).mean()
    wanted = mx.softmax(mx.stop_gradient(teacher(inputs)), axis=-1)
    return -(wanted * log_softmax(logits)).sum(axis=-1).mean()
