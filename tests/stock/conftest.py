"""Checkpoints of the embedded demo model and the means to run stock mlx-lm programs on them.

`make test-stock` runs these tests. Everything is float32: it is exact, and fast on a CPU. The
first run on a machine is slower, because MLX compiles kernels with the C++ compiler and keeps
them in the temporary folder. What stock mlx-lm cannot do with any model is listed in constants at
the top of the files, each with a control test on the dense model where that is cheap.
"""

import contextlib
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import mlx_svd
from mlx_svd.calibrate.calibrate import calibrate
from mlx_svd.calibrate.statistics import Calibration
from mlx_svd.calibrate.text import read_windows
from mlx_svd.checkpoint.layout import quantization
from mlx_svd.compress import compress
from mlx_svd.demo.run import DEMO_MODEL, PASSAGE, PROMPT
from mlx_svd.evaluate.generation.generate import generate
from mlx_svd.plan.make import make_plan
from mlx_svd.plan.policy import RankPolicy
from mlx_svd.plan.recipe import Recipe, Rule
from mlx_svd.source.families import PROJECTIONS
from mlx_svd.source.source import open_source

MAX_TOKENS = 24
TIMEOUT = 240  # seconds for one program; a quiet machine needs 2 to 20
_HALF = {"policy": RankPolicy(rank_ratio=0.5), "dtype": "float32"}
_SKIP = {"rules": (Rule(skip=True),), "dtype": "float32"}
_Q4 = {"quantize": quantization(4, 32), "dtype": "float32"}
RECIPES: dict[str, Recipe] = {
    "factored": Recipe(form="factored", rank_multiple=64, **_HALF),
    "pivot": Recipe(form="pivot", rank_multiple=64, **_HALF),
    "dense": Recipe(form="dense", **_HALF),
    "8bit_auto": Recipe(quantize=quantization(8), **_HALF),
    "8bit_factored": Recipe(form="factored", quantize=quantization(8), **_HALF),
    # 704 / 2 columns of down_proj are no multiple of 64: tensor parallelism needs groups of 32.
    "8bit_factored_groups_of_32": Recipe(form="factored", quantize=quantization(8, 32), **_HALF),
    "8bit_pivot_groups_of_32": Recipe(form="pivot", quantize=quantization(8, 32), **_HALF),
    "per_head": Recipe(form="factored", per_head=True, **_HALF),
    "pivot_everywhere": Recipe(form="pivot", projections=PROJECTIONS, **_HALF),
    # Groups of 32 for the same reason.
    "corrected": Recipe(PROJECTIONS, RankPolicy(rank=64), "corrected", **_Q4),
    "corrected_8bit_factors": Recipe(
        rules=(Rule(policy=RankPolicy(rank=64), form="corrected", factor_bits=8),), **_Q4
    ),
    "sliced": Recipe(form="sliced", projections=PROJECTIONS, **_HALF),
    # Controls: nothing truncated, so that mlx-lm's own classes run.
    "untouched": Recipe(**_SKIP),
    "untouched_8bit": Recipe(quantize=quantization(8), **_SKIP),
}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """name in RECIPES -> the checkpoint, made on first use."""
    folder, source = tmp_path_factory.mktemp("checkpoints"), open_source(str(DEMO_MODEL))

    def make(name: str) -> Path:
        path = folder / name
        if not path.exists():
            known = calibration() if RECIPES[name].form == "sliced" else None
            plan = make_plan(source, RECIPES[name], calibration=known)
            compress(source, plan, path, calibration=known)
        return path

    def calibration() -> Calibration:
        model, tokenizer = mlx_svd.load(DEMO_MODEL, dtype="float32")
        windows = read_windows(tokenizer, PASSAGE, length=64)
        return calibrate(
            source, lambda: model, windows, folder / "calibration", projections=PROJECTIONS
        )

    return make


@pytest.fixture(scope="session")
def prompt() -> str:
    return PROMPT


@pytest.fixture(scope="session")
def max_tokens() -> int:
    return MAX_TOKENS


@pytest.fixture(scope="session")
def greedy() -> Callable[[Path], str]:
    """checkpoint -> what mlx-svd itself generates from it in this process."""
    texts: dict[Path, str] = {}

    def text(path: Path) -> str:
        if path not in texts:
            model, tokenizer = mlx_svd.load(path)
            run = generate(model, tokenizer, PROMPT, max_tokens=MAX_TOKENS, chat=False)
            assert run.text.strip()
            texts[path] = run.text
        return texts[path]

    return text


@pytest.fixture(scope="session")
def tokens() -> np.ndarray:
    """40 tokens of a text that the model has not seen."""
    _, tokenizer = mlx_svd.load(DEMO_MODEL, lazy=True)
    return np.array(tokenizer.encode(PASSAGE.read_text())[:40])


@pytest.fixture(scope="session")
def logits(tokens: np.ndarray) -> Callable[[nn.Module], np.ndarray]:
    """model -> its logits (length, vocabulary) on ``tokens``."""
    return lambda model: np.array(model(mx.array(tokens)[None])[0].astype(mx.float32))


@pytest.fixture(scope="session")
def assert_equal_logits() -> Callable[..., None]:
    """Compare two arrays of logits; ``limit`` is a share of the largest expected one."""

    def check(actual: np.ndarray, expected: np.ndarray, limit: float = 1e-5) -> None:
        assert actual.shape == expected.shape
        difference = float(np.abs(actual - expected).max() / np.abs(expected).max())
        assert difference <= limit, f"logits differ by {difference:.2e} of the largest"

    return check


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.jsonl and valid.jsonl with the paragraphs of the demo's passage."""
    folder = tmp_path_factory.mktemp("data")
    rows = [json.dumps({"text": line}) for line in PASSAGE.read_text().splitlines() if line]
    (folder / "train.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "valid.jsonl").write_text("\n".join(rows[:4]) + "\n")
    return folder


@pytest.fixture(scope="session")
def datasets_package() -> None:
    """mlx-lm reads the data of perplexity and dwq with it; its absence is an error in CI only."""
    if importlib.util.find_spec("datasets") is None:
        reason = "mlx_lm perplexity and dwq need the datasets package"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Offline, without colors, caches in a temporary folder; LD_PRELOAD (the BLAS) is kept."""
    return os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(tmp_path_factory.mktemp("datasets")),
        "NO_COLOR": "1",
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


@pytest.fixture(scope="session")
def start(environment: dict[str, str]) -> Callable[..., subprocess.Popen]:
    """Start a program in a process group of its own, so that ``stop`` ends its children too."""

    def begin(command: list[str], **options: Any) -> subprocess.Popen:
        options = {"stdin": subprocess.DEVNULL, "text": True, "env": environment, **options}
        return subprocess.Popen(command, start_new_session=True, **options)

    return begin


@pytest.fixture(scope="session")
def stop() -> Callable[[subprocess.Popen], None]:
    def end(process: subprocess.Popen) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream:
                stream.close()

    return end


@pytest.fixture(scope="session")
def run_command(start: Callable, stop: Callable) -> Callable[..., subprocess.CompletedProcess]:
    """Run a command to its end; a test fails with the end of stderr if ``check`` and it fails."""

    def run(
        command: list[str], check: bool = True, timeout: int = TIMEOUT, **options: Any
    ) -> subprocess.CompletedProcess:
        process = start(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        finally:
            stop(process)
        shown = " ".join(command)
        assert not check or process.returncode == 0, (
            f"{shown}\nexit status {process.returncode}\n{stdout[-1000:]}\n{stderr[-3000:]}"
        )
        return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)

    return run


@pytest.fixture(scope="session")
def run_stock(run_command: Callable) -> Callable[..., subprocess.CompletedProcess]:
    """``python -m mlx_lm`` with these arguments; stdout without colors."""

    def run(*arguments: Any, check: bool = True) -> subprocess.CompletedProcess:
        done = run_command([sys.executable, "-m", "mlx_lm", *map(str, arguments)], check=check)
        done.stdout = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)
        return done

    return run


@pytest.fixture(scope="session")
def stock_text(run_stock: Callable) -> Callable[..., str]:
    """Text that ``mlx_lm generate`` prints for a checkpoint and further flags."""

    def text(path: Path, *flags: Any, trust: bool = True) -> str:
        trusted = ["--trust-remote-code"] if trust else []
        fixed = ["--ignore-chat-template", "--max-tokens", MAX_TOKENS, "--verbose", "False"]
        done = run_stock("generate", "--model", path, *trusted, *fixed, "--prompt", PROMPT, *flags)
        return done.stdout.removesuffix("\n")

    return text


@pytest.fixture(scope="session")
def free_ports() -> Callable[[int], int]:
    """n -> the first of n consecutive ports of 127.0.0.1 that nobody listens on."""

    def find(count: int) -> int:
        for _ in range(50):
            sockets = [socket.socket() for _ in range(count)]
            try:
                sockets[0].bind(("127.0.0.1", 0))
                first = sockets[0].getsockname()[1]
                for offset, other in enumerate(sockets[1:], 1):
                    other.bind(("127.0.0.1", first + offset))
            except (OSError, OverflowError):
                continue
            else:
                return first
            finally:
                for each in sockets:
                    each.close()
        raise AssertionError("found no free ports")

    return find
