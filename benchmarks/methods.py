"""One measured row per method at least: bytes of the re-loaded file, test error, seconds. Small networks on MNIST.

python benchmarks/methods.py [--quick] [--again] [--only prune.lamp ...] [--data-dir DIR]

Every row starts from the same trained network of its kind (``methods_parts/networks.py``) and changes one thing
(``methods_parts/rows.py``), so that the rows of one kind can be compared with each other; none is tuned. The random
rows are the baseline the others must beat. Rows are kept: a second call goes on where the first stopped. ``--quick``:
10,000 training images, half of the test images and two epochs in place of three; a full row is never replaced by a
quick one, a quick one is by a full one. ``--again`` does all of them again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import RESULTS, save
from benchmarks.methods_parts.networks import NETWORKS
from benchmarks.methods_parts.row import Row, Setting
from benchmarks.methods_parts.rows import rows

import espalier as es
from espalier.core.context import Context
from espalier.core.errors import EspalierWarning
from espalier.core.recipe import Recipe
from espalier.data import Loader, Normalisation, standard
from espalier.train import Finetune

FILE = "methods"
QUICK = Setting("quick", epochs=2, images=10_000, judged=5_000, every=10)
FULL = Setting("full", epochs=3, images=55_000, judged=10_000, every=50)


def task_of(setting: Setting, folder: Path | None) -> es.Task:
    """MNIST; of the training images a seeded subset, of val and test the first ones."""
    scale = Normalisation((0.0,), (1.0,))
    data = standard("mnist", folder, batch_size=128, normalisation=scale)
    chosen = torch.randperm(len(data.train.x), generator=torch.Generator().manual_seed(0))[: setting.images]
    train = data.train
    if setting.images < len(data.train.x):
        train = Loader(data.train.x[chosen], data.train.y[chosen], batch_size=128, shuffle=True, normalisation=scale)
    held = (
        Loader(part.x[:count], part.y[:count], batch_size=1000, normalisation=scale)
        for part, count in ((data.val, setting.judged // 2), (data.test, setting.judged))
    )
    return es.tasks.classification(train, *held)


def trained(network: str, setting: Setting, task: es.Task) -> nn.Module:
    """The network that all rows of its kind start from; seeded, so that a later call trains the same."""
    torch.manual_seed(0)
    return Finetune(epochs=setting.start, lr=2e-3)(NETWORKS[network][1](), Context(task=task))


def done(setting: Setting) -> set[tuple[str, str]]:
    """The rows that are there in this setting, or in the full one."""
    path = RESULTS / f"{FILE}.json"
    found = json.loads(path.read_text()) if path.exists() else []
    modes = {setting.mode, "full"}
    return {(row["id"], row["row"]) for row in found if row["setting"].get("mode", "full") in modes}


def measured(row: Row, model: nn.Module, task: es.Task) -> dict[str, Any]:
    """One row. The bytes are the length of a file that was loaded again, the test error is that of what it holds."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        recipe = Recipe(steps=row.steps, file=row.file)
        record = es.compress(model, row.task(task), recipe, out=Path(folder) / "run", timing_seconds=0).record
        seconds = time.monotonic() - started
    return {
        "bytes": record["files"]["model.weights.espalier"]["bytes"],
        "test_error": 100 - record["test"]["compressed"]["value"],
        "test_error_before": 100 - record["test"]["original"]["value"],
        "nonzero": record["compressed"]["nonzero"],
        "seconds": round(seconds, 1),
    }


def main() -> None:
    """Parse and run; what fails is said, and the others go on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--again", action="store_true", help="rows that are there already as well")
    parser.add_argument("--only", nargs="+", metavar="ID", help="the rows of these methods")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data-dir", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    warnings.simplefilter("always", EspalierWarning)  # a method without an effect says so
    setting = QUICK if given.quick else FULL
    there = set() if given.again else done(setting)
    left = [row for row in rows(setting) if (row.id, row.what) not in there and row.id in (given.only or [row.id])]
    print(f"{len(left)} rows, {setting}", flush=True)
    task = task_of(setting, given.data_dir or os.environ.get("ESPALIER_DATA"))  # type: ignore[arg-type]
    starts: dict[str, nn.Module] = {}
    failed = []
    for row in left:
        if row.network not in starts:
            starts[row.network] = trained(row.network, setting, task)
        try:
            found = measured(row, starts[row.network], task)
        except Exception:
            failed.append(f"{row.id} ({row.what})")
            print(f"{row.id} failed:\n{traceback.format_exc()}", flush=True)
            continue
        print(f"{row.id:28} {row.what:60} {found}", flush=True)
        described = {
            "network": NETWORKS[row.network][0], "data": "MNIST", "mode": setting.mode, "epochs": setting.epochs,
            "images": setting.images, "test_images": setting.judged, "threads": given.threads,
        }  # fmt: skip
        entry = {"id": row.id, "row": row.what, "claimed": {}, "measured": found, "setting": described, "seed": 0}
        save(FILE, [entry])
    if failed:
        sys.exit(f"{len(failed)} rows failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
