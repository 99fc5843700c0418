"""``mlx-svd analyze cliff``: quality over a grid of ranks, cliff or slope."""

from typing import Annotated

import typer

from mlx_svd.cli.analyze import options as a

_TEXTS = "Generated texts"


def cliff(
    model: a.Model,
    output: a.Output,
    revision: a.Revision = None,
    plot: a.Plot = None,
    layers: a.Layers = None,
    projections: a.Projections = "attention",
    ratios: a.Ratios = None,
    per_head: a.PerHead = False,
    scorer: a.Scorer = "plain",
    calibration: a.CalibrationFolder = None,
    at: Annotated[
        float | None,
        typer.Option(
            help="Ratio at which projection types, and smallest, random and largest directions and "
            "noise of equal energy are compared. Default: not done."
        ),
    ] = None,
    prompts: Annotated[
        int, typer.Option(min=0, help="Prompts to continue; 0: none.", rich_help_panel=_TEXTS)
    ] = 32,
    prompt_file: Annotated[
        str | None,
        typer.Option(help="File of prompts. Default: those shipped.", rich_help_panel=_TEXTS),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(min=8, help="Of each text.", rich_help_panel=_TEXTS)
    ] = 64,
    attention_windows: Annotated[
        int, typer.Option(min=0, help="Windows on which attention is compared.")
    ] = 2,
    text: a.Text = None,
    windows: a.Windows = 8,
    length: a.Length = 256,
    seed: a.Seed = 0,
    dtype: a.Dtype = None,
    json_: a.Json = False,
) -> None:
    """Perplexity, KL divergence, attention, repetition and agreement from full rank downwards, and
    a test whether the damage has a cliff. --ratios default: 25 from 0.98 to 0.1."""
    from mlx_svd.analyze.cliff import DEFAULT_RATIOS, CliffSettings
    from mlx_svd.analyze.cliff import cliff as run
    from mlx_svd.analyze.ranks import parse_numbers, policies
    from mlx_svd.analyze.subject import parse_layers
    from mlx_svd.cli.analyze.tables import print_cliff
    from mlx_svd.cli.progress import progress
    from mlx_svd.plan.recipe import parse_projections

    grid = parse_numbers(ratios, "--ratios") or DEFAULT_RATIOS
    policies(grid)  # refuses what is no ratio before the model is loaded
    if at is not None:
        policies([at])
    names, numbers = parse_projections(projections), parse_layers(layers)
    subject = a.opened(
        model, output, plot, revision=revision, text=text, windows=windows, length=length,
        dtype=dtype,
    )  # fmt: skip
    settings = CliffSettings(
        grid,
        names,
        numbers,
        a.scoring(subject.source, scorer, calibration),
        per_head,
        at,
        prompts,
        prompt_file,
        max_tokens,
        attention_windows,
        seed,
    )
    subject.chosen(names, numbers)
    with progress("measuring", {"point": 1.0 / len({1.0, *grid})}) as advance:
        result = run(subject, settings, advance)
    if (shown := a.finish(result, output, plot, json_)) is not None:
        print_cliff(shown)
