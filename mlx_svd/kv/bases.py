"""``mlx-svd kv-bases``: run a model over a text and keep what low-rank caches are made from."""

from collections.abc import Callable
from pathlib import Path

from mlx_svd.calibrate.text import Windows, read_windows
from mlx_svd.checkpoint.loader import load, load_model
from mlx_svd.conditions import conditions
from mlx_svd.kv.bases_file import Bases, BasesInfo, folder_digest, save_bases
from mlx_svd.kv.moments import measure_moments
from mlx_svd.source.resolve import CHECKPOINT_PATTERNS, resolve_model


def kv_bases(
    model: str,
    output: Path | None,
    *,
    text: str | Path | None = None,
    windows: int | None = 24,
    length: int = 1024,
    revision: str | None = None,
    dtype: str | None = "float32",
    advance: Callable[[str], None] = lambda done: None,
) -> Bases:
    """Moments of queries, keys and values of ``model`` (hub id or folder, compressed or not) on
    windows of a text, written to ``output`` (None: only returned).

    text: as :func:`read_windows`. length: as long as the contexts that the bases are for, because
    the moments of rotated keys depend on how far the positions go. ``advance`` is told each
    finished window. Raises MlxSvdError for a bad text or model, and for an architecture without
    observable attention.
    """
    resolved = resolve_model(model, revision, CHECKPOINT_PATTERNS)
    folder = resolved.path
    _, tokenizer = load(folder, lazy=True)
    loaded, config = load_model(folder, dtype=dtype)
    read = read_windows(
        tokenizer, text, count=windows, length=length, vocab_size=config["vocab_size"]
    )
    bases = Bases(
        bases_info(resolved.name, folder, config["model_type"], read),
        measure_moments(loaded, config["model_type"], read, advance),
    )
    if output is not None:
        save_bases(output, bases)
    return bases


def too_few_tokens(bases: Bases) -> str | None:
    """A sentence if a latent over all heads has too many dimensions for the tokens, else None.

    Below four times as many tokens, 8-bit latents of the shared models were up to 15 times worse
    than with enough of them.
    """
    tokens = bases.info.windows * bases.info.length
    widest = max(len(layer.key_mean) for layer in bases.layers)
    if tokens >= 4 * widest:
        return None
    return (
        f"measured on {tokens} tokens, fewer than four times the {widest} dimensions of all heads: "
        "directions that the text never used are kept badly; use more windows"
    )


def bases_info(name: str, folder: Path, model_type: str, windows: Windows) -> BasesInfo:
    """The description that a bases file carries."""
    return BasesInfo(
        model=name,
        digest=folder_digest(folder),
        model_type=model_type,
        origin=windows.origin,
        text=windows.digest,
        windows=len(windows),
        length=windows.tokens.shape[1],
        conditions=conditions(),
    )
