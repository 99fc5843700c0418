"""``python -m benchmarks [decompose|memory|speed|evaluate|kv ...]``: run, print tables, save JSON.

Every benchmark runs in a process of its own, so that none measures what another left behind.
"""

import argparse
import subprocess
import sys

NAMES = ("decompose", "memory", "speed", "evaluate", "kv")


def main() -> int:
    """The exit code: 1 if a benchmark failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(NAMES)}; default all")
    parser.add_argument("--quick", action="store_true", help="Small sizes: does it run at all?")
    parser.add_argument("--runs", type=int, help="Repetitions; the median is reported.")
    options = parser.parse_args()
    if unknown := sorted(set(options.names) - set(NAMES)):
        parser.error(f"{unknown[0]}: use {', '.join(NAMES)}")
    given = ["--quick"] * options.quick
    given += ["--runs", str(options.runs)] if options.runs else []
    failed = 0
    for name in options.names or NAMES:
        command = [sys.executable, "-m", f"benchmarks.{name}", *given]
        failed |= subprocess.run(command).returncode != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
