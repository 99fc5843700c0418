"""What planning costs: a budget's plan made by the command, in a process of its own."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from mlx_svd.errors import MlxSvdError
from mlx_svd.experiments.child import child_environment, python_module

_KEEP_BYTES = "0.5"


def plan_cost(model: Path, calibration: Path) -> dict[str, Any]:
    """Seconds, CPU seconds and peak memory (bytes) of ``mlx-svd plan --projections all
    --keep-bytes 0.5`` from a finished calibration.

    All candidates are measured, unless the calibration's folder holds them already. Raises
    MlxSvdError with the command's last line when it fails.
    """
    options = ["--model", str(model), "--calibration", str(calibration), "--projections", "all"]
    command = [*python_module("mlx_svd"), "plan", *options, "--keep-bytes", _KEEP_BYTES]
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            [*command, "--json"], stdout=subprocess.DEVNULL, stderr=errors, env=child_environment()
        )
        # wait4 tells the use of this child alone, which no call of subprocess does.
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            errors.seek(0)
            last = (errors.read().strip() or "no message").splitlines()[-1]
            raise MlxSvdError(f"mlx-svd plan failed: {last.removeprefix('error: ')}")
    return {
        "seconds": round(time.perf_counter() - began, 2),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_memory": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
    }
