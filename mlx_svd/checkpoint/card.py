"""The README.md of a checkpoint: what it is, how it was made, how to load it."""

from pathlib import Path

import mlx_svd
from mlx_svd.checkpoint.layout import FORMS, MODES
from mlx_svd.models import own_architecture

_GROUP_SIZES = (32, 64, 128)


def model_card(config: dict, plan: dict, source_folder: Path, command: str) -> str:
    """Markdown with the hub's front matter. config, plan: as stored in the checkpoint."""
    code = "model_file" in config
    repo = plan["base_model"]
    flag = " --trust-remote-code" if code else ""
    sections = [
        front_matter(
            repo if plan["revision"] else None,
            "quantized" if config.get("quantization") else None,
            source_folder,
        ),
        f"# {repo.split('/')[-1]}, compressed with mlx-svd\n",
        _summary(plan),
        '## Use\n\n```\nmlx-svd generate --model PATH --prompt "..."\n'
        f'python -m mlx_lm generate --model PATH{flag} --prompt "..."\n```\n',
    ]
    if code:
        sections.append(
            f"The checkpoint carries its model code (`{config['model_file']}`, mlx and mlx-lm "
            "only). mlx-lm runs it with `--trust-remote-code`; `mlx-svd` uses its own copy and "
            "runs no code from a checkpoint. Programs that pass no such flag (LM Studio, exo) "
            "cannot load it.\n"
        )
        sections.append(_without_code(config, plan))
        sections.append(_quantize_again(config))
    made = f"mlx-svd {mlx_svd.__version__}, plan {config['mlx_svd']['plan_digest'][:16]}"
    sections.append(f"## Made by\n\n{made}\n" + (f"\n```\n{command}\n```\n" if command else ""))
    sections.append(
        "Forms, ranks, energy kept and weight error of every projection: "
        "`mlx-svd inspect PATH`. Quality was not measured by the compression itself.\n"
    )
    return "\n".join(filter(None, sections))


def front_matter(hub_id: str | None, relation: str | None, folder: Path) -> str:
    """What the hub reads. hub_id: of the base model; relation: to it (quantized, adapter); folder:
    whose card names the licence."""
    lines = ["---", "library_name: mlx", "pipeline_tag: text-generation"]
    if hub_id:
        lines += [f"base_model: {hub_id}"]
        if relation:
            lines += [f"base_model_relation: {relation}"]
    if licence := _licence(folder):
        lines.append(f"license: {licence}")
    return "\n".join([*lines, "tags:", "- mlx", "- mlx-svd", "- low-rank", "---", ""])


def _licence(folder: Path) -> str | None:
    """The licence in the source's model card, None if it names none."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    text = card.read_text(errors="replace")
    if not text.startswith("---"):
        return None
    for line in text.split("---")[1].splitlines():
        if line.startswith("license:"):
            return line.removeprefix("license:").strip() or None
    return None


def _summary(plan: dict) -> str:
    total = len(plan["projections"])
    touched = [p for p in plan["projections"] if p["ranks"]]
    corrected = [p for p in touched if p["form"] == "corrected"]
    truncated = [p for p in touched if p["form"] != "corrected"]
    forms = {form: sum(p["form"] == form for p in truncated) for form in FORMS}
    stored = ", ".join(f"{n} {form}" for form, n in forms.items() if n) or "none"
    q = plan["quantize"]
    commit = f" @ {plan['revision']}" if plan["revision"] else ""
    whole = plan["bytes_after"] / plan["bytes_before"]
    lines = [
        f"- base model: {plan['base_model']}{commit}",
        f"- truncated projections: {len(truncated)} of {total}; stored {stored}"
        + _share(truncated),
        *_corrected(corrected, total),
        f"- tensor data: {plan['bytes_after']:,} bytes, source {plan['bytes_before']:,} "
        f"({whole:.3f})",
    ]
    if q:
        lines.append(f"- quantized: {q['mode']}, {q['bits']} bits, group size {q['group_size']}")
    lines += [f"- {note}" for note in plan["notes"]]
    return "\n".join(lines) + "\n"


def _share(projections: list[dict]) -> str:
    before, after = (sum(p[f"bytes_{when}"] for p in projections) for when in ("before", "after"))
    return f" ({after / before:.3f} of their bytes)" if before else ""


def _corrected(projections: list[dict], total: int) -> list[str]:
    """The line about projections of which what quantization lost is stored as factors."""
    if not projections:
        return []
    bits = sorted({p["quantization"]["bits"] for p in projections})
    factors = sorted({p["factors"]["bits"] for p in projections if p["factors"]})
    kept = ["unquantized"] if any(p["factors"] is None for p in projections) else []
    kept += [f"in {', '.join(map(str, factors))} bits"] if factors else []
    ranks = [p["ranks"][0] for p in projections]
    span = f"rank {min(ranks)}" + (f" to {max(ranks)}" if max(ranks) > min(ranks) else "")
    return [
        f"- corrected projections: {len(projections)} of {total}, each in "
        f"{', '.join(map(str, bits))} bits plus the part of {span} of what these lose, as factors "
        f"{' or '.join(kept)}{_share(projections)}"
    ]


def _without_code(config: dict, plan: dict) -> str | None:
    """How a checkpoint whose only low-rank form is the corrected one gets around its code."""
    changed = [p for p in plan["projections"] if p["form"] != "dense"]
    fits = all(p["form"] == "corrected" and not p["factors"] for p in changed)
    bits = {p["path"]: p["quantization"] for p in plan["projections"]}
    for path, fused in config["mlx_svd"]["fused"].items():
        first, *others = (bits[f"{path}.{name}"] for name in fused["parts"])
        fits &= all(other == first for other in others)
    if not changed or not fits or own_architecture(config["model_type"]).is_file():
        return None
    return (
        "`mlx-svd export-adapter --model PATH --mlx-path OUT` writes it as a stock quantized model "
        "and a LoRA adapter, which give the same outputs in mlx-lm and need neither code nor "
        "flag.\n"
    )


def _quantize_again(config: dict) -> str | None:
    """What ``mlx_lm convert -q`` would do to factors, where that is not what one expects."""
    if config.get("quantization"):
        return None
    ranks = [
        rank
        for entry in config["mlx_svd"]["projections"].values()
        if entry["form"] not in ("dense", "sliced")
        for rank in entry["ranks"]
    ]
    skipped = [(g, sum(rank % g > 0 for rank in ranks)) for g in _GROUP_SIZES]
    if not any(count for _, count in skipped):
        return None
    counts = ", ".join(f"{count} with --q-group-size {g}" for g, count in skipped if count)
    default = MODES["affine"][0]
    return (
        "`mlx_lm convert -q` on this checkpoint would leave second factors (`up`) unquantized, "
        f"because their rank is no multiple of the group size: of {len(ranks)}, {counts}. "
        f"Compress with `--rank-multiple {default}` or with `mlx-svd compress -q` instead.\n"
    )
