"""The saved state: complete or the one before, never another run's."""

import json

import mlx.core as mx
import pytest

from mlx_svd.errors import MlxSvdError
from mlx_svd.finetune.state import StateFolder, TrainingState
from tests.finetune.conftest import equal


def state(step: int = 3) -> TrainingState:
    arrays = {
        kind: {"a.weight": mx.random.normal((3, 2)), "b": mx.random.normal((4,))}
        for kind in ("delta", "m", "v")
    }
    return TrainingState(0.5, 0.25, step, 2, arrays | {"best": {}})


def test_what_is_saved_is_loaded(tmp_path):
    folder, saved = StateFolder(tmp_path / "out", "d"), state()
    assert folder.load() is None
    folder.save(saved)
    loaded = StateFolder(tmp_path / "out", "d").load()
    assert (loaded.step, loaded.best_step, loaded.kl_start, loaded.kl_best) == (3, 2, 0.5, 0.25)
    assert set(loaded.arrays) == set(saved.arrays)
    assert loaded.arrays["best"] == {}
    for kind in ("delta", "m", "v"):
        for name, array in saved.arrays[kind].items():
            assert equal(loaded.arrays[kind][name], array)


def test_only_the_last_state_stays_and_nothing_after_the_end(tmp_path):
    folder = StateFolder(tmp_path / "out", "d")
    for step in (1, 2, 3):
        folder.save(state(step))
    assert sorted(p.name for p in folder.path.iterdir()) == [
        "state.json",
        "step-000003.safetensors",
    ]
    folder.remove()
    assert list(tmp_path.iterdir()) == []


def test_killed_while_saving_the_state_before_counts(tmp_path, monkeypatch):
    folder = StateFolder(tmp_path / "out", "d")
    folder.save(state(1))

    def killed(*paths):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        folder.save(state(2))
    assert folder.load().step == 1


def test_killed_in_the_first_save_is_a_new_run(tmp_path):
    folder = StateFolder(tmp_path / "out", "d")
    folder.path.mkdir()
    (folder.path / "step-000001.safetensors").write_bytes(b"torn")
    assert folder.load() is None


def test_state_of_another_run_is_refused(tmp_path):
    StateFolder(tmp_path / "out", "d").save(state())
    with pytest.raises(MlxSvdError, match=r"out.healing: holds an unfinished healing with other"):
        StateFolder(tmp_path / "out", "e").load()


@pytest.mark.parametrize("damage", ["tensors", "json", "missing", "key"])
def test_damaged_state_is_refused(damage, tmp_path):
    folder = StateFolder(tmp_path / "out", "d")
    folder.save(state())
    tensors, record = folder.path / "step-000003.safetensors", folder.path / "state.json"
    if damage == "tensors":
        data = bytearray(tensors.read_bytes())
        data[-1] ^= 1
        tensors.write_bytes(data)
    elif damage == "json":
        record.write_text("{")
    elif damage == "key":
        content = json.loads(record.read_text())
        del content["state"]["step"], content["crc"]
        record.write_text(json.dumps(content))
    else:
        tensors.unlink()
    with pytest.raises(MlxSvdError, match=r"out.healing: damaged state .*delete it"):
        folder.load()


def test_folder_with_other_files_is_refused(tmp_path):
    folder = StateFolder(tmp_path / "out", "d")
    folder.path.mkdir()
    (folder.path / "notes.txt").write_text("mine")
    with pytest.raises(MlxSvdError, match=r"out.healing: is in the way"):
        folder.load()
