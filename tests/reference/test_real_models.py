"""The trained models of the shared folder give transformers' logits on real text, in float32."""

import numpy as np
import pytest

pytestmark = pytest.mark.reference

TOKENS = 400  # beyond gpt-neo-8m's window of 256


@pytest.mark.parametrize("name", ["qwen2-6m", "qwen2-16m", "llama-44m", "gpt2-14m", "gpt-neo-8m"])
def test_logits_on_text_equal_transformers(name, shared, difference):
    import torch
    import transformers

    folder = shared / "models" / name
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = (shared / "data" / "text" / "gutenberg.heldout.txt").read_text()[:4000]
    ids = tokenizer(text)["input_ids"][:TOKENS]
    assert len(ids) == TOKENS
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    assert difference(model, folder, np.array(ids)) < 1e-4
