"""What a run of ``evaluate`` may vary. All of it is part of the conditions of a result."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.likelihood.batches import BATCH_TOKENS

SCORINGS = ("words", "seed")


@dataclass(frozen=True)
class EvaluateSettings:
    """limit: rows of each task (None: all), the first ones or, with random_rows, drawn by seed;
    num_fewshot: examples in a prompt; seed: draws rows and examples (1234 is lm-eval's); scoring:
    how generated answers are compared, by whole words or by the seeds' substring rule; max_length:
    tokens of context (None: the model's); batch_tokens: padded tokens of a forward pass; dtype:
    of the parameters (None: as stored); data_dir: folder with local rows (None: the hub); base:
    model, or folder of results, that kl and facts compare with; prompts: file of the generation
    task (None: those shipped); tokens_generated: of an answer."""

    limit: int | None = None
    random_rows: bool = False
    num_fewshot: int = 0
    seed: int = 1234
    scoring: str = "words"
    max_length: int | None = None
    batch_tokens: int = BATCH_TOKENS
    dtype: str | None = None
    data_dir: Path | None = None
    base: str | None = None
    prompts: Path | None = None
    tokens_generated: int = 12

    def __post_init__(self):
        for name, least in (("limit", 1), ("num_fewshot", 0), ("max_length", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                option = "--" + name.replace("_", "-")
                raise MlxSvdError(f"{option} {value}: must be at least {least}")
        if self.scoring not in SCORINGS:
            raise MlxSvdError(f"--scoring {self.scoring}: use {' or '.join(SCORINGS)}")
        if self.data_dir is not None and not self.data_dir.is_dir():
            raise MlxSvdError(
                f"{self.data_dir}: no such folder; give --data-dir a folder with rows"
            )

    def conditions(self) -> dict[str, Any]:
        """What numbers depend on. Where rows and prompts are stored is not part of it: their
        content is in their digest."""
        kept = asdict(self)
        del kept["data_dir"], kept["prompts"]
        return kept
