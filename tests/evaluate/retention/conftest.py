"""A tiny random model with one token a character, and facts about it."""

import pytest

import mlx_svd
from mlx_svd.evaluate.facts import Fact
from mlx_svd.evaluate.retention import Neighbour, Probe
from tests.finetune.conftest import write_teacher

WORDS = ("oak", "elm", "fir", "yew", "ash", "box", "may", "bay")


def probe(i: int, relation: str = "tree", subject: str = "", **extra) -> Probe:
    names = [WORDS[(i + k) % len(WORDS)] for k in range(4)]
    subject = subject or f"s{i}"
    fact = Fact(relation, subject, names[0], f"{subject} of {relation} is", names[1],
                tuple(names[2:]))  # fmt: skip
    return Probe(f"{relation}: {subject}", fact, **extra)


PROBES = [
    probe(0, paraphrases=("zero's tree:", "a tree, s0"), locality=(Neighbour("s9 is", "fig"),)),
    *[probe(i, relation="tree" if i % 2 else "bush") for i in range(1, 24)],
    *[probe(i, relation="fern", subject=f"s{i - 24}") for i in range(24, 40)],
    *[probe(i, relation="moss") for i in range(40, 48)],
]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """(model, tokenizer)."""
    folder = write_teacher(tmp_path_factory.mktemp("models") / "tiny", seed=3)
    return mlx_svd.load(folder, dtype="float32")
