"""Options that the analyses share."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_svd.cli import options as o

if TYPE_CHECKING:
    from mlx_svd.analyze.subject import Subject
    from mlx_svd.calibrate.scorers import Scoring
    from mlx_svd.source.source import Source

Model, Revision, Dtype, Json = o.Model, o.Revision, o.Dtype, o.Json
_MEASURED, _WHICH, _RANKS = "Text it is measured on", "Which projections", "Ranks"

Output = Annotated[Path, typer.Option("--output", "-o", help="JSON file for the result.")]
Plot = Annotated[
    Path | None,
    typer.Option(help="Picture of the result: a .png, .svg or .pdf file (matplotlib extra)."),
]
Text = Annotated[
    str | None,
    typer.Option(
        help="File (.txt, .jsonl) or hub data set (owner/name:split:column). Default: a text "
        "shipped with mlx-svd, which is short.",
        rich_help_panel=_MEASURED,
    ),
]
Windows = Annotated[int, typer.Option(min=1, help="Of the text.", rich_help_panel=_MEASURED)]
Length = Annotated[int, typer.Option(min=3, help="Tokens of a window.", rich_help_panel=_MEASURED)]
Layers = Annotated[
    str | None,
    typer.Option(help="Numbers and ranges: 0,6,12 or 0-5. Default: all.", rich_help_panel=_WHICH),
]
Projections = Annotated[
    str,
    typer.Option(
        help="Comma-separated: q, k, v, o, gate, up, down; or attention, mlp, all.",
        rich_help_panel=_WHICH,
    ),
]
Ratios = Annotated[
    str | None,
    typer.Option(
        help="Ranks as shares of the singular values, int(ratio * min(m, n)): 0.9,0.5, or "
        "start:stop:step.",
        rich_help_panel=_RANKS,
    ),
]
Ranks = Annotated[
    str | None,
    typer.Option(help="Ranks themselves: 64,32 or 64:32:-2.", rich_help_panel=_RANKS),
]
Energies = Annotated[
    str | None,
    typer.Option(
        help="Smallest ranks that keep these shares of the squared singular values.",
        rich_help_panel=_RANKS,
    ),
]
PerHead = Annotated[
    bool,
    typer.Option(
        "--per-head/--whole-matrix",
        help="Cut q, k and v into heads, each with its own rank.",
        rich_help_panel=_RANKS,
    ),
]
Scorer = Annotated[
    str,
    typer.Option(
        help="plain (largest singular values), or one that needs --calibration: activation, "
        "fisher, importance, whitened, two-sided.",
        rich_help_panel=_RANKS,
    ),
]
CalibrationFolder = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        help="Folder made by mlx-svd calibrate, best on another text than --text.",
        rich_help_panel=_RANKS,
    ),
]
Seed = Annotated[int, typer.Option(help="Of random inputs, directions and bootstraps.")]


def opened(
    model: str,
    output: Path,
    plot: Path | None,
    *,
    revision: str | None,
    text: str | None,
    windows: int,
    length: int,
    dtype: str | None,
    quiet: bool = False,
) -> "Subject":
    """The loaded model and text; refuses unusable outputs first, and says what is measured on
    unless ``quiet``."""
    from mlx_svd.analyze.record import check_output
    from mlx_svd.analyze.subject import open_subject
    from mlx_svd.cli.tables import progress_console
    from mlx_svd.report.figure import check_plot_path, new_figure

    check_output(output)
    if plot is not None:
        check_plot_path(plot)
        new_figure("")  # names the missing extra before anything is measured
    subject = open_subject(
        model, revision=revision, text=text, windows=windows, length=length, dtype=dtype
    )
    if quiet:
        return subject
    got = len(subject.windows)
    fewer = f" (asked for {windows})" if got < windows else ""
    progress_console().print(
        f"note: measured on {got} windows{fewer} of {length} tokens of {subject.windows.origin}",
        markup=False,
    )
    return subject


def scoring(source: "Source", scorer: str, calibration: Path | None) -> "Scoring":
    """The scorer with its calibration. Raises MlxSvdError if it is missing or of another model."""
    from mlx_svd.calibrate.scorers import SCORERS, Scoring, check_scorer
    from mlx_svd.calibrate.statistics import load_calibration
    from mlx_svd.errors import MlxSvdError

    check_scorer(scorer)
    if not SCORERS[scorer]:
        if calibration is not None:
            raise MlxSvdError("--calibration: the plain scorer needs none; give another --scorer")
        return Scoring(scorer)
    if calibration is None:
        raise MlxSvdError(
            f"--scorer {scorer}: give --calibration, a folder made by mlx-svd calibrate "
            f"--moments {','.join(SCORERS[scorer])}"
        )
    found = load_calibration(calibration)
    found.check(source, SCORERS[scorer])
    return Scoring(scorer, calibration=found)


def finish(
    result: dict[str, Any], output: Path, plot: Path | None, json_: bool
) -> dict[str, Any] | None:
    """Save the result and its picture; print it as JSON if asked for. What is left to show."""
    import json

    from mlx_svd.analyze.record import save_analysis
    from mlx_svd.cli.tables import progress_console
    from mlx_svd.report.analysis import plot_analysis

    saved = save_analysis(result, output)
    if plot is not None:
        plot_analysis(saved, plot)
    progress_console().print(f"{output}: written", markup=False, soft_wrap=True)
    if json_:
        print(json.dumps(saved, indent=1))
        return None
    return saved
