"""``mlx-svd calibrate``: measure what the scorers need, once."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlx_svd.cli import options as o

if TYPE_CHECKING:
    from mlx_svd.calibrate.statistics import Calibration
    from mlx_svd.source.source import Source

_DEFAULT_WINDOWS, _DEFAULT_LENGTH = 128, 512


def calibrate(
    model: o.Model,
    output: Annotated[Path, typer.Option(help="Folder for the calibration.")],
    revision: o.Revision = None,
    text: o.Text = None,
    windows: o.WindowCount = None,
    length: o.WindowLength = None,
    projections: o.Projections = None,
    moments: Annotated[
        str,
        typer.Option(
            help="input (forward passes only), output (two-sided scorer), gradient (fisher and "
            "importance scorers); comma-separated."
        ),
    ] = "input,output",
    dtype: o.Dtype = None,
    json_: o.Json = False,
) -> None:
    """Measure the statistics of a model on text. A killed run continues when repeated."""
    from mlx_svd.plan.recipe import parse_projections
    from mlx_svd.source.source import open_source

    source = open_source(model, revision)
    result = run(
        source,
        output,
        text=text,
        windows=windows,
        length=length,
        projections=parse_projections(projections or "q,k,o"),
        moments=_moments(moments),
        dtype=dtype,
    )
    info = result.info
    if json_:
        print(json.dumps({"folder": str(output), "digest": info.digest, **asdict(info)}, indent=2))
        return
    loss = "" if info.loss is None else f", loss {info.loss:.4f} nats a token"
    print(
        f"{output}: {', '.join(info.moments)} moments of {','.join(info.projections)} on "
        f"{info.windows} windows of {info.length} tokens of {info.origin}{loss}; "
        f"{info.seconds:.0f} s, {info.cpu_seconds:.0f} CPU s, {info.peak_memory / 1e9:.2f} GB"
    )


def run(
    source: "Source",
    folder: Path | None,
    *,
    text: str | None,
    windows: int | None,
    length: int | None,
    projections: tuple[str, ...],
    moments: tuple[str, ...],
    dtype: str | None,
) -> "Calibration":
    """Load the model, read the text and calibrate with a progress bar; folder: None = the cache,
    where the same calibration is found again."""
    import mlx.core as mx

    from mlx_svd.calibrate.calibrate import calibrate as run_calibration
    from mlx_svd.calibrate.calibrate import calibration_info, steps, too_few_tokens
    from mlx_svd.calibrate.statistics import cache_folder, finished
    from mlx_svd.calibrate.text import read_windows
    from mlx_svd.checkpoint.loader import load, load_model
    from mlx_svd.cli.progress import progress
    from mlx_svd.cli.tables import progress_console

    out = progress_console()
    # Names what is missing or does not fit, before the model is loaded.
    _ = source.linears, source.tensors
    if dtype is None and mx.default_device() == mx.Device(mx.cpu):
        dtype = "float32"  # half precision is slow there
    model, tokenizer = load(source.folder, dtype=dtype, lazy=True)
    chosen = read_windows(
        tokenizer,
        text,
        count=windows or _DEFAULT_WINDOWS,
        length=length or _DEFAULT_LENGTH,
        vocab_size=source.config.get("vocab_size"),
    )
    info = calibration_info(source, model, chosen, projections, moments)
    folder = folder or cache_folder(info)
    if (known := finished(folder, info)) is not None:
        return known
    out.print(
        f"note: calibrating on {len(chosen)} windows of {chosen.tokens.shape[1]} tokens of "
        f"{chosen.origin}"
    )
    if windows and len(chosen) < windows:
        out.print(f"note: the text has only {len(chosen)} windows, {windows} were asked for")
    if warning := too_few_tokens(info, source):
        out.print(f"note: {warning}")
    work = dict.fromkeys(steps(source, projections, moments, len(chosen)), 1.0)
    with progress("calibrating", work) as advance:
        return run_calibration(
            source,
            lambda: load_model(source.folder, dtype=dtype, lazy=True)[0],
            chosen,
            folder,
            projections=projections,
            moments=moments,
            advance=advance,
        )


def for_recipe(source: "Source", recipe, *, moments, folder: Path | None, text, windows, length):
    """The calibration that a recipe needs: the one in ``folder``, or one of ``moments`` from the
    cache, made on ``text`` if it is not there yet; None if no moments are needed."""
    from mlx_svd.calibrate.statistics import load_calibration
    from mlx_svd.errors import MlxSvdError

    if folder is not None:
        if text or windows or length:
            raise MlxSvdError(
                "--calibration: holds its own text; leave out --text, --windows and --length"
            )
        return load_calibration(folder)
    if not moments:
        return None
    return run(
        source,
        None,
        text=text,
        windows=windows,
        length=length,
        projections=recipe.projections,
        moments=moments,
        dtype=None,
    )


def _moments(text: str) -> tuple[str, ...]:
    from mlx_svd.calibrate.statistics import MOMENTS
    from mlx_svd.errors import MlxSvdError

    names = tuple(o.names(text))
    if unknown := [name for name in names if name not in MOMENTS]:
        raise MlxSvdError(f"--moments {unknown[0]}: use {', '.join(MOMENTS)}")
    return names
