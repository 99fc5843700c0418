"""``mlx-svd protect``: fine-tune, keep what the model knows, and measure both."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from mlx_svd.cli import options as o

_FACTS, _ARM, _TRAINING, _MEASURING = "Facts and text", "Protection", "Training", "Measuring"


def _option(panel: str, help: str, *names: str):
    return typer.Option(*names, help=help, rich_help_panel=panel)


def protect(
    model: o.Model,
    facts: Annotated[
        Path, _option(_FACTS, "JSON list of facts that must be kept (see docs/protection.md).")
    ],
    mlx_path: Annotated[Path, _option("Model", "New folder for the checkpoint.")],
    paraphrases: Annotated[
        Path | None,
        _option(
            _FACTS,
            "Other prompts for every fact of a relation (.yaml: relation -> list of texts with "
            "{subject}).",
        ),
    ] = None,
    conflict: Annotated[
        Path | None, _option(_FACTS, "Facts whose conflicting object is trained, same format.")
    ] = None,
    conflict_count: Annotated[
        int | None, _option(_FACTS, "Instead: draw so many of the known facts by seed.")
    ] = None,
    data: Annotated[
        Path | None, _option(_FACTS, "Rows to train on, in mlx-lm's formats (.jsonl).")
    ] = None,
    text: Annotated[
        str | None,
        _option(
            _FACTS,
            "Text for perplexity, KL and replay: file or hub data set. Default: "
            "a short one shipped with mlx-svd.",
        ),
    ] = None,
    prompts_file: Annotated[
        Path | None, _option(_FACTS, "Prompts to continue. Default: those shipped.")
    ] = None,
    conversations: Annotated[
        Path | None, _option(_FACTS, "Rows of {messages} (.jsonl), for conversational perplexity.")
    ] = None,
    arm: Annotated[
        str | None,
        _option(
            _ARM,
            "none, freeze-50, freeze-75, freeze-90, freeze-top-75, hierarchical, "
            "compress, cf90, cf90-90, cf90-all, cf90-hierarchical, lora-r8, lora-r16, dora-r8, "
            "kl, replay, replay-text. The options below change it. Default: cf90.",
        ),
    ] = None,
    preset: Annotated[
        str | None,
        _option(
            _ARM,
            "seed: the seed document's own training (five steps for 20 facts, padding "
            "trained, substrings).",
        ),
    ] = None,
    freeze: Annotated[
        float | None,
        _option(_ARM, "Share of the layers that is frozen, int(L * share); 0: nothing is."),
    ] = None,
    freeze_from: Annotated[str | None, _option(_ARM, "bottom or top. Default: bottom.")] = None,
    hierarchical: Annotated[
        str | None,
        _option(_ARM, "EARLY:LATE, as 0.9:0.5: freeze a share of the rows of every layer."),
    ] = None,
    compress: Annotated[
        str | None, _option(_ARM, "Whose projections are truncated: none, frozen or all layers.")
    ] = None,
    rank_ratio: Annotated[
        float | None, _option(_ARM, "rank = int(ratio * min(m, n)). Default: 0.7.")
    ] = None,
    projections: Annotated[str | None, _option(_ARM, "Comma-separated. Default: q,k,o.")] = None,
    form: Annotated[
        str | None, _option(_ARM, "auto (smallest), dense, factored or pivot. Default: auto.")
    ] = None,
    adapter: Annotated[str | None, _option(_ARM, "none, lora or dora, of mlx-lm.")] = None,
    adapter_rank: Annotated[int | None, _option(_ARM, "Default: 8.")] = None,
    adapter_scale: Annotated[float | None, _option(_ARM, "alpha / rank. Default: 2.")] = None,
    adapter_dropout: Annotated[float | None, _option(_ARM, "Default: 0.05.")] = None,
    adapter_projections: Annotated[str | None, _option(_ARM, "Default: q,k,v,o.")] = None,
    kl: Annotated[
        float | None, _option(_ARM, "Weight of KL(base || model) on the text. Default: 0.")
    ] = None,
    replay: Annotated[
        str | None, _option(_ARM, "none, facts (known ones set aside) or text.")
    ] = None,
    replay_weight: Annotated[float | None, _option(_ARM, "Default: 1.")] = None,
    epochs: Annotated[int | None, _option(_TRAINING, "Passes. Default: 1.")] = None,
    steps: Annotated[int | None, _option(_TRAINING, "Optimizer steps, instead.")] = None,
    lr: Annotated[float | None, _option(_TRAINING, "Of AdamW, constant. Default: 1e-5.")] = None,
    weight_decay: Annotated[float | None, _option(_TRAINING, "Default: 0.01.")] = None,
    batch_size: Annotated[int | None, _option(_TRAINING, "Examples in a step. Default: 4.")] = None,
    loss_on: Annotated[
        str | None, _option(_TRAINING, "all tokens or the answer. Default: all.")
    ] = None,
    mask_padding: Annotated[
        bool | None,
        _option(
            _TRAINING,
            "Leave padding out of the loss. Default: masked.",
            "--mask-padding/--no-mask-padding",
        ),
    ] = None,
    pad_to: Annotated[int | None, _option(_TRAINING, "Default: the batch's longest.")] = None,
    grad_checkpoint: Annotated[
        bool | None, _option(_TRAINING, "Less memory, more time.", "--grad-checkpoint")
    ] = None,
    seed: Annotated[int | None, _option(_TRAINING, "Default: 0.")] = None,
    dtype: Annotated[
        str | None, _option(_TRAINING, "Of the forward passes. Default: float32.")
    ] = None,
    stored_dtype: Annotated[
        str | None, _option(_TRAINING, "Of the checkpoint. Default: the model's.")
    ] = None,
    accept: Annotated[
        str | None, _option(_TRAINING, "Guard rails to override, comma-separated, or all.")
    ] = None,
    strict: Annotated[
        bool | None, _option(_TRAINING, "Guard rails stop the run.", "--strict")
    ] = None,
    measure_every: Annotated[
        int | None, _option(_MEASURING, "Steps between two points; each is saved. Default: 10.")
    ] = None,
    facts_limit: Annotated[int | None, _option(_MEASURING, "Measured facts at most.")] = None,
    scoring: Annotated[str | None, _option(_MEASURING, "words, or seed (substrings).")] = None,
    prompts: Annotated[int | None, _option(_MEASURING, "To continue. Default: 32.")] = None,
    max_tokens: Annotated[int | None, _option(_MEASURING, "Of each. Default: 80.")] = None,
    text_windows: Annotated[int | None, _option(_MEASURING, "Default: 64.")] = None,
    text_length: Annotated[int | None, _option(_MEASURING, "Tokens. Default: 128.")] = None,
    json_: o.Json = False,
) -> None:
    """Fine-tune a model while it keeps what it knows; measure what was learned and what was kept.
    A killed run continues when repeated."""
    given = {k: v for k, v in locals().items() if v is not None}
    from mlx_svd.cli.progress import StepProgress
    from mlx_svd.cli.protect_settings import protect_settings
    from mlx_svd.cli.tables import print_protected, progress_console
    from mlx_svd.conditions import command_line
    from mlx_svd.errors import MlxSvdError
    from mlx_svd.evaluate.retention import (
        read_conflict,
        read_probes,
        read_templates,
        with_paraphrases,
    )
    from mlx_svd.finetune.protection import check_arm, make_baseline, warnings_for
    from mlx_svd.finetune.protection import protect as run

    if conflict is not None and conflict_count is not None:
        raise MlxSvdError("--conflict and --conflict-count: give one of them")
    if conflict is None and conflict_count is None and data is None:
        raise MlxSvdError(
            "there is nothing to train on; give --conflict, --conflict-count or --data"
        )
    if mlx_path.exists():
        raise MlxSvdError(f"{mlx_path}: exists already; delete it or give another --mlx-path")
    settings = protect_settings(given)
    probes = read_probes(facts, settings.seed)
    if paraphrases is not None:
        probes = with_paraphrases(probes, read_templates(paraphrases))
    asked = read_conflict(conflict) if conflict is not None else conflict_count
    # Refused here, not after the base model was measured.
    check_arm(model, settings.arm, settings.stored_dtype)
    if data is None:
        warnings_for(settings, asked if isinstance(asked, int) else len(asked))
    err = progress_console()
    err.print(f"asking {model} {len(probes)} facts", markup=False)
    baseline = make_baseline(
        model, probes, asked, settings, text=text, prompts=prompts_file,
        conversations=conversations,
    )  # fmt: skip
    with ExitStack() as stack:
        result = run(
            baseline,
            mlx_path,
            settings,
            data=data,
            command=command_line(),
            advance=StepProgress(stack, "training", _said),
        )
    if json_:
        print(json.dumps(result.to_json(), indent=2))
        return
    print_protected(result)


def _said(step) -> str | None:
    if step.point is None:
        return None
    summary, loss = step.point["summary"], step.point["loss"]
    uptake = summary["uptake"].get("value")
    learned = "" if uptake is None else f"uptake {uptake:.3f}, "
    kept = f"retained {summary['retained']['value']:.3f}"
    return learned + kept + ("" if loss is None else f", loss {loss:.3f}")
