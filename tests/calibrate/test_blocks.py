"""Blocks run one at a time give what the whole model gives, in every architecture."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_svd.calibrate.blocks import Blocks
from mlx_svd.checkpoint.loader import load_model
from mlx_svd.source.families import FAMILIES
from mlx_svd.x86 import numpy_exponentials
from tests.calibrate.material import inputs_by_hand, random_windows
from tests.tiny import write_tiny


@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_gets_the_hidden_states_that_the_whole_model_gives_it(
    family, tmp_path, monkeypatch
):
    write_tiny(family, tmp_path / "model")
    windows = random_windows()
    whole = load_model(tmp_path / "model")[0]
    # Computed in the same way, so that the bits must be the same.
    with numpy_exponentials(whole):
        expected = inputs_by_hand(whole, windows, monkeypatch)
    blocks = Blocks(
        lambda: load_model(tmp_path / "model", lazy=True)[0], family, windows.tokens[:, :-1]
    )
    seen = {}
    for index in range(len(blocks)):
        model, block = blocks.open(index)
        names = {id(m): path for path, m in model.named_modules()}
        for module in block.modules():
            if "weight" in module and (path := names[id(module)]) in expected:
                seen[path] = module
        inputs = {}
        for path, module in list(seen.items()):
            _record(module, path, inputs)
        blocks.advance(index, block)
        for path, rows in inputs.items():
            np.testing.assert_array_equal(np.concatenate(rows), expected.pop(path), err_msg=path)
        seen.clear()
    # What is left is outside the blocks (an untied head).
    assert all(path.endswith(("lm_head", "embed_out")) for path in expected), list(expected)


def test_a_block_is_freed_with_the_model_it_came_from(tmp_path):
    write_tiny("llama", tmp_path / "model", num_hidden_layers=3)
    opened = []

    def open_model():
        opened.append(load_model(tmp_path / "model", lazy=True)[0])
        return opened[-1]

    blocks = Blocks(open_model, "llama", random_windows().tokens[:, :-1])
    for index in range(len(blocks)):
        blocks.advance(index, blocks.open(index)[1])
    # One model for the embedding, one for each block: none is used twice.
    assert len(opened) == 1 + 3
    assert len({id(model) for model in opened}) == 4


def _record(module, path: str, inputs: dict) -> None:
    original = type(module)

    def call(self, x):
        rows = np.array(x.astype(mx.float32), dtype=np.float64).reshape(-1, x.shape[-1])
        inputs.setdefault(path, []).append(rows)
        return original.__call__(self, x)

    module.__class__ = type(original.__name__, (original,), {"__call__": call})
