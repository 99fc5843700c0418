"""Spectra against numpy's SVD of the activations, and against the seed's formula."""

import numpy as np
import pytest

from mlx_svd.checkpoint.loader import load
from mlx_svd.demo import DEMO_MODEL
from mlx_svd.errors import MlxSvdError
from mlx_svd.kv.probe import probe_kv
from mlx_svd.kv.spectra import layer_spectra, matrix_spectrum
from mlx_svd.kv.toy_text import SENTENCES, default_layers, toy_windows
from tests.kv.conftest import windows
from tests.kv.reference import cached, rows


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_spectra_are_those_of_numpys_svd(tiny, family):
    t = tiny(family)
    n_kv = t.heads[0][0]
    sizes = (1, 2, n_kv)
    for moments, pair in zip(t.bases.layers, cached(t.model, windows().tokens), strict=True):
        found = [s for s in layer_spectra(moments, sizes) if s.rotation != "pre"]
        assert len(found) == 2 * 2 * sum(n_kv // size for size in sizes)
        for s in found:
            heads = pair[s.activation == "V"]
            part = rows(heads[:, s.group * s.heads_per_group : (s.group + 1) * s.heads_per_group])
            part = part - part.mean(0) if s.centred else part
            expected = np.linalg.svd(part, compute_uv=False)
            np.testing.assert_allclose(s.singular_values, expected, rtol=1e-4, atol=1e-4)
            energy = np.cumsum(expected**2) / (expected**2).sum()
            for share, rank in s.effective_rank.items():
                assert rank == int(np.searchsorted(energy, float(share))) + 1
            assert s.energy_at["16"] == pytest.approx(energy[15], abs=1e-6)


def test_keys_before_the_rotation_are_there_for_models_that_rotate(tiny):
    def kinds(family):
        spectra = layer_spectra(tiny(family).bases.layers[0], (1,))
        return {(s.activation, s.rotation) for s in spectra}

    assert kinds("qwen2") == {("K", "post"), ("K", "pre"), ("V", "none")}
    assert kinds("gpt2") == {("K", "none"), ("V", "none")}


def test_a_matrix_of_exact_rank_has_it_and_no_condition_number():
    rng = np.random.default_rng(0)
    low = rng.standard_normal((200, 5)) @ rng.standard_normal((5, 40))
    numbers = matrix_spectrum(low, centred=False)
    assert numbers["effective_rank"]["0.99"] <= 5
    assert numbers["energy_at"]["16"] == pytest.approx(1)
    assert numbers["condition_number"] is None


def test_the_toy_text_is_the_seeds():
    _, tokenizer = load(DEMO_MODEL, lazy=True)
    toy = toy_windows(tokenizer)
    assert toy.shape == (64, 256)
    assert len(np.unique(toy, axis=0)) == 4
    assert all((toy[n] == toy[n % 4]).all() for n in range(64))
    start = tokenizer.decode(toy[2].tolist())
    assert start.startswith(SENTENCES[2] * 2)
    assert default_layers(24) == [0, 6, 12, 18, 23]  # the seed's own example
    assert default_layers(2) == [0, 1]


def test_the_seeds_columns_follow_its_formula():
    probe = probe_kv(str(DEMO_MODEL), windows=1, length=32)
    model, tokenizer = load(DEMO_MODEL, dtype="float32")
    toy = toy_windows(tokenizer)[:4]  # the other samples are copies, which change no share
    seed = probe.texts[1].seed
    assert seed["layers"] == [0, 1, 3, 4, 5]
    ranks, energies = {"K": [], "V": []}, {"K": [], "V": []}
    for layer in seed["layers"]:
        for name, heads in zip("KV", cached(model, toy)[layer], strict=True):
            matrix = rows(heads)
            s = np.linalg.svd(matrix - matrix.mean(0), compute_uv=False)
            total = np.cumsum(s**2) / (s**2).sum()
            ranks[name].append(int(np.searchsorted(total, 0.99)) + 1)
            energies[name].append(total[31])
    for name in "KV":
        assert seed[name]["avg_effective_rank_99"] == pytest.approx(np.mean(ranks[name]))
        assert seed[name]["avg_energy_in_top_32"] == pytest.approx(
            np.mean(energies[name]), abs=1e-5
        )
        assert seed[name]["min_energy_in_top_32"] == pytest.approx(min(energies[name]), abs=1e-5)
    assert seed["assessment"] == "Compressible"


def test_a_layer_that_is_not_there_is_refused():
    with pytest.raises(MlxSvdError, match="--layers 6: the model has layers 0 to 5"):
        probe_kv(str(DEMO_MODEL), layers=[0, 6], windows=1, length=32, toy=False)
