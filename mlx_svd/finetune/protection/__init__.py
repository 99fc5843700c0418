"""Fine-tune a model while it keeps what it knows, and measure what it kept.

The pieces, for a program that compares arms:

    baseline = make_baseline(model, read_probes(file), 100, settings)
    for arm in (ARMS["none"], ARMS["cf90"], replace(ARMS["lora-r8"], adapter_rank=4)):
        result = protect(baseline, None, replace(settings, arm=arm))
        result.trajectory.uptakes  # of every point; .margins: of every point and fact
        result.record["knowledge"]["retained"]  # value, low, high, n

``read_probes`` is in ``mlx_svd.evaluate.retention``. One baseline (one model, one seed, one
division of the facts) serves all arms that are to be paired. ``protect`` writes a checkpoint if
given a path, and gives the same numbers for the same settings on the same machine with the same
BLAS and number of threads. See docs/protection.md.
"""

from mlx_svd.finetune.protection.arms import ARMS, Arm, arm_named
from mlx_svd.finetune.protection.baseline import Baseline, make_baseline
from mlx_svd.finetune.protection.guards import GUARDS, Warned, warnings_for
from mlx_svd.finetune.protection.protect import protect
from mlx_svd.finetune.protection.result import ProtectResult, Trajectory
from mlx_svd.finetune.protection.settings import PRESETS, ProtectSettings
from mlx_svd.finetune.protection.start import check_arm
from mlx_svd.finetune.protection.trainer import Diverged

__all__ = [
    "ARMS",
    "GUARDS",
    "PRESETS",
    "Arm",
    "Baseline",
    "Diverged",
    "ProtectResult",
    "ProtectSettings",
    "Trajectory",
    "Warned",
    "arm_named",
    "check_arm",
    "make_baseline",
    "protect",
    "warnings_for",
]
