"""Seconds of the whole demo as a process of its own, training to report; and of a second call."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import save


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.parse_args()
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "espalier.cli.main", "demo", "--out", f"{folder}/demo", "--json"]
        for _ in range(2):
            started = time.perf_counter()
            done = subprocess.run(command, capture_output=True, check=True)
            seconds.append(round(time.perf_counter() - started, 1))
        record = json.loads(done.stdout)
    measured = {
        "seconds": seconds[0], "seconds_second_call": seconds[1],
        "bytes": record["compressed"]["file_bytes"], "bytes_before": record["original"]["file_bytes"],
        "test_error": 100 - record["test"]["compressed"]["value"],
        "test_error_before": 100 - record["test"]["original"]["value"],
    }  # fmt: skip
    print(measured)
    save("demo", [{"id": "recipes.deep-compression", "row": "digits", "claimed": {}, "measured": measured,
                   "setting": {"threads": 1, "runs": 1}, "seed": 0}])  # fmt: skip


if __name__ == "__main__":
    main()
