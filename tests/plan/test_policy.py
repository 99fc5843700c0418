"""Rank policies and rounding."""

import numpy as np
import pytest

from mlx_svd.errors import MlxSvdError
from mlx_svd.plan.policy import RankPolicy, parse_energy, round_rank


def never() -> np.ndarray:
    raise AssertionError("this policy must not read weights")


@pytest.mark.parametrize(
    ("ratio", "limit", "rank"), [(0.9, 64, 57), (0.98, 64, 62), (0.95, 64, 60), (0.7, 128, 89),
                                 (0.9, 768, 691), (0.001, 64, 1), (1.0, 64, 64)],
)  # fmt: skip
def test_rank_ratio_is_the_seeds_int_of_ratio_times_full_rank(ratio, limit, rank):
    assert RankPolicy(rank_ratio=ratio).choose(limit, 0.0, never) == rank


def test_energy_ramp_goes_linearly_from_the_first_layer_to_the_last():
    energies = np.ones(100)
    policy = RankPolicy(energy=(0.5, 0.9))
    ranks = [policy.choose(100, depth, lambda: energies) for depth in (0.0, 0.5, 1.0)]
    assert ranks == [50, 70, 90]


def test_min_rank_ratio_is_a_floor():
    steep = np.array([1.0] + [1e-9] * 99)
    assert RankPolicy(energy=0.9).choose(100, 0, lambda: steep) == 1
    assert RankPolicy(energy=0.9, min_rank_ratio=0.1).choose(100, 0, lambda: steep) == 10


@pytest.mark.parametrize(
    "wrong",
    [{}, {"rank": 0}, {"rank": -3}, {"rank_ratio": 0.0}, {"rank_ratio": 1.01}, {"energy": 1.5},
     {"energy": (0.9, 0.0)}, {"rank": 3, "rank_ratio": 0.5}, {"rank": 3, "min_rank_ratio": 2}],
)  # fmt: skip
def test_impossible_policies_are_refused(wrong):
    with pytest.raises(MlxSvdError):
        RankPolicy(**wrong)


def test_rank_over_the_limit_is_refused_and_says_what_to_do():
    with pytest.raises(MlxSvdError, match=r"rank 65 is over.*64; use a smaller rank"):
        RankPolicy(rank=65).choose(64, 0.0, never)


@pytest.mark.parametrize(
    ("rank", "multiple", "limit", "up", "expected"),
    [(89, 64, 128, False, 64), (96, 64, 128, False, 128), (115, 64, 128, False, 128),
     (5, 64, 128, False, 64), (65, 64, 128, True, 128), (200, 64, 250, True, 192),
     (40, 64, 48, False, None), (37, 1, 64, False, 37)],
)  # fmt: skip
def test_rounding_is_to_the_nearest_multiple_and_upwards_for_energies(
    rank, multiple, limit, up, expected
):
    assert round_rank(rank, multiple, limit, up) == expected


def test_energy_text_is_a_share_or_a_ramp():
    assert parse_energy("0.95") == 0.95
    assert parse_energy("0.96:0.98") == (0.96, 0.98)
    for wrong in ("", "a", "0.1:0.2:0.3"):
        with pytest.raises(MlxSvdError):
            parse_energy(wrong)
