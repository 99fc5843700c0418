"""The text that seed document 003 measured its spectra on, to show what such a text does.

Its probe (mcgrof/knlp, kv_spectrum_probe.py) takes four sentences, repeats each 20 times, cuts or
continues them to 256 tokens and cycles through them for 64 samples: 16 exact copies of each.
"""

from typing import Any

import numpy as np

from mlx_svd.errors import MlxSvdError

SENTENCES = (
    "The quick brown fox jumps over the lazy dog. ",
    "In the beginning, there was nothing but darkness. ",
    "Machine learning is a subset of artificial intelligence. ",
    "The weather today is sunny with clear skies. ",
)
REPEATS, SAMPLES, LENGTH = 20, 64, 256


def toy_windows(tokenizer: Any, samples: int = SAMPLES, length: int = LENGTH) -> np.ndarray:
    """Token ids (samples, length) int32 of the seed's text, without special tokens. Four samples
    have the moments of any multiple of four.

    Raises MlxSvdError if the tokenizer makes nothing of a sentence.
    """
    rows = []
    for sentence in SENTENCES:
        ids = tokenizer.encode(sentence * REPEATS, add_special_tokens=False)
        if not len(ids):
            raise MlxSvdError(f"the tokenizer has no tokens for {sentence!r}")
        rows.append(np.resize(np.asarray(ids, dtype=np.int32), length))
    return np.stack([rows[n % len(rows)] for n in range(samples)])


def default_layers(count: int) -> list[int]:
    """The layers that the seed's probe looks at: the first, at a quarter, half and three quarters,
    and the last."""
    return sorted({0, count // 4, count // 2, 3 * count // 4, count - 1})
