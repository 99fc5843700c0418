"""mlx_lm dwq distils into a quantized low-rank student, and its checkpoint loads.

bfloat16, which dwq trains in, is slow on a CPU: one step on one short sequence.
"""

import json
import shutil

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

import mlx_svd

pytestmark = [pytest.mark.stock, pytest.mark.usefixtures("datasets_package")]

# dwq copies *.py from the teacher's folder, so the code of a student with another teacher is
# missing in its output. Copying the file from the student repairs it.
STOCK_LIMITS = {"dwq --model dense --quantized-model low-rank": "writes no model_file"}


@pytest.fixture(scope="module")
def student(checkpoint, run_stock, tmp_path_factory):
    """The factored checkpoint in 4 bits, made by mlx_lm convert."""
    out = tmp_path_factory.mktemp("student") / "4bit"
    model = ["--hf-path", checkpoint("factored"), "--trust-remote-code"]
    run_stock("convert", *model, "--mlx-path", out, "-q", "--q-bits", 4)
    return out


@pytest.fixture(scope="module")
def distil(checkpoint, student, run_stock, data_folder, tmp_path_factory):
    """name of the teacher -> the folder that dwq wrote for the student."""
    folder = tmp_path_factory.mktemp("dwq")
    (folder / "data").mkdir()
    rows = (data_folder / "train.jsonl").read_text().splitlines()[:2]
    (folder / "data" / "train.jsonl").write_text("\n".join(rows) + "\n")

    def run(teacher):
        out = folder / teacher
        if not out.exists():
            models = ["--model", checkpoint(teacher), "--quantized-model", student]
            flags = ["--num-samples", 1, "--batch-size", 1, "--max-seq-length", 13]
            data = ["--data-path", folder / "data", "--learning-rate", 1e-3, "--mlx-path", out]
            run_stock("dwq", *models, "--trust-remote-code", *flags, *data)
        return out

    return run


def scales(folder):
    weights = mx.load(str(folder / "model.safetensors"))
    return {name: w.astype(mx.float32) for name, w in weights.items() if name.endswith(".scales")}


def test_dwq_with_the_low_rank_teacher_writes_a_checkpoint_that_loads(
    distil, student, stock_text, logits, assert_equal_logits
):
    out = distil("factored")
    assert stock_text(out).strip()
    ours, _ = mlx_svd.load(out)
    stock, _ = mlx_lm.load(str(out), trust_remote_code=True)
    assert_equal_logits(logits(ours), logits(stock), 1e-6)
    before, after = scales(student), scales(out)
    assert set(before) == set(after)
    for part in ("down", "up"):
        name = f"model.layers.0.self_attn.q_proj.{part}.scales"
        assert not np.array_equal(before[name], after[name])


def test_dwq_with_a_dense_teacher_loads_once_the_model_file_is_copied(
    distil, student, logits, assert_equal_logits
):
    out = distil("untouched")
    model_file = json.loads((out / "config.json").read_text())["model_file"]
    assert not (out / model_file).exists()
    ours, _ = mlx_svd.load(out)  # has its own copy of the code
    shutil.copy(student / model_file, out)
    stock, _ = mlx_lm.load(str(out), trust_remote_code=True)
    assert_equal_logits(logits(ours), logits(stock), 1e-6)
