"""LeNet-5 from MNIST to Fashion-MNIST: compressed while fine-tuned, against fine-tuned and then compressed.

python benchmarks/transfer.py [--quick] [--seeds 3] [--data-dir DIR]

All get a fresh output layer and train for the same epochs in all. ``while``: recipes.transfer, whose masks grow from
the start, then k-means and its fine-tuning. ``then``: half of the epochs fine-tune, half prune gradually. ``then, at
once``: all of these epochs fine-tune, the masks come at once, and the fine-tuning of the shared values, as long as for
the others, repairs them. The sparsity is global, the shared values have the same bits. Bytes are the length of
``model.weights.espalier``, loaded again and evaluated; the comparison is at equal bytes, as in ``joint.py``. Rows are
kept: a second call goes on where the first stopped.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import arguments, begin, kept, save
from benchmarks.joint import compare
from benchmarks.subjects import NORMALISATIONS, blind, dense, stored, task_of

import espalier as es
from espalier.core.context import Context
from espalier.core.method import Technique
from espalier.core.recipe import Recipe
from espalier.data import Loader, standard
from espalier.prune import Cubic, Global, Prune
from espalier.recipes import NewHead, Transfer
from espalier.share import KMeans
from espalier.train import AdamW, Finetune

FILE = "transfer"
METHODS = ("while", "then", "then, at once")


@dataclass(frozen=True)
class Setting:
    """What a reader needs to repeat a row."""

    mode: str
    images: int
    judged: int
    dense_epochs: int
    epochs: int
    tuned: int
    sparsities: tuple[float, ...]
    every: int
    bits: int = 4
    lr: float = 1.5e-3
    batch: int = 128


QUICK = Setting("quick", 10_000, 5_000, 4, 8, 2, (0.95, 0.98), 10)
FULL = Setting("full", 55_000, 10_000, 6, 12, 3, (0.9, 0.95, 0.97, 0.985), 20)


def recipe(name: str, sparsity: float, setting: Setting) -> Technique:
    """The steps of one method."""
    alike: dict[str, Any] = {"lr": setting.lr, "optimizer": AdamW(weight_decay=0.0)}
    share = KMeans(bits=setting.bits)
    tune = Finetune(epochs=setting.tuned, lr=setting.lr / 3, optimizer=AdamW(weight_decay=0.0))
    prune = Prune(sparsity=sparsity, scope=Global(), every=setting.every)
    if name == "while":
        gradual = prune.replace(schedule=Cubic(start=0.1), epochs=setting.epochs, **alike)
        return Transfer(strength=None, prune=gradual, share=share, finetune=tune)
    if name == "then":
        half = setting.epochs // 2
        gradual = prune.replace(schedule=Cubic(), epochs=setting.epochs - half, **alike)
        return Recipe(steps=(NewHead(), Finetune(epochs=half, **alike), gradual, share, tune))
    return Recipe(steps=(NewHead(), Finetune(epochs=setting.epochs, **alike), prune, share, tune))


def fashion(setting: Setting, folder: Path, seed: int) -> es.Task:
    """Fashion-MNIST as ``task_of`` gives MNIST."""
    scale = NORMALISATIONS["lenet5"]
    splits = standard("fashion-mnist", folder, seed=seed, normalisation=scale)
    rows = torch.randperm(len(splits.train.x), generator=torch.Generator().manual_seed(0))[: setting.images]
    train = Loader(
        splits.train.x[rows], splits.train.y[rows], batch_size=setting.batch, shuffle=True, normalisation=scale
    )
    held = (
        Loader(part.x[: setting.judged], part.y[: setting.judged], batch_size=500, normalisation=scale)
        for part in (splits.val, splits.test)
    )
    return es.tasks.classification(train, *held)


def main() -> None:
    """Parse and run."""
    given = arguments(__doc__).parse_args()
    folder = begin(given)
    setting = QUICK if given.quick else FULL
    described = {**dataclasses.asdict(setting), "threads": given.threads}
    found: dict[str, dict[int, list[dict[str, Any]]]] = {name: {} for name in METHODS}
    for seed in range(given.seeds):
        model, task = None, fashion(setting, folder, seed)
        for name in METHODS:
            for sparsity in setting.sparsities:
                row = f"{setting.mode}, {sparsity:.1%}, seed {seed}"
                measured = kept(FILE, vars(setting)).get((name, row))
                if measured is None:
                    if model is None:
                        digits = task_of("lenet5", setting.images, setting.judged, folder, seed, setting.batch)
                        model = dense("lenet5", setting.dense_epochs, blind(digits), folder, seed)
                    started = time.process_time()
                    result = recipe(name, sparsity, setting)(model, Context(task=blind(task), seed=seed))
                    seconds = round(time.process_time() - started, 1)
                    measured = {**stored(result, model, task), "cpu_seconds": seconds}
                    print(f"{name:14} {row:30} {measured}", flush=True)
                    save(FILE, [{"id": name, "row": row, "claimed": {}, "measured": measured, "setting": described,
                                 "seed": seed}])  # fmt: skip
                found[name].setdefault(seed, []).append(measured)
    for other in METHODS[1:]:
        result = compare(found, "while", other)
        print(
            f"compressed while fine-tuned against {other}: {result.get('ahead_by', 'no sizes in common')}", flush=True
        )
        save(FILE, [{
            "id": "recipes.transfer", "row": f"{setting.mode}, against {other}", "claimed": {}, "measured": result,
            "setting": described, "seed": list(range(given.seeds)),
        }])  # fmt: skip


if __name__ == "__main__":
    main()
