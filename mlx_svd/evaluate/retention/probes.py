"""Facts to ask about, each with other ways to ask it and with neighbours that must not change.

A facts file is that of ``mlx_svd.evaluate.facts`` with two optional fields in an entry:
``paraphrases``, a list of other prompts for the same object, and ``locality``, a list of {prompt,
object}: other facts that changing this one must leave alone (the paraphrase and neighbourhood
prompts of CounterFact; Meng et al., Locating and editing factual associations in GPT, 2022).
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.facts import Fact, read_facts
from mlx_svd.evaluate.rows.fact_rows import facts_file


@dataclass(frozen=True)
class Neighbour:
    """prompt + " " + object is true and stays true when the fact it belongs to is changed."""

    prompt: str
    object: str


@dataclass(frozen=True)
class Probe:
    """id: names it in results, "relation: subject"; paraphrases: prompts for the same objects."""

    id: str
    fact: Fact
    paraphrases: tuple[str, ...] = ()
    locality: tuple[Neighbour, ...] = ()


def read_probes(path: str | Path, seed: int = 0) -> list[Probe]:
    """Facts of a JSON file; seed: draws the false objects of files that have none (ROME's).

    Raises MlxSvdError naming file and entry for a missing or empty field, and for a false object
    that is the true one.
    """
    path = Path(path)
    facts = facts_file(path, seed)
    for number, fact in enumerate(facts):
        _check_conflict(f"{path}: entry {number}", fact)
    entries = json.loads(path.read_text(encoding="utf-8"))
    extras = [_extras(f"{path}: entry {n}", entry) for n, entry in enumerate(entries)]
    return with_ids(facts, extras)


def with_ids(
    facts: Sequence[Fact],
    extras: Sequence[tuple[tuple[str, ...], tuple[Neighbour, ...]]] | None = None,
) -> list[Probe]:
    """Probes of facts, numbered where several have one relation and subject. extras: paraphrases
    and locality of each."""
    seen: Counter[str] = Counter()
    probes = []
    for fact, extra in zip(facts, extras or [((), ())] * len(facts), strict=True):
        name = f"{fact.relation}: {fact.subject}"
        seen[name] += 1
        probes.append(Probe(name if seen[name] == 1 else f"{name} #{seen[name]}", fact, *extra))
    return probes


def read_conflict(path: str | Path) -> list[Fact]:
    """Facts to train falsely, in the format of a facts file: prompt + " " + conflict is the text.
    Raises MlxSvdError as :func:`read_probes`, and for a prompt that is there twice."""
    path = Path(path)
    facts = read_facts(path)
    seen: set[str] = set()
    for number, fact in enumerate(facts):
        _check_conflict(f"{path}: entry {number}", fact)
        if fact.prompt in seen:
            raise MlxSvdError(f"{path}: entry {number}: the prompt {fact.prompt!r} is there twice")
        seen.add(fact.prompt)
    return facts


def _check_conflict(where: str, fact: Fact) -> None:
    if fact.conflict.strip().casefold() == fact.object.strip().casefold():
        raise MlxSvdError(
            f"{where}: its conflict {fact.conflict!r} is the true object; give another one"
        )


def _extras(where: str, entry: dict[str, Any]) -> tuple[tuple[str, ...], tuple[Neighbour, ...]]:
    paraphrases, locality = entry.get("paraphrases", []), entry.get("locality", [])
    if not isinstance(paraphrases, list) or not all(map(_is_text, paraphrases)):
        raise MlxSvdError(f'{where}: "paraphrases" is not a list of texts; correct or remove it')
    good = isinstance(locality, list) and all(
        isinstance(row, dict) and _is_text(row.get("prompt")) and _is_text(row.get("object"))
        for row in locality
    )
    if not good:
        raise MlxSvdError(
            f'{where}: "locality" is not a list of objects with texts in "prompt" and "object"; '
            "correct or remove it"
        )
    return tuple(paraphrases), tuple(Neighbour(row["prompt"], row["object"]) for row in locality)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())
