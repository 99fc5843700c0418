"""One arm: its student, how a state of it is measured, and the record of the result."""

from collections.abc import Callable
from typing import Any

from mlx_svd.conditions import conditions
from mlx_svd.evaluate.retention import Outcomes, knowledge_summary
from mlx_svd.finetune.protection.baseline import Baseline
from mlx_svd.finetune.protection.examples import Batches
from mlx_svd.finetune.protection.guards import Warned
from mlx_svd.finetune.protection.notes import result_notes
from mlx_svd.finetune.protection.quality import measure_quality, quality_summary
from mlx_svd.finetune.protection.result import trajectory_of, trajectory_record, warned
from mlx_svd.finetune.protection.settings import ProtectSettings
from mlx_svd.finetune.protection.start import Start
from mlx_svd.finetune.protection.student import Student
from mlx_svd.finetune.protection.trainer import ProtectState, ProtectStep, Trainer
from mlx_svd.strict_json import finite


class ArmRun:
    """Trains one arm from ``start`` and measures it; replay, steps: as for :class:`Trainer`."""

    def __init__(
        self,
        baseline: Baseline,
        settings: ProtectSettings,
        start: Start,
        examples: Batches,
        replay: Batches | None,
        steps: int,
    ):
        self.baseline, self.settings, self.start, self.examples = (
            baseline,
            settings,
            start,
            examples,
        )
        self.student = Student(start.folder, settings.arm, settings.dtype, settings.seed)
        self._trainer = Trainer(
            self.student,
            examples,
            replay,
            baseline.data if settings.arm.reads_text else None,
            baseline.open(settings.dtype) if settings.arm.kl else None,
            settings,
            steps,
        )

    def train(
        self,
        saved: ProtectState | None,
        save: Callable[[ProtectState], None],
        advance: Callable[[ProtectStep], None],
    ) -> ProtectState:
        """See ``Trainer.run``."""
        return self._trainer.run(saved, self._point, save, advance)

    def _point(self, state: ProtectState, loss: float | None) -> dict[str, Any]:
        with self.student.written(state.arrays["values"]) as model:
            found = self.baseline.test.ask(model)
        return {
            "step": state.step,
            "loss": loss,
            "summary": finite(knowledge_summary(self.baseline.test, found)),
            "margins": found.facts.margins.tolist(),
            "conflicts": found.facts.conflicts.tolist(),
            "paraphrase_margins": found.paraphrases.margins.tolist(),
            "paraphrase_conflicts": found.paraphrases.conflicts.tolist(),
        }

    def finish(self, state: ProtectState, warnings: list[Warned]) -> tuple[dict, Outcomes]:
        """(record of the result, outcomes of the last step, texts included)."""
        baseline, test = self.baseline, self.baseline.test
        with self.student.written(state.arrays["values"]) as model:
            outcomes = test.ask(model, write=True)
            quality = measure_quality(model, baseline.tokenizer, baseline.config, baseline.material)
        record = {
            "model": baseline.folder.name,
            "revision": baseline.folder.revision,
            "arm": self.settings.arm.to_json(),
            "settings": {k: v for k, v in self.settings.to_json().items() if k != "arm"},
            "warnings": warned(warnings),
            **self._material(),
            "steps": state.step,
            "training": self._training(state),
            "base": {
                "knowledge": knowledge_summary(test, test.base),
                "quality": quality_summary(baseline.quality),
            },
            "trajectory": trajectory_record(trajectory_of(state.points)),
            "knowledge": knowledge_summary(test, outcomes),
            "quality": quality_summary(quality, baseline.quality),
            "conditions": conditions(),
        }
        record["notes"] = [*self.start.notes, *result_notes(record, test, outcomes, state.points)]
        return finite(record), outcomes

    def _material(self) -> dict[str, Any]:
        """What was asked, trained and read."""
        test, windows = self.baseline.test, self.baseline.windows
        count = len(self.examples.examples)
        return {
            "facts": {
                "asked": test.asked,
                "known": test.known,
                "groups": {str(g): int((test.groups == g).sum()) for g in sorted(set(test.groups))},
                "replay": len(test.replay),
                "seed": test.seed,
                "digest": test.digest,
            },
            "examples": {
                "count": count,
                "cut": self.examples.cut,
                "epochs": self.settings.count_epochs(count),
                "digest": self.examples.digest,
            },
            "text": {"origin": windows.origin, "digest": windows.digest},
        }

    def _training(self, state: ProtectState) -> dict[str, Any]:
        """Sizes: numbers trained, layers frozen, projections truncated, bytes."""
        student, start = self.student, self.start
        return {
            "trained": student.trained,
            "total": student.total,
            "trained_share": student.trained / student.total,
            "layers": student.layers,
            "frozen_layers": student.frozen_layers,
            "layer_shares_frozen": self.settings.arm.layer_shares(student.layers),
            "compressed": start.compressed,
            "bytes_before": start.bytes_before,
            "bytes_after": start.bytes_after,
            "changed_share": student.changed_share(student.stored(state.arrays["values"])),
        }
