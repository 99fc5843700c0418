"""What a checkpoint holds, projection by projection, with the bytes that are on disk."""

from dataclasses import dataclass
from pathlib import Path

from mlx_svd.checkpoint.layout import rank_text
from mlx_svd.checkpoint.loader import checkpoint_section, tensor_bytes
from mlx_svd.errors import MlxSvdError
from mlx_svd.source.resolve import CHECKPOINT_PATTERNS, resolve_model

_HEALED_KEYS = {"teacher", "text", "steps", "kl_before", "kl_after"}


@dataclass(frozen=True)
class InspectedProjection:
    """ranks: of a corrected form those of the correction; energy: share of sum(sigma^2) that the
    rank keeps, or base and correction together; relative_error: ||W - W'|| / ||W|| of the matrix
    as stored (rounding and quantization included), both measured when it was compressed; nbytes:
    on disk now."""

    path: str
    form: str
    shape: tuple[int, int]
    ranks: tuple[int, ...] | None
    rank_limit: int
    energy: float
    relative_error: float
    nbytes: int
    saved_again: bool

    def rank_text(self) -> str:
        """'57/64', '31-57/64 x12' for heads, 'full' if not truncated."""
        return rank_text(self.ranks, self.rank_limit)


@dataclass(frozen=True)
class Inspection:
    """A checkpoint's table. nbytes: all tensor data on disk; healed: the record of ``mlx-svd heal``
    (teacher, text, kl_before, kl_after, ...), None if it was not."""

    base_model: str
    revision: str | None
    version: str
    plan_digest: str
    projections: tuple[InspectedProjection, ...]
    nbytes: int
    healed: dict | None = None


def inspect(checkpoint: str | Path) -> Inspection:
    """Per projection form, ranks, energy kept, weight error and bytes.

    ``saved_again`` marks projections whose bytes are no longer those written by mlx-svd (another
    program quantized or trained them): their error is the one before that. Raises MlxSvdError for
    a folder without an mlx-svd checkpoint or with damaged files.
    """
    folder = resolve_model(str(checkpoint), None, CHECKPOINT_PATTERNS).path
    section = checkpoint_section(folder)
    _check_healed(folder, section)
    sizes = tensor_bytes(folder)
    return Inspection(
        base_model=section["base_model"],
        revision=section["revision"],
        version=section["version"],
        plan_digest=section["plan_digest"],
        projections=tuple(
            _projection(path, entry, sizes) for path, entry in section["projections"].items()
        ),
        nbytes=sum(sizes.values()),
        healed=section.get("healed"),
    )


def _check_healed(folder: Path, section: dict) -> None:
    healed = section.get("healed")
    if healed is not None and not (isinstance(healed, dict) and healed.keys() >= _HEALED_KEYS):
        raise MlxSvdError(
            f"{folder / 'config.json'}: its mlx_svd.healed section is damaged; copy or download "
            "the checkpoint again"
        )


def _projection(path: str, entry: dict, sizes: dict[str, int]) -> InspectedProjection:
    own = [size for name, size in sizes.items() if name.startswith(f"{path}.")]
    module = path.rpartition(".")[0]
    if not own and f"{module}.weight" not in sizes:
        raise MlxSvdError(f"{path}: its tensors are missing; copy or download the checkpoint again")
    # A part of a module that stayed fused has no tensors of its own: its share is the recorded one.
    nbytes = sum(own) if own else entry["bytes"]
    return InspectedProjection(
        path=path,
        form=entry["form"],
        shape=tuple(entry["shape"]),
        ranks=tuple(entry["ranks"]) if entry["ranks"] else None,
        rank_limit=entry["rank_limit"],
        energy=entry["energy"],
        relative_error=entry["relative_error"],
        nbytes=nbytes,
        saved_again=nbytes != entry["bytes"],
    )
