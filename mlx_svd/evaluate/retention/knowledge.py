"""What the base model knows, and the parts that its facts play when something else is trained.

Only known facts can be retained or lost, so all others are left out. The known ones are divided
once, by seed, and the same division serves every arm of an experiment:

- conflict: trained to be false; uptake is measured on them (also on those that were not known);
- replay: set aside, and not asked again, for arms that train known facts along with the rest; in
  every arm, so that none is measured on what it was reminded of;
- same_subject, same_relation, elsewhere: the facts that retention is about, by how near they are to
  a conflict (its subject in another relation, else its relation, else neither).
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import mlx.nn as nn
import numpy as np

from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.facts import Fact
from mlx_svd.evaluate.retention.outcomes import Outcomes, Prober
from mlx_svd.evaluate.retention.probes import Probe, with_ids

CONFLICT = "conflict"
MEASURED = ("same_subject", "same_relation", "elsewhere")
_REPLAY_SHARE = 0.15


@dataclass(frozen=True)
class KnowledgeTest:
    """probes, groups (n,): what is asked and the part it plays; replay: known facts that may be
    trained along; base: the base model's outcomes, texts included; asked, known: facts that the
    base model was asked and knew, before any were left out by a limit; digest: of probes, groups
    and scoring, the same for outcomes that can be paired."""

    probes: tuple[Probe, ...]
    groups: np.ndarray
    replay: tuple[Fact, ...]
    base: Outcomes
    prober: Prober
    asked: int
    known: int
    seed: int
    digest: str

    def ask(self, model: nn.Module, *, write: bool = False) -> Outcomes:
        """The outcomes of another model with the same tokenizer."""
        return self.prober.ask(model, write=write)

    @property
    def measured(self) -> np.ndarray:
        """(n,) bool: known, and neither trained nor set aside."""
        return np.isin(self.groups, MEASURED)

    @property
    def conflict(self) -> list[Fact]:
        """Facts to train falsely."""
        return [p.fact for p, g in zip(self.probes, self.groups, strict=True) if g == CONFLICT]


def make_knowledge_test(
    base: nn.Module,
    tokenizer: Any,
    probes: Sequence[Probe],
    conflict: Sequence[Fact] | int | None,
    *,
    seed: int = 0,
    replay_share: float = _REPLAY_SHARE,
    limit: int | None = None,
    config: dict | None = None,
    scoring: str = "words",
    tokens: int = 10,
) -> KnowledgeTest:
    """Ask the base model, and divide what it knows.

    conflict: facts to train falsely, how many to draw from the known ones, or None; replay_share:
    of the other known facts; limit: measured facts at most, drawn by seed. Raises MlxSvdError if
    nothing is known, if a conflict contradicts the facts file, and if too little is left over.
    """
    drawn = conflict if isinstance(conflict, int) else None
    merged, trained = list(probes), []
    if drawn is None and conflict is not None:
        merged, trained = _merged(probes, conflict)
    found = Prober(tokenizer, merged, config=config, scoring=scoring, tokens=tokens).ask(
        base, write=True
    )
    known = np.flatnonzero(found.facts.known)
    if not len(known):
        raise MlxSvdError(
            f"none of {len(merged)} facts is known to the base model (the true object likelier "
            "than every false one), so there is nothing to retain; give other facts or a model "
            "that knows them"
        )
    generator = np.random.default_rng([seed, 7])
    if drawn is not None:
        if not 0 < drawn < len(known):
            raise MlxSvdError(
                f"--conflict-count {drawn}: the base model knows {len(known)} facts; give a number "
                "from 1 to below that"
            )
        trained = sorted(generator.choice(known, drawn, replace=False).tolist())
    others = np.setdiff1d(known, trained)
    replay = generator.permutation(others)[: int(replay_share * len(others))]
    measured = np.setdiff1d(others, replay)
    if not len(measured):
        raise MlxSvdError(
            f"all {len(known)} known facts are in the conflict; nothing is left whose retention "
            "could be measured: give fewer conflicts or more facts"
        )
    if limit is not None and limit < len(measured):
        measured = np.sort(generator.choice(measured, limit, replace=False))
    chosen = np.unique(np.concatenate([np.array(trained, dtype=np.int64), measured]))
    kept = [merged[i] for i in chosen]
    aside = tuple(merged[i].fact for i in replay)
    groups = _groups(merged, chosen, set(trained))
    prober = Prober(tokenizer, kept, config=config, scoring=scoring, tokens=tokens)
    content = [[asdict(p) for p in kept], groups.tolist(), [asdict(f) for f in aside]]
    content += [scoring, tokens]
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return KnowledgeTest(
        tuple(kept), groups, aside, found.of(chosen), prober, len(merged), len(known), seed, digest
    )


def _merged(probes: Sequence[Probe], conflict: Sequence[Fact]) -> tuple[list[Probe], list[int]]:
    """(facts with those of the conflict, indices of the latter)."""
    if not conflict:
        raise MlxSvdError("the conflict holds no facts; give at least one")
    merged = list(probes)
    place = {probe.fact.prompt: i for i, probe in enumerate(merged)}
    new, trained = [], []
    for fact in conflict:
        i = place.get(fact.prompt)
        if i is None:
            new.append(fact)
            continue
        if merged[i].fact.object.strip().casefold() != fact.object.strip().casefold():
            raise MlxSvdError(
                f"the conflict says that {fact.prompt!r} is followed by {fact.object!r}, the facts "
                f"say {merged[i].fact.object!r}; correct one of the two"
            )
        merged[i] = replace(merged[i], fact=fact)
        trained.append(i)
    taken = {probe.id for probe in merged}
    for probe in with_ids(new):
        name = probe.id if probe.id not in taken else f"{probe.id} (conflict)"
        trained.append(len(merged))
        merged.append(replace(probe, id=name))
    return merged, sorted(trained)


def _groups(merged: list[Probe], chosen: np.ndarray, trained: set[int]) -> np.ndarray:
    subjects = {merged[i].fact.subject for i in trained}
    relations = {merged[i].fact.relation for i in trained}

    def group(i: int) -> str:
        fact = merged[i].fact
        if i in trained:
            return CONFLICT
        if fact.subject in subjects:
            return MEASURED[0]
        return MEASURED[1] if fact.relation in relations else MEASURED[2]

    return np.array([group(int(i)) for i in chosen])
