"""What all benchmarks share: options, interleaved timing, conditions, tables, the JSON file.

Imports little: the process that measures the memory of another must be small itself.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

import mlx_svd

RESULTS = Path(__file__).with_name("results")
_PACKAGES = ("mlx", "mlx-lm", "numpy", "scipy", "torch")


def parse_options(doc: str, runs: int, quick_runs: int) -> argparse.Namespace:
    """--quick and --runs; runs and quick_runs: their defaults."""
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--runs", type=int)
    options = parser.parse_args()
    options.runs = options.runs or (quick_runs if options.quick else runs)
    return options


def interleaved(contenders: dict[str, Callable[[], object]], runs: int) -> dict[str, list[float]]:
    """Wall seconds of each contender: A B C A B C ..., so that a noisy minute hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for run in range(runs):
        for name, contender in contenders.items():
            progress(f"run {run + 1}/{runs}: {name}")
            start = time.perf_counter()
            contender()
            seconds[name].append(time.perf_counter() - start)
    progress("")
    return seconds


def progress(text: str) -> None:
    """Show what is running, on a terminal only."""
    if sys.stderr.isatty():
        print(f"\r{text[:78]:<78}\r", end="", file=sys.stderr, flush=True)


def spread(values: list[float]) -> dict:
    """Median, smallest and largest, and all values."""
    return {"median": median(values), "min": min(values), "max": max(values), "values": values}


def blas_libraries() -> list[dict]:
    """Every BLAS and thread pool loaded into this process: file name, version, threads."""
    from threadpoolctl import threadpool_info

    keys = ("user_api", "internal_api", "version", "architecture", "num_threads")
    return [
        {"file": Path(pool["filepath"]).name, **{key: pool.get(key) for key in keys}}
        for pool in threadpool_info()
    ]


def conditions(runs: int, pools: list[dict] | None = None) -> dict:
    """Machine, versions and command; pools: what ``blas_libraries`` said at the right moment."""
    name = Path(sys.argv[0]).stem
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "os": platform.platform(),
        "python": platform.python_version(),
        "versions": {"mlx-svd": mlx_svd.__version__} | {name: _version(name) for name in _PACKAGES},
        "thread_pools": blas_libraries() if pools is None else pools,
        "blas_environment": {k: v for k, v in sorted(os.environ.items()) if "_NUM_THREADS" in k}
        | {k: v for k, v in os.environ.items() if k == "OPENBLAS_CORETYPE"},
        "preloaded": [Path(p).name for p in os.environ.get("LD_PRELOAD", "").split(":") if p],
        "command": shlex.join(["python", "-m", "benchmarks", name, *sys.argv[1:]]),
        "runs": runs,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def print_conditions(c: dict) -> None:
    """The lines above every table."""
    print(f"{c['cpu']}, {c['cores']} cores, {c['os']}, load {c['load_average'][0]}")
    print(
        ", ".join(f"{name} {number or 'not installed'}" for name, number in c["versions"].items())
    )
    for pool in c["thread_pools"]:
        if pool["user_api"] == "blas":
            print(f"BLAS {pool['file']} {pool['version']}, {pool['num_threads']} threads")


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """The first column on the left, the others on the right."""
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    for line in [header, *rows]:
        cells = [c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True)]
        print("  ".join([line[0].ljust(widths[0]), *cells]))


def save(name: str, result: dict) -> None:
    """Write benchmarks/results/NAME.json; a quick run is a smoke test and is not kept as one."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"saved {path.relative_to(RESULTS.parent.parent)}\n")
