"""An exported adapter in the stock programs: no trust flag, the output of the checkpoint."""

import mlx_lm
import pytest

import mlx_svd
from mlx_svd.checkpoint.adapter import export_adapter

pytestmark = pytest.mark.stock

# mlx_lm fuse rounds the fused weights to the bits of the model again.
STOCK_LIMITS = {"fuse without --dequantize": "loses the correction"}


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    return export_adapter(checkpoint("corrected"), tmp_path_factory.mktemp("exported") / "out")


def test_generate_gives_the_text_of_the_corrected_checkpoint_without_trust(
    exported, checkpoint, stock_text, greedy
):
    expected = greedy(checkpoint("corrected"))
    text = stock_text(exported.model, "--adapter-path", exported.adapter, trust=False)
    assert text == expected


def test_the_adapter_makes_the_logits_those_of_the_corrected_checkpoint(
    exported, checkpoint, logits, assert_equal_logits
):
    corrected, _ = mlx_svd.load(checkpoint("corrected"))
    both, _ = mlx_lm.load(str(exported.model), adapter_path=str(exported.adapter))
    alone, _ = mlx_lm.load(str(exported.model))
    assert_equal_logits(logits(both), logits(corrected), 1e-5)
    with pytest.raises(AssertionError, match="logits differ"):
        assert_equal_logits(logits(alone), logits(corrected), 1e-2)


def test_fuse_with_dequantize_gives_a_dense_model_with_the_same_logits(
    exported, checkpoint, run_stock, tmp_path, logits, assert_equal_logits
):
    out = tmp_path / "fused"
    paths = ["--adapter-path", exported.adapter, "--save-path", out]
    run_stock("fuse", "--model", exported.model, *paths, "--dequantize")
    fused, _ = mlx_lm.load(str(out))
    corrected, _ = mlx_svd.load(checkpoint("corrected"))
    assert_equal_logits(logits(fused), logits(corrected), 1e-4)


def test_the_model_without_its_adapter_loads_in_mlx_svd_and_mlx_lm_alike(
    exported, stock_text, greedy
):
    assert stock_text(exported.model, trust=False) == greedy(exported.model)
