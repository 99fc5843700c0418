"""Model names: local folders, the hub's cache and the hub's refusals, without a network."""

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx2
import huggingface_hub
import pytest
from huggingface_hub import errors

import mlx_svd
from mlx_svd.demo import DEMO_MODEL
from mlx_svd.errors import MlxSvdError
from mlx_svd.source import resolve
from mlx_svd.source.resolve import resolve_model

REPO, COMMIT = "some-org/Some-Model.v2", "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_thisIsASecretThatMustNotBePrinted"
SECRET_URL = f"https://huggingface.co/api/models/{REPO}"


def http_error(kind: type, status: int, message: str) -> Exception:
    request = httpx2.Request("GET", SECRET_URL, headers={"authorization": f"Bearer {TOKEN}"})
    return kind(message, response=httpx2.Response(status, request=request))


# name -> what huggingface_hub raises, words that the message must hold
REFUSALS: dict[str, tuple[Callable[[], Exception], tuple[str, ...]]] = {
    "gated": (
        lambda: http_error(errors.GatedRepoError, 403, "403 Client Error.\nAccess is restricted"),
        ("gated model", f"https://huggingface.co/{REPO}", "hf auth login", "HF_TOKEN"),
    ),
    "no such model": (
        lambda: http_error(errors.RepositoryNotFoundError, 401, "401 Client Error.\n\nNot Found"),
        ("no such folder", "no such model", "private", "HF_TOKEN"),
    ),
    "no such revision": (
        lambda: http_error(errors.RevisionNotFoundError, 404, "404 Client Error.\n\nNot Found"),
        ("no such revision", "--revision"),
    ),
    "nothing cached": (
        lambda: errors.LocalEntryNotFoundError("Got: ConnectError\nAn error happened"),
        ("cannot be reached", "no copy in the cache", "connect, or give a local folder"),
    ),
    "cached in part": (
        lambda: errors.IncompleteSnapshotError("The cached snapshot\nis incomplete", "/somewhere"),
        ("cannot be reached", "incomplete copy in the cache", "connect"),
    ),
    "offline": (
        lambda: errors.OfflineModeIsEnabled("Cannot reach the hub: offline mode is enabled."),
        ("cannot be reached", "HF_HUB_OFFLINE", "connect, or give a local folder"),
    ),
    "server down": (
        lambda: http_error(errors.HfHubHTTPError, 503, "503 Server Error\nfor url"),
        ("failed: 503 Server Error", "try again"),
    ),
    "disabled": (
        lambda: http_error(errors.DisabledRepoError, 403, "403 Client Error. Disabled.\nx"),
        ("failed: 403 Client Error. Disabled.", "try again"),
    ),
    "time out": (
        lambda: httpx2.ReadTimeout("The read operation timed out"),
        ("failed: The read operation timed out", "try again"),
    ),
    "error without a message": (lambda: httpx2.ReadTimeout(""), ("failed: ReadTimeout",)),
    "disk full": (
        lambda: OSError(28, "No space left on device"),
        ("failed: [Errno 28] No space left on device",),
    ),
    "proxy": (lambda: httpx2.ProxyError("407 Proxy\nAuthentication"), ("failed: 407 Proxy",)),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusal_of_the_hub_is_one_line_with_the_model_and_the_remedy(case, monkeypatch):
    make, words = REFUSALS[case]

    def refuse(*args, **kwargs):
        raise make()

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(MlxSvdError) as raised:
        resolve_model(REPO, "v1")
    message = str(raised.value)
    assert message.startswith(f"{REPO}@v1: ")
    assert "\n" not in message
    assert TOKEN not in message
    for word in words:
        assert word in message


def test_name_revision_and_patterns_reach_the_hub_and_the_commit_comes_back(monkeypatch, tmp_path):
    asked = []

    def download(repo, *, revision, allow_patterns):
        asked.append((repo, revision, allow_patterns))
        return str(tmp_path / COMMIT)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    found = resolve_model(REPO, "v1")
    assert (found.path, found.name, found.revision) == (tmp_path / COMMIT, REPO, COMMIT)
    assert asked == [(REPO, "v1", resolve.HUB_PATTERNS)]


def test_no_code_is_ever_downloaded():
    from huggingface_hub.utils import filter_repo_objects

    repo = ["config.json", "model.safetensors", "modeling.py", "sub/evil.py", "pytorch_model.bin"]
    repo += ["tokenizer.py", "model.safetensors.py", "vocab.py.py", "setup.sh", "a.so", "x.pkl"]
    for patterns in (resolve.HUB_PATTERNS, resolve.CHECKPOINT_PATTERNS):
        wanted = list(filter_repo_objects(repo, allow_patterns=patterns))
        assert wanted[:2] == repo[:2]
        assert [name for name in wanted if not name.endswith((".json", ".safetensors"))] == []


def test_local_folder_wins_over_the_hub_and_has_no_revision(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    for model in ("org/name", "./org/name", str(tmp_path / "org" / "name"), "org/../org/name/"):
        found = resolve_model(model)
        assert found.path == tmp_path.resolve() / "org" / "name"
        assert (found.name, found.revision) == ("name", None)
    with pytest.raises(MlxSvdError, match=r"org/name: .*leave out --revision"):
        resolve_model("org/name", "main")


@pytest.mark.parametrize(
    "model",
    ["/no/such/folder", "a/b/c", "./nothing/here", "../nothing", "~/no-such-folder-here", "a b/c"]
    + ["nul\0byte", "-", "..", "x" * 300, "https://huggingface.co/org/name"],
)
def test_name_that_can_be_neither_folder_nor_hub_id_is_refused(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if model == "..":
        assert resolve_model(model).path == tmp_path.parent.resolve()
        return
    with pytest.raises(MlxSvdError) as raised:
        resolve_model(model)
    assert str(raised.value).startswith(f"{model}: ")


# -- a real cache, in a process of its own, because huggingface_hub reads its settings on import --


def fake_cache(home: Path) -> Path:
    """The demo model as a hub download would have left it; returns the cache's root."""
    root = home / "hub" / f"models--{REPO.replace('/', '--')}"
    snapshot = root / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir()
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(COMMIT)
    for path in DEMO_MODEL.iterdir():
        blob = root / "blobs" / hashlib.sha256(path.name.encode()).hexdigest()
        shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    return home


def listing(folder: Path) -> dict[str, tuple]:
    """Every file and folder with its size, times and target."""
    found = {}
    for path in sorted(folder.rglob("*")):
        stat = path.lstat()
        target = os.readlink(path) if path.is_symlink() else ""
        size = stat.st_size if path.is_file() else 0
        found[str(path.relative_to(folder))] = (size, stat.st_mtime_ns, stat.st_mode, target)
    return found


def mlx_svd_plan(home: Path, *argv: str, **environment: str) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "LD_PRELOAD"))}
    root = str(Path(mlx_svd.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-m", "mlx_svd", "plan", "--rank-ratio", "0.5", "--json", *argv],
        env={**clean, "PYTHONPATH": root, "HF_HOME": str(home), "HF_TOKEN": TOKEN, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def dead_endpoint():
    """A local address that refuses connections."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


@pytest.mark.parametrize("reason", ["offline", "unreachable", "commit"])
def test_cached_model_is_found_without_the_hub_and_the_cache_left_as_it_was(
    reason, tmp_path, dead_endpoint
):
    home = fake_cache(tmp_path / "hf")
    before = listing(home)
    environment = (
        {"HF_ENDPOINT": dead_endpoint} if reason == "unreachable" else {"HF_HUB_OFFLINE": "1"}
    )
    revision = ("--revision", COMMIT) if reason == "commit" else ()
    result = mlx_svd_plan(home, "--model", REPO, *revision, **environment)
    assert result.returncode == 0, result.stderr
    plan = json.loads(result.stdout)
    assert (plan["base_model"], plan["revision"]) == (REPO, COMMIT)
    assert len(plan["projections"]) == 42
    assert listing(home) == before
    assert TOKEN not in result.stdout + result.stderr


@pytest.mark.parametrize("reason", ["offline", "unreachable", "other revision"])
def test_model_that_is_not_cached_is_refused_in_one_line_without_the_hub(
    reason, tmp_path, dead_endpoint
):
    home = fake_cache(tmp_path / "hf")
    before = listing(home)
    environment = (
        {"HF_ENDPOINT": dead_endpoint} if reason == "unreachable" else {"HF_HUB_OFFLINE": "1"}
    )
    model = REPO if reason == "other revision" else "some-org/Other"
    revision = ("--revision", "v7") if reason == "other revision" else ()
    result = mlx_svd_plan(home, "--model", model, *revision, **environment)
    assert (result.returncode, result.stdout) == (2, "")
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1
    assert lines[0].startswith(f"error: {model}")
    assert "cannot be reached" in lines[0]
    assert "connect, or give a local folder" in lines[0]
    assert TOKEN not in result.stderr
    assert listing(home) == before


def test_blob_that_is_missing_in_the_cache_is_named(tmp_path):
    home = fake_cache(tmp_path / "hf")
    snapshot = next(home.rglob(COMMIT))
    (snapshot / "model.safetensors").resolve().unlink()
    result = mlx_svd_plan(home, "--model", REPO, HF_HUB_OFFLINE="1")
    assert result.returncode == 2
    assert "model.safetensors: cannot be read" in result.stderr
    assert "Traceback" not in result.stderr
