"""Two processes, mlx.launch with the ring backend on 127.0.0.1: the same as one process.

One launch serves all tests; its script writes a result for every checkpoint, because mlx.launch
exits with 0 even when its processes fail.
"""

import json
import os
import sys
import sysconfig
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

pytestmark = pytest.mark.stock

TENSOR = [
    "factored",
    "pivot",
    "8bit_factored_groups_of_32",
    "8bit_pivot_groups_of_32",
    "per_head",
    "pivot_everywhere",
    "corrected",
    "corrected_8bit_factors",
    "sliced",
    "untouched",
]
PIPELINE = ["factored", "pivot", "8bit_auto", "corrected", "untouched"]
# With groups of 64, the 704 columns of down_proj cannot be cut in two: 352 is no multiple of 64.
STOCK_LIMITS = {"tensor parallelism": "quantized columns / processes must be a multiple of a group"}
REFUSED = ["8bit_factored", "untouched_8bit"]
PROGRAM = """
import json, sys
from pathlib import Path
import mlx.core as mx
from mlx_lm import stream_generate
from mlx_lm.utils import sharded_load

jobs, tokens, prompt, max_tokens, out = json.loads(sys.argv[1])
group = mx.distributed.init(strict=True, backend="ring")
for name, mode, folder in jobs:
    groups = (group, None) if mode == "pipeline" else (None, group)
    try:
        model, tokenizer = sharded_load(folder, *groups, trust_remote_code=True)
    except ValueError as error:  # raised by both, before they exchange anything
        result = {"error": str(error)}
    else:
        logits = model(mx.array(tokens)[None])[0].astype(mx.float32)
        mx.eval(logits)
        steps = stream_generate(model, tokenizer, prompt, max_tokens=max_tokens)
        result = {"text": "".join(step.text for step in steps)}
        mx.save_safetensors(f"{out}/{name}-{mode}-{group.rank()}", {"logits": logits})
    result["processes"] = group.size()
    path = Path(f"{out}/{name}-{mode}-{group.rank()}.json")
    path.with_suffix(".part").write_text(json.dumps(result))
    path.with_suffix(".part").rename(path)
mx.eval(mx.distributed.all_sum(mx.array(1.0), group=group, stream=mx.cpu))
"""


@pytest.fixture(scope="module")
def launched(
    checkpoint, run_command, environment, free_ports, tokens, prompt, max_tokens, tmp_path_factory
):
    """(folder of the results, what mlx.launch printed)."""
    folder = tmp_path_factory.mktemp("distributed")
    script = folder / "generate.py"
    script.write_text(PROGRAM)
    jobs = [(n, "tensor", str(checkpoint(n))) for n in TENSOR + REFUSED]
    jobs += [(n, "pipeline", str(checkpoint(n))) for n in PIPELINE]
    request = json.dumps([jobs, tokens.tolist(), prompt, max_tokens, str(folder)])
    launch = str(Path(sysconfig.get_path("scripts")) / "mlx.launch")
    command = [sys.executable, launch, "-n", "2", "--backend", "ring"]
    command += ["--starting-port", str(free_ports(2)), "--", sys.executable, str(script), request]
    # mlx.launch polls stdin without pause once that is at its end: an open pipe keeps it quiet.
    # Two processes share the cores, so the BLAS of each must not take all of them.
    read, write = os.pipe()
    try:
        threads = environment | {"OPENBLAS_NUM_THREADS": "1"}
        done = run_command(command, stdin=read, env=threads)
    finally:
        os.close(read)
        os.close(write)
    return folder, f"{done.stdout[-1000:]}\n{done.stderr[-3000:]}"


@pytest.fixture(scope="module")
def results(launched):
    """name, mode -> the two processes' results."""
    folder, printed = launched

    def read(name, mode):
        paths = [folder / f"{name}-{mode}-{rank}.json" for rank in range(2)]
        assert all(path.exists() for path in paths), f"no result; mlx.launch printed:\n{printed}"
        found = [json.loads(path.read_text()) for path in paths]
        assert [result["processes"] for result in found] == [2, 2]
        for result, path in zip(found, paths, strict=True):
            if "text" in result:
                arrays = mx.load(str(path.with_suffix(".safetensors")))
                result["logits"] = np.array(arrays["logits"])
        return found

    return read


@pytest.fixture(scope="module")
def assert_same_as_one_process(results, checkpoint, logits, greedy, assert_equal_logits):
    def check(name, mode):
        model, _ = mlx_lm.load(str(checkpoint(name)), trust_remote_code=True)
        for result in results(name, mode):
            assert "error" not in result, result["error"]
            assert_equal_logits(result["logits"], logits(model), 1e-4)
            assert result["text"] == greedy(checkpoint(name))

    return check


@pytest.mark.parametrize("name", TENSOR)
def test_tensor_parallel_equals_one_process(name, assert_same_as_one_process):
    assert_same_as_one_process(name, "tensor")


@pytest.mark.parametrize("name", PIPELINE)
def test_pipeline_equals_one_process(name, assert_same_as_one_process):
    assert_same_as_one_process(name, "pipeline")


@pytest.mark.parametrize("name", REFUSED)
def test_groups_that_cannot_be_split_are_refused_for_low_rank_and_dense_models(name, results):
    for result in results(name, "tensor"):
        assert "divisible by the quantization group size" in result["error"]
