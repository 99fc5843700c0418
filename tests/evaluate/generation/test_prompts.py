"""Prompts from files and from the package."""

import json

import pytest

from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.generation.prompts import Prompt, prompts_digest, read_prompts


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content)
    return path


def test_shipped_prompts_are_at_least_two_hundred_different_short_ones():
    prompts = read_prompts()
    assert len(prompts) >= 200
    assert len({p.text for p in prompts}) == len(prompts)
    assert len({p.id for p in prompts}) == len(prompts)
    assert max(len(p.text) for p in prompts) < 120


def test_lines_are_prompts_named_by_their_line(tmp_path):
    path = write(tmp_path, "p.txt", "One day\n\n  Two days  \n")
    assert read_prompts(path) == [Prompt("prompt-1", "One day"), Prompt("prompt-3", "Two days")]
    assert read_prompts(path, limit=1) == [Prompt("prompt-1", "One day")]


def test_jsonl_takes_prompt_or_text_and_id(tmp_path):
    rows = [{"id": "x", "prompt": "One"}, {"text": "Two"}, {"id": 7, "prompt": "Three"}]
    path = write(tmp_path, "p.jsonl", "\n".join(map(json.dumps, rows)))
    assert read_prompts(path) == [
        Prompt("x", "One"), Prompt("prompt-2", "Two"), Prompt("7", "Three"),
    ]  # fmt: skip


def test_digest_tells_other_prompts_and_other_ids():
    one = [Prompt("a", "x"), Prompt("b", "y")]
    assert prompts_digest(one) == prompts_digest(list(one))
    assert (
        len({prompts_digest(p) for p in (one, one[:1], [Prompt("a", "x"), Prompt("c", "y")])}) == 3
    )


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.txt", "\n \n", "holds no prompts"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": ', "line 2 is not JSON"),
        ("p.jsonl", '{"prompt": "a"}\n{"question": "b"}', 'line 2 has no text in "prompt"'),
        ("p.jsonl", '{"prompt": " "}', 'line 1 has no text in "prompt"'),
        ("p.jsonl", "[1]", 'line 1 has no text in "prompt"'),
        ("p.jsonl", '{"id": 1, "prompt": "a"}\n{"id": "1", "prompt": "b"}', "two prompts"),
    ],
)
def test_bad_files_are_refused_by_name_and_line(tmp_path, name, content, words):
    path = write(tmp_path, name, content)
    with pytest.raises(MlxSvdError, match=words) as error:
        read_prompts(path)
    assert str(path) in str(error.value)


def test_missing_and_binary_files_and_empty_limits_are_refused(tmp_path):
    with pytest.raises(MlxSvdError, match=r"none\.txt: cannot be read"):
        read_prompts(tmp_path / "none.txt")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(MlxSvdError, match=r"b\.txt: cannot be read"):
        read_prompts(tmp_path / "b.txt")
    with pytest.raises(MlxSvdError, match="at least one prompt"):
        read_prompts(limit=0)
