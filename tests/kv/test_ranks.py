"""Ranks follow the policy, and bytes are those of the arrays."""

import numpy as np
import pytest

from mlx_svd.errors import MlxSvdError
from mlx_svd.kv.ranks import Storage, choose_ranks, latent_bytes

FP16 = Storage(2)
# Two layers; two groups of 64 in the first, one of 128 in the second.
ENERGIES = [
    (np.tile(2.0 ** -np.arange(64), (2, 1)), np.ones((2, 64))),
    (np.ones((1, 128)), 2.0 ** -np.arange(128)[None]),
]


def test_a_rank_is_counted_per_head():
    ranks = choose_ranks(ENERGIES, FP16, rank=10, heads_per_group=[1, 2])
    assert ranks == [(10, 10), (20, 20)]
    assert choose_ranks(ENERGIES, FP16) == [(64, 64), (128, 128)]


def test_energy_gives_the_smallest_ranks_that_keep_it():
    ranks = choose_ranks(ENERGIES, FP16, energy=0.99)
    # 1 - 2^-7 = 0.9922 for halving energies; 0.99 * 64 = 63.4 of equal ones.
    assert ranks == [(7, 64), (127, 7)]


def test_one_part_can_be_left_whole():
    assert choose_ranks(ENERGIES, FP16, rank=8, part="keys") == [(8, 64), (8, 128)]
    assert choose_ranks(ENERGIES, FP16, rank=8, part="values") == [(64, 8), (128, 8)]


@pytest.mark.parametrize(
    ("storage", "share"),
    [
        (FP16, 0.3),
        (FP16, 0.53),
        (Storage(4), 0.9),
        (Storage(2, 8, 32), 0.6),
        (Storage(2, 4, 32), 0.9),
    ],
)
def test_a_budget_is_kept_and_shared_evenly(storage, share):
    full = latent_bytes([(64, 64), (128, 128)], [2, 1], storage)
    ranks = choose_ranks(ENERGIES, storage, bytes_per_token=share * full)
    used = latent_bytes(ranks, [2, 1], storage)
    assert used <= share * full
    step = 2 * storage.multiple * storage.bytes_per_number
    shares = [r / n for pair, n in zip(ranks, (64, 128), strict=True) for r in pair]
    # Unless what is left is less than a step of the widest array.
    assert max(shares) - min(shares) <= storage.multiple / 64 + 1e-9
    assert full * share - used < 2 * step or min(shares) == 1
    assert all(r % storage.multiple == 0 for pair in ranks for r in pair)


def test_quantized_ranks_are_rounded_up_to_groups():
    assert choose_ranks(ENERGIES, Storage(2, 8, 32), rank=33) == [(64, 64), (64, 64)]


def test_bytes_count_scales_and_offsets():
    # 64 numbers in 8 bits with a float16 scale and offset: mlx-lm's 68 bytes.
    assert latent_bytes([(64, 64)], [1], Storage(2, 8, 64)) == 2 * 68
    assert latent_bytes([(64, 64)], [1], Storage(2, 4, 64)) == 2 * 36


def test_what_cannot_be_kept_is_refused():
    with pytest.raises(MlxSvdError, match="the smallest latents take 12 bytes"):
        choose_ranks(ENERGIES, FP16, bytes_per_token=11)
    with pytest.raises(MlxSvdError, match="give one of"):
        choose_ranks(ENERGIES, FP16, rank=3, energy=0.5)
    with pytest.raises(MlxSvdError, match="--kv-group-size 128: does not divide the 64 numbers"):
        choose_ranks(ENERGIES, Storage(2, 8, 128))
    with pytest.raises(MlxSvdError, match=r"--kv-energy 1\.5"):
        choose_ranks(ENERGIES, FP16, energy=1.5)
