"""What conditions are measured on: texts, and facts of which some are set aside."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_svd.calibrate.text import Windows, read_windows
from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.facts import Fact
from mlx_svd.evaluate.rows.fact_rows import facts_file
from mlx_svd.experiments.matrix.places import Places, check_keys, file_digest

_TEXT_KEYS = {"file", "windows", "length"}
_FACTS_KEYS = {"file", "count", "reserve"}
# Which facts are set aside is the same in every run, whatever its seed.
_DIVISION_SEED = 0


@dataclass(frozen=True)
class Facts:
    """test: asked; reserve: never asked, for whatever needs facts besides; test_ids: names of the
    asked ones, by their place in the file."""

    test: tuple[Fact, ...]
    test_ids: tuple[str, ...]
    reserve: tuple[Fact, ...]

    @property
    def every(self) -> tuple[Fact, ...]:
        """All of them."""
        return (*self.test, *self.reserve)


def read_facts_of(entry: dict[str, Any], places: Places) -> Facts:
    """Facts of ``{file, count, reserve}``: ``count`` of them evenly spread over the file (default:
    all), of which the share ``reserve`` (default 0) is set aside, drawn once for all runs; a limit
    holds for those that are asked. Raises MlxSvdError for a reserve that leaves none."""
    check_keys("facts", entry, _FACTS_KEYS)
    every = facts_file(places.file(entry["file"]), _DIVISION_SEED)
    chosen = spread(len(every), entry.get("count"))
    reserve = int(float(entry.get("reserve", 0)) * len(chosen))
    if not 0 <= reserve < len(chosen):
        raise MlxSvdError(f"facts: a reserve of {entry['reserve']} leaves no facts to ask")
    drawn = np.random.default_rng(_DIVISION_SEED).permutation(chosen)
    aside, asked = np.sort(drawn[:reserve]), np.sort(drawn[reserve:])
    asked = asked[spread(len(asked), places.limit)]
    return Facts(
        tuple(every[i] for i in asked),
        tuple(f"{i} {every[i].relation}: {every[i].subject}" for i in asked),
        tuple(every[i] for i in aside),
    )


def read_text(
    entry: dict[str, Any], places: Places, tokenizer: Any, vocab_size: int | None
) -> Windows:
    """Windows of ``{file, windows, length}``, evenly spread over the text."""
    check_keys("text", entry, _TEXT_KEYS)
    return read_windows(
        tokenizer,
        places.file(entry["file"]),
        count=places.limited(entry.get("windows", 24)),
        length=entry.get("length", 512),
        vocab_size=vocab_size,
    )


def drawn_windows(
    entry: dict[str, Any], places: Places, tokenizer: Any, vocab_size: int | None, seed: int
) -> Windows:
    """As ``read_text``, but drawn from the whole text by the seed."""
    import hashlib

    check_keys("calibration", entry, _TEXT_KEYS)
    every = read_windows(
        tokenizer,
        places.file(entry["file"]),
        length=entry.get("length", 512),
        vocab_size=vocab_size,
    )
    count = min(places.limited(entry.get("windows", 32)), len(every))
    rows = np.sort(np.random.default_rng([seed, 11]).choice(len(every), count, replace=False))
    tokens = np.ascontiguousarray(every.tokens[rows])
    digest = hashlib.sha256(tokens.tobytes()).hexdigest()
    return Windows(tokens, every.origin, digest, every.available)


def digests(settings: dict[str, Any], places: Places) -> dict[str, str]:
    """Digest of every file that settings name under a key ``file``."""
    found: dict[str, str] = {}

    def visit(value: Any) -> None:
        if isinstance(value, dict):
            if isinstance(value.get("file"), str):
                found[value["file"]] = file_digest(places.file(value["file"]))
            for part in value.values():
                visit(part)
        elif isinstance(value, list):
            for part in value:
                visit(part)

    visit(settings)
    return found


def spread(total: int, count: int | None) -> np.ndarray:
    """``count`` of ``total`` places, evenly spread; all of them for None or too large a count."""
    if count is None or count >= total:
        return np.arange(total)
    if count < 1:
        raise MlxSvdError(f"count {count}: must be at least 1")
    return np.linspace(0, total - 1, count).round().astype(int)
