"""A model's name -> a folder on disk: a local folder as it is, or a snapshot from the hub."""

import re
from dataclasses import dataclass
from pathlib import Path

from mlx_svd.errors import MlxSvdError
from mlx_svd.source.headers import INDEX_FILE

# Files that a checkpoint takes over from its source as they are: never code.
COPIED_FILES = [
    "generation_config.json",
    "*token*.json",
    "chat_template.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "*.jinja",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
]
HUB_PATTERNS = ["config.json", "model*.safetensors", INDEX_FILE, "README.md", *COPIED_FILES]
# The plan that is saved with a checkpoint.
PLAN_FILE = "mlx_svd_plan.json"
CHECKPOINT_PATTERNS = [*HUB_PATTERNS, PLAN_FILE]
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+|[\w.-]+")


@dataclass(frozen=True)
class ModelFolder:
    """path: the folder; name: hub id, or the folder's name; revision: hub commit or None."""

    path: Path
    name: str
    revision: str | None = None


def resolve_model(
    model: str, revision: str | None = None, patterns: list[str] = HUB_PATTERNS
) -> ModelFolder:
    """Find a model folder; download from the hub if ``model`` is not a local folder.

    The hub cache, token and offline mode are huggingface_hub's own (HF_HOME, HF_TOKEN or
    ``hf auth login``, HF_HUB_OFFLINE); nothing is changed in them. Raises MlxSvdError with the
    remedy when there is no such folder or model, no access, or no network.
    """
    try:
        path = Path(model).expanduser()
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, RuntimeError) as error:  # no permission, name too long, no such ~user
        raise MlxSvdError(f"{model}: cannot be read: {error}; give a model folder") from error
    if not model:
        raise MlxSvdError("--model: is empty; give a hub id or a model folder")
    if is_folder:
        if revision:
            raise MlxSvdError(f"{model}: a local folder has no revision; leave out --revision")
        path = path.resolve()
        return ModelFolder(path, path.name)
    if exists:
        raise MlxSvdError(f"{model}: is a file; give the folder that holds config.json")
    if not _HUB_ID.fullmatch(model):
        raise MlxSvdError(f"{model}: no such folder")
    snapshot = _download(model, revision, patterns)
    return ModelFolder(snapshot, model, snapshot.name)


def _download(model: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import errors, snapshot_download

    asked = f"{model}{'@' + revision if revision else ''}"
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except errors.GatedRepoError as error:
        raise MlxSvdError(
            f"{asked}: gated model; accept its licence at https://huggingface.co/{model}, "
            "then run `hf auth login` or set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise MlxSvdError(f"{asked}: the model has no such revision; check --revision") from error
    except errors.RepositoryNotFoundError as error:
        raise MlxSvdError(
            f"{asked}: no such folder, and no such model on the Hugging Face hub (or it is "
            "private: set HF_TOKEN)"
        ) from error
    except errors.HFValidationError as error:
        raise MlxSvdError(f"{asked}: no such folder, and not a valid hub id") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        # An IncompleteSnapshotError, which older versions of huggingface_hub do not have.
        partial = hasattr(error, "snapshot_path")
        raise MlxSvdError(
            f"{asked}: no such folder, and the Hugging Face hub cannot be reached (offline, or "
            f"HF_HUB_OFFLINE is set) with {'an incomplete' if partial else 'no'} copy in the "
            "cache; connect, or give a local folder"
        ) from error
    except (errors.HTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise MlxSvdError(
            f"{asked}: download from the Hugging Face hub failed: {reason}; try again, it "
            "continues where it stopped"
        ) from error
