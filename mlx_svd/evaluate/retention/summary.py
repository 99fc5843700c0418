"""Outcomes -> shares with intervals. What cannot be measured is said, never filled in.

Keys of a summary:

- uptake: of the conflict facts, those whose conflicting object is now likelier than the true one
  (the efficacy of Meng et al., 2022); uptake_all: likelier than every other object;
  uptake_written: named in the greedy text.
- retained: of the measured facts (known to the base model, not trained), those still known: the
  true object likelier than every false one; retained_same_subject, retained_same_relation,
  retained_elsewhere: parts of them (see ``knowledge``).
- retained_written: of the measured facts whose object the base model wrote, those still written.
- retained_conflict: of the conflict facts known before, those still known: the other side of
  uptake, not to be mixed with retained.
- margin_change: mean change of the log-likelihood margin of measured facts, in nats.
- paraphrase_uptake: of the paraphrases of conflict facts, those with the conflicting object
  likelier; paraphrase_retained: of the paraphrases of measured facts that the base model knew,
  those still known.
- locality: of the neighbours of conflict facts that the base model had right, those still right.
"""

from dataclasses import asdict
from typing import Any

import numpy as np

from mlx_svd.evaluate.retention.knowledge import CONFLICT, MEASURED, KnowledgeTest
from mlx_svd.evaluate.retention.outcomes import Answers, Outcomes
from mlx_svd.evaluate.statistics.intervals import estimate, window_estimate

NOT_MEASURED = "not_measured"
_NO_PARAPHRASES = "the facts give no paraphrases here"
_NO_LOCALITY = "the conflict facts give no locality prompts"
_NOT_WRITTEN = "no texts were written at this point"


def knowledge_summary(test: KnowledgeTest, outcomes: Outcomes) -> dict[str, dict[str, Any]]:
    """Key -> {value, error, low, high, n, rows} (95 % interval over facts), or {not_measured:
    reason}."""
    conflict, measured = test.groups == CONFLICT, test.measured
    facts, base = outcomes.facts, test.base
    found = {
        "uptake": _share(facts.conflicting[conflict]),
        "uptake_all": _share(_beats_all(facts)[conflict]),
        "retained": _share(facts.known[measured]),
    }
    for group in MEASURED:
        found[f"retained_{group}"] = _share(facts.known[test.groups == group])
    found["retained_conflict"] = _share(facts.known[conflict & base.facts.known])
    change = facts.margins - base.facts.margins
    found["margin_change"] = _mean(change[measured])
    if outcomes.texts is None:
        found["uptake_written"] = found["retained_written"] = {NOT_MEASURED: _NOT_WRITTEN}
    else:
        found["uptake_written"] = _share(outcomes.writes_conflict[conflict])
        found["retained_written"] = _share(outcomes.writes_object[measured & base.writes_object])
    asked = outcomes.paraphrases
    of_conflict, of_measured = conflict[asked.owners], measured[asked.owners]
    kept = of_measured & base.paraphrases.known
    found["paraphrase_uptake"] = _clustered(
        asked.conflicting[of_conflict], asked.owners[of_conflict], _NO_PARAPHRASES
    )
    found["paraphrase_retained"] = _clustered(
        asked.known[kept], asked.owners[kept], _NO_PARAPHRASES
    )
    near = conflict[outcomes.locality.owners] & base.locality.known
    found["locality"] = _clustered(
        outcomes.locality.known[near], outcomes.locality.owners[near], _NO_LOCALITY
    )
    return found


def _beats_all(facts: Answers) -> np.ndarray:
    """The conflicting object beats the true one and is itself the likeliest false one."""
    return facts.conflicting & np.isclose(facts.conflicts, -facts.margins, rtol=0, atol=1e-9)


def _share(flags: np.ndarray) -> dict[str, Any]:
    if not len(flags):
        return {NOT_MEASURED: "no fact belongs here"}
    return asdict(estimate(flags.astype(np.float64)))


def _mean(values: np.ndarray) -> dict[str, Any]:
    """Of any numbers, with Student's interval also where all are 0."""
    return asdict(window_estimate(values, np.ones(len(values))))


def _clustered(flags: np.ndarray, owners: np.ndarray, missing: str) -> dict[str, Any]:
    if not len(flags):
        return {NOT_MEASURED: missing}
    return asdict(estimate(flags.astype(np.float64), owners))
