"""``mlx-svd probe-kv``: spectra of keys and values."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlx_svd.cli import options as o

if TYPE_CHECKING:
    from mlx_svd.kv.probe import ProbedText


def probe_kv(
    model: o.Model,
    output: Annotated[
        Path | None, typer.Option(help="File for the full spectra (JSON); needed for --plot.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture (.png, .svg, .pdf).")] = None,
    layers: Annotated[
        str | None, typer.Option(help="Comma-separated numbers of layers. Default: all.")
    ] = None,
    text: o.Text = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of the text.")] = 32,
    length: Annotated[int, typer.Option(min=2, help="Tokens a window.")] = 512,
    toy: Annotated[
        bool, typer.Option("--toy/--no-toy", help="Also on seed 003's four sentences.")
    ] = True,
    revision: o.Revision = None,
    dtype: Annotated[str, typer.Option(help="Of the forward passes.")] = "float32",
    json_: o.Json = False,
) -> None:
    """Singular values of K (before and after rotation) and V on real text."""
    from mlx_svd.checkpoint.disk import replace_file
    from mlx_svd.cli.progress import progress
    from mlx_svd.cli.tables import console
    from mlx_svd.errors import MlxSvdError
    from mlx_svd.kv.probe import probe_json
    from mlx_svd.kv.probe import probe_kv as run
    from mlx_svd.report.figure import check_plot_path

    if plot is not None:
        check_plot_path(plot)
        if output is None:
            raise MlxSvdError("--plot: is drawn from the file of --output; give that, too")
    with progress("probing", {str(n): 1.0 for n in range(windows)}) as advance:
        probe = run(
            model,
            text=text,
            windows=windows,
            length=length,
            layers=_numbers(layers),
            toy=toy,
            revision=revision,
            dtype=dtype,
            advance=advance,
        )
    content = probe_json(probe)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        replace_file(output, json.dumps(content).encode())
    if plot is not None:
        from mlx_svd.report.kv_spectra import plot_kv_spectra

        plot_kv_spectra(output, plot)
    if json_:
        print(json.dumps(content, indent=2))
        return
    for probed in probe.texts:
        console().print(_table(probed), markup=False, soft_wrap=True)


def _numbers(text: str | None) -> list[int] | None:
    from mlx_svd.errors import MlxSvdError

    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise MlxSvdError(f"--layers {text}: give numbers separated by commas") from error


def _table(probed: "ProbedText") -> str:
    """Markdown: means over layers, then the seed's columns."""
    lines = [
        f"{probed.text}: {probed.tokens:,} tokens, {probed.different_tokens} different; "
        f"{len(probed.layers)} layers",
        "",
        "| activation | heads | centred | dimensions | E@16 | E@32 | rank 90 % | 95 % | 99 % |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in probed.summary:
        name = row["activation"]
        if row["rotation"] != "none":
            name += f" {row['rotation']}-RoPE"
        ranks = " | ".join(f"{value:.1f}" for value in row["effective_rank"].values())
        shares = " | ".join(f"{value:.3f}" for value in row["energy_at"].values())
        lines.append(
            f"| {name} | {row['heads_per_group']} | {'yes' if row['centred'] else 'no'} "
            f"| {row['dimensions']} | {shares} | {ranks} |"
        )
    seed = probed.seed
    k, v = seed["K"], seed["V"]
    lines += [
        "",
        f"seed 003's columns (layers {','.join(map(str, seed['layers']))}, all heads, centred): "
        f"K energy@32 {k['avg_energy_in_top_32']:.1%}, V {v['avg_energy_in_top_32']:.1%}, "
        f"K eff. rank {k['avg_effective_rank_99']:.1f} of {k['num_dims']}, "
        f"V {v['avg_effective_rank_99']:.1f} of {v['num_dims']}; its rule says: "
        f"{seed['assessment']}",
        "",
    ]
    return "\n".join(lines)
