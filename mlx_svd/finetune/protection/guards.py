"""Guard rails: settings that the seeds, or measurements here, found harmful.

Each is a warning with its reason. ``--accept NAME`` overrides one (the result says so) and
``--strict`` turns those that are left into errors. Figures are of docs/protection.md, on qwen2-6m.
"""

from dataclasses import dataclass

from mlx_svd.errors import MlxSvdError
from mlx_svd.finetune.protection.settings import ProtectSettings
from mlx_svd.source.families import MLP

# Name -> why. Brackets: 95 % intervals; retained: of 350 known facts.
GUARDS: dict[str, str] = {
    "v": (
        "in the seeds v at 90 % raised perplexity by 105 %; on qwen2-6m v at 70 % raises it by 7 % "
        "[5, 9], q, k and o together by 0.3 % [-0.9, 1.6]"
    ),
    "mlp": (
        "the seeds broke at 99 % of it; on qwen2-6m 99 % does no harm that shows, 90 % raises "
        "perplexity by 5 % [3, 7], 70 % by 60 % [49, 72] and loses a quarter of the known facts"
    ),
    "epochs": (
        "the seeds kept least after 3 epochs; on qwen2-6m most of the loss came early: retained "
        "0.45 [0.40, 0.51] after 0.8 epochs and 0.58 [0.53, 0.63] after 3.2 (nothing protected)"
    ),
    "lr": (
        "the seeds kept least at 2e-5; on qwen2-6m, nothing protected, 3e-4 instead of 1e-4 costs "
        "16 [11, 20] points of retention at an uptake of 0.5: tune it before comparing arms"
    ),
    "freeze": (
        "the seeds kept nothing with half of the layers frozen; on qwen2-6m half retains 22 [17, "
        "27] points less than three quarters at an uptake of 0.7"
    ),
    "perplexity": (
        "perplexity tells neither knowledge nor loops: on qwen2-6m two arms at 1.04 times the base "
        "model's perplexity retained 0.58 [0.53, 0.63] and 0.86 [0.82, 0.90]"
    ),
    "padding": (
        "most trained tokens of short examples are then end tokens, and what is measured is partly "
        "that; on qwen2-6m no difference in retention was found at an uptake of 0.5 or 0.7"
    ),
}


@dataclass(frozen=True)
class Warned:
    """name: of the guard rail; text: what was asked for and why it is warned of; accepted: it was
    overridden."""

    name: str
    text: str
    accepted: bool


def warnings_for(settings: ProtectSettings, examples: int) -> list[Warned]:
    """The guard rails that these settings run into. examples: that are trained.

    Raises MlxSvdError for an unknown name in ``accept``, and with ``strict`` for any rail that was
    not accepted.
    """
    unknown = [name for name in settings.accept if name not in (*GUARDS, "all")]
    if unknown:
        raise MlxSvdError(f"--accept {unknown[0]}: use all or one of {', '.join(GUARDS)}")
    found = []
    for name, asked in _asked(settings, examples):
        accepted = "all" in settings.accept or name in settings.accept
        found.append(Warned(name, f"{asked}: {GUARDS[name]}", accepted))
    refused = [warning for warning in found if not warning.accepted]
    if settings.strict and refused:
        raise MlxSvdError(
            f"{refused[0].text}; change it, add --accept {refused[0].name}, or leave out --strict"
        )
    return found


def _asked(settings: ProtectSettings, examples: int) -> list[tuple[str, str]]:
    """(guard rail, what was asked for)."""
    arm, found = settings.arm, []
    if arm.compress != "none":
        if "v" in arm.projections:
            found.append(("v", f"v truncated to {arm.rank_ratio:g} of its ranks"))
        if mlp := [name for name in arm.projections if name in MLP]:
            found.append(("mlp", f"{', '.join(mlp)} truncated to {arm.rank_ratio:g} of the ranks"))
    epochs = settings.count_epochs(examples)
    if epochs >= 3:
        found.append(("epochs", f"{epochs:g} epochs"))
    if settings.lr >= 2e-5:
        found.append(("lr", f"learning rate {settings.lr:g}"))
    if arm.freeze in ("bottom", "top") and 0 < arm.share <= 0.5:
        found.append(("freeze", f"{arm.share:g} of the layers frozen"))
    if not settings.prompts:
        found.append(("perplexity", "generation quality is not measured"))
    if not settings.mask_padding:
        found.append(("padding", "padding is trained"))
    return found
