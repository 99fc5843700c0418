"""``mlx-svd compress``: the main job."""

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from mlx_svd.cli import options as o
from mlx_svd.cli.plan import Planned, planned, show


def compress(
    model: o.Model,
    mlx_path: Annotated[
        Path, typer.Option(help="New folder for the checkpoint.", rich_help_panel="Model")
    ] = Path("mlx_model"),
    revision: o.Revision = None,
    projections: o.Projections = None,
    rank_ratio: o.RankRatio = None,
    rank: o.Rank = None,
    energy: o.Energy = None,
    config: o.Config = None,
    form: o.Form = None,
    per_head: o.PerHead = None,
    min_dim: o.MinDim = None,
    rank_multiple: o.RankMultiple = None,
    quantize: o.Quantize = False,
    q_bits: o.QBits = None,
    q_group_size: o.QGroupSize = None,
    q_mode: o.QMode = "affine",
    dtype: o.Dtype = None,
    scorer: o.Scorer = None,
    preset: o.Preset = None,
    keep_bytes: o.KeepBytes = None,
    target_size: o.TargetSize = None,
    target_bpw: o.TargetBpw = None,
    bits: o.Bits = None,
    allocation: o.Allocation = None,
    calibration: o.CalibrationFolder = None,
    text: o.Text = None,
    windows: o.WindowCount = None,
    length: o.WindowLength = None,
    sequential: Annotated[
        bool,
        typer.Option(
            "--sequential",
            help="Measure every input again after compressing what is before it. Slower: the text "
            "runs several times more.",
            rich_help_panel="Calibration",
        ),
    ] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Matrices at a time. Default: cores, at most 4.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    json_: o.Json = False,
) -> None:
    """Compress a model into a new mlx-lm checkpoint. A killed run continues when repeated."""
    given = dict(locals())
    own = ("mlx_path", "sequential", "workers", "dry_run", "json_")
    from mlx_svd.conditions import command_line
    from mlx_svd.errors import MlxSvdError

    if os.path.lexists(mlx_path) and not dry_run:
        raise MlxSvdError(f"{mlx_path}: exists already; delete it or give another --mlx-path")
    found = planned(not dry_run, **{k: v for k, v in given.items() if k not in own})
    if dry_run:
        show(found.plan, json_)
        return
    from mlx_svd.cli.progress import progress, unit_work
    from mlx_svd.cli.tables import progress_console, share, touched_bytes
    from mlx_svd.compress import compress as run

    for note in found.plan.notes:
        progress_console().print(f"note: {note}")
    if sequential:
        found = calibrated_again(found)
    plan = found.plan
    with progress("compressing", unit_work(plan)) as advance:
        run(
            found.source,
            plan,
            mlx_path,
            command_line(),
            lambda unit: advance(unit.path),
            workers,
            found.calibration,
        )
    if json_:
        print(json.dumps({"mlx_path": str(mlx_path), "plan": plan.to_json()}, indent=2))
    else:
        print(touched_bytes(plan))
        print(
            f"{mlx_path}: {plan.bytes_before:,} -> {plan.bytes_after:,} bytes of tensor data "
            f"({share(plan.bytes_after, plan.bytes_before)})"
        )


def calibrated_again(found: Planned) -> Planned:
    """The same plan on a sequential calibration, which is kept in the cache."""
    from dataclasses import replace

    from mlx_svd.calibrate.statistics import cache_folder
    from mlx_svd.checkpoint.loader import load_model
    from mlx_svd.cli.progress import progress
    from mlx_svd.compress.sequential import calibrate_sequentially, sequential_info
    from mlx_svd.errors import MlxSvdError

    source, calibration = found.source, found.calibration
    if calibration is None:
        raise MlxSvdError(
            f"--sequential: scorer {found.plan.scorer} needs no calibration; choose another, or "
            "give --calibration"
        )
    dtype = calibration.info.dtype.rpartition(".")[2]
    with progress("calibrating", {linear.path: 1.0 for linear in source.linears}) as advance:
        plan, sequential = calibrate_sequentially(
            source,
            lambda: load_model(source.folder, dtype=dtype, lazy=True)[0],
            found.plan,
            calibration,
            cache_folder(sequential_info(found.plan, calibration)),
            advance,
        )
    return replace(found, plan=plan, calibration=sequential)
