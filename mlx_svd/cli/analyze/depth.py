"""``mlx-svd analyze depth``: error growth through the blocks, and with compressed layers."""

from typing import Annotated

import typer

from mlx_svd.cli.analyze import options as a


def depth(
    model: a.Model,
    output: a.Output,
    revision: a.Revision = None,
    plot: a.Plot = None,
    layers: a.Layers = None,
    projections: a.Projections = "attention",
    ratio: Annotated[
        float | None,
        typer.Option(help="Rank as a share of the singular values. Default: 0.5."),
    ] = None,
    rank: Annotated[int | None, typer.Option(help="The rank itself.")] = None,
    energy: Annotated[float | None, typer.Option(help="Share of the energy to keep.")] = None,
    per_head: a.PerHead = False,
    scorer: a.Scorer = "plain",
    calibration: a.CalibrationFolder = None,
    counts: Annotated[
        str | None,
        typer.Option(
            help="Numbers of layers compressed together. Default: all, or with more than 8 layers "
            "1, 2, 4, ... and all."
        ),
    ] = None,
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
    """Error of the residual stream after each block, and of the logits with 1, 2, ... layers
    compressed: do errors average out, or add up?"""
    from mlx_svd.analyze.depth import DepthSettings
    from mlx_svd.analyze.depth import depth as run
    from mlx_svd.analyze.ranks import parse_numbers, policies
    from mlx_svd.analyze.subject import parse_layers
    from mlx_svd.cli.analyze.tables import print_depth
    from mlx_svd.cli.progress import progress
    from mlx_svd.errors import MlxSvdError
    from mlx_svd.plan.recipe import parse_projections

    given = [[x] if x is not None else [] for x in (ratio, rank, energy)]
    if not any(given):
        given[0] = [0.5]
    found = policies(*given)
    if len(found) > 1:
        raise MlxSvdError("--ratio, --rank, --energy: give one of them")
    names, numbers = parse_projections(projections), parse_layers(layers)
    numbers_of_layers = parse_numbers(counts, "--counts", int) or None
    subject = a.opened(
        model, output, plot, revision=revision, text=text, windows=windows, length=length,
        dtype=dtype,
    )  # fmt: skip
    settings = DepthSettings(
        next(iter(found.items())),
        names,
        numbers,
        a.scoring(subject.source, scorer, calibration),
        per_head,
        numbers_of_layers,
        attention_windows,
        seed,
    )
    count = len({p.layer for p in subject.chosen(names, numbers)})
    share = {"growth": 1.0 / (count + 1), "chain": 1.0 / (count * min(count, 8))}
    with progress("measuring", share) as advance:
        result = run(subject, settings, advance)
    if (shown := a.finish(result, output, plot, json_)) is not None:
        print_depth(shown)
