"""Tiny models trained on the spot, so that an experiment may begin before training."""

from mlx_svd.experiments.matrix.training.train import Trained, Training

__all__ = ["Trained", "Training"]
