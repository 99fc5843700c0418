"""The README.md of a checkpoint: what it is, how it was made, how to load it."""

from pathlib import Path

import mlx_svd
from mlx_svd.checkpoint.layout import FORMS, MODES

_GROUP_SIZES = (32, 64, 128)


def model_card(config: dict, plan: dict, source_folder: Path, command: str) -> str:
    """Markdown with the hub's front matter. config, plan: as stored in the checkpoint."""
    code = "model_file" in config
    repo = plan["base_model"]
    flag = " --trust-remote-code" if code else ""
    sections = [
        _front_matter(config, plan, source_folder),
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
        sections.append(_quantize_again(config))
    made = f"mlx-svd {mlx_svd.__version__}, plan {config['mlx_svd']['plan_digest'][:16]}"
    sections.append(f"## Made by\n\n{made}\n" + (f"\n```\n{command}\n```\n" if command else ""))
    sections.append(
        "Forms, ranks, energy kept and weight error of every projection: "
        "`mlx-svd inspect PATH`. Quality was not measured by the compression itself.\n"
    )
    return "\n".join(filter(None, sections))


def _front_matter(config: dict, plan: dict, source_folder: Path) -> str:
    lines = ["---", "library_name: mlx", "pipeline_tag: text-generation"]
    if plan["revision"]:
        lines += [f"base_model: {plan['base_model']}"]
        if config.get("quantization"):
            lines += ["base_model_relation: quantized"]
    if licence := _licence(source_folder):
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
    touched = [p for p in plan["projections"] if p["ranks"]]
    forms = {form: sum(p["form"] == form for p in touched) for form in FORMS}
    stored = ", ".join(f"{n} {form}" for form, n in forms.items() if n) or "none"
    before, after = plan["touched_bytes_before"], plan["touched_bytes_after"]
    share = f" ({after / before:.3f} of their bytes)" if before else ""
    q = plan["quantize"]
    commit = f" @ {plan['revision']}" if plan["revision"] else ""
    whole = plan["bytes_after"] / plan["bytes_before"]
    lines = [
        f"- base model: {plan['base_model']}{commit}",
        f"- truncated projections: {len(touched)} of {len(plan['projections'])}; "
        f"stored {stored}{share}",
        f"- tensor data: {plan['bytes_after']:,} bytes, source {plan['bytes_before']:,} "
        f"({whole:.3f})",
    ]
    if q:
        lines.append(f"- quantized: {q['mode']}, {q['bits']} bits, group size {q['group_size']}")
    lines += [f"- {note}" for note in plan["notes"]]
    return "\n".join(lines) + "\n"


def _quantize_again(config: dict) -> str | None:
    """Which settings of ``mlx_lm convert -q`` would leave second factors unquantized."""
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
