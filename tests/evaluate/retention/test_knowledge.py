"""Only known facts are kept; conflicts, replayed and measured ones never overlap."""

from dataclasses import replace

import numpy as np
import pytest

from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.facts import facts_recalled
from mlx_svd.evaluate.retention import make_knowledge_test
from tests.evaluate.retention.conftest import PROBES


def make(tiny, conflict, **options):
    return make_knowledge_test(*tiny, PROBES, conflict, **options)


@pytest.fixture(scope="module")
def known(tiny):
    """Indices of known facts, by the task of ``evaluate``."""
    recall = facts_recalled(*tiny, [probe.fact for probe in PROBES])
    found = np.flatnonzero(recall.margins > 0).tolist()
    assert 4 <= len(found) < len(PROBES), "seed of the tiny model: some known, some not"
    return found


def test_parts_are_known_and_disjoint(tiny, known):
    test = make(tiny, 2, replay_share=0.3)
    assert (test.asked, test.known) == (len(PROBES), len(known))
    names = {PROBES[i].fact.prompt for i in known}
    conflict = {fact.prompt for fact in test.conflict}
    replay = {fact.prompt for fact in test.replay}
    measured = {p.fact.prompt for p, m in zip(test.probes, test.measured, strict=True) if m}
    assert len(conflict) == 2
    assert replay
    assert conflict | replay | measured == names
    assert len(conflict) + len(replay) + len(measured) == len(names)
    assert test.base.facts.known.all()


def test_groups_say_how_near_a_fact_is_to_a_conflict(tiny, known):
    test = make(tiny, [PROBES[known[0]].fact], replay_share=0)
    trained = PROBES[known[0]].fact
    for probe, group in zip(test.probes, test.groups, strict=True):
        if probe.fact.prompt == trained.prompt:
            expected = "conflict"
        elif probe.fact.subject == trained.subject:
            expected = "same_subject"
        else:
            same = probe.fact.relation == trained.relation
            expected = "same_relation" if same else "elsewhere"
        assert group == expected


def test_base_outcomes_are_those_of_asking_again(tiny):
    test = make(tiny, 2)
    again = test.ask(tiny[0], write=True)
    np.testing.assert_allclose(test.base.facts.margins, again.facts.margins, atol=1e-4)
    assert test.base.texts == again.texts


def test_the_same_seed_divides_equally_and_another_differently(tiny):
    first, second = make(tiny, 2, seed=1), make(tiny, 2, seed=1)
    assert first.digest == second.digest
    assert {make(tiny, 2, seed=s).digest for s in range(6)} != {first.digest}


def test_an_unknown_conflict_is_trained_but_not_retained(tiny, known):
    unknown = next(p.fact for i, p in enumerate(PROBES) if i not in known)
    new = replace(unknown, prompt="a new one is", subject="new")
    test = make(tiny, [unknown, new])
    assert {fact.prompt for fact in test.conflict} == {unknown.prompt, new.prompt}
    assert not test.base.facts.known[test.probes.index(
        next(p for p in test.probes if p.fact.prompt == unknown.prompt))]  # fmt: skip


def test_what_cannot_work_is_refused(tiny, known):
    facts = [PROBES[i].fact for i in known]
    with pytest.raises(MlxSvdError, match="nothing is left whose retention"):
        make(tiny, facts)
    with pytest.raises(MlxSvdError, match="--conflict-count 99: the base model knows"):
        make(tiny, 99)
    with pytest.raises(MlxSvdError, match="the facts say"):
        make(tiny, [replace(facts[0], object="other")])
    none = [p for i, p in enumerate(PROBES) if i not in known]
    with pytest.raises(MlxSvdError, match=r"none of .* facts is known .* nothing to retain"):
        make_knowledge_test(*tiny, none, 1)
