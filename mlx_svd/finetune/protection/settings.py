"""What a protected fine-tuning may be told, checked before any file is opened."""

import math
from dataclasses import asdict, dataclass, field

from mlx_svd.checkpoint.layout import DTYPES
from mlx_svd.errors import MlxSvdError
from mlx_svd.finetune.protection.arms import ARMS, Arm

LOSS_ON = ("all", "answer")
SCORINGS = ("words", "seed")
DEFAULT_EPOCHS = 1


@dataclass(frozen=True)
class ProtectSettings:
    """arm: what protects. Training: epochs over the examples, or steps; lr, weight_decay: of AdamW,
    constant; batch_size: examples in a step; loss_on: every token of an example, or its answer
    only; mask_padding: False also trains the padding (end tokens), as the seeds did; pad_to: tokens
    that every example is padded or cut to (None: the longest of the batch); grad_checkpoint:
    compute each layer again in the backward pass, which takes less memory.

    Measuring: measure_every: steps between two points of the trajectory, each of which saves the
    state; facts_limit: measured facts at most, drawn by seed; scoring, tokens: of written answers;
    prompts: how many are continued for generation quality (0: not measured); text_windows,
    text_length: of the text, an eighth (at most 16) held out for perplexity, the rest for KL and
    replay; text_batch: windows of it in a step.

    dtype: of the forward passes (trained values are float32); stored_dtype: of the written tensors
    (None: the model's own); what is measured is always what is stored. accept: names of guard rails
    that are overridden; strict: the others stop the run instead of warning.

    Raises MlxSvdError for a value that cannot work.
    """

    arm: Arm = field(default_factory=lambda: ARMS["cf90"])
    epochs: int | None = None
    steps: int | None = None
    lr: float = 1e-5
    weight_decay: float = 0.01
    batch_size: int = 4
    loss_on: str = "all"
    mask_padding: bool = True
    pad_to: int | None = None
    grad_checkpoint: bool = False
    seed: int = 0
    measure_every: int = 10
    facts_limit: int | None = None
    scoring: str = "words"
    tokens: int = 10
    prompts: int = 32
    max_tokens: int = 80
    text_windows: int = 64
    text_length: int = 128
    text_batch: int = 2
    dtype: str = "float32"
    stored_dtype: str | None = None
    accept: tuple[str, ...] = ()
    strict: bool = False

    def __post_init__(self):
        for name, allowed in (("loss_on", LOSS_ON), ("scoring", SCORINGS), ("dtype", DTYPES)):
            if getattr(self, name) not in allowed:
                raise MlxSvdError(
                    f"{_option(name)} {getattr(self, name)}: use one of {', '.join(allowed)}"
                )
        if self.stored_dtype not in (None, *DTYPES):
            raise MlxSvdError(f"--stored-dtype {self.stored_dtype}: use one of {', '.join(DTYPES)}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise MlxSvdError(f"--lr {self.lr}: must be a number above 0")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise MlxSvdError(f"--weight-decay {self.weight_decay}: must be a number from 0 on")
        if self.epochs is not None and self.steps is not None:
            raise MlxSvdError("--epochs and --steps: give one of them")
        if not self.mask_padding and self.loss_on == "answer":
            raise MlxSvdError("--no-mask-padding: goes with --loss-on all only")
        floors = {"batch_size": 1, "measure_every": 1, "seed": 0, "tokens": 1, "prompts": 0}
        floors |= {"max_tokens": 1, "text_windows": 2, "text_length": 2, "text_batch": 1}
        optional = {"epochs": 1, "steps": 1, "pad_to": 2, "facts_limit": 1}
        floors |= {k: v for k, v in optional.items() if getattr(self, k) is not None}
        for name, floor in floors.items():
            if getattr(self, name) < floor:
                raise MlxSvdError(
                    f"{_option(name)} {getattr(self, name)}: must be at least {floor}"
                )

    def count_steps(self, examples: int) -> int:
        """Optimizer steps in all; an incomplete last batch is filled from the next epoch."""
        if self.steps is not None:
            return self.steps
        epochs = DEFAULT_EPOCHS if self.epochs is None else self.epochs
        return math.ceil(epochs * examples / self.batch_size)

    def count_epochs(self, examples: int) -> float:
        """Passes over the examples."""
        return self.count_steps(examples) * self.batch_size / examples

    def to_json(self) -> dict:
        """For records."""
        return asdict(self)


# The seeds' own fine-tuning, to compare with their numbers: 20 examples make five steps; padding is
# trained; facts are found as substrings; the truncated projections are multiplied back.
PRESETS: dict[str, dict] = {
    "seed": {
        "arm": Arm("cf90", compress="frozen", freeze="bottom", share=0.75, form="dense"),
        "epochs": 1,
        "lr": 1e-5,
        "weight_decay": 0.01,
        "batch_size": 4,
        "loss_on": "all",
        "mask_padding": False,
        "pad_to": 32,
        "scoring": "seed",
        "tokens": 10,
        "measure_every": 1,
        "stored_dtype": "float32",
    }
}


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
