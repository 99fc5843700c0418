"""``mlx-svd analyze spectrum``: singular values of weights, and of weights times activations."""

from typing import Annotated

import typer

from mlx_svd.cli import options as o
from mlx_svd.cli.analyze import options as a


def spectrum(
    model: a.Model,
    output: a.Output,
    revision: a.Revision = None,
    plot: a.Plot = None,
    layers: a.Layers = None,
    projections: a.Projections = "all",
    ratios: a.Ratios = None,
    ranks: a.Ranks = None,
    calibration: o.CalibrationFolder = None,
    text: o.Text = None,
    windows: o.WindowCount = None,
    length: o.WindowLength = None,
    activations: Annotated[
        bool,
        typer.Option(
            "--activations/--no-activations", help="Also the spectrum weighted by real inputs."
        ),
    ] = True,
    dtype: a.Dtype = None,
    json_: a.Json = False,
) -> None:
    """Energy at ranks, ranks at 90/95/99 % of it, effective rank, condition number, whole matrices
    and heads. Energy is not quality: see analyze layers and cliff."""
    from mlx_svd.analyze.ranks import parse_numbers, policies
    from mlx_svd.analyze.spectrum import spectrum as run
    from mlx_svd.analyze.subject import parse_layers
    from mlx_svd.calibrate.statistics import load_calibration
    from mlx_svd.cli.analyze.tables import print_spectrum
    from mlx_svd.cli.calibrate import run as calibrate
    from mlx_svd.cli.progress import progress
    from mlx_svd.errors import MlxSvdError
    from mlx_svd.plan.recipe import parse_projections

    if (calibration is not None or not activations) and (text or windows or length):
        raise MlxSvdError(
            "--text, --windows, --length: are of the calibration; leave them out with "
            "--calibration or --no-activations"
        )
    chosen = policies(
        parse_numbers(ratios or (None if ranks else "0.9,0.5"), "--ratios"),
        parse_numbers(ranks, "--ranks", int),
    )
    names = parse_projections(projections)
    # Weights only: the text of the subject is never run.
    subject = a.opened(
        model, output, plot, revision=revision, text=None, windows=1, length=8, dtype=dtype,
        quiet=True,
    )  # fmt: skip
    numbers = parse_layers(layers)
    wanted = subject.chosen(names, numbers)
    statistics = None
    if calibration is not None:
        statistics = load_calibration(calibration)
    elif activations:
        statistics = calibrate(
            subject.source,
            None,
            text=text,
            windows=windows,
            length=length,
            projections=tuple(n for n in names if any(p.name == n for p in wanted)),
            moments=("input",),
            dtype=dtype,
        )
    with progress("decomposing", {p.path: 1.0 for p in wanted}) as advance:
        result = run(
            subject,
            chosen,
            projections=names,
            layers=numbers,
            calibration=statistics,
            advance=advance,
        )
    if (shown := a.finish(result, output, plot, json_)) is not None:
        print_spectrum(shown)
