"""``mlx-svd analyze layers``: every projection compressed alone, and sensitivity scans."""

from typing import Annotated

import typer

from mlx_svd.cli.analyze import options as a

_SCANS = "Sensitivity scans"


def layers(
    model: a.Model,
    output: a.Output,
    revision: a.Revision = None,
    plot: a.Plot = None,
    layers: a.Layers = None,
    projections: a.Projections = "all",
    ratios: a.Ratios = None,
    ranks: a.Ranks = None,
    energies: a.Energies = None,
    per_head: a.PerHead = False,
    scorer: a.Scorer = "plain",
    calibration: a.CalibrationFolder = None,
    bands: Annotated[
        str,
        typer.Option(
            help="Words for cosines: seed-001, seed-002, or such as 0.99=excellent,0.9=fair,poor."
        ),
    ] = "seed-001",
    alone: Annotated[
        bool,
        typer.Option("--alone/--no-alone", help="Every projection alone, not only the scans."),
    ] = True,
    effects: Annotated[
        bool,
        typer.Option("--effects/--no-effects", help="KL and perplexity of each projection alone."),
    ] = True,
    scan: Annotated[
        str | None,
        typer.Option(
            help="Groups to compress alone, or to leave dense alone: layer, type, head; "
            "comma-separated.",
            rich_help_panel=_SCANS,
        ),
    ] = None,
    leave: Annotated[
        str, typer.Option(help="compressed, dense or both.", rich_help_panel=_SCANS)
    ] = "compressed,dense",
    text: a.Text = None,
    windows: a.Windows = 8,
    length: a.Length = 256,
    seed: a.Seed = 0,
    dtype: a.Dtype = None,
    json_: a.Json = False,
) -> None:
    """Output cosine, relative error and difference on real and on Gaussian inputs, KL divergence
    and perplexity of every projection alone; scans by layer, type and head."""
    from mlx_svd.analyze.layers import LayersSettings
    from mlx_svd.analyze.layers import layers as run
    from mlx_svd.analyze.ranks import parse_numbers, policies
    from mlx_svd.analyze.sensitivity import check_scan
    from mlx_svd.analyze.subject import parse_layers
    from mlx_svd.analyze.verdict import parse_bands
    from mlx_svd.cli.analyze.tables import print_layers
    from mlx_svd.cli.progress import progress
    from mlx_svd.plan.recipe import parse_projections

    default = None if ranks or energies else "0.5"
    chosen = policies(
        parse_numbers(ratios or default, "--ratios"),
        parse_numbers(ranks, "--ranks", int),
        parse_numbers(energies, "--energies"),
    )
    scans = tuple(part.strip() for part in scan.split(",")) if scan else ()
    left = tuple(part.strip() for part in leave.split(","))
    for by in scans:
        check_scan(by, left)
    words = parse_bands(bands)
    names, numbers = parse_projections(projections), parse_layers(layers)
    subject = a.opened(
        model, output, plot, revision=revision, text=text, windows=windows, length=length,
        dtype=dtype,
    )  # fmt: skip
    settings = LayersSettings(
        chosen,
        names,
        numbers,
        a.scoring(subject.source, scorer, calibration),
        per_head,
        words,
        alone,
        effects,
        scans,
        left,
        seed,
    )
    rows = len(subject.chosen(names, numbers)) * len(chosen)
    with progress("measuring", {str(i): 1.0 for i in range(rows)}) as advance:
        done = iter(range(10**9))
        result = run(subject, settings, lambda what: advance(str(next(done))))
    if (shown := a.finish(result, output, plot, json_)) is not None:
        print_layers(shown)
