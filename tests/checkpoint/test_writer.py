"""The writer against the safetensors package, and against every way of being interrupted."""

import contextlib
import fcntl
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import safetensors

import mlx_svd
from mlx_svd.checkpoint import writer as writer_module
from mlx_svd.checkpoint.layout import TensorSpec
from mlx_svd.checkpoint.writer import JOURNAL, CheckpointWriter
from mlx_svd.errors import MlxSvdError

DTYPES = (mx.float32, mx.float16, mx.bfloat16, mx.uint32, mx.uint8)
FILES = {"config.json": b"{}", "README.md": b"# card\n"}
INDEX = "model.safetensors.index.json"


def make_units(count: int = 6) -> list[tuple[str, tuple[TensorSpec, ...]]]:
    """Modules with one to three tensors of all dtypes."""
    rng = np.random.default_rng(0)
    units, number = [], 0
    for index in range(count):
        specs = []
        for kind in ("weight", "scales", "bias")[: 1 + index % 3]:
            shape = tuple(int(i) for i in rng.integers(1, 9, size=1 if kind == "bias" else 2))
            specs.append(TensorSpec(f"m.{index}.{kind}", shape, DTYPES[number % len(DTYPES)]))
            number += 1
        units.append((f"m.{index}", tuple(specs)))
    return units


def make_tensors(specs: tuple[TensorSpec, ...]) -> list[mx.array]:
    """Random bits (any float, NaN payloads included), the same for the same name."""
    tensors = []
    for spec in specs:
        rng = np.random.default_rng([*spec.name.encode()])
        size = spec.dtype.size
        unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32}[size]
        bits = rng.integers(0, 1 << (8 * size), size=spec.shape, dtype=unsigned)
        tensors.append(mx.array(bits).view(spec.dtype))
    return tensors


def pairs(specs: tuple[TensorSpec, ...]) -> zip:
    return zip(specs, make_tensors(specs), strict=True)


def bits(tensor: mx.array) -> bytes:
    """The bytes of a tensor, whatever its dtype."""
    return bytes(np.array(tensor.flatten().view(mx.uint8)))


UNITS = make_units()
NAMES = [name for name, _ in UNITS]


def write(target: Path, stop_after: int | None = None, units=UNITS, **options) -> list[str]:
    """Write what is left; returns the units written. stop_after: leave without finishing."""
    writer = CheckpointWriter(target, units, options.pop("digest", "d"), **options)
    written = []
    try:
        for name, specs in units:
            if name in writer.done:
                continue
            if stop_after is not None and len(writer.done) == stop_after:
                return written
            writer.write(name, make_tensors(specs), {"of": name, "value": 0.1 + len(name)})
            written.append(name)
        if stop_after is None:
            writer.finish(FILES)
        return written
    finally:
        writer.close()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(params=[1 << 20, 150], ids=["one shard", "several shards"])
def shard_bytes(request) -> int:
    return request.param


@pytest.fixture
def whole(tmp_path, shard_bytes) -> dict[str, bytes]:
    """The files of an uninterrupted run."""
    write(tmp_path / "whole", max_shard_bytes=shard_bytes)
    return contents(tmp_path / "whole")


# -- what is written ------------------------------------------------------------------------------


def test_safetensors_and_mlx_read_back_every_bit(tmp_path, shard_bytes):
    target = tmp_path / "model"
    write(target, max_shard_bytes=shard_bytes)
    expected = {s.name: t for _, specs in UNITS for s, t in pairs(specs)}
    by_mlx, by_safetensors = {}, {}
    for path in target.glob("model*.safetensors"):
        by_mlx |= mx.load(str(path))
        for name, entry in safetensors.deserialize(path.read_bytes()):
            by_safetensors[name] = (entry["dtype"], tuple(entry["shape"]), bytes(entry["data"]))
        with safetensors.safe_open(path, "numpy") as file:
            assert file.metadata() == {"format": "mlx"}
    names = dict(zip(DTYPES, ("F32", "F16", "BF16", "U32", "U8"), strict=True))
    assert by_mlx.keys() == by_safetensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (by_mlx[name].dtype, by_mlx[name].shape) == (tensor.dtype, tensor.shape)
        assert bits(by_mlx[name]) == bits(tensor)
        assert by_safetensors[name] == (names[tensor.dtype], tensor.shape, bits(tensor))


def test_tensor_of_any_strides_is_written_in_row_order(tmp_path):
    base = mx.arange(24, dtype=mx.float32).reshape(4, 6)
    views = {"t": base.T, "row": base[1:3], "step": base[::2, ::3], "one": mx.ones((1, 4))[:, :3]}
    views["bf"] = base.astype(mx.bfloat16).T
    views["broadcast"] = mx.broadcast_to(mx.array([1.0, 2.0]), (3, 2))
    units = [(n, (TensorSpec(n, tuple(t.shape), t.dtype),)) for n, t in views.items()]
    writer = CheckpointWriter(tmp_path / "model", units, "d")
    for name, tensor in views.items():
        writer.write(name, [tensor], {})
    writer.finish({})
    writer.close()
    loaded = mx.load(str(tmp_path / "model" / "model.safetensors"))
    for name, tensor in views.items():
        assert loaded[name].tolist() == tensor.tolist()


def test_index_and_names_are_those_of_mlx_lm(tmp_path, whole, shard_bytes):
    shards = sorted(name for name in whole if name.endswith(".safetensors"))
    if shard_bytes > 1000:
        assert shards == ["model.safetensors"]
    else:
        count = len(shards)
        assert count > 2
        assert shards == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    index = json.loads(whole[INDEX])
    specs = [spec for _, tensors in UNITS for spec in tensors]
    assert index["metadata"]["total_size"] == sum(spec.nbytes for spec in specs)
    assert list(index["weight_map"]) == sorted(spec.name for spec in specs)
    for name, shard in index["weight_map"].items():
        with safetensors.safe_open(tmp_path / "whole" / shard, "numpy") as file:
            assert name in file.keys()  # noqa: SIM118 - not a dict
    assert set(whole) == {*shards, INDEX, *FILES}
    assert {name: whole[name] for name in FILES} == FILES


def test_no_shard_is_over_the_limit_unless_one_unit_is(tmp_path):
    sizes = {name: sum(s.nbytes for s in specs) for name, specs in UNITS}
    limit = max(sizes.values())
    write(tmp_path / "model", max_shard_bytes=limit)
    data = []
    for path in (tmp_path / "model").glob("model*.safetensors"):
        tensors = safetensors.deserialize(path.read_bytes())
        data.append(sum(len(entry["data"]) for _, entry in tensors))
    assert max(data) <= limit
    assert sum(data) == sum(sizes.values())
    write(tmp_path / "each", max_shard_bytes=1)
    assert len(list((tmp_path / "each").glob("model*.safetensors"))) == len(UNITS)


def test_nothing_is_at_the_target_before_everything_is(tmp_path, monkeypatch):
    target, seen = tmp_path / "model", []
    rename = os.rename

    def spy(old, new):
        seen.append(set(contents(Path(old))))
        assert not target.exists()
        rename(old, new)

    monkeypatch.setattr(os, "rename", spy)
    write(target)
    assert seen == [{"model.safetensors", INDEX, *FILES}]
    assert set(contents(target)) == seen[0]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_index_is_the_last_of_the_small_files(tmp_path, monkeypatch):
    order, write_file = [], writer_module.write_file
    monkeypatch.setattr(
        writer_module, "write_file", lambda p, d: (order.append(p.name), write_file(p, d))
    )
    write(tmp_path / "model")
    assert order == [*FILES, INDEX]


# -- resuming -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", range(len(UNITS) + 1))
def test_resumes_at_every_unit_boundary_with_the_same_bytes(stop, tmp_path, shard_bytes, whole):
    target = tmp_path / "model"
    assert write(target, stop, max_shard_bytes=shard_bytes) == NAMES[:stop]
    assert not target.exists()
    assert write(target, max_shard_bytes=shard_bytes) == NAMES[stop:]
    assert contents(target) == whole


@pytest.mark.parametrize("every", [1, 2, 3])
def test_resumes_again_and_again(every, tmp_path, shard_bytes, whole):
    target = tmp_path / "model"
    for stop in range(every, len(UNITS), every):
        assert len(write(target, stop, max_shard_bytes=shard_bytes)) == every
    write(target, max_shard_bytes=shard_bytes)
    assert contents(target) == whole


def test_records_come_back_as_they_were_given(tmp_path):
    write(tmp_path / "model", 4)
    writer = CheckpointWriter(tmp_path / "model", UNITS, "d")
    assert writer.done == {n: {"of": n, "value": 0.1 + len(n)} for n in NAMES[:4]}
    writer.close()


def shards_of(folder: Path) -> list[Path]:
    """Shard files, the one written last at the end."""
    return sorted(folder.glob("model*.safetensors"))


# name -> damage to the unfinished folder after 4 units; how many units must be written again
DAMAGE = {
    "nothing": (lambda f: None, 0),
    "torn tail after the last unit": (lambda f: append(shards_of(f)[-1], b"half a tensor"), 0),
    "torn journal line": (lambda f: append(f / JOURNAL, b'{"unit": "m.4", "crc'), 0),
    "journal line that is no JSON": (lambda f: append(f / JOURNAL, b"\0\0\0\0\n"), 0),
    "journal line that is no entry": (lambda f: append(f / JOURNAL, b"[1]\n{}\n7\n"), 0),
    "journal line of an unknown unit": (
        lambda f: append(f / JOURNAL, b'{"unit": "other", "crc": 0, "record": {}}\n'),
        0,
    ),
    "journal line twice": (
        lambda f: append(f / JOURNAL, (f / JOURNAL).read_bytes().splitlines(True)[-1]),
        0,
    ),
    "journal ahead of the data": (
        lambda f: append(f / JOURNAL, b'{"unit": "m.4", "crc": 1, "record": {}}\n'),
        0,
    ),
    "last journal line lost": (lambda f: cut_line(f / JOURNAL), 1),
    "last journal line without its end": (lambda f: cut(f / JOURNAL, 1), 1),
    "last byte of the data lost": (lambda f: cut(shards_of(f)[-1], 1), 1),
    "last byte of the data changed": (lambda f: flip(shards_of(f)[-1], -1), 1),
    "middle journal line damaged": (lambda f: damage_line(f / JOURNAL, 2), 3),
}


def append(path: Path, data: bytes) -> None:
    with open(path, "ab") as stream:
        stream.write(data)


def cut(path: Path, count: int) -> None:
    os.truncate(path, path.stat().st_size - count)


def cut_line(path: Path) -> None:
    path.write_bytes(b"".join(path.read_bytes().splitlines(True)[:-1]))


def damage_line(path: Path, number: int) -> None:
    lines = path.read_bytes().splitlines(True)
    lines[number] = b"#" + lines[number]
    path.write_bytes(b"".join(lines))


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_of_a_crash_is_noticed_and_repaired(case, tmp_path, shard_bytes, whole):
    damage, again = DAMAGE[case]
    target = tmp_path / "model"
    write(target, 4, max_shard_bytes=shard_bytes)
    damage(tmp_path / "model.incomplete")
    assert write(target, max_shard_bytes=shard_bytes) == NAMES[4 - again :]
    assert contents(target) == whole


def test_a_changed_byte_of_the_recorded_data_is_noticed(tmp_path, shard_bytes, whole):
    target, folder = tmp_path / "model", tmp_path / "model.incomplete"
    write(target, 4, max_shard_bytes=shard_bytes)
    saved = contents(folder)
    rewritten = set()
    for name in [name for name in saved if name != JOURNAL]:
        for at in range(0, len(saved[name]), 2):
            for other, data in saved.items():
                (folder / other).write_bytes(data)
            flip(folder / name, at)
            writer = CheckpointWriter(target, UNITS, "d", max_shard_bytes=shard_bytes)
            rewritten.add(len(writer.done))
            assert len(writer.done) < 4
            writer.done = {"keep": {}}  # close() would remove a folder with nothing recorded
            writer.close()
    assert rewritten == {0, 1, 2, 3}
    for other, data in saved.items():
        (folder / other).write_bytes(data)
    flip(folder / shards_of(folder)[0].name, 9)
    assert write(target, max_shard_bytes=shard_bytes) == NAMES
    assert contents(target) == whole


def test_shard_of_a_lost_file_is_written_again(tmp_path, whole, shard_bytes):
    target = tmp_path / "model"
    write(target, 5, max_shard_bytes=shard_bytes)
    shards_of(tmp_path / "model.incomplete")[0].unlink()
    assert write(target, max_shard_bytes=shard_bytes) == NAMES
    assert contents(target) == whole


@pytest.mark.parametrize("content", [b"", b'{"digest"', b"\0\0\0\0", b"\0\0\0\n"])
def test_empty_or_torn_journal_alone_is_a_new_beginning(content, tmp_path, whole, shard_bytes):
    folder = tmp_path / "model.incomplete"
    folder.mkdir()
    (folder / JOURNAL).write_bytes(content)
    assert write(tmp_path / "model", max_shard_bytes=shard_bytes) == NAMES
    assert contents(tmp_path / "model") == whole


class Killed(BaseException):
    """Stands for kill -9: nothing after it runs but what the test runs."""


def half_write(stream, data) -> None:
    stream.write(memoryview(data)[: len(data) // 2])


# Where a process may die: the function that is not called any more, or only half carried out.
DEATHS = {
    "open": (writer_module, "open", None),
    "unlink": (Path, "unlink", None),
    "rename": (os, "rename", None),
    "truncate": (os, "truncate", None),
    "fsync": (os, "fsync", None),
    "write": (writer_module, "write_all", None),
    "half a write": (writer_module, "write_all", half_write),
    "half a file": (writer_module, "write_file", lambda path, data: path.write_bytes(data[:9])),
}


@pytest.mark.parametrize("begun", [False, True], ids=["new run", "resumed run"])
@pytest.mark.parametrize("case", DEATHS)
def test_killed_at_any_system_call_the_next_run_gives_the_same_files(
    case, begun, tmp_path, shard_bytes, whole, monkeypatch
):
    """Dies at the n-th call of the function, for every n until the run survives."""
    owner, name, last_act = DEATHS[case]
    original = getattr(owner, name, open)
    deaths = 0
    for calls in itertools.count():
        target, left = tmp_path / f"model-{calls}", calls
        if begun:
            write(target, 3, max_shard_bytes=shard_bytes)
            append(shards_of(tmp_path / f"model-{calls}.incomplete")[-1], b"torn")

        def dies(*args, **kwargs):
            nonlocal left
            left -= 1
            if left < 0:
                if last_act:
                    last_act(*args)
                raise Killed
            return original(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, dies, raising=False)
            patch.setattr(CheckpointWriter, "close", release)
            with contextlib.suppress(Killed):
                write(target, max_shard_bytes=shard_bytes)
        deaths += left < 0
        if not target.exists():
            write(target, max_shard_bytes=shard_bytes)
        assert contents(target) == whole
        assert not target.with_name(target.name + ".incomplete").exists()
        if left >= 0:
            break
    assert deaths == calls
    assert deaths or (case, begun) == ("truncate", False)  # only a resumed run cuts files


def release(writer: CheckpointWriter) -> None:
    """What the system does with the files of a killed process."""
    for stream in (writer._stream, writer._journal):
        if stream:
            stream.close()
    if writer._lock is not None:
        os.close(writer._lock)


def test_finished_folder_without_its_name_is_not_mixed_with_another_run(tmp_path, monkeypatch):
    """Killed between journal and rename, then repeated with settings that give other files."""
    target = tmp_path / "model"
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", lambda old, new: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            write(target, max_shard_bytes=150)
    assert len(shards_of(tmp_path / "model.incomplete")) > 2
    write(target, units=UNITS[:3], digest="another run")
    assert set(contents(target)) == {"model.safetensors", INDEX, *FILES}


# -- refusals -------------------------------------------------------------------------------------


def test_unfinished_run_of_another_digest_is_refused_and_kept(tmp_path):
    write(tmp_path / "model", 3)
    before = contents(tmp_path / "model.incomplete")
    with pytest.raises(MlxSvdError, match="other settings or another source; delete it"):
        write(tmp_path / "model", digest="other")
    assert contents(tmp_path / "model.incomplete") == before
    assert write(tmp_path / "model") == NAMES[3:]


def test_unfinished_run_with_other_shards_is_refused_and_kept(tmp_path):
    write(tmp_path / "model", 3, max_shard_bytes=150)
    before = contents(tmp_path / "model.incomplete")
    with pytest.raises(MlxSvdError, match="other settings"):
        write(tmp_path / "model")
    assert contents(tmp_path / "model.incomplete") == before


def test_second_writer_is_refused_while_the_first_lives(tmp_path):
    target = tmp_path / "model"
    first = CheckpointWriter(target, UNITS, "d")
    first.write(NAMES[0], make_tensors(UNITS[0][1]), {})
    for digest in ("d", "other"):
        with pytest.raises(MlxSvdError, match=r"model.incomplete: another mlx-svd is writing"):
            CheckpointWriter(target, UNITS, digest)
    for name, specs in UNITS[1:]:
        first.write(name, make_tensors(specs), {})
    first.finish(FILES)
    first.close()
    write(tmp_path / "alone")
    assert contents(target) == contents(tmp_path / "alone")


def test_writer_that_waited_on_the_folder_of_a_finished_run_leaves_the_result_alone(
    tmp_path, monkeypatch
):
    """The other run finishes between this one's mkdir and its lock."""
    target, flock = tmp_path / "model", fcntl.flock

    def finish_first(descriptor, mode):
        monkeypatch.setattr(fcntl, "flock", flock)
        write(target)
        flock(descriptor, mode)

    monkeypatch.setattr(fcntl, "flock", finish_first)
    with pytest.raises(MlxSvdError, match="exists already"):
        write(target, digest="other")
    assert set(contents(target)) == {"model.safetensors", INDEX, *FILES}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_lock_ends_with_the_process_that_held_it(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; import mlx.core as mx\n"
        "from mlx_svd.checkpoint.writer import CheckpointWriter\n"
        "from mlx_svd.checkpoint.layout import TensorSpec\n"
        "w = CheckpointWriter(Path(sys.argv[1]), [('a', (TensorSpec('a', (2,), mx.float32),)),"
        " ('b', ())], 'd')\n"
        "w.write('a', [mx.zeros(2)], {})\n"
        "os.kill(os.getpid(), 9)\n"
    )
    root = str(Path(mlx_svd.__file__).parents[1])
    target = tmp_path / "model"
    result = subprocess.run(
        [sys.executable, "-c", code, str(target)],
        env={**os.environ, "PYTHONPATH": root},
        timeout=60,
        check=False,
    )
    assert result.returncode == -9
    units = [("a", (TensorSpec("a", (2,), mx.float32),)), ("b", ())]
    writer = CheckpointWriter(target, units, "d")
    assert list(writer.done) == ["a"]
    writer.close()


@pytest.mark.parametrize("kind", ["folder", "file", "link to nothing"])
def test_existing_target_is_refused(kind, tmp_path):
    target = tmp_path / "model"
    if kind == "folder":
        target.mkdir()
    elif kind == "file":
        target.write_text("")
    else:
        target.symlink_to("nothing")
    with pytest.raises(MlxSvdError, match=r"model: exists already; delete it"):
        write(target)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_target_that_appears_meanwhile_is_left_alone_and_the_run_can_be_finished(tmp_path):
    target = tmp_path / "model"
    writer = CheckpointWriter(target, UNITS, "d")
    for name, specs in UNITS:
        writer.write(name, make_tensors(specs), {"of": name, "value": 0.1 + len(name)})
    target.mkdir()
    with pytest.raises(MlxSvdError, match="exists already"):
        writer.finish(FILES)
    writer.close()
    assert list(target.iterdir()) == []
    target.rmdir()
    assert write(target) == []
    write(tmp_path / "alone")
    assert contents(target) == contents(tmp_path / "alone")


def test_folder_of_someone_else_is_refused_and_kept(tmp_path):
    folder = tmp_path / "model.incomplete"
    (folder / "sub").mkdir(parents=True)
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(MlxSvdError, match=r"model.incomplete: is in the way.*delete it"):
        write(tmp_path / "model")
    assert (folder / "mine.txt").read_text() == "mine"
    assert (folder / "sub").is_dir()


def test_wrong_order_shape_dtype_or_count_raises_and_records_nothing(tmp_path):
    writer = CheckpointWriter(tmp_path / "model", UNITS, "d")
    good = make_tensors(UNITS[0][1])
    with pytest.raises(AssertionError, match=r"out of order: m\.1 instead of m\.0"):
        writer.write("m.1", make_tensors(UNITS[1][1]), {})
    for wrong in ([good[0].T[None]], [good[0].astype(mx.int32)]):
        with pytest.raises(AssertionError, match="planned"):
            writer.write("m.0", wrong, {})
    for wrong in ([], good * 2):
        with pytest.raises(ValueError, match="zip"):
            writer.write("m.0", wrong, {})
    with pytest.raises(AssertionError, match=r"6 units were not written, the first: m\.0"):
        writer.finish(FILES)
    writer.close()
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "model")
    assert (tmp_path / "model").is_dir()


def test_unit_is_not_written_twice(tmp_path):
    writer = CheckpointWriter(tmp_path / "model", UNITS, "d")
    writer.write("m.0", make_tensors(UNITS[0][1]), {})
    with pytest.raises(AssertionError, match="out of order"):
        writer.write("m.0", make_tensors(UNITS[0][1]), {})
    writer.close()


# -- full disk ------------------------------------------------------------------------------------


def test_disk_too_small_is_seen_before_writing_and_leaves_nothing(tmp_path, monkeypatch):
    needed = sum(spec.nbytes for _, specs in UNITS for spec in specs)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    with pytest.raises(MlxSvdError, match=r"model: needs .* free some space"):
        write(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    write(tmp_path / "model")


def test_resumed_run_needs_space_only_for_what_is_left(tmp_path, monkeypatch):
    write(tmp_path / "model", 4)
    needed = sum(spec.nbytes for _, specs in UNITS[4:] for spec in specs)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    with pytest.raises(MlxSvdError, match="free some space"):
        write(tmp_path / "model")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    assert write(tmp_path / "model") == NAMES[4:]


# Run with a limit on the size of files that falls into the middle of the third unit.
_FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import mlx.core as mx
from mlx_svd.checkpoint.layout import TensorSpec
from mlx_svd.checkpoint.writer import CheckpointWriter
from mlx_svd.errors import MlxSvdError
units = [(f"m.{i}", (TensorSpec(f"m.{i}.weight", (64, 256), mx.float32),)) for i in range(5)]
if int(sys.argv[2]):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
try:
    writer = CheckpointWriter(Path(sys.argv[1]), units, "d")
    try:
        print("resumed", len(writer.done))
        for name, specs in units:
            if name not in writer.done:
                writer.write(name, [mx.full((64, 256), float(name[2:]))], {})
        writer.finish({})
    finally:
        writer.close()
except MlxSvdError as error:
    print("error:", error)
    sys.exit(2)
"""


def limited(target: Path, limit: int) -> subprocess.CompletedProcess:
    root = str(Path(mlx_svd.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-c", _FULL_DISK, str(target), str(limit)],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_write_that_the_system_refuses_is_one_line_and_continues_with_space(tmp_path):
    target = tmp_path / "model"
    result = limited(target, 2 * 65536 + 30_000)
    assert result.returncode == 2, result.stderr
    assert result.stderr == ""
    resumed, error = result.stdout.splitlines()
    assert resumed == "resumed 0"
    assert str(tmp_path / "model.incomplete") in error
    assert "too large" in error
    assert "make room and repeat the command" in error
    assert not target.exists()
    result = limited(target, 0)
    assert (result.returncode, result.stdout) == (0, "resumed 2\n"), result.stderr
    loaded = mx.load(str(target / "model.safetensors"))
    assert all((loaded[f"m.{i}.weight"] == i).all().item() for i in range(5))
    assert limited(tmp_path / "whole", 0).returncode == 0
    assert contents(target) == contents(tmp_path / "whole")


@pytest.mark.parametrize("function", ["write_all", "write_file", "sync_folder"])
@pytest.mark.parametrize("calls", [0, 1, 2])
def test_full_disk_at_any_write_is_one_line_and_continues_with_space(
    function, calls, tmp_path, monkeypatch, shard_bytes, whole
):
    original, left = getattr(writer_module, function), calls

    def full(*args):
        nonlocal left
        left -= 1
        if left == -1:
            raise OSError(28, "No space left on device")
        return original(*args)

    target = tmp_path / "model"
    with monkeypatch.context() as patch:
        patch.setattr(writer_module, function, full)
        with pytest.raises(MlxSvdError, match=r"model\.incomplete: no space left .* make room"):
            write(target, max_shard_bytes=shard_bytes)
    if not target.exists():
        write(target, max_shard_bytes=shard_bytes)
    assert contents(target) == whole


def test_output_below_a_file_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MlxSvdError, match=r"Not a directory; make it writable .* --mlx-path"):
        write(tmp_path / "file" / "model")
