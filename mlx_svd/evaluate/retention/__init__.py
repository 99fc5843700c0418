"""What a model still knows after it was trained on something else, fact by fact.

``read_probes``: facts from a file; ``with_paraphrases``: with other wordings of their relations.
``make_knowledge_test``: what the base model knows of them, and which of them are trained to be
false. ``KnowledgeTest.ask``: the outcomes of any loaded model, item by item. ``knowledge_summary``:
retention, uptake, paraphrases and locality with 95 % intervals. ``at_uptake``: a run's outcomes at
a given uptake, so that runs are compared where they learned equally much.
"""

from mlx_svd.evaluate.retention.frontier import (
    at_uptake,
    difference_at_uptake,
    retained_at_uptake,
    uptake_reached,
)
from mlx_svd.evaluate.retention.knowledge import KnowledgeTest, make_knowledge_test
from mlx_svd.evaluate.retention.outcomes import Outcomes, Prober
from mlx_svd.evaluate.retention.probes import Neighbour, Probe, read_conflict, read_probes
from mlx_svd.evaluate.retention.summary import knowledge_summary
from mlx_svd.evaluate.retention.templates import (
    check_templates,
    read_templates,
    with_paraphrases,
)

__all__ = [
    "KnowledgeTest",
    "Neighbour",
    "Outcomes",
    "Probe",
    "Prober",
    "at_uptake",
    "check_templates",
    "difference_at_uptake",
    "knowledge_summary",
    "make_knowledge_test",
    "read_conflict",
    "read_probes",
    "read_templates",
    "retained_at_uptake",
    "uptake_reached",
    "with_paraphrases",
]
