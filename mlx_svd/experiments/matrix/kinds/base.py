"""What a kind of experiment is."""

from typing import Any, Protocol

from mlx_svd.experiments.matrix.record import Measured


class Kind(Protocol):
    """Made of an experiment's settings and places, before anything is loaded."""

    def check(self, condition: dict[str, Any]) -> None:
        """Raise MlxSvdError for settings that make no sense."""

    def seeded(self, condition: dict[str, Any]) -> bool:
        """Whether the seed changes anything; if not, the condition runs once."""

    def inputs(self, condition: dict[str, Any]) -> Any:
        """Digests of all that the run reads; JSON values."""

    def group(self, condition: dict[str, Any], seed: int | None) -> str | None:
        """Runs of one group go to one process, one after the other, because they share what takes
        long to make; None: the run stands alone."""

    def run(self, condition: dict[str, Any], seed: int) -> Measured:
        """Run one condition with one seed."""
