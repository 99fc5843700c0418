"""Metrics of kind ``protection``: outcomes of a knowledge test, by fact.

Paraphrases are counted by the fact they belong to, so that several of one fact are one item; of
measured facts those that the base model knew in these words, of facts trained falsely all.
"""

from collections.abc import Iterable

import numpy as np

from mlx_svd.evaluate.retention import KnowledgeTest, Outcomes, at_uptake, retained_at_uptake
from mlx_svd.evaluate.retention.knowledge import CONFLICT
from mlx_svd.experiments.matrix.record import Measured, Metric, metric_of
from mlx_svd.finetune.protection import ProtectResult


def add_knowledge(test: KnowledgeTest, outcomes: Outcomes, measured: Measured) -> None:
    """retained: of the facts known before and not trained, is it still known, all of them and by
    how near they are to a trained one; uptake: of those trained, is the false object likelier than
    the true one; both also as written texts (the seeds' measure, of the facts whose object the base
    model wrote) and in other words, where there are paraphrases."""
    ids = _ids(test)
    trained, asked = test.groups == CONFLICT, test.measured
    facts = outcomes.facts
    measured.metrics["retained"] = metric_of(ids[asked], facts.known[asked])
    for group in ("same_subject", "same_relation"):
        part = test.groups == group
        if part.any():
            measured.metrics[f"retained_{group}"] = metric_of(ids[part], facts.known[part])
    measured.metrics["margin_change"] = metric_of(
        ids[asked], (facts.margins - test.base.facts.margins)[asked]
    )
    measured.metrics["uptake"] = metric_of(ids[trained], facts.conflicting[trained], better=None)
    if outcomes.texts is not None:
        wrote = asked & test.base.writes_object
        if wrote.any():
            measured.metrics["retained_written"] = metric_of(
                ids[wrote], outcomes.writes_object[wrote]
            )
        measured.metrics["uptake_written"] = metric_of(
            ids[trained], outcomes.writes_conflict[trained], better=None
        )
    said = outcomes.paraphrases
    measured.metrics |= _paraphrased(test, said.known, said.conflicting, "")


def add_trajectory(result: ProtectResult, levels: Iterable[float], measured: Measured) -> None:
    """retained_at_LEVEL: of each measured fact, how far it is known where the run first reaches
    that uptake, and the same of paraphrases; left out where it never does. Numbers and notes of the
    training."""
    test, t = result.test, result.trajectory
    ids = _ids(test)[test.measured]
    for level in levels:
        found = retained_at_uptake(t.uptakes, t.margins, test.measured, float(level))
        measured.numbers[f"reached_{level:g}"] = float(found is not None)
        if found is None:
            continue
        measured.metrics[f"retained_at_{level:g}"] = metric_of(ids, found)
        measured.metrics |= _paraphrased(
            test,
            at_uptake(t.uptakes, t.paraphrase_margins > 0, float(level)),
            at_uptake(t.uptakes, t.paraphrase_conflicts > 0, float(level)),
            f"_at_{level:g}",
        )
    training = result.record["training"]
    for name in ("trained_share", "bytes_before", "bytes_after"):
        measured.numbers[name] = float(training[name])
    measured.numbers["steps"] = float(t.steps[-1])
    measured.details["path"] = [
        {"step": step, "uptake": uptake, "retained": retained}
        for step, uptake, retained in zip(t.steps, t.uptakes, t.retained, strict=True)
    ]


def _ids(test: KnowledgeTest) -> np.ndarray:
    return np.array([probe.id for probe in test.probes])


def _paraphrased(
    test: KnowledgeTest, known: np.ndarray, conflicting: np.ndarray, suffix: str
) -> dict[str, Metric]:
    """known, conflicting (k,): of every paraphrase, 0 to 1. Neither metric if none was asked."""
    asked = test.base.paraphrases
    kept = test.measured[asked.owners] & asked.known
    trained = (test.groups == CONFLICT)[asked.owners]
    found = {}
    for name, values, chosen, better in (
        ("paraphrase_retained", known, kept, True),
        ("paraphrase_uptake", conflicting, trained, None),
    ):
        if chosen.any():
            owners, fact = np.unique(asked.owners[chosen], return_inverse=True)
            found[name + suffix] = metric_of(
                _ids(test)[owners],
                np.bincount(fact, weights=values[chosen].astype(np.float64)),
                np.bincount(fact),
                better=better,
            )
    return found
