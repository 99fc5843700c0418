"""A task of questions with choices: prompt, choices and metrics of a row, under lm-eval's names."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_svd.evaluate.likelihood.encode import Item
from mlx_svd.evaluate.rows.hub import Hub
from mlx_svd.evaluate.rows.read import Row, choice_row
from mlx_svd.evaluate.rows.shots import draw_shots, first_shots


def question_answer(row: Row) -> str:
    """The prompt that ARC and PIQA have in lm-eval."""
    return f"Question: {row.question}\nAnswer:"


def accuracy(row: Row, log_likelihoods: np.ndarray) -> dict[str, float]:
    """acc: is the right choice the likeliest?"""
    return {"acc": float(np.argmax(log_likelihoods) == row.label)}


def accuracy_and_norm(row: Row, log_likelihoods: np.ndarray) -> dict[str, float]:
    """acc, and acc_norm with each log-likelihood divided by the characters of its choice."""
    lengths = np.array([float(len(choice)) for choice in row.choices])
    norm = float(np.argmax(log_likelihoods / lengths) == row.label)
    return accuracy(row, log_likelihoods) | {"acc_norm": norm}


@dataclass(frozen=True)
class ChoiceTask:
    """name, version: lm-eval's; file: its rows in a local folder (shots_file: its examples);
    hub: its rows on the hub; from_hub: a hub row -> what a line of the file holds;
    parse: (where, line, number) -> Row; prompt: row -> text before " " + choice;
    description: row -> text before everything; metrics: (row, log-likelihoods) -> numbers;
    metric_names: theirs; fixed_shots: examples are not to be changed (TruthfulQA: none);
    by_subject: examples are the first ones of the subject (MMLU); split: the choice is in the
    prompt and what follows it is scored (Winogrande)."""

    name: str
    file: str = ""
    hub: Hub | None = None
    from_hub: Callable[[dict[str, Any]], dict[str, Any]] = lambda row: row
    parse: Callable[[str, dict[str, Any], int], Row] = choice_row
    prompt: Callable[[Row], str] = question_answer
    choices: Callable[[Row], Sequence[str]] = lambda row: row.choices
    description: Callable[[Row], str] = lambda row: ""
    metrics: Callable[[Row, np.ndarray], dict[str, float]] = accuracy_and_norm
    metric_names: tuple[str, ...] = ("acc", "acc_norm")
    chance: Callable[[Row], float] = lambda row: 1 / len(row.choices)
    version: float = 1.0
    shots_file: str = ""
    fixed_shots: int | None = None
    by_subject: bool = False
    split: Callable[[Row], tuple[list[str], str]] | None = None

    @property
    def graded_by_one_answer(self) -> bool:
        """acc is 0 or 1: an answer can flip."""
        return self.metrics in (accuracy, accuracy_and_norm)

    def shots(
        self, rows: Sequence[Row], pool: Sequence[Row], count: int, seed: int, *, own: bool
    ) -> list[list[Row]]:
        """Examples for each row (see :func:`draw_shots`)."""
        if self.by_subject:
            return first_shots(rows, pool, count)
        return draw_shots(rows, pool, count, seed, own=own)

    def item(self, row: Row, shots: Sequence[Row]) -> Item:
        """What is scored: description, examples and prompt, then every choice."""
        before = self.description(row) + "".join(self._solved(shot) + "\n\n" for shot in shots)
        if self.split:
            contexts, rest = self.split(row)
            pairs = tuple((before + context, " " + rest) for context in contexts)
        else:
            context = before + self.prompt(row)
            pairs = tuple((context, " " + choice) for choice in self.choices(row))
        return Item(row.where or f"{self.name} {row.id}", pairs)

    def _solved(self, row: Row) -> str:
        if self.split:
            contexts, rest = self.split(row)
            return f"{contexts[row.label]} {rest}"
        return f"{self.prompt(row)} {self.choices(row)[row.label]}"
