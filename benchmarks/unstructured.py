"""Single weights removed: every criterion that scores weights, at 50, 70, 90, 95 and 98 %, one-shot and iterative.

python benchmarks/unstructured.py [--quick] [--all-levels] [--network lenet5|resnet20] [--seeds 3] [--data-dir DIR]

LeNet-5 on MNIST, trained here, and the published ResNet-20 on CIFAR-10 (JPEG), fine-tuned to the JPEG images first.
one-shot: prune once, then fine-tune; iterative: a cubic schedule with ten mask updates in the first 70 % of the
epochs; before-training: SNIP, GraSP and SynFlow, which start from fresh values and get the epochs of the dense
network and of the fine-tuning together (of ResNet-20 only those of this benchmark: the published network was trained
for far longer). Scope global with a small floor, but for criteria made for another one; ``magnitude-layer`` is the
measure for those with equal layers. Nothing is chosen by val or test: both are reported. Rows are kept: a second call
goes on where the first stopped. What is left out, and why, is a row as well. ``--quick``: one seed, subsets, fewer
epochs, iterative (with twice the epochs of one-shot) at 90 and 98 %, on ResNet-20 before-training too; OBS as
SparseGPT (the exact form takes about a minute a time). ``--all-levels``: the quick form at all five. ``threshold`` cuts
at a height, not at a share: read the ``sparsity`` of each entry, which is counted in the network that is judged.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import RESULTS, save
from benchmarks.subjects import blind, dense, task_of, training

import espalier as es
from espalier import api
from espalier.core import registry
from espalier.core.context import Context
from espalier.core.method import Method, Technique
from espalier.core.selection import weights
from espalier.prune import Criterion, Cubic, Global, Layer, LossPrune, Magnitude, OneShot, Prune, Row, Threshold
from espalier.prune.connections import Connections
from espalier.prune.parts import CutCriterion, Scope, SolvingCriterion, WatchingCriterion
from espalier.train import Finetune

FILE = "unstructured"
SPARSITIES = (0.5, 0.7, 0.9, 0.95, 0.98)
SCHEDULES = ("one-shot", "iterative")
BEFORE = "before-training"
UPDATES = 10
RISE = 0.7
FLOOR = 0.005  # below the share that stays at 98 %, or global would be layer
SCOPES: dict[str, Scope] = {"wanda": Row()}  # its inputs' norms are compared inside one output; others: global


@dataclass(frozen=True)
class Setting:
    """What a reader needs to repeat a row."""

    network: str
    images: int
    judged: int
    dense_epochs: int
    one_shot_epochs: int
    iterative_epochs: int
    solving_batches: int = 16
    solving_form: str = "exact"
    batch: int = 128

    def training(self, epochs: int) -> dict[str, Any]:
        """The same training for every row."""
        return training(self.network, epochs)

    @property
    def every(self) -> int:
        """Optimizer steps between two mask updates."""
        return max(1, round(RISE * self.iterative_epochs * -(-self.images // self.batch) / UPDATES))


QUICK = {
    "lenet5": Setting(
        "lenet5", 10_000, 2_500, dense_epochs=6, one_shot_epochs=2, iterative_epochs=4,
        solving_batches=4, solving_form="sparsegpt",
    ),
    "resnet20": Setting(
        "resnet20", 5_000, 2_500, dense_epochs=3, one_shot_epochs=1, iterative_epochs=2,
        solving_batches=4, solving_form="sparsegpt",
    ),
}  # fmt: skip
FULL = {
    "lenet5": Setting("lenet5", 55_000, 10_000, dense_epochs=8, one_shot_epochs=5, iterative_epochs=5),
    "resnet20": Setting("resnet20", 50_000, 5_000, dense_epochs=10, one_shot_epochs=10, iterative_epochs=10),
}
FEW = (0.9, 0.98)
"""What the quick form asks where a row costs a training of its own."""


@dataclass(frozen=True)
class Job:
    """One row: a criterion, its scope, a schedule, and the sparsities it is asked for."""

    name: str
    part: Criterion | Connections
    scope: Scope
    schedule: str
    sparsities: tuple[float, ...]


def parts() -> tuple[dict[str, Criterion | Connections], dict[str, str]]:
    """What scores single weights by its name, and what is left out with the reason."""
    api.fill_registry()
    found: dict[str, Criterion | Connections] = {"magnitude-layer": Magnitude()}
    left: dict[str, str] = {}
    for cls in registry.methods():
        if issubclass(cls, Connections):
            found[cls.id] = cls()
        if not issubclass(cls, Criterion):
            continue
        criterion = cls()
        if criterion.of == "units" and "level" in {field.name for field in dataclasses.fields(cls)}:
            criterion = criterion.replace(level="weights")
        if criterion.of == "units":
            left[cls.id] = "scores output units, not single weights"
        elif isinstance(criterion, CutCriterion) and not isinstance(criterion, Threshold):
            left[cls.id] = "decides the sparsity itself, and no setting of it is known that meets one"
        else:
            found[cls.id] = criterion
            if isinstance(criterion, WatchingCriterion):
                left[f"{cls.id}, one-shot"] = "judges by what it saw in training: iterative only"
    return found, left


def jobs(setting: Setting, *, few: bool) -> Iterator[Job]:
    """The rows of one network; ``few``: where a row costs a training, two levels."""
    found, _ = parts()
    before = FEW if few and setting.network == "resnet20" else SPARSITIES
    for name in sorted(found, key=lambda name: isinstance(found[name], Connections)):
        part = found[name]
        if isinstance(part, Connections):
            yield Job(name, part, Global(), BEFORE, before)
            continue
        if isinstance(part, SolvingCriterion):
            part = part.replace(batches=setting.solving_batches, form=setting.solving_form)
        layers = isinstance(part, SolvingCriterion | Threshold) or name == "magnitude-layer"
        scope = Layer() if layers else SCOPES.get(name, Global(floor=FLOOR))
        for schedule in SCHEDULES:
            if not isinstance(part, WatchingCriterion) or schedule == "iterative":
                asked = FEW if few and schedule == "iterative" else SPARSITIES
                full = f"{name}-{setting.solving_form}" if isinstance(part, SolvingCriterion) else name
                yield Job(full, part, scope, schedule, asked)


def cut(criterion: Threshold, model: nn.Module, sparsity: float) -> Threshold:
    """The threshold, as a share of each layer's spread, below which ``sparsity`` of the dense weights lie."""
    scores = criterion.scores(model, weights(model), Context()).values()
    ordered = torch.cat([score.detach().reshape(-1) for score in scores]).sort().values
    return criterion.replace(quality=float(ordered[int(sparsity * len(ordered))]))


def steps(job: Job, setting: Setting, model: nn.Module, sparsity: float) -> tuple[Technique, ...]:
    """What is done to the dense network."""
    part, asked = job.part, sparsity
    if isinstance(part, Connections):
        epochs = setting.dense_epochs + setting.one_shot_epochs
        return (LossPrune(connections=part, sparsity=sparsity, **setting.training(epochs)),)
    if isinstance(part, Threshold):
        part, asked = cut(part, model, sparsity), None  # type: ignore[assignment]
    if job.schedule == "iterative":
        fields = {"schedule": Cubic(end=RISE), "every": setting.every, **setting.training(setting.iterative_epochs)}
        return (Prune(criterion=part, scope=job.scope, sparsity=asked, **fields),)
    return (
        Prune(criterion=part, scope=job.scope, sparsity=asked, schedule=OneShot()),
        Finetune(**setting.training(setting.one_shot_epochs)),
    )


def zeros(model: nn.Module) -> float:
    """The share of the weights that is zero."""
    values = [slot.value() for slot in weights(model)]
    return sum(int((value == 0).sum()) for value in values) / sum(value.numel() for value in values)


def measured(task: es.Task, model: nn.Module, started: float) -> dict[str, Any]:
    """Accuracies with their standard errors, the sparsity reached, and the seconds of pruning and training."""
    seconds = time.perf_counter() - started
    model.eval()
    val, test = task.measure(model, "val"), task.measure(model, "test")
    return {
        "val": round(val.value, 3), "test": round(test.value, 3), "test_stderr": round(test.stderr, 3),
        "sparsity": round(zeros(model), 5), "seconds": round(seconds, 1),
    }  # fmt: skip


def tried(job: Job, setting: Setting, task: es.Task, base: nn.Module, sparsity: float, seed: int) -> dict[str, Any]:
    """One entry of a row; a failure is one too."""
    started, model, unseen = time.perf_counter(), base, blind(task)
    try:
        for step in steps(job, setting, base, sparsity):
            model = step(model, Context(task=unseen, seed=seed))
        return measured(task, model, started)
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {str(error)[:300]}"}


def plain(method: Method) -> str:
    """A part with the fields that say what it does."""
    return f"{method.id} " + " ".join(f"{f.name}={getattr(method, f.name)}" for f in dataclasses.fields(method))


def run(setting: Setting, folder: Path, seed: int, *, quick: bool, few: bool) -> None:
    """All rows of one network and seed that are not there yet."""
    path, mode = RESULTS / f"{FILE}.json", "quick" if quick else "full"
    there = {(row["id"], row.get("row")): row for row in (json.loads(path.read_text()) if path.exists() else ())}
    task = task_of(setting.network, setting.images, setting.judged, folder, seed, setting.batch)
    unseen = blind(task)
    started = time.perf_counter()
    base = dense(setting.network, setting.dense_epochs, unseen, folder, seed)
    common = {"seed": seed, "setting": dataclasses.asdict(setting)}
    label = f"{setting.network}, {mode}, seed {seed}"
    if ("baseline", label) not in there:
        found = {"dense": measured(task, base, started)}
        for schedule, epochs in (("one-shot", setting.one_shot_epochs), ("iterative", setting.iterative_epochs)):
            started = time.perf_counter()
            more = Finetune(**setting.training(epochs))(base, Context(task=unseen, seed=seed))
            found[f"dense, epochs of {schedule}"] = measured(task, more, started)
        save(FILE, [{"id": "baseline", "row": label, **common, "measured": found}])
        print("baseline", label, json.dumps(found), flush=True)
    order = (SCHEDULES[0], BEFORE, SCHEDULES[1])  # the dearest last
    for job in sorted(jobs(setting, few=few), key=lambda job: order.index(job.schedule)):
        label = f"{setting.network}, {job.schedule}, {mode}, seed {seed}"
        entries = {k: v for k, v in there.get((job.name, label), {}).get("measured", {}).items() if "failed" not in v}
        for sparsity in job.sparsities:
            if str(sparsity) in entries:
                continue
            entries[str(sparsity)] = tried(job, setting, task, base, sparsity, seed)
            row = {"id": job.name, "row": label, "part": plain(job.part), "scope": plain(job.scope), **common}
            save(FILE, [{**row, "measured": entries}])
            print(job.name, label, sparsity, json.dumps(entries[str(sparsity)]), flush=True)


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--all-levels", action="store_true")
    parser.add_argument("--network", choices=sorted(FULL), default=None)
    parser.add_argument("--seeds", type=int, default=None)
    parser.add_argument("--data-dir", type=Path, default=None)
    given = parser.parse_args()
    folder = given.data_dir or Path(
        os.environ.get("ESPALIER_DATA", Path(__file__).resolve().parents[2] / "shared/data")
    )
    torch.set_num_threads(1)
    settings = QUICK if given.quick else FULL
    left = [{"id": "left out", "row": name, "reason": reason} for name, reason in parts()[1].items()]
    save(FILE, left)
    for network in [given.network] if given.network else sorted(settings):
        for seed in range(given.seeds or (1 if given.quick else 3)):
            run(settings[network], folder, seed, quick=given.quick, few=given.quick and not given.all_levels)


if __name__ == "__main__":
    main()
