"""Facts from their files: this project's, ROME's known facts, and CounterFact on the hub."""

import json
import random
from pathlib import Path
from typing import Any

from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.facts import Fact, read_facts
from mlx_svd.evaluate.rows.hub import Hub, hub_rows

HUB = Hub("NeelNanda/counterfact-tracing", "*", "train")
_FALSE_OBJECTS = 4
_KNOWN_FIELDS = ("subject", "attribute", "prompt", "relation_id")


def facts_file(path: Path, seed: int) -> list[Fact]:
    """Facts of a JSON list: {relation, subject, object, prompt, conflict, distractors}, or ROME's
    {subject, attribute, prompt, relation_id}, which have no false objects: up to four other
    attributes of the same relation are drawn by the seed.

    Raises MlxSvdError naming file and entry.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MlxSvdError(f"{path}: cannot be read as JSON; give a list of facts") from error
    first = entries[0] if isinstance(entries, list) and entries else None
    if isinstance(first, dict) and "attribute" in first:
        return _known(path, entries, seed)
    return read_facts(path)


def hub_facts() -> list[Fact]:
    """CounterFact: a true and a false object for each prompt."""
    return [
        Fact(
            row["relation_id"],
            row["subject"].strip(),
            row["target_true"].strip(),
            row["prompt"],
            row["target_false"].strip(),
            (),
        )
        for row in hub_rows(HUB, HUB.split)
    ]


def _known(path: Path, entries: list[Any], seed: int) -> list[Fact]:
    for number, entry in enumerate(entries):
        for key in _KNOWN_FIELDS:
            value = entry.get(key) if isinstance(entry, dict) else None
            if not isinstance(value, str) or not value.strip():
                raise MlxSvdError(f'{path}: entry {number} has no text in "{key}"; write one')
    objects: dict[str, set[str]] = {}
    for entry in entries:
        objects.setdefault(entry["relation_id"], set()).add(entry["attribute"].strip())
    everything = set().union(*objects.values())
    generator, facts = random.Random(seed), []
    for entry in entries:
        true = entry["attribute"].strip()
        others = sorted(objects[entry["relation_id"]] - {true}) or sorted(everything - {true})
        false = generator.sample(others, min(_FALSE_OBJECTS, len(others)))
        if not false:
            raise MlxSvdError(
                f"{path}: all entries have the object {true!r}; nothing to tell apart"
            )
        facts.append(
            Fact(entry["relation_id"], entry["subject"], true, entry["prompt"], false[0],
                 tuple(false[1:]))
        )  # fmt: skip
    return facts
