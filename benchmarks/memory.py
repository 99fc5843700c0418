"""Peak memory of ``mlx-svd compress`` on a generated checkpoint of 4 GB.

Each run is a process of its own. Its peak is the kernel's count of resident memory, including
the Python interpreter and every library; on Linux it is also split into anonymous memory and
mapped files.
"""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from math import prod
from pathlib import Path

from benchmarks.common import (
    conditions,
    parse_options,
    print_conditions,
    print_table,
    progress,
    save,
    spread,
)

WANTED_GB = 0.8
# Only the comparison in decompose needs torch. Users have none; transformers would import it.
_NO_TORCH = "import sys; sys.modules['torch'] = None; "
_IMPORTS = "import mlx_svd.cli.app, mlx_svd.cli.plan, mlx_svd.cli.progress, mlx_svd.compress"
_MAIN = "from mlx_svd.cli.app import main; main()"
_RECIPE = ["--projections", "q,k,o", "--rank-ratio", "0.7"]
VARIANTS = {
    "auto, default workers": [],
    "auto, 1 worker": ["--workers", "1"],
    "auto, 4 workers": ["--workers", "4"],
    "8 bits, default workers": ["-q", "--q-bits", "8"],
}


def run_measured(command: list[str]) -> dict[str, float]:
    """Run a command; GB of peak resident memory of exactly that process, and its seconds.

    resident: the kernel's ru_maxrss, which on Linux also covers this small process at the fork;
    on Linux also high_water (VmHWM of the new program) and the largest anonymous and file-mapped
    parts seen, all polled. Raises SystemExit if the command fails.
    """
    start = time.perf_counter()
    with tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        peaks: dict[str, float] = {}
        poller = threading.Thread(target=_poll, args=(child.pid, peaks))
        poller.start()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        poller.join()
        if child.returncode:
            errors.seek(0)
            raise SystemExit(f"{command}: {errors.read().decode()[-2000:]}")
    unit = 1 if platform.system() == "Darwin" else 1024
    return {
        "resident": usage.ru_maxrss * unit / 1e9,
        **peaks,
        "seconds": time.perf_counter() - start,
    }


def _poll(pid: int, peaks: dict[str, float]) -> None:
    """Largest values of /proc/PID/status until the process has ended (elsewhere: nothing)."""
    path = Path(f"/proc/{pid}/status")
    names = {"VmHWM": "high_water", "RssAnon": "anonymous", "RssFile": "mapped_files"}
    while path.exists():
        try:
            fields = dict(line.split(":", 1) for line in path.read_text().splitlines())
        except OSError:
            return
        if "VmHWM" not in fields:  # a zombie
            return
        for field, name in names.items():
            peaks[name] = max(peaks.get(name, 0), int(fields[field].split()[0]) * 1024 / 1e9)
        time.sleep(0.005)


def compress_command(model: Path, target: Path, options: list[str]) -> list[str]:
    program = [sys.executable, "-c", _NO_TORCH + _MAIN, "compress", "--model", str(model)]
    return [*program, "--mlx-path", str(target), *_RECIPE, *options]


def measure(model: str, runs: int) -> dict:
    """Generate the checkpoint, compress it in each variant, delete everything."""
    from benchmarks.checkpoints import MODELS, tensor_shapes, total_bytes

    config = MODELS[model]
    size = total_bytes(config)
    with tempfile.TemporaryDirectory(prefix="mlx-svd-bench-") as folder:
        if shutil.disk_usage(folder).free < 2.5 * size:
            raise SystemExit(f"memory: needs {2.5 * size / 1e9:.1f} GB below {folder}")
        source = Path(folder, "source")
        source.mkdir()
        progress(f"generating {size / 1e9:.2f} GB")
        generate = [sys.executable, "-m", "benchmarks.checkpoints", str(source), model]
        subprocess.run(generate, check=True)
        imports = [run_measured([sys.executable, "-c", _NO_TORCH + _IMPORTS]) for _ in range(runs)]
        variants = {
            name: [_compress(source, Path(folder, "target"), o) for _ in range(runs)]
            for name, o in VARIANTS.items()
        }
        progress("")
    return {
        "conditions": conditions(runs, pools=[]),
        "model": config,
        "checkpoint_bytes": size,
        "largest_tensor_bytes": max(2 * prod(shape) for shape in tensor_shapes(config).values()),
        "wanted_gb": WANTED_GB,
        "imports_gb": _summary(imports),
        "compress_gb": {name: _summary(values) for name, values in variants.items()},
    }


def _compress(source: Path, target: Path, options: list[str]) -> dict[str, float]:
    progress(f"compress {' '.join(options)}")
    try:
        return run_measured(compress_command(source, target, options))
    finally:
        shutil.rmtree(target, ignore_errors=True)


def _summary(values: list[dict[str, float]]) -> dict:
    return {key: spread([v[key] for v in values]) for key in values[0]}


def report(result: dict) -> None:
    """Print peaks in GB: the median of the runs; the largest beside what is wanted."""
    print(f"\n# memory: compress a checkpoint of {result['checkpoint_bytes'] / 1e9:.2f} GB")
    print_conditions(result["conditions"])
    largest = result["largest_tensor_bytes"] / 1e9
    print(f"largest tensor {largest:.3f} GB as stored, {2 * largest:.3f} GB in float32\n")
    keys = [k for k in result["imports_gb"] if k != "seconds"]
    header = ["GB", *(k.replace("_", " ") for k in keys), "worst run", "wanted", "seconds"]
    rows = [_row("imports alone", result["imports_gb"], keys, "")]
    rows += [
        _row(name, peaks, keys, _verdict(peaks["resident"]["max"]))
        for name, peaks in result["compress_gb"].items()
    ]
    print_table(header, rows)
    print(
        "anonymous: the process's own data, the part that nothing else can use. Peaks of the\n"
        "parts need not be at the same time. Workers by default: one for each core, at most 4."
    )


def _verdict(gigabytes: float) -> str:
    return f"<= {WANTED_GB}: {'yes' if gigabytes <= WANTED_GB else 'NO'}"


def _row(name: str, peaks: dict, keys: list[str], verdict: str) -> list[str]:
    medians = [f"{peaks[key]['median']:.3f}" for key in keys]
    seconds = f"{peaks['seconds']['median']:.1f}"
    return [name, *medians, f"{peaks['resident']['max']:.3f}", verdict, seconds]


def main() -> None:
    """Measure, print and save."""
    options = parse_options(__doc__, runs=1, quick_runs=1)
    result = measure("tiny" if options.quick else "4GB", options.runs)
    report(result)
    save("memory-quick" if options.quick else "memory", result)


if __name__ == "__main__":
    main()
