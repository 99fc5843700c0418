"""The ``mlx-svd`` command: its subcommands, its errors and its exit codes.

Exit codes: 0 done, 1 something unexpected failed, 2 bad input (one line on stderr), 3 a gate that
was asked for failed, 130 Ctrl-C (a compression, healing, protected
fine-tuning, evaluation or experiment continues when repeated).
"""

import sys
import traceback
from typing import Annotated

import typer

from mlx_svd import __version__
from mlx_svd.cli.analyze import analyze
from mlx_svd.cli.calibrate import calibrate
from mlx_svd.cli.compare import compare
from mlx_svd.cli.compress import compress
from mlx_svd.cli.demo import demo
from mlx_svd.cli.evaluate import evaluate
from mlx_svd.cli.experiment import experiment
from mlx_svd.cli.export_adapter import export_adapter
from mlx_svd.cli.generate import generate
from mlx_svd.cli.heal import heal
from mlx_svd.cli.inspect import inspect
from mlx_svd.cli.kv_bases import kv_bases
from mlx_svd.cli.plan import plan
from mlx_svd.cli.probe_kv import probe_kv
from mlx_svd.cli.protect import protect
from mlx_svd.cli.sweep import sweep
from mlx_svd.cli.sweep_kv import sweep_kv
from mlx_svd.errors import MlxSvdError

_INTERRUPTED = 130

app = typer.Typer(
    name="mlx-svd",
    help="Low-rank compression of language models: Hugging Face weights in, mlx-lm checkpoint out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    calibrate,
    compress,
    plan,
    inspect,
    heal,
    protect,
    evaluate,
    sweep,
    compare,
    export_adapter,
    probe_kv,
    kv_bases,
    sweep_kv,
    generate,
    demo,
):
    app.command()(command)
app.add_typer(analyze)
app.add_typer(experiment)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"mlx-svd {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Low-rank compression of language models: Hugging Face weights in, mlx-lm checkpoint out."""


def main() -> None:
    """Run the command line and exit."""
    try:
        app(prog_name="mlx-svd")
    except MlxSvdError as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as done:
        if done.code == _INTERRUPTED:  # Typer's own handling of Ctrl-C prints nothing
            print(
                "interrupted; a compression, healing, protected fine-tuning, evaluation or "
                "experiment continues where it stopped when the same command is repeated",
                file=sys.stderr,
            )
        raise
