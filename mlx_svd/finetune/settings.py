"""What a healing run may be told, checked before any file is opened."""

import math
from dataclasses import asdict, dataclass

from mlx_svd.checkpoint.layout import DTYPES
from mlx_svd.errors import MlxSvdError

# What --train may name: see finetune/trainable.py.
TRAIN = ("all", "factors", "norms", "scales")
DEFAULT_EPOCHS = 1


@dataclass(frozen=True)
class HealSettings:
    """train: which tensors; windows, length: calibration windows and tokens in each, held-out ones
    included; epochs: passes over the training windows, or steps: optimizer steps; lr: the learning
    rate of Adam as a share of each tensor's root mean square (0.3 of it for scales); batch_size:
    windows in a step; dtype: of both models' forward passes (the trained values are float32);
    save_every: steps between two validations, each of which also saves the state.

    Raises MlxSvdError for a value that cannot work.
    """

    train: str = "all"
    windows: int = 128
    length: int = 512
    epochs: int | None = None
    steps: int | None = None
    lr: float = 5e-3
    batch_size: int = 2
    dtype: str = "float32"
    seed: int = 0
    save_every: int = 32

    def __post_init__(self):
        if self.train not in TRAIN:
            raise MlxSvdError(f"--train {self.train}: use one of {', '.join(TRAIN)}")
        if self.dtype not in DTYPES:
            raise MlxSvdError(f"--dtype {self.dtype}: use one of {', '.join(DTYPES)}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise MlxSvdError(f"--lr {self.lr}: must be a number above 0")
        if self.epochs is not None and self.steps is not None:
            raise MlxSvdError("--epochs and --steps: give one of them")
        if self.seed < 0:
            raise MlxSvdError(f"--seed {self.seed}: must not be negative")
        floors = {"windows": 2, "length": 2, "batch_size": 1, "save_every": 1}
        floors |= {name: 1 for name in ("epochs", "steps") if getattr(self, name) is not None}
        for name, floor in floors.items():
            if getattr(self, name) < floor:
                option = name.replace("_", "-")
                raise MlxSvdError(f"--{option} {getattr(self, name)}: must be at least {floor}")

    def count_steps(self, training_windows: int) -> int:
        """Optimizer steps in all; an incomplete last batch is filled from the next epoch."""
        if self.steps is not None:
            return self.steps
        epochs = DEFAULT_EPOCHS if self.epochs is None else self.epochs
        return math.ceil(epochs * training_windows / self.batch_size)

    def to_json(self) -> dict:
        """For digests and records."""
        return asdict(self)
