"""Channels removed from a pretrained CIFAR ResNet at 2x and 3x fewer multiply-adds.

python benchmarks/cifar_channels.py [--quick] [--network resnet20|resnet56] [--seeds 3] [--only TOOL:NAME ...]

Every criterion, random, and torch-pruning. The published network is fine-tuned on the JPEG training images first
(they cost it about ten points); that is the baseline. Each row prunes it to the same multiply-adds, re-estimates BN,
fine-tunes for the same epochs, and is judged on val (half of the 10,000 test images); test (the other half) is read
once, paired with the baseline. ``--quick``: ResNet-20, one seed, 5,000 training images, 3 epochs, 2,500 images each
of val and test. ``--finals``: the best of each tool on the val of the quick rows, at each ratio, with 15,000 images,
8 epochs, all of val and test, 3 seeds. torch-pruning rows need the environment of zoo_requirements.txt; its channel
ratio is bisected to the same multiply-adds; its criterion and scope are the best of its own on val. Rows are kept: a
second call goes on where the first stopped. ``--only`` repeats the finalists with more seeds.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import RESULTS, save

import espalier as es
from espalier import api
from espalier.compact import load_pretrained, resnet20, resnet56
from espalier.core import registry
from espalier.core.context import Context
from espalier.data import Loader, Normalisation, standard
from espalier.graph import macs, trace
from espalier.measure import paired
from espalier.prune import Channels, Criterion, Global, Isomorphic, Layer, Magnitude, Prune
from espalier.prune.parts import CutCriterion, SolvingCriterion, WatchingCriterion
from espalier.train import SGD, Crop, Finetune, Flip

FILES = {"resnet20": "resnet20-12fca82f.th", "resnet56": "resnet56-4bfd9763.th"}
BUILD = {"resnet20": resnet20, "resnet56": resnet56}
NORMALISATION = Normalisation(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
SCOPES = {"layer": Layer(), "global": Global(floor=0.1), "isomorphic": Isomorphic(floor=0.1)}
PEERS = ("magnitude", "taylor", "fpgm", "lamp", "bn-scale", "random")


@dataclass(frozen=True)
class Setting:
    """What a reader needs to repeat a row."""

    network: str
    images: int
    judged: int
    epochs: int
    lr: float = 0.02
    batch: int = 128
    weight_decay: float = 5e-4

    def tune(self, lr: float | None = None) -> Finetune:
        """The same fine-tuning for every row."""
        return Finetune(
            epochs=self.epochs, lr=self.lr if lr is None else lr, augment=(Crop(), Flip()),
            optimizer=SGD(momentum=0.9, weight_decay=self.weight_decay), precision="bf16", reestimate=True,
        )  # fmt: skip


def task_of(setting: Setting, folder: Path, seed: int) -> es.Task:
    """Seeded splits of the JPEG images; the training images a seeded subset."""
    splits = standard("cifar10", folder, variant="jpeg", seed=seed, normalisation=NORMALISATION)
    rows = torch.randperm(len(splits.train.x), generator=torch.Generator().manual_seed(0))[: setting.images]
    train = Loader(
        splits.train.x[rows], splits.train.y[rows], batch_size=setting.batch, shuffle=True, normalisation=NORMALISATION
    )
    held = (
        Loader(part.x[: setting.judged], part.y[: setting.judged], batch_size=500, normalisation=NORMALISATION)
        for part in (splits.val, splits.test)
    )
    return es.tasks.classification(train, *held)


def criteria() -> dict[str, Criterion]:
    """Every registered criterion that can rank channels without watching a training."""
    api.fill_registry()
    found: dict[str, Criterion] = {"magnitude-l2": Magnitude(norm=2)}
    for cls in registry.methods():
        ranks = issubclass(cls, Criterion) and not issubclass(cls, CutCriterion | SolvingCriterion | WatchingCriterion)
        if cls.verb == "prune" and ranks:
            found[cls.id] = cls()  # type: ignore[assignment]
    return found


def count(model: nn.Module) -> int:
    """Multiply-adds of one image."""
    return macs(trace(model, (torch.zeros(2, 3, 32, 32),))).total


def measured(
    setting: Setting, task: es.Task, base: nn.Module, pruned: nn.Module, seed: int, started: float
) -> dict[str, Any]:
    """Fine-tune, judge on val, one look at test."""
    tuned = setting.tune()(pruned, Context(task=task, seed=seed))
    val, test = task.measure(tuned, "val"), task.measure(tuned, "test")
    return {
        "macs": count(tuned), "parameters": sum(p.numel() for p in tuned.parameters()),
        "val": val.value, "test": test.value, "test_stderr": test.stderr,
        "paired_test": paired(base, tuned, task, "test").to_json(), "seconds": round(time.perf_counter() - started, 1),
    }  # fmt: skip


def ours(task: es.Task, base: nn.Module, criterion: Criterion, scope: str, ratio: float, seed: int) -> nn.Module:
    """espalier's removal."""
    step = Prune(criterion=criterion, scope=SCOPES[scope], pattern=Channels(measure="macs"), sparsity=1 - 1 / ratio)
    return step(base, Context(task=task, seed=seed))


def theirs(task: es.Task, base: nn.Module, criterion: str, scope: str, ratio: float, seed: int) -> nn.Module:
    """torch-pruning's, its channel ratio bisected to the multiply-adds."""
    import torch_pruning as tp

    torch.manual_seed(seed)
    example = torch.zeros(2, 3, 32, 32)
    start, low, high, best = count(base), 0.0, 0.95, None
    for _ in range(7):
        middle = (low + high) / 2
        model = copy.deepcopy(base).eval()
        importance = {
            "magnitude": lambda: tp.importance.GroupMagnitudeImportance(p=2),
            "taylor": tp.importance.GroupTaylorImportance, "fpgm": tp.importance.FPGMImportance,
            "lamp": tp.importance.LAMPImportance, "bn-scale": tp.importance.BNScaleImportance,
            "random": tp.importance.RandomImportance,
        }[criterion]()  # fmt: skip
        pruner = tp.pruner.BasePruner(model, example, importance=importance, pruning_ratio=middle,
                                      ignored_layers=[model.linear], global_pruning=scope != "layer",
                                      isomorphic=scope == "isomorphic", max_pruning_ratio=0.9)  # fmt: skip
        if criterion == "taylor":
            for images, labels in list(task.train)[:8]:
                nn.functional.cross_entropy(model(images), labels).backward()
        pruner.step()
        left = count(model)
        if best is None or abs(left - start / ratio) < abs(best[0] - start / ratio):
            best = (left, model)
        low, high = (middle, high) if left > start / ratio else (low, middle)
    assert best is not None
    for parameter in best[1].parameters():
        parameter.grad = None
    es.train.batch_norm.reestimate(best[1], Context(task=task, seed=seed), 32)
    return best[1]


def finalists(path: Path) -> dict[tuple[str, float], tuple[str, str]]:
    """(tool, ratio) -> (criterion, scope) that did best on val in the quick rows."""
    best: dict[tuple[str, float], tuple[float, str, str]] = {}
    for row in json.loads(path.read_text()):
        if "tool" in row and "measured" in row and ", quick, " in row["row"]:
            _, ratio, scope, tool, *_ = row["row"].split(", ")
            found = (row["measured"]["val"], row["id"], scope)
            key = (tool, float(ratio[:-1]))
            best[key] = max(best.get(key, found), found)
    return {key: (name, scope) for key, (_, name, scope) in best.items()}


def run(setting: Setting, folder: Path, seeds: int, mode: str, only: tuple[str, ...]) -> None:
    """All rows that are not there yet."""
    path = RESULTS / "cifar_channels.json"
    there = {(row["id"], row.get("row")) for row in (json.loads(path.read_text()) if path.exists() else ())}
    tools: list[tuple[str, Any]] = [(name, criterion) for name, criterion in criteria().items()]
    for seed in range(seeds):
        task = task_of(setting, folder, seed)
        base = load_pretrained(BUILD[setting.network](), folder / "cifar10_resnets" / FILES[setting.network])
        base = setting.tune(0.01)(base, Context(task=task, seed=seed)).eval()
        first = {"val": task.measure(base, "val").value, "test": task.measure(base, "test").value}
        row = {"id": "baseline", "row": f"{setting.network}, {mode}, seed {seed}", "setting": vars(setting)}
        save("cifar_channels", [{**row, "seed": seed, "measured": {**first, "macs": count(base)}}])
        print(f"baseline {first}", flush=True)
        jobs: list[tuple[str, str, str, Any, float]] = []
        for ratio in (2.0, 3.0):
            jobs += [("espalier", name, "isomorphic", criterion, ratio) for name, criterion in tools]
            jobs += [("espalier", "magnitude-l2", scope, Magnitude(norm=2), ratio) for scope in ("layer", "global")]
            if importlib.util.find_spec("torch_pruning"):
                jobs += [("torch-pruning", name, "layer", name, ratio) for name in PEERS]
                jobs += [
                    ("torch-pruning", name, scope, name, ratio)
                    for name in ("magnitude", "fpgm", "taylor")
                    for scope in ("isomorphic", "global")
                ]
        if mode == "finals":
            best = finalists(path)
            jobs = [job for job in jobs if best[job[0], job[4]] == (job[1], job[2])]
        jobs = [job for job in jobs if not only or f"{job[0]}:{job[1]}" in only]
        for tool, name, scope, criterion, ratio in jobs:
            label = f"{setting.network}, {ratio:g}x, {scope}, {tool}, {mode}, seed {seed}"
            if (name, label) in there:
                continue
            started = time.perf_counter()
            row = {"id": name, "row": label, "tool": tool, "seed": seed, "setting": vars(setting)}
            try:
                if tool == "espalier":
                    smaller = ours(task, base, criterion, scope, ratio, seed)
                else:
                    smaller = theirs(task, base, name, scope, ratio, seed)
                row["measured"] = measured(setting, task, base, smaller, seed, started)
                print(label, name, {k: v for k, v in row["measured"].items() if k != "paired_test"}, flush=True)
            except Exception as error:  # a tool's failure is a row
                row["failed"] = f"{type(error).__name__}: {str(error)[:300]}"
                print(label, name, row["failed"], flush=True)
            save("cifar_channels", [row])


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--finals", action="store_true")
    parser.add_argument("--network", choices=sorted(FILES), default=None)
    parser.add_argument("--seeds", type=int, default=None)
    parser.add_argument("--only", nargs="*", default=(), help="finalists, such as espalier:obd torch-pruning:magnitude")
    parser.add_argument("--data-dir", type=Path, default=None)
    given = parser.parse_args()
    folder = given.data_dir or Path(
        os.environ.get("ESPALIER_DATA", Path(__file__).resolve().parents[2] / "shared/data")
    )
    torch.set_num_threads(1)
    if given.finals:
        setting = Setting(network=given.network or "resnet20", images=15_000, judged=5_000, epochs=8)
        run(setting, folder, given.seeds or 3, "finals", tuple(given.only))
        return
    if given.quick:
        run(
            Setting(network=given.network or "resnet20", images=5_000, judged=2_500, epochs=3),
            folder,
            given.seeds or 1,
            "quick",
            tuple(given.only),
        )
        return
    for network in [given.network] if given.network else sorted(FILES):
        run(
            Setting(network=network, images=50_000, judged=5_000, epochs=20),
            folder,
            given.seeds or 3,
            "full",
            tuple(given.only),
        )


if __name__ == "__main__":
    main()
