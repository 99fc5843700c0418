"""Texts -> windows of token ids, and what is said about texts that give none."""

import json
import logging
import shutil

import numpy as np
import pytest

from mlx_svd.calibrate.text import SHIPPED_TEXT, read_windows
from mlx_svd.checkpoint.loader import load_tokenizer
from mlx_svd.demo import DEMO_MODEL
from mlx_svd.errors import MlxSvdError


class Letters:
    """A tokenizer for which a character is a token."""

    def encode(self, text: str, verbose: bool = True) -> list[int]:
        return [ord(letter) for letter in text]


def write(folder, text: str | bytes, name: str = "text.txt"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def first_letters(windows) -> str:
    return "".join(map(chr, windows.tokens[:, 0]))


@pytest.fixture(scope="module")
def tokenizer():
    """That of the embedded model, new: transformers warns once for each."""
    return load_tokenizer(DEMO_MODEL, {}, {})


def test_windows_follow_each_other_and_the_rest_is_left_out(tmp_path):
    windows = read_windows(Letters(), write(tmp_path, "abcdefghijk"), length=3)
    assert [bytes(list(row)).decode() for row in windows.tokens] == ["abc", "def", "ghi"]
    assert windows.tokens.dtype == np.int32
    assert (len(windows), windows.available, windows.origin) == (3, 3, "text.txt")


@pytest.mark.parametrize(
    ("count", "expected"),
    [(None, "abcdefghijk"), (11, "abcdefghijk"), (99, "abcdefghijk"), (2, "ak"), (3, "afk"),
     (6, "acegik"), (1, "a")],
)  # fmt: skip
def test_windows_are_spread_evenly_over_the_whole_text(count, expected, tmp_path):
    path = write(tmp_path, "".join(letter * 4 for letter in "abcdefghijk"))
    windows = read_windows(Letters(), path, count=count, length=4)
    assert first_letters(windows) == expected
    assert windows.available == 11


def test_jsonl_is_the_text_fields_with_a_blank_line_between(tmp_path):
    lines = ['{"text": "ab", "id": 1}', "", '{"text": "c\\nd"}']
    path = write(tmp_path, "\n".join(lines) + "\n", "text.jsonl")
    windows = read_windows(Letters(), path, length=1)
    assert first_letters(windows).split() == ["ab", "c", "d"]
    assert first_letters(windows).startswith("ab\n\n")


def test_separators_inside_a_json_string_do_not_end_the_line(tmp_path):
    texts = ["one\u2028two", "three\x85four", "five\x0csix"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    path = write(tmp_path, "\r\n".join(lines), "text.jsonl")
    assert first_letters(read_windows(Letters(), path, length=1)) == "\n\n".join(texts)


@pytest.mark.parametrize("line", ["{", "[1]", '"text"', '{"content": "a"}', '{"text": 3}', "null",
                                  '{"text": null}', "[" * 100_000])  # fmt: skip
def test_a_bad_jsonl_line_is_named(line, tmp_path):
    path = write(tmp_path, '{"text": "fine"}\n' + line, "text.jsonl")
    with pytest.raises(MlxSvdError, match=r"text\.jsonl: line 2 is not a JSON object with"):
        read_windows(Letters(), path, length=1)


@pytest.mark.parametrize("content", ["", " \n\t\n"])
@pytest.mark.parametrize("name", ["text.txt", "text.jsonl"])
def test_an_empty_file_is_said(name, content, tmp_path):
    with pytest.raises(MlxSvdError, match=f"{name}: is empty"):
        read_windows(Letters(), write(tmp_path, content, name), length=1)


def test_a_text_shorter_than_one_window_says_both_lengths(tmp_path):
    path = write(tmp_path, "short")
    assert len(read_windows(Letters(), path, length=5)) == 1
    with pytest.raises(MlxSvdError, match=r"text\.txt: has 5 tokens.*one window of 6"):
        read_windows(Letters(), path, length=6)


def test_ids_beyond_the_vocabulary_are_refused(tmp_path):
    path = write(tmp_path, "abz")
    largest = ord("z")
    assert len(read_windows(Letters(), path, length=1, vocab_size=largest + 1)) == 3
    with pytest.raises(MlxSvdError, match=f"token id {largest} is beyond.*vocabulary of {largest}"):
        read_windows(Letters(), path, length=1, vocab_size=largest)


@pytest.mark.parametrize("name", ["missing.txt", "folder/deeper/missing.txt", "./a/b", "folder"])
def test_a_missing_file_is_said_without_asking_the_hub(name, tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mlx_svd.calibrate.text._hub", lambda name: pytest.fail("asked the hub"))
    with pytest.raises(MlxSvdError, match=f"{name}: no such text file"):
        read_windows(Letters(), name)


@pytest.mark.parametrize("content", [b"caf\xe9 au lait", b"\xff\xfea\x00b\x00", b"\x80"])
def test_a_file_in_another_encoding_is_named(content, tmp_path):
    path = write(tmp_path, content)
    with pytest.raises(MlxSvdError, match=r"text\.txt: cannot be read as text"):
        read_windows(Letters(), path, length=1)


def test_texts_are_utf_8_whatever_the_locale_says(tmp_path, monkeypatch):
    monkeypatch.setattr("locale.getencoding", lambda: "ascii")
    monkeypatch.setattr("io.text_encoding", lambda encoding, _=0: encoding or "ascii")
    assert first_letters(read_windows(Letters(), write(tmp_path, "é€"), length=1)) == "é€"


def test_the_digest_changes_with_the_windows_and_only_with_them(tmp_path):
    text = "the quick brown fox jumps over the lazy dog"
    path = write(tmp_path, text)
    windows = read_windows(Letters(), path, length=4)
    (tmp_path / "elsewhere").mkdir()
    copy = shutil.copy(path, tmp_path / "elsewhere" / "other.txt")
    assert read_windows(Letters(), copy, length=4).digest == windows.digest
    others = [
        read_windows(Letters(), path, length=4, count=5),
        read_windows(Letters(), write(tmp_path, text.replace("fox", "cat"), "b.txt"), length=4),
        read_windows(Letters(), write(tmp_path, text[4:] + text[:4], "c.txt"), length=4),
    ]
    assert len({windows.digest, *(other.digest for other in others)}) == 4


def test_the_shipped_text_gives_twenty_windows_of_512_to_the_embedded_model(tokenizer):
    windows = read_windows(tokenizer, length=512)
    assert len(windows) == windows.available >= 20
    assert windows.tokens.shape[1] == 512
    assert windows.origin == "the text shipped with mlx-svd"
    # Not one passage over and over: no window is like another.
    assert len({row.tobytes() for row in windows.tokens}) == len(windows)
    everything = tokenizer.encode(SHIPPED_TEXT.read_text(encoding="utf-8"), verbose=False)
    assert windows.tokens.ravel().tolist() == everything[: windows.tokens.size]


def test_nobody_is_told_that_the_text_is_longer_than_the_context():
    records = []

    class Keep(logging.Handler):
        def emit(self, record):
            records.append(record.getMessage())

    handler, log = Keep(), logging.getLogger("transformers")
    log.addHandler(handler)
    try:
        tokenizer = load_tokenizer(DEMO_MODEL, {}, {})
        read_windows(tokenizer, length=512)
        assert [r for r in records if "longer than" in r] == []
        tokenizer.encode(SHIPPED_TEXT.read_text(encoding="utf-8"))  # the handler does hear it
        assert [r for r in records if "longer than" in r]
    finally:
        log.removeHandler(handler)
