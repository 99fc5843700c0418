"""Arms freeze what they say, and refuse what does not go together."""

import pytest

from mlx_svd.errors import MlxSvdError
from mlx_svd.finetune.protection import ARMS, Arm, arm_named


@pytest.mark.parametrize(
    ("layers", "share", "frozen"), [(24, 0.75, 18), (24, 0.9, 21), (6, 0.5, 3)]
)
def test_the_lowest_layers_are_frozen_whole(layers, share, frozen):
    shares = Arm(freeze="bottom", share=share).layer_shares(layers)
    assert shares == [1.0] * frozen + [0.0] * (layers - frozen)
    assert Arm(freeze="top", share=share).layer_shares(layers) == shares[::-1]


def test_a_hierarchical_schedule_is_no_block():
    shares = Arm(freeze="hierarchical", early=0.9, late=0.5).layer_shares(5)
    assert shares == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5])


def test_nothing_is_frozen_without_freezing():
    assert Arm().layer_shares(3) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"freeze": "middle"}, "--freeze middle: use one of none, bottom, top, hierarchical"),
        ({"compress": "frozen"}, "--compress frozen: needs whole frozen layers"),
        ({"share": 1.5}, "share 1.5: give a share from 0 to 1"),
        ({"rank_ratio": 0}, "--rank-ratio 0: must be above 0"),
        ({"form": "corrected"}, "--form corrected: use one of auto"),
        ({"adapter": "lora", "freeze": "hierarchical"}, "rows of an adapter cannot be frozen"),
        ({"adapter_rank": 0}, "--adapter-rank 0"),
        ({"kl": float("nan")}, "--kl nan: must be a number from 0 on"),
        ({"projections": ("x",)}, "projection 'x'"),
    ],
)
def test_what_cannot_work_is_refused(values, words):
    with pytest.raises(MlxSvdError) as error:
        Arm(**values)
    assert words in str(error.value)


def test_arms_have_their_own_names():
    assert all(arm.name == name for name, arm in ARMS.items())
    with pytest.raises(MlxSvdError, match="--arm cf91: use one of none, freeze-50"):
        arm_named("cf91")
