"""Seconds until ``espalier --help`` has answered: a process of its own each time, wall clock, median and spread.

python benchmarks/startup.py [--quick]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import save

COMMANDS = {"espalier --help": ["-m", "espalier.cli.main", "--help"], "python -c pass": ["-c", "pass"]}


def seconds(arguments: list[str]) -> float:
    """One process, start to end."""
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="10 runs each instead of 50")
    runs = 10 if parser.parse_args().quick else 50
    taken: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for name, command in COMMANDS.items():
        seconds(command)  # warm
        taken[name] = sorted(seconds(command) for _ in range(runs))
    rows = []
    for name, found in taken.items():
        measured = {
            "seconds_median": statistics.median(found),
            "seconds_p10": found[runs // 10],
            "seconds_p90": found[-1 - runs // 10],
        }
        print(f"{name}: {measured['seconds_median']:.3f} s", flush=True)
        rows.append(
            {"id": "cli", "row": name, "claimed": {}, "measured": measured, "setting": {"runs": runs}, "seed": None}
        )
    save("startup", rows)


if __name__ == "__main__":
    main()
