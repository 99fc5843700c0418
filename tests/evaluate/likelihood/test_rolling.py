"""Windows of a long text and the counts behind perplexities, against lm-eval's own code."""

import numpy as np
import pytest
from lm_eval.tasks.wikitext.preprocess_wikitext import process_results, wikitext_detokenizer
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from mlx_svd.evaluate.likelihood.rolling import rolling_items
from mlx_svd.evaluate.rows.wikitext import count_words, detokenized


@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 17, 31])
def test_windows_are_lm_evals(length):
    tokens = np.random.default_rng(length).integers(1, 99, length).tolist()
    theirs = map(
        make_disjoint_window,
        get_rolling_token_windows(tokens, prefix_token=0, max_seq_len=8, context_len=1),
    )
    ours = [item.pairs[0] for item in rolling_items("text", tokens, 0, 8)]
    assert ours == [(tuple(before), tuple(after)) for before, after in theirs]
    assert [t for _, after in ours for t in after] == tokens


SENTENCES = """ = Robert <unk> =

 Robert <unk> is an English film , television and theatre actor . He had a guest @-@ starring
 role ( in 1 @,@ 200 houses , 3 @.@ 5 N ) : " it 's the boys ' own " ; [ see ] { here } ! ?
 = = Career = =
 = = = Later = = =
 At 20 ° C , ' so ' .
"""


def test_detokenized_text_is_lm_evals(shared):
    text = (shared / "data/text/wikitext-2.test.txt").read_text()[:60_000]
    for stored in (SENTENCES, text):
        assert detokenized(stored) == wikitext_detokenizer({"page": stored})
    assert detokenized(SENTENCES) != SENTENCES


def test_words_and_bytes_are_lm_evals():
    counts = process_results({"page": SENTENCES}, (-1.0,))
    assert count_words(SENTENCES) == counts["word_perplexity"][1]
    assert len(SENTENCES.encode()) == counts["bits_per_byte"][1]
