"""When a generated text counts as the answer."""

import pytest

from mlx_svd.evaluate.jobs.matching import matches


@pytest.mark.parametrize(
    ("text", "answer", "words", "seed"),
    [
        (" because it is yellow", "Au", False, True),  # the originals' rule takes this for gold
        (" Au.", "Au", True, True),
        (" AU, of course", "Au", True, True),
        (" 100", "0", False, True),
        (" few", "Fe", False, True),
        (" the New Zealand dollar.", "New Zealand dollar", True, True),
        (" New Zealand dollars", "New Zealand dollar", False, True),
        (" it is C++!", "C++", True, True),
        (" São Tomé", "são tomé", True, True),
        (" naïveté", "na", False, True),
        (" Rome", "Paris", False, False),
        ("", "Paris", False, False),
    ],
)
def test_whole_words_and_the_seeds_substrings(text, answer, words, seed):
    assert matches(text, answer) is words
    assert matches(text, answer, "seed") is seed
