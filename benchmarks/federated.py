"""Federated averaging on MNIST: accuracy against bytes, round by round, with dense and with compressed messages.

python benchmarks/federated.py [--quick] [--seeds 3] [--only NAME ...] [--data-dir DIR]

LeNet-5 from scratch; 10 clients, each with two runs of the training images in the order of their labels, so of two to
four classes. Each round a client goes through its data ``epochs`` times. All rows do the same rounds with the same seed
and learning rate and differ in the messages only. Bytes are the lengths of the messages as encoded; up: all clients to
the server, down: the server to the clients. What counts is the mean test accuracy over the last tenth of the rounds,
and all bytes of all rounds. Rows are kept: a second call goes on where the first stopped.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import arguments, begin, kept, save, spread
from benchmarks.subjects import task_of
from examples.lenet import LeNet5
from torch import nn

import espalier as es
from espalier.core.context import Context
from espalier.core.method import Technique
from espalier.core.record import Record
from espalier.recipes import Federated

FILE = "federated"
DENSE = "dense"


@dataclass(frozen=True)
class Setting:
    """What a reader needs to repeat a row."""

    mode: str
    images: int
    judged: int
    rounds: int
    epochs: int
    lr: float
    clients: int = 10
    shards: int = 2
    batch: int = 50


QUICK = Setting("quick", 6_000, 5_000, rounds=30, epochs=5, lr=0.05)
FULL = Setting("full", 55_000, 10_000, rounds=60, epochs=1, lr=0.05)

ROWS: dict[str, dict[str, Any]] = {
    DENSE: {"sparsity": 0.0, "bits": None, "down": False},
    "20 %, 1 bit": {"sparsity": 0.8, "bits": 1},
    "10 %, 1 bit": {"sparsity": 0.9, "bits": 1},
    "5 %, 1 bit": {"sparsity": 0.95, "bits": 1},
    "1 %, 1 bit": {"sparsity": 0.99, "bits": 1},
    "10 %, 4 bits": {"sparsity": 0.9, "bits": 4},
    "5 %, 1 bit, nothing sent later": {"sparsity": 0.95, "bits": 1, "feedback": False},
    "all, 1 bit": {"sparsity": 0.0, "bits": 1},
}
"""The messages; up and down alike but for the dense ones, where the server sends the model."""


@dataclass
class Noting(Context):
    """Keeps the record of the federation."""

    records: list[Record] = dataclasses.field(default_factory=list)

    def child(self, name: str, method: Technique) -> Context:
        """The child's context."""
        made = super().child(name, method)
        self.records.append(made.record)
        return made


def measured(fields: dict[str, Any], setting: Setting, task: es.Task, seed: int) -> dict[str, Any]:
    """All rounds of one row. The metric of the rounds is that of ``task.val``, here the test images."""
    torch.manual_seed(seed)
    model: nn.Module = LeNet5()
    method = Federated(
        clients=setting.clients, rounds=setting.rounds, epochs=setting.epochs, shards=setting.shards, lr=setting.lr,
        **fields,
    )  # fmt: skip
    context, started = Noting(task=task, seed=seed), time.process_time()
    method(model, context)
    rounds = context.records[0].details["rounds"]
    last = rounds[-max(1, len(rounds) // 10) :]
    up, down = (sum(row[name] for row in rounds) for name in ("bytes_up", "bytes_down"))
    return {
        "test_accuracy": statistics.mean(row["metric"] for row in last), "bytes_up": up, "bytes_down": down,
        "bytes": up + down, "cpu_seconds": round(time.process_time() - started, 1), "rounds": rounds,
    }  # fmt: skip


def main() -> None:
    """Parse and run."""
    parser = arguments(__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these rows, and the dense one")
    given = parser.parse_args()
    folder = begin(given)
    setting = QUICK if given.quick else FULL
    described = {**vars(setting), "threads": given.threads}
    chosen = {name: fields for name, fields in ROWS.items() if name == DENSE or name in (given.only or ROWS)}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
    for seed in range(given.seeds):
        whole = task_of("lenet5", setting.images, setting.judged, folder, seed, setting.batch)
        task = dataclasses.replace(whole, val=whole.test, test=None)  # nothing is chosen by the rounds' metric
        for name, fields in chosen.items():
            row = f"{setting.mode}, {name}, seed {seed}"
            done = kept(FILE, vars(setting)).get(("messages", row))
            if done is None:
                done = measured(fields, setting, task, seed)
                print(f"{row:50} { ({key: value for key, value in done.items() if key != 'rounds'}) }", flush=True)
                save(FILE, [{"id": "messages", "row": row, "claimed": {}, "measured": done,
                             "setting": {**described, "fields": fields}, "seed": seed}])  # fmt: skip
            found[name].append(done)
    for name, fields in chosen.items():
        if name != DENSE:
            pairs = list(zip(found[DENSE], found[name], strict=True))
            result = {
                "times_fewer_bytes": spread([dense["bytes"] / other["bytes"] for dense, other in pairs]),
                "times_fewer_bytes_up": spread([dense["bytes_up"] / other["bytes_up"] for dense, other in pairs]),
                "points_lost": spread([dense["test_accuracy"] - other["test_accuracy"] for dense, other in pairs]),
            }
            print(f"{name}: {result}", flush=True)
            save(FILE, [{
                "id": "recipes.federated", "row": f"{setting.mode}, {name}", "claimed": {}, "measured": result,
                "setting": {**described, "fields": fields}, "seed": list(range(given.seeds)),
            }])  # fmt: skip


if __name__ == "__main__":
    main()
