"""``mlx-svd plan``: what compress would do, to the byte."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_svd.cli import options as o

if TYPE_CHECKING:
    from mlx_svd.calibrate.statistics import Calibration
    from mlx_svd.plan.plan import Plan
    from mlx_svd.source.source import Source


def plan(
    model: o.Model,
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
    json_: o.Json = False,
) -> None:
    """Print form, rank, break-even rank and bytes of every projection; write nothing."""
    given = dict(locals())
    chosen = planned(False, **{k: v for k, v in given.items() if k != "json_"}).plan
    show(chosen, json_)


@dataclass(frozen=True)
class Planned:
    """What the options of plan and compress come to."""

    source: "Source"
    plan: "Plan"
    calibration: "Calibration | None"


def planned(
    compresses: bool,
    model: str,
    revision: str | None,
    calibration: Path | None,
    text: str | None,
    windows: int | None,
    length: int | None,
    **recipe_options,
) -> Planned:
    """Source, calibration and plan, with progress bars for what is measured.

    compresses: the plan is carried out, so that the calibration of its scorer is needed in any
    case; otherwise only where the plan depends on it."""
    from mlx_svd.cli.calibrate import for_recipe
    from mlx_svd.cli.progress import progress
    from mlx_svd.plan.make import make_plan
    from mlx_svd.source.source import open_source

    recipe = o.read_recipe(**recipe_options)
    source = open_source(model, revision)
    statistics = for_recipe(
        source,
        recipe,
        moments=recipe.moments if compresses else recipe.planning_moments,
        folder=calibration,
        text=text,
        windows=windows,
        length=length,
    )
    names = [p.path for linear in source.linears for p in linear.projections]
    asked = {
        p.path: 1.0 for m in source.linears for p in m.projections if p.name in recipe.projections
    }
    with progress("spectra", {name: asked.get(name, 0.0) for name in names}) as advance:
        plan = make_plan(source, recipe, advance, statistics)
    return Planned(source, plan, statistics)


def show(chosen, as_json: bool) -> None:
    """Print a plan as a table or as JSON."""
    if as_json:
        print(json.dumps(chosen.to_json(), indent=2))
        return
    from mlx_svd.cli.tables import print_plan

    print_plan(chosen)
