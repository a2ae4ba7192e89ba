"""kill -9 at random moments, then --resume: the final files must be the same bytes every time.

python benchmarks/kill_resume.py [--kills 50] [--quick]

A run on the digits is started as a process of its own, killed after a random time, resumed, killed again ..., and at
last left to finish. Its two files are compared with those of a run that nobody disturbed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

PROJECT = """
import torch
from torch import nn
import espalier as es

def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
                         nn.Linear(128, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 10))

def task():
    data = es.data.standard("digits", batch_size=32)
    return es.tasks.classification(data.train, data.val, data.test)
"""
RECIPE = """
- train.finetune: {epochs: 12, lr: 3e-3}
- recipes.deep-compression:
    strength: 0.6
    prune:
      prune.prune: {epochs: 24, scope: global, schedule: cubic, lr: 2e-3, optimizer: {sgd: {momentum: 0.9}}, every: 7}
    finetune: {train.finetune: {epochs: 8, stopping: early-stopping}}
"""
FILES = ("model.espalier", "model.weights.espalier")


def command(folder: Path, out: Path, *, resume: bool) -> list[str]:
    """The compress command line of one run."""
    extra = ["--resume"] if resume else []
    return [sys.executable, "-m", "espalier.cli.main", "compress", str(folder / "project.py"), "--recipe",
            str(folder / "recipe.yaml"), "--out", str(out), "--threads", "1", "--json", *extra]  # fmt: skip


def digests(out: Path) -> dict[str, str]:
    """SHA-256 of the two files of a finished run."""
    return {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in FILES}


def start(folder: Path, out: Path) -> subprocess.Popen[bytes]:
    """Start or resume a run in a process of its own, quietly."""
    resume = (out / "journal.jsonl").exists()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command(folder, out, resume=resume), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment
    )


@dataclass(frozen=True)
class Pace:
    """Seconds an undisturbed run needs before its journal appears, and from there to its end."""

    startup: float
    work: float


def finish(folder: Path, out: Path) -> Pace:
    """Run to the end. Raises RuntimeError with what the run said if it fails."""
    started = time.monotonic()
    process = start(folder, out)
    while process.poll() is None and not (out / "journal.jsonl").exists():
        time.sleep(0.02)
    begun = time.monotonic()
    _, said = process.communicate(timeout=600)
    if process.returncode:
        raise RuntimeError(f"the run ended with {process.returncode}: {said.decode()[-2000:]}")
    return Pace(begun - started, time.monotonic() - begun)


def prepare(folder: Path) -> tuple[dict[str, str], Pace]:
    """Write project and recipe and make the undisturbed run: its digests and its pace."""
    (folder / "project.py").write_text(PROJECT)
    (folder / "recipe.yaml").write_text(RECIPE)
    pace = finish(folder, folder / "reference")
    return digests(folder / "reference"), pace


def disturbed(
    folder: Path, name: str, kills: int, pace: Pace, chance: random.Random
) -> tuple[dict[str, str], list[float]]:
    """A run killed up to ``kills`` times at random moments, then finished: its digests and when it was killed.

    Each life gets a random share of the work, about one part in ``kills`` on average, so that most kills land.
    """
    out, moments = folder / name, []
    for _ in range(kills):
        process = start(folder, out)
        moment = pace.startup + chance.uniform(0, 1.2 * pace.work / kills)
        try:
            process.communicate(timeout=moment)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            moments.append(moment)
    finish(folder, out)
    return digests(out), moments


def main() -> None:
    from benchmarks.common import save

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--quick", action="store_true", help="10 kills")
    arguments = parser.parse_args()
    wanted = 10 if arguments.quick else arguments.kills
    chance, killed, same, runs = random.Random(0), 0, 0, 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        reference, pace = prepare(folder)
        while killed < wanted:
            found, moments = disturbed(folder, f"run-{runs}", min(5, wanted - killed), pace, chance)
            killed, runs, same = killed + len(moments), runs + 1, same + (found == reference)
            print(f"{killed} kills, {runs} runs, {same} with the same bytes", flush=True)
            save("kill_resume" + ("_quick" if arguments.quick else ""), [{
                "id": "runs", "row": "kill -9, then --resume", "claimed": {},
                "measured": {"kills": killed, "runs": runs, "runs_with_the_same_bytes": same},
                "setting": {"kills_per_run": 5, "threads": 1, "seconds": round(pace.startup + pace.work, 1)},
                "seed": 0,
            }])  # fmt: skip
    if same != runs:
        raise SystemExit("some runs ended with other bytes")


if __name__ == "__main__":
    main()
