"""Rows of a data set on the Hugging Face hub, read from the parquet files that it keeps of each."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_svd.errors import MlxSvdError
from mlx_svd.source.source import brief

# The hub converts every public data set to parquet files CONFIG/SPLIT/0000.parquet here.
_REVISION = "refs/convert/parquet"


@dataclass(frozen=True)
class Hub:
    """repo: owner/name; config: its configuration, * for the only one; split: what is asked;
    shots: split of the examples in the prompt, or "" if there is none."""

    repo: str
    config: str
    split: str
    shots: str = ""


def hub_rows(hub: Hub, split: str) -> list[dict[str, Any]]:
    """All rows of a split, in order, as the data set has them.

    Respects HF_HOME, HF_TOKEN and HF_HUB_OFFLINE. Raises MlxSvdError with the remedy if pyarrow is
    missing or the hub cannot be reached.
    """
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise MlxSvdError(
            f"{hub.repo}: data sets of the hub need the extra: pip install 'mlx-svd[eval]', or "
            "give --data-dir with JSON lines"
        ) from error
    folder = _download(hub, split)
    files = sorted(folder.glob(f"{hub.config}/{split}/*.parquet"))
    if not files:
        raise MlxSvdError(
            f"{hub.repo}: the hub has no parquet files of {hub.config}/{split}; give --data-dir "
            "with JSON lines"
        )
    return [row for file in files for row in parquet.read_table(file).to_pylist()]


def _download(hub: Hub, split: str) -> Path:
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(
            snapshot_download(
                hub.repo,
                repo_type="dataset",
                revision=_REVISION,
                allow_patterns=f"{hub.config}/{split}/*.parquet",
            )
        )
    # No network, offline mode, no such data set, no access: the remedy is the same.
    except (errors.HTTPError, errors.LocalEntryNotFoundError, OSError, ValueError) as error:
        raise MlxSvdError(
            f"{hub.repo}: cannot be fetched from the Hugging Face hub: {brief(error)}; connect, or "
            "give --data-dir with JSON lines"
        ) from error
