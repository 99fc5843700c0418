"""Train a compressed checkpoint: heal it by distillation from the dense model."""

from mlx_svd.finetune.heal import Healed, heal
from mlx_svd.finetune.settings import HealSettings

__all__ = ["HealSettings", "Healed", "heal"]
