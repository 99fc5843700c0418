"""read_headers against the safetensors package, on good, truncated and corrupt files."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_svd.errors import MlxSvdError
from mlx_svd.source.headers import DTYPE_BYTES, INDEX_FILE, read_headers

NUMPY = (np.float32, np.float16, np.int64, np.int32, np.int16, np.int8, np.uint8, np.uint64)


def random_tensors(seed: int, count: int = 8) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    tensors = {}
    for index in range(count):
        shape = tuple(int(i) for i in rng.integers(1, 7, size=int(rng.integers(0, 4))))
        dtype = NUMPY[int(rng.integers(len(NUMPY)))]
        tensors[f"layer.{seed}.{index}.wéight"] = rng.integers(0, 99, size=shape).astype(dtype)
    return tensors


def write(folder: Path, shards: int = 1, index: bool = True) -> dict[str, str]:
    """Random shards by the safetensors package and an index; returns tensor -> file."""
    files = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        tensors = random_tensors(shard)
        safetensors.numpy.save_file(tensors, folder / name, {"format": "pt", "text": 'quo"te'})
        files |= dict.fromkeys(tensors, name)
    if index:
        (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return files


def reference(path: Path) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """name -> (dtype, shape, bytes) by the safetensors package."""
    return {
        name: (entry["dtype"], tuple(entry["shape"]), len(entry["data"]))
        for name, entry in safetensors.deserialize(path.read_bytes())
    }


def ours(folder: Path) -> dict[str, tuple[str, tuple[int, ...], int]]:
    return {n: (h.dtype, h.shape, h.nbytes) for n, h in read_headers(folder).items()}


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("shards", [1, 3])
def test_names_dtypes_shapes_bytes_and_files_are_those_of_the_safetensors_package(
    shards, index, tmp_path
):
    files = write(tmp_path, shards, index)
    expected = {}
    for path in sorted(tmp_path.glob("*.safetensors")):
        expected |= reference(path)
    assert ours(tmp_path) == expected
    assert {name: h.file.name for name, h in read_headers(tmp_path).items()} == files
    assert len(expected) == 8 * shards


def test_every_dtype_has_the_size_that_the_safetensors_package_gives_it(tmp_path):
    for dtype, size in DTYPE_BYTES.items():
        path = tmp_path / "model.safetensors"
        path.write_bytes(raw_file({"t": (dtype, [3], [0, 3 * size])}, 3 * size))
        assert ours(tmp_path) == reference(path) == {"t": (dtype, (3,), 3 * size)}


def raw_file(entries: dict, data: int, **extra) -> bytes:
    header = {n: {"dtype": d, "shape": s, "data_offsets": o} for n, (d, s, o) in entries.items()}
    text = json.dumps(header | extra).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data)


def test_empty_tensors_and_scalars_are_read(tmp_path):
    path = tmp_path / "model.safetensors"
    entries = {"scalar": ("F32", [], [0, 4]), "none": ("F32", [0, 7], [4, 4])}
    path.write_bytes(raw_file(entries, 4))
    assert ours(tmp_path) == reference(path)


def test_file_cut_at_any_byte_is_refused_and_named(tmp_path):
    write(tmp_path)
    path = next(tmp_path.glob("*.safetensors"))
    data = path.read_bytes()
    header = 8 + struct.unpack("<Q", data[:8])[0]
    for length in {*range(header + 2), *range(header, len(data), 7), len(data) - 1}:
        path.write_bytes(data[:length])
        with pytest.raises(MlxSvdError, match="truncated or corrupt") as raised:
            read_headers(tmp_path)
        assert str(raised.value).startswith(f"{path}: ")
        assert "download or copy it again" in str(raised.value)
    path.write_bytes(data)
    assert ours(tmp_path) == reference(path)


def test_file_that_goes_on_after_its_tensors_is_refused(tmp_path):
    write(tmp_path)
    path = next(tmp_path.glob("*.safetensors"))
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(MlxSvdError, match="truncated or corrupt"):
        read_headers(tmp_path)


F4 = ("F32", [1], [0, 4])
# name -> entries and bytes of data that contradict each other
CONTRADICTIONS = {
    "gap": ({"a": F4, "b": ("F32", [1], [8, 12])}, 12),
    "gap at the beginning": ({"a": ("F32", [1], [4, 8])}, 8),
    "overlap": ({"a": ("F32", [2], [0, 8]), "b": ("F32", [2], [4, 12])}, 12),
    "the same bytes twice": ({"a": F4, "b": F4}, 4),
    "shape larger than the bytes": ({"a": ("F32", [2], [0, 4])}, 4),
    "shape smaller than the bytes": ({"a": ("F32", [1], [0, 8])}, 8),
    "end before begin": ({"a": ("F32", [1], [4, 0])}, 4),
    "negative shape": ({"a": ("F32", [-1, -1], [0, 4])}, 4),
    "negative offset": ({"a": ("F32", [2], [-4, 4])}, 4),
    "shape of fractions": ({"a": ("F32", [0.5, 2.0], [0, 4])}, 4),
    "shape of texts": ({"a": ("F32", ["1"], [0, 4])}, 4),
    "shape of truth values": ({"a": ("F32", [True], [0, 4])}, 4),
    "shape a number": ({"a": ("F32", 1, [0, 4])}, 4),
    "three offsets": ({"a": ("F32", [1], [0, 4, 4])}, 4),
    "offsets of fractions": ({"a": ("F32", [1], [0.0, 4.0])}, 4),
    "dtype a list": ({"a": (["F32"], [1], [0, 4])}, 4),
    "huge shape": ({"a": ("F32", [2**40, 2**40], [0, 4])}, 4),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_header_that_contradicts_itself_is_refused_as_by_the_safetensors_package(case, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw_file(*CONTRADICTIONS[case]))
    with pytest.raises(safetensors.SafetensorError):
        safetensors.deserialize(path.read_bytes())
    with pytest.raises(MlxSvdError, match=r"model\.safetensors: truncated or corrupt"):
        read_headers(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"7",
        b'"a"',
        b"null",
        b"[" * 50_000,
        b"\xff\xfe",
        b'{"a": 1}',
        b'{"a": {}}',
    ],
)
def test_header_that_is_no_header_is_refused(text, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(MlxSvdError, match=r"model\.safetensors: truncated or corrupt"):
        read_headers(tmp_path)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**12])
def test_absurd_header_length_is_refused_without_reading(length, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}" * 40)
    with pytest.raises(MlxSvdError, match="too short for its header"):
        read_headers(tmp_path)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F64", "BF8", ""])
def test_dtype_that_mlx_cannot_read_is_refused_with_the_tensor(dtype, tmp_path):
    size = 8 if dtype == "F64" else 1
    (tmp_path / "model.safetensors").write_bytes(raw_file({"a.b": (dtype, [1], [0, size])}, size))
    with pytest.raises(MlxSvdError, match=r"model\.safetensors: tensor a\.b has dtype .*bfloat16"):
        read_headers(tmp_path)


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> tuple[Path, bytes]:
    folder = tmp_path_factory.mktemp("sample")
    write(folder, index=False)
    path = next(folder.glob("*.safetensors"))
    return path, path.read_bytes()


@settings(max_examples=600, deadline=None)
@given(data=st.data())
def test_flipped_header_bytes_are_refused_or_read_as_the_safetensors_package_does(sample, data):
    path, good = sample
    end = 8 + struct.unpack("<Q", good[:8])[0]
    changed = bytearray(good)
    printable = st.sampled_from(b'0123456789,:.-e[]{}" FUIB"tf')
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, end - 1))
        changed[at] = data.draw(st.one_of(st.integers(0, 255), printable))
    path.write_bytes(changed)
    try:
        expected = reference(path)
    except safetensors.SafetensorError:
        expected = None
    if expected and not {dtype for dtype, _, _ in expected.values()} <= {*DTYPE_BYTES}:
        expected = None  # the package knows more dtypes than MLX can read
    try:
        read = ours(path.parent)
    except MlxSvdError:
        read = None
    assert read == expected


def test_folder_without_weights_is_refused_and_says_what_it_holds(tmp_path):
    with pytest.raises(MlxSvdError, match=r"no model\*\.safetensors file"):
        read_headers(tmp_path)
    (tmp_path / "pytorch_model-00001-of-00002.bin").write_bytes(b"")
    with pytest.raises(MlxSvdError, match=r"only PyTorch \.bin weights; convert them"):
        read_headers(tmp_path)


def test_tensor_in_two_files_is_refused_with_both(tmp_path):
    for name in ("model.safetensors", "model-00001-of-00001.safetensors"):
        (tmp_path / name).write_bytes(raw_file({"a": F4}, 4))
    with pytest.raises(MlxSvdError, match=r"tensor a is also in .*delete the stale file") as raised:
        read_headers(tmp_path)
    assert "model.safetensors" in str(raised.value)
    assert "model-00001-of-00001.safetensors" in str(raised.value)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}']
)
def test_index_that_is_no_index_is_refused(content, tmp_path):
    write(tmp_path)
    (tmp_path / INDEX_FILE).write_text(content)
    with pytest.raises(MlxSvdError, match=r"index\.json: not a valid index; download it again"):
        read_headers(tmp_path)


def test_index_that_names_what_is_not_there_is_refused(tmp_path):
    files = write(tmp_path, 2)
    tensor, file = next(iter(files.items()))
    other = next(name for name in files.values() if name != file)
    for wrong, word in (
        ({"ghost": file}, "ghost"),
        ({tensor: "model-9.safetensors"}, "model-9.safetensors"),
        ({tensor: other}, tensor),
    ):
        (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": files | wrong}))
        with pytest.raises(MlxSvdError, match="download the model again") as raised:
            read_headers(tmp_path)
        assert str(raised.value).startswith(f"{tmp_path / INDEX_FILE}: names ")
        assert word in str(raised.value)
