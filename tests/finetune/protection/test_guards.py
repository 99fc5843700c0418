"""Each common mistake is warned of with its reason; it can be accepted, or made to stop the run."""

from dataclasses import replace

import pytest

from mlx_svd.errors import MlxSvdError
from mlx_svd.finetune.protection import ARMS, GUARDS, ProtectSettings, warnings_for

FINE = ProtectSettings(arm=ARMS["cf90"], epochs=1, lr=1e-5)
MISTAKES = {
    "v": replace(FINE, arm=replace(ARMS["cf90"], projections=("q", "v"))),
    "mlp": replace(FINE, arm=replace(ARMS["cf90"], projections=("down",))),
    "epochs": replace(FINE, epochs=3),
    "lr": replace(FINE, lr=2e-5),
    "freeze": replace(FINE, arm=ARMS["freeze-50"]),
    "perplexity": replace(FINE, prompts=0),
    "padding": replace(FINE, mask_padding=False),
}


def test_the_seeds_formula_is_not_warned_of():
    assert warnings_for(FINE, 20) == []
    assert warnings_for(replace(FINE, arm=ARMS["none"]), 20) == []


def test_every_guard_rail_has_its_case():
    assert set(MISTAKES) == set(GUARDS)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_warned_of_with_its_reason(name):
    (warning,) = warnings_for(MISTAKES[name], 20)
    assert (warning.name, warning.accepted) == (name, False)
    assert warning.text.endswith(GUARDS[name])
    assert len(GUARDS[name]) > 40


@pytest.mark.parametrize("name", MISTAKES)
def test_it_can_be_accepted_or_made_to_stop_the_run(name):
    strict = replace(MISTAKES[name], strict=True)
    with pytest.raises(MlxSvdError, match=f"--accept {name}"):
        warnings_for(strict, 20)
    for accept in (name, "all"):
        (warning,) = warnings_for(replace(strict, accept=(accept,)), 20)
        assert warning.accepted


def test_an_unknown_guard_rail_is_named():
    with pytest.raises(MlxSvdError, match="--accept luck: use all or one of v, mlp"):
        warnings_for(replace(FINE, accept=("luck",)), 20)
