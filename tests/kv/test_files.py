"""Bases files and prompt-cache files: what was saved is what is read, and nothing else is taken."""

import copy

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache

from mlx_svd.errors import MlxSvdError
from mlx_svd.kv.attach import attach
from mlx_svd.kv.bases_file import load_bases, save_bases
from mlx_svd.kv.session import open_session
from mlx_svd.kv.settings import KVSettings
from tests.conftest import relative_difference


def test_bases_are_read_as_they_were_saved(tiny, tmp_path):
    t = tiny("qwen2")
    path = tmp_path / "bases.safetensors"
    save_bases(path, t.bases)
    found = load_bases(path, t.folder)
    assert found.info == t.bases.info
    for got, expected in zip(found.layers, t.bases.layers, strict=True):
        assert (got.heads, got.tokens, got.rotary) == (expected.heads, expected.tokens, True)
        for name in ("keys", "key_mean", "queries", "joint", "joint_mean"):
            np.testing.assert_allclose(getattr(got, name), getattr(expected, name), rtol=1e-6)


def test_files_that_do_not_fit_are_refused_by_name(tiny, tmp_path):
    t = tiny("qwen2")
    path = tmp_path / "bases.safetensors"
    with pytest.raises(MlxSvdError, match=r"bases\.safetensors: no such file; make one with"):
        load_bases(path)
    save_bases(path, t.bases)
    with pytest.raises(MlxSvdError, match="was made from another model"):
        load_bases(path, tiny("llama").folder)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(MlxSvdError, match="is no bases file of mlx-svd kv-bases, or is damaged"):
        load_bases(path)
    with pytest.raises(MlxSvdError, match="is no bases file"):
        load_bases(next(t.folder.glob("*.safetensors")))


@pytest.mark.parametrize("bits", [None, 8])
def test_a_saved_prompt_cache_goes_on_where_it_stopped(tiny, tmp_path, bits):
    t = tiny("qwen2")
    bases, file = tmp_path / "bases.safetensors", tmp_path / "new" / "prompt.safetensors"
    save_bases(bases, t.bases)
    settings = KVSettings(heads_per_group=None, bits=bits, group_size=32)
    session = open_session(t.model, t.folder, bases, settings)
    mx.eval(t.model(t.tokens[:1, :30], cache=session.caches))
    session.save(file)
    assert session.tokens == 30
    expected = np.array(t.model(t.tokens[:1, 30:], cache=session.caches))
    detach(t)
    again = open_session(t.model, t.folder, bases, settings, file)
    assert again.tokens == 30
    got = np.array(t.model(t.tokens[:1, 30:], cache=again.caches))
    detach(t)
    assert relative_difference(got, expected) < 1e-6
    # mlx-lm can read the file, and its own check of the model's name refuses it.
    _, metadata = load_prompt_cache(str(file), return_metadata=True)
    assert metadata["model"] == "mlx-svd latents of qwen2"


def detach(t):
    """The model as it was: sessions belong to a process and have no end."""
    for layer in t.model.layers:
        layer.self_attn.__class__ = type(layer.self_attn).__mro__[1]
    del t.model.make_cache


def test_a_prompt_cache_of_other_settings_is_refused(tiny, tmp_path):
    t = tiny("qwen2")
    bases, file = tmp_path / "bases.safetensors", tmp_path / "prompt.safetensors"
    save_bases(bases, t.bases)
    session = open_session(t.model, t.folder, bases, KVSettings(rank=8))
    mx.eval(t.model(t.tokens[:1], cache=session.caches))
    session.save(file)
    detach(t)
    with pytest.raises(MlxSvdError, match="was saved with another settings"):
        open_session(t.model, t.folder, bases, KVSettings(rank=4), file)
    detach(t)
    with pytest.raises(MlxSvdError, match="no such prompt-cache file"):
        open_session(t.model, t.folder, bases, KVSettings(rank=8), tmp_path / "none")
    detach(t)
    with pytest.raises(MlxSvdError, match="is no prompt-cache file"):
        open_session(t.model, t.folder, bases, KVSettings(rank=8), bases)
    detach(t)


def test_a_branch_of_a_text_shares_its_bases(tiny):
    t = tiny("qwen2")
    attachment = attach(t.model, t.type, t.bases, KVSettings(rank=8))
    caches = make_prompt_cache(t.model)
    mx.eval(t.model(t.tokens[:, :30], cache=caches))
    branch = copy.deepcopy(caches)
    assert branch[0].basis is caches[0].basis
    mx.eval(t.model(t.tokens[:, 30:35], cache=branch))
    assert (caches[0].offset, branch[0].offset) == (30, 35)
    attachment.detach()
