"""Model definitions that travel with checkpoints: each file here is copied as it is."""

from pathlib import Path


def own_architecture(model_type: str) -> Path:
    """The model file of an architecture that mlx-lm lacks (it need not exist)."""
    return Path(__file__).with_name(f"modeling_{model_type}.py")
