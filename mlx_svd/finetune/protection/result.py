"""The result of a protected fine-tuning, as it is returned and as it is written."""

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mlx_svd.evaluate.retention import KnowledgeTest, Outcomes
from mlx_svd.finetune.protection.guards import Warned

# Files in the folder of a checkpoint that protect wrote.
RESULT_FILE, ITEMS_FILE = "mlx_svd_protect.json", "mlx_svd_protect_items.jsonl"


@dataclass(frozen=True)
class Trajectory:
    """A run at several steps: P points, n facts in the order of the test.

    steps (P,); losses (P,): mean of the examples since the point before, None first; summaries: of
    each point (see ``knowledge_summary``); margins, conflicts (P, n) float64: of each fact in nats
    (see ``Answers``); paraphrase_margins, paraphrase_conflicts (P, k): of each paraphrase, in the
    order of the outcomes. The first point is the start of training, after any compression.
    """

    steps: list[int]
    losses: list[float | None]
    summaries: list[dict[str, dict[str, Any]]]
    margins: np.ndarray
    conflicts: np.ndarray
    paraphrase_margins: np.ndarray
    paraphrase_conflicts: np.ndarray

    @property
    def uptakes(self) -> list[float]:
        """(P,) of each point; NaN without a conflict."""
        return [s["uptake"].get("value", math.nan) for s in self.summaries]

    @property
    def retained(self) -> list[float]:
        """(P,) of each point."""
        return [s["retained"]["value"] for s in self.summaries]


@dataclass(frozen=True)
class ProtectResult:
    """mlx_path: the checkpoint, None if none was written; record: everything but items, as written
    to mlx_svd_protect.json (docs/protection.md lists it); test, outcomes: per item, of the last
    step; trajectory: per item, of every point; warnings: guard rails that the settings ran into."""

    mlx_path: str | None
    record: dict[str, Any]
    test: KnowledgeTest
    outcomes: Outcomes
    trajectory: Trajectory
    warnings: list[Warned]

    def to_json(self) -> dict[str, Any]:
        """The record with the path of the checkpoint."""
        return {"mlx_path": self.mlx_path, **self.record}


def trajectory_of(points: list[dict[str, Any]]) -> Trajectory:
    """The points of a training state."""
    return Trajectory(
        [p["step"] for p in points],
        [p["loss"] for p in points],
        [p["summary"] for p in points],
        np.array([p["margins"] for p in points]),
        np.array([p["conflicts"] for p in points]),
        np.array([p["paraphrase_margins"] for p in points]),
        np.array([p["paraphrase_conflicts"] for p in points]),
    )


def trajectory_record(t: Trajectory) -> list[dict[str, Any]]:
    """The trajectory without items, for the record."""
    return [
        {"step": step, "loss": loss, **summary}
        for step, loss, summary in zip(t.steps, t.losses, t.summaries, strict=True)
    ]


def item_lines(test: KnowledgeTest, outcomes: Outcomes, trajectory: Trajectory) -> bytes:
    """One JSON line a fact: its part, the base model's outcomes, those of the last step, and the
    margins along the trajectory; then one a paraphrase and a neighbour."""
    lines = []
    for i, probe in enumerate(test.probes):
        lines.append(
            {
                "id": probe.id,
                "kind": "fact",
                "group": str(test.groups[i]),
                "prompt": probe.fact.prompt,
                "object": probe.fact.object,
                "conflict": probe.fact.conflict,
                "base_margin": float(test.base.facts.margins[i]),
                "base_text": test.base.texts[i],
                "base_writes_object": bool(test.base.writes_object[i]),
                "text": outcomes.texts[i],
                "writes_object": bool(outcomes.writes_object[i]),
                "writes_conflict": bool(outcomes.writes_conflict[i]),
                "steps": trajectory.steps,
                "margins": trajectory.margins[:, i].tolist(),
                "conflict_margins": trajectory.conflicts[:, i].tolist(),
            }
        )
    for kind in ("paraphrases", "locality"):
        before, after = getattr(test.base, kind), getattr(outcomes, kind)
        for row, owner in enumerate(after.owners):
            lines.append(
                {
                    "id": test.probes[owner].id,
                    "kind": kind,
                    "group": str(test.groups[owner]),
                    "base_margin": float(before.margins[row]),
                    "margin": float(after.margins[row]),
                    "base_conflict_margin": float(before.conflicts[row]),
                    "conflict_margin": float(after.conflicts[row]),
                }
            )
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()


def warned(warnings: list[Warned]) -> list[dict[str, Any]]:
    """For the record."""
    return [asdict(warning) for warning in warnings]
