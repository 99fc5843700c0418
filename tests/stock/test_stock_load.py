"""mlx_lm.load in a fresh process: the same logits as mlx_svd.load, code only if trusted."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

import mlx_svd

pytestmark = pytest.mark.stock

WITH_CODE = ["factored", "pivot", "8bit_auto", "8bit_factored", "per_head", "pivot_everywhere"]
WITH_CODE += ["corrected", "corrected_8bit_factors", "sliced"]
WITHOUT_CODE = ["dense", "untouched", "untouched_8bit"]
# {name: folder} and tokens in; for each name its logits, and the error without trust.
PROGRAM = """
import json, sys
import mlx.core as mx
import mlx_lm
folders, tokens, out = json.loads(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
logits, refusals = {}, {}
for name, folder in folders.items():
    model, _ = mlx_lm.load(folder, trust_remote_code=True)
    logits[name] = model(mx.array(tokens)[None])[0].astype(mx.float32)
    try:
        mlx_lm.load(folder)
        refusals[name] = ""
    except ValueError as error:
        refusals[name] = str(error)
mx.savez(out, **logits)
modules = {module.partition(".")[0] for module in sys.modules}
print(json.dumps({"refusals": refusals, "imported mlx_svd": "mlx_svd" in modules}))
"""


@pytest.fixture(scope="module")
def loaded(checkpoint, run_command, tokens, tmp_path_factory):
    """What one fresh process with only mlx_lm reports of all checkpoints."""
    folders = {name: str(checkpoint(name)) for name in WITH_CODE + WITHOUT_CODE}
    out = tmp_path_factory.mktemp("loaded") / "logits.npz"
    arguments = [json.dumps(folders), json.dumps(tokens.tolist()), str(out)]
    # Anywhere but the repository: the checkpoint must not need mlx_svd.
    done = run_command([sys.executable, "-c", PROGRAM, *arguments], cwd=out.parent)
    with np.load(out) as arrays:
        return json.loads(done.stdout.splitlines()[-1]) | {"logits": dict(arrays)}


@pytest.mark.parametrize("name", WITH_CODE + WITHOUT_CODE)
def test_mlx_lm_load_gives_the_logits_of_mlx_svd_load(
    name, loaded, checkpoint, logits, assert_equal_logits
):
    model, _ = mlx_svd.load(checkpoint(name))
    assert_equal_logits(loaded["logits"][name], logits(model), 1e-6)


def test_a_checkpoint_does_not_import_mlx_svd(loaded):
    assert not loaded["imported mlx_svd"]


@pytest.mark.parametrize("name", WITH_CODE)
def test_mlx_lm_load_refuses_a_low_rank_checkpoint_without_trust(name, loaded):
    assert "trust_remote_code=True" in loaded["refusals"][name]


@pytest.mark.parametrize("name", WITHOUT_CODE)
def test_mlx_lm_load_needs_no_trust_for_the_dense_form(name, loaded, checkpoint):
    assert loaded["refusals"][name] == ""
    assert not list(Path(checkpoint(name)).glob("*.py"))


def test_all_forms_of_one_rank_are_the_same_matrix(loaded, assert_equal_logits):
    for form in ("factored", "pivot"):
        assert_equal_logits(loaded["logits"][form], loaded["logits"]["dense"], 1e-4)


def test_truncation_changed_the_logits(loaded):
    difference = np.abs(loaded["logits"]["factored"] - loaded["logits"]["untouched"]).max()
    assert difference > 0.1
