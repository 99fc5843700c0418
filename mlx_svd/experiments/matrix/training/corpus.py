"""What tiny models learn: bytes of a text, and sentences that state facts."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.facts import Fact

# Every byte is a token; one more ends a text.
END_TOKEN = 256
VOCABULARY = 257
END_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class Corpus:
    """text (T,), sentences: token ids; facts_share: of the rows of a batch, those made of
    sentences."""

    text: np.ndarray
    sentences: tuple[np.ndarray, ...]
    facts_share: float

    def batches(self, seed: int, rows: int, length: int):
        """Endless (rows, length + 1) int32: windows of the text from anywhere, and sentences in
        random order, one after the other from a beginning."""
        generator = np.random.default_rng([seed, 17])
        while True:
            facts = generator.random(rows) < self.facts_share
            yield np.stack(
                [
                    self._sentences(generator, length) if fact else self._window(generator, length)
                    for fact in facts
                ]
            )

    def _window(self, generator: np.random.Generator, length: int) -> np.ndarray:
        start = generator.integers(0, len(self.text) - length)
        return self.text[start : start + length + 1]

    def _sentences(self, generator: np.random.Generator, length: int) -> np.ndarray:
        row: list[np.ndarray] = []
        left = length + 1
        while left > 0:
            row.append(self.sentences[generator.integers(len(self.sentences))])
            left -= len(row[-1])
        return np.concatenate(row)[: length + 1]


def make_corpus(text: Path, facts: Sequence[Fact], facts_share: float, length: int) -> Corpus:
    """Raises MlxSvdError for a text shorter than a window, and for a share of no facts."""
    tokens = np.frombuffer(text.read_bytes(), dtype=np.uint8).astype(np.int32)
    if len(tokens) <= length + 1:
        raise MlxSvdError(f"{text}: has {len(tokens)} bytes, less than one window of {length}")
    if facts_share and not facts:
        raise MlxSvdError("training: a share of facts needs facts")
    sentences = tuple(
        np.frombuffer(f"{f.prompt} {f.object}.\n".encode(), dtype=np.uint8).astype(np.int32)
        for f in facts
    )
    return Corpus(tokens, sentences, facts_share)


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of single bytes, as transformers reads it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    # The printable stand-ins of bytes that byte-level tokenizers use, in the order of the bytes.
    alphabet = _byte_characters()
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_TEXT, special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_TEXT,
        "bos_token": END_TEXT,
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _byte_characters() -> list[str]:
    """GPT-2's printable character for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    shown = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    return [shown[b] for b in range(256)]
