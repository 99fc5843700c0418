"""Options that several commands share, and the recipe that they describe."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mlx_svd.plan.recipe import Recipe

_MODEL, _RANK, _QUANTIZE = "Model", "How much to keep", "Quantization"

Model = Annotated[
    str,
    typer.Option("--model", "--hf-path", help="Hub id or local folder.", rich_help_panel=_MODEL),
]
Revision = Annotated[
    str | None,
    typer.Option(help="Branch, tag or commit on the hub.", rich_help_panel=_MODEL),
]
Projections = Annotated[
    str | None,
    typer.Option(
        help="Comma-separated: q, k, v, o, gate, up, down; or attention, mlp, all. Default: q,k,o.",
        rich_help_panel=_RANK,
    ),
]
RankRatio = Annotated[
    float | None,
    typer.Option(
        help="rank = int(ratio * min(m, n)): a share of the singular values, not of the bytes.",
        rich_help_panel=_RANK,
    ),
]
Rank = Annotated[int | None, typer.Option(help="The same rank everywhere.", rich_help_panel=_RANK)]
Energy = Annotated[
    str | None,
    typer.Option(
        help="Smallest rank that keeps this share of the squared singular values; "
        "0.96:0.98 goes from the first layer to the last.",
        rich_help_panel=_RANK,
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(
        help="Recipe with rules (YAML), or a saved plan (JSON) to repeat. Options override it.",
        rich_help_panel=_RANK,
    ),
]
Form = Annotated[
    str | None,
    typer.Option(
        help="auto (smallest; with a budget: all), dense, factored, pivot, corrected or sliced; "
        "with a budget also several, comma-separated. Default: auto.",
        rich_help_panel=_RANK,
    ),
]
PerHead = Annotated[
    bool | None,
    typer.Option(
        "--per-head/--whole-matrix",
        help="Cut q, k and v into attention heads, each with its own rank. Default: whole-matrix.",
        rich_help_panel=_RANK,
    ),
]
MinDim = Annotated[
    int | None,
    typer.Option(help="Leave matrices with a smaller dimension alone.", rich_help_panel=_RANK),
]
RankMultiple = Annotated[
    int | None,
    typer.Option(
        help="Round ranks to a multiple. Default: 1, or the group size with -q.",
        rich_help_panel=_RANK,
    ),
]
Quantize = Annotated[
    bool,
    typer.Option(
        "--quantize", "-q", help="Quantize the model, factors included.", rich_help_panel=_QUANTIZE
    ),
]
QBits = Annotated[
    int | None,
    typer.Option(help="Bits per weight: 8, 6, 5, 4, 3, 2. Default: 4.", rich_help_panel=_QUANTIZE),
]
QGroupSize = Annotated[
    int | None, typer.Option(help="32, 64 or 128. Default: 64.", rich_help_panel=_QUANTIZE)
]
QMode = Annotated[
    str,
    typer.Option(help="affine, mxfp4, nvfp4 or mxfp8.", rich_help_panel=_QUANTIZE),
]
Dtype = Annotated[
    str | None,
    typer.Option(help="float32, float16 or bfloat16. Default: as the source."),
]
_CALIBRATION = "Calibration"
Text = Annotated[
    str | None,
    typer.Option(
        help="File (.txt, .jsonl) or hub data set (owner/name:split:column). Default: a text "
        "shipped with mlx-svd.",
        rich_help_panel=_CALIBRATION,
    ),
]
WindowCount = Annotated[
    int | None,
    typer.Option(
        "--windows", min=1, help="Windows of the text. Default: 128.", rich_help_panel=_CALIBRATION
    ),
]
WindowLength = Annotated[
    int | None,
    typer.Option(
        "--length", min=2, help="Tokens a window. Default: 512.", rich_help_panel=_CALIBRATION
    ),
]
CalibrationFolder = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        help="Folder made by mlx-svd calibrate. Default: made when needed and kept in "
        "~/.cache/mlx-svd (MLX_SVD_CACHE).",
        rich_help_panel=_CALIBRATION,
    ),
]
Scorer = Annotated[
    str | None,
    typer.Option(
        help="plain, activation, fisher, importance, whitened or two-sided. Default: whitened, or "
        "two-sided with a budget; plain if nothing is truncated.",
        rich_help_panel=_CALIBRATION,
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(
        help="seed: the seed documents' importance-guided SVD (70 % of the ranks of q, k, o, "
        "multiplied back; only the first 2 * rank components are scored).",
        rich_help_panel=_RANK,
    ),
]
_BUDGET = "Budget (chooses form, rank and bits of every projection)"
KeepBytes = Annotated[
    float | None,
    typer.Option(help="Share of the bytes of the projections.", rich_help_panel=_BUDGET),
]
TargetSize = Annotated[
    str | None,
    typer.Option(help="Bytes of the whole checkpoint: 3.2GB.", rich_help_panel=_BUDGET),
]
TargetBpw = Annotated[
    float | None,
    typer.Option(help="Bits per weight of the whole checkpoint.", rich_help_panel=_BUDGET),
]
Allocation = Annotated[
    str | None,
    typer.Option(
        help="greedy (expected loss per byte), or zero-sum (first-order changes that cancel; one "
        "unquantized form, with --keep-bytes). Default: greedy.",
        rich_help_panel=_BUDGET,
    ),
]
Bits = Annotated[
    str | None,
    typer.Option(
        help="What a budget may use: 16 (unquantized), 8, 6, 5, 4, 3, 2. Default: all.",
        rich_help_panel=_BUDGET,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]


def read_recipe(
    *,
    config: Path | None,
    projections: str | None,
    rank_ratio: float | None,
    rank: int | None,
    energy: str | None,
    form: str | None,
    per_head: bool | None,
    min_dim: int | None,
    rank_multiple: int | None,
    quantize: bool,
    q_bits: int | None,
    q_group_size: int | None,
    q_mode: str,
    dtype: str | None,
    scorer: str | None = None,
    preset: str | None = None,
    keep_bytes: float | None = None,
    target_size: str | None = None,
    target_bpw: float | None = None,
    bits: str | None = None,
    allocation: str | None = None,
) -> "Recipe":
    """The recipe of the file, overridden by the options given."""
    from mlx_svd.checkpoint.layout import quantization
    from mlx_svd.errors import MlxSvdError
    from mlx_svd.plan.budget import parse_budget
    from mlx_svd.plan.choices import parse_choices
    from mlx_svd.plan.policy import RankPolicy, parse_energy
    from mlx_svd.plan.recipe import Recipe, parse_projections
    from mlx_svd.plan.recipe_file import load_recipe_fields

    fields = load_recipe_fields(config) if config else {}
    fields |= _preset(preset)
    budget = {"keep_bytes": keep_bytes, "target_size": target_size, "target_bpw": target_bpw}
    if any(value is not None for value in budget.values()):
        fields["budget"] = parse_budget(**budget)
    if "budget" in fields:
        if form is not None or bits is not None or q_group_size is not None:
            fields["choices"] = parse_choices(form, bits, q_group_size, rank_multiple)
        form = None
    elif bits is not None:
        raise MlxSvdError("--bits: is what a budget may choose from; use -q --q-bits without one")
    given = {
        "scorer": scorer,
        "allocation": allocation,
        "form": form,
        "per_head": per_head,
        "min_dim": min_dim,
        "rank_multiple": rank_multiple,
        "dtype": dtype,
    }
    fields |= {name: value for name, value in given.items() if value is not None}
    if projections is not None:
        fields["projections"] = parse_projections(projections)
    if not (rank_ratio is rank is energy is None):
        shares = parse_energy(energy) if energy is not None else None
        fields["policy"] = RankPolicy(rank=rank, rank_ratio=rank_ratio, energy=shares)
    if quantize:
        fields["quantize"] = quantization(q_bits, q_group_size, q_mode)
    elif q_bits or (q_group_size and "budget" not in fields) or q_mode != "affine":
        raise MlxSvdError("--q-bits, --q-group-size and --q-mode need -q (--quantize)")
    if "scorer" not in fields:
        truncates = fields.get("policy") or any(
            r.policy or r.ranks for r in fields.get("rules", ())
        )
        fields["scorer"] = "whitened" if truncates else "plain"
        if "budget" in fields:
            fields["scorer"] = "two-sided"
    return Recipe(**fields)


def _preset(name: str | None) -> dict:
    """Fields of a recipe that a preset stands for."""
    from mlx_svd.errors import MlxSvdError
    from mlx_svd.plan.policy import RankPolicy

    if name is None:
        return {}
    if name != "seed":
        raise MlxSvdError(f"--preset {name}: use seed")
    return {
        "projections": ("q", "k", "o"),
        "policy": RankPolicy(rank_ratio=0.7),
        "form": "dense",
        "scorer": "importance",
        "importance_window": 2,
    }


def names(text: str) -> list[str]:
    """The parts of a comma-separated list."""
    return [part.strip() for part in text.split(",") if part.strip()]
