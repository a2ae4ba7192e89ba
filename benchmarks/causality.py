"""Causality pruning of LeNet-5 on MNIST and ResNet-20 on CIFAR-10: units gone, agreement kept, interventions.

python benchmarks/causality.py [--quick] [--network lenet5|resnet20] [--data-dir DIR]

The network is trained, then pruned against its own predictions on training images only; the tolerance is the largest
of a few whose agreement on val stays at 99.2 % or more. Agreement and accuracy on test are read once. ``--quick``:
LeNet-5. Random and magnitude rows remove as many units of every group.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import save
from examples.lenet import LeNet5

import espalier as es
from espalier.compact import load_pretrained, resnet20
from espalier.core.context import Context
from espalier.core.model import copy_model, evaluating
from espalier.core.selection import weights
from espalier.core.task import Task
from espalier.data import Normalisation, standard
from espalier.graph.channels.surgery import groups_of, remove
from espalier.prune import Causality, Magnitude, Random
from espalier.prune.parts import Criterion
from espalier.prune.unit_scores import unit_scores
from espalier.train import SGD, Crop, Finetune, Flip

TOLERANCES = (0.002, 0.005, 0.01, 0.02)
WANTED = 0.992
CIFAR = Normalisation(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def agreement(a: nn.Module, b: nn.Module, loader: Any) -> float:
    """Share of the images to which both give the same class."""
    same = total = 0
    with evaluating(a), evaluating(b):
        for images, _ in loader:
            same += int((a(images).argmax(1) == b(images).argmax(1)).sum())
            total += len(images)
    return same / total


def beside(model: nn.Module, task: Task, groups: list[dict[str, Any]], criterion: Criterion, seed: int) -> nn.Module:
    """As many units of every group gone, chosen by ``criterion``."""
    images = next(iter(task.data("val")))[0][:2]
    copy = copy_model(model)
    found = groups_of(copy, (images,))
    scores = unit_scores(found.groups, criterion.scores(copy, weights(copy), Context(task=task, seed=seed)), criterion)
    chosen = {}
    for row in groups:
        order = scores[row["name"]].argsort()
        mask = torch.zeros(row["before"], dtype=torch.bool)
        mask[order[: row["before"] - row["after"]]] = True
        chosen[row["name"]] = mask.numpy()
    return remove(copy, found, chosen, (images,)).model


def row(network: str, model: nn.Module, task: Task, samples: int, tune: Finetune | None, seed: int = 0) -> None:
    """One network."""
    best: tuple[nn.Module, dict[str, Any], float, float] | None = None
    for tolerance in TOLERANCES:
        started = time.perf_counter()
        context = Context(task=task, seed=seed)
        method = Causality(against="predictions", tolerance=tolerance, samples=samples)
        smaller = method.transform(copy_model(model), context)
        seconds = time.perf_counter() - started
        on_val = agreement(model, smaller, task.data("val"))
        print(f"{network} tolerance {tolerance}: val agreement {on_val:.4f}, {seconds:.0f} s", flush=True)
        if best is None or on_val >= WANTED:
            best = (smaller, context.record.details, tolerance, seconds)
        if on_val < WANTED:
            break
    assert best is not None
    smaller, details, tolerance, seconds = best
    before, after = (sum(g[key] for g in details["groups"]) for key in ("before", "after"))
    rows = [("causality", smaller)]
    rows += [(c.id, beside(model, task, details["groups"], c, seed)) for c in (Magnitude(norm=2), Random())]
    for name, result in rows:
        measured: dict[str, Any] = {
            "units": {"before": before, "after": after, "removed": 1 - after / before},
            "parameters": [sum(p.numel() for p in m.parameters()) for m in (model, result)],
            "test_agreement": agreement(model, result, task.data("test")),
            "test_accuracy": [task.measure(m, "test").value for m in (model, result)],
        }
        if name == "causality":
            measured |= {"interventions": details["interventions"], "seconds": round(seconds, 1)}
        if tune is not None:
            tuned = tune(result, Context(task=task, seed=seed))
            measured["after_tuning"] = {
                "test_agreement": agreement(model, tuned, task.data("test")),
                "test_accuracy": task.measure(tuned, "test").value,
            }
        setting = {"against": "predictions", "tolerance": tolerance, "samples": samples, "network": network}
        print(network, name, measured, flush=True)
        save("causality", [{"id": name, "row": network, "seed": seed, "setting": setting, "measured": measured}])


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--network", choices=("lenet5", "resnet20"), help="one of them; both without it")
    parser.add_argument("--data-dir", type=Path, default=None)
    given = parser.parse_args()
    folder = given.data_dir or Path(
        os.environ.get("ESPALIER_DATA", Path(__file__).resolve().parents[2] / "shared/data")
    )
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if given.network != "resnet20":
        splits = standard("mnist", folder)
        task = es.tasks.classification(splits.train, splits.val, splits.test)
        row("LeNet-5", Finetune(epochs=5)(LeNet5(), Context(task=task)).eval(), task, 4000, None)
    if given.quick or given.network == "lenet5":
        return
    splits = standard("cifar10", folder, variant="jpeg", normalisation=CIFAR)
    task = es.tasks.classification(splits.train, splits.val, splits.test)
    tune = Finetune(epochs=2, lr=0.01, augment=(Crop(), Flip()), optimizer=SGD(momentum=0.9), precision="bf16")
    base = tune(load_pretrained(resnet20(), folder / "cifar10_resnets" / "resnet20-12fca82f.th"), Context(task=task))
    row("ResNet-20", base.eval(), task, 1500, tune)


if __name__ == "__main__":
    main()
