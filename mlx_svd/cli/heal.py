"""``mlx-svd heal``: win back quality at the same bytes."""

import json
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mlx_svd.cli import options as o

_TEXT, _TRAINING = "Text", "Training"


def heal(
    model: Annotated[
        str,
        typer.Option(
            "--model",
            help="Checkpoint of mlx-svd, or quantized by mlx-lm.",
            rich_help_panel="Model",
        ),
    ],
    teacher: Annotated[
        str,
        typer.Option(
            help="The dense model that it was made from: hub id or local folder.",
            rich_help_panel="Model",
        ),
    ],
    mlx_path: Annotated[
        Path, typer.Option(help="New folder for the checkpoint.", rich_help_panel="Model")
    ],
    text: Annotated[
        str | None,
        typer.Option(
            help="File (.txt, .jsonl) or hub data set (owner/name:split:column). Default: a text "
            "shipped with mlx-svd, which is short.",
            rich_help_panel=_TEXT,
        ),
    ] = None,
    windows: Annotated[
        int | None,
        typer.Option(
            help="Windows of the text, an eighth (at most 16) held out. Default: 128.",
            rich_help_panel=_TEXT,
        ),
    ] = None,
    length: Annotated[
        int | None, typer.Option(help="Tokens in a window. Default: 512.", rich_help_panel=_TEXT)
    ] = None,
    train: Annotated[
        str | None,
        typer.Option(
            help="all, factors (low-rank parts), norms (and biases) or scales (of affine "
            "quantization). Default: all.",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(help="Passes over the windows. Default: 1.", rich_help_panel=_TRAINING),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(help="Optimizer steps, instead of epochs.", rich_help_panel=_TRAINING),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            help="Learning rate, as a share of each tensor's root mean square (0.3 of it for "
            "scales of quantization). Default: 0.005.",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Windows in a step. Default: 2.", rich_help_panel=_TRAINING)
    ] = None,
    save_every: Annotated[
        int | None,
        typer.Option(
            help="Steps between two validations; each saves the state too. Default: 32.",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Default: 0.", rich_help_panel=_TRAINING)] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Of both models' forward passes: float32, float16 or bfloat16. Trained values "
            "are float32, stored as before. Default: float32.",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    json_: o.Json = False,
) -> None:
    """Distil the dense model into its compressed checkpoint. A killed run continues when
    repeated."""
    given = dict(locals())
    own = ("model", "teacher", "mlx_path", "text", "json_")
    from mlx_svd.cli.progress import StepProgress
    from mlx_svd.conditions import command_line
    from mlx_svd.finetune import HealSettings
    from mlx_svd.finetune import heal as run

    settings = HealSettings(**{k: v for k, v in given.items() if k not in own and v is not None})
    with ExitStack() as stack:
        healed = run(
            model,
            teacher,
            mlx_path,
            settings,
            text=text,
            command=command_line(),
            advance=StepProgress(stack, "healing", _said),
        )
    if json_:
        print(json.dumps(asdict(healed), indent=2))
        return
    asked = settings.windows
    got = healed.training_windows + healed.held_out_windows
    if got < asked:
        print(f"{healed.text}: has only {got} windows of {settings.length} tokens, not {asked}")
    print(
        f"trained {healed.trained_parameters:,} numbers in {healed.trained_tensors} tensors for "
        f"{healed.steps} steps on {healed.training_windows} windows of {healed.text}"
    )
    print(
        f"KL divergence from {Path(teacher).name} on {healed.held_out_windows} held-out windows, "
        f"nats per token: {healed.kl_before:.4f} -> {healed.kl_after:.4f}"
    )
    if healed.best_step:
        print(f"{healed.mlx_path}: written as of step {healed.best_step}")
    else:
        print(
            f"{healed.mlx_path}: no step was better than the start, so the tensors are those of "
            f"{model}; try a smaller --lr or more --windows"
        )


def _said(step) -> str | None:
    return None if step.kl is None else f"validation KL {step.kl:.4f}"
