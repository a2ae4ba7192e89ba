"""Trained layers swapped for compact blocks: before and after layer-wise regression, and after fine-tuning.

python benchmarks/compact_swap.py [--quick] [--again] [--networks squeezenet resnet20] [--seeds 3] [--data-dir DIR]

SqueezeNet v1.0 with its published weights: the eight 3x3 convolutions, blocks started from the weights alone, with
least squares, and with regression, on the 200 calibration images of ImageNet; judged on the 300 val and 500 test
images. ResNet-20 on CIFAR-10 (JPEG), fine-tuned to these images for one epoch: all 3x3 convolutions but the first,
from the weights alone and regressed on 1,024 training images, each also after two epochs of fine-tuning. ``bytes``:
length of the file of weights that was written, fp32. ``error``: mean over the layers of the share of the outputs'
variance that a block misses on samples that it was not fitted to.

Rows in results/compact_swap.json are kept (``--again`` measures them anew), a quick row is replaced by a full one.
``--quick``: two blocks for each network, fewer images and steps, one seed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402 - the thread counts above must be set first
from benchmarks.common import RESULTS, save  # noqa: E402
from benchmarks.int8_accuracy import Images, squeezenet  # noqa: E402
from benchmarks.subjects import blind, dense, task_of, training  # noqa: E402
from torch import nn  # noqa: E402

import espalier as es  # noqa: E402
from espalier.compact import (  # noqa: E402
    AsymmetricKernels,
    Block,
    Bottleneck,
    DepthwiseSeparable,
    Fire,
    Ghost,
    InvertedResidual,
    Shuffle,
    Swap,
)
from espalier.core.context import Context  # noqa: E402
from espalier.core.method import Technique  # noqa: E402
from espalier.core.recipe import FileOptions  # noqa: E402
from espalier.core.record import Record  # noqa: E402
from espalier.graph import trace  # noqa: E402
from espalier.graph.macs import macs  # noqa: E402
from espalier.runs.files import freeze_model, write_weights  # noqa: E402
from espalier.train import Finetune  # noqa: E402

NAME = "compact_swap"
STAGES: dict[str, dict[str, Any]] = {
    "weights alone": {"least_squares": False, "regression": 0},
    "least squares": {"regression": 0},
    "regressed": {},
}
BLOCKS: dict[str, tuple[Block, ...]] = {
    "squeezenet": (
        DepthwiseSeparable(), InvertedResidual(expansion=3.0), DepthwiseSeparable(multiplier=3), Bottleneck(width=0.5),
        AsymmetricKernels(width=0.25), Shuffle(), Fire(), Ghost(),
    ),
    "resnet20": (
        DepthwiseSeparable(), Ghost(), DepthwiseSeparable(multiplier=3), InvertedResidual(expansion=1.0), Shuffle(),
        Fire(), Bottleneck(width=0.5), AsymmetricKernels(),
    ),
}  # fmt: skip
"""None is tuned; ``--quick`` takes the first two."""
PIXELS = {"squeezenet": (227, 227), "resnet20": (32, 32)}
LAYERS = {"squeezenet": ("fire*.expand3x3",), "resnet20": ("layer*",)}


@dataclass(frozen=True)
class Setting:
    """What a reader needs to repeat a row."""

    mode: str
    steps: int
    batches: int
    images: int
    judged: int
    epochs: int
    seeds: int


QUICK = Setting("quick", steps=60, batches=4, images=4_000, judged=1_000, epochs=1, seeds=1)
FULL = Setting("full", steps=200, batches=8, images=45_000, judged=5_000, epochs=2, seeds=3)


class Watched(Context):
    """Keeps the record of the step."""

    kept: Record

    def child(self, name: str, method: Technique) -> Context:
        made = super().child(name, method)
        self.kept = made.record
        return made


def described(block: Block) -> str:
    """The fields that are not the default."""
    default = type(block)()
    changed = {k: v for k, v in vars(block).items() if v != getattr(default, k)}
    return ", ".join([block.id, *(f"{key} {value:g}" for key, value in changed.items())])


def size(model: nn.Module, network: str) -> dict[str, int]:
    """Length of the file of weights (fp32), parameters, and multiply-adds for one image."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights"
        write_weights(freeze_model(model, None), path, FileOptions(), "fp32")
        length = path.stat().st_size
    graph = trace(model, (torch.zeros(2, 3, *PIXELS[network]),))
    return {"bytes": length, "parameters": sum(p.numel() for p in model.parameters()), "macs": macs(graph).total}


def swapped(model: nn.Module, block: Block, network: str, fields: dict[str, Any], task: es.Task, seed: int) -> Any:
    """The model with blocks, the seconds it took, and what the record says."""
    context, started = Watched(task=task, seed=seed), time.monotonic()
    result = Swap(block=block, layers=LAYERS[network], **fields)(model, context)
    rows = context.kept.details["swapped"]
    told = {
        "seconds": round(time.monotonic() - started, 1),
        "layers": len(rows),
        "error": round(mean(row["error"]["regressed"] for row in rows), 4) if rows else None,
    }
    return result, told | size(result, network)


class Results:
    """The rows that are there, and those that are added."""

    def __init__(self, setting: Setting, *, again: bool) -> None:
        path = RESULTS / f"{NAME}.json"
        found = json.loads(path.read_text()) if path.exists() and not again else []
        self.setting = setting
        self.there = {row["row"] for row in found if row["setting"]["mode"] in (setting.mode, "full")}

    def add(self, id: str, row: str, measured: dict[str, Any], seed: int | None) -> None:  # noqa: A002
        setting = {key: value for key, value in vars(self.setting).items() if key != "seeds"}
        save(NAME, [{"id": id, "row": row, "claimed": {}, "measured": measured, "setting": setting, "seed": seed}])
        self.there.add(row)
        print(f"{row:70} {measured}", flush=True)


def scores(model: nn.Module, images: Images) -> dict[str, float]:
    """Top-1 and top-5 in percent."""
    model.eval()
    with torch.no_grad():
        best = torch.cat([model(batch) for batch in images.batches(25)]).topk(5).indices == images.y[:, None]
    return {f"top{k}": round(100 * float(best[:, :k].any(1).float().mean()), 2) for k in (1, 5)}


def on_squeezenet(setting: Setting, folder: Path, results: Results) -> None:
    """One row per block and stage; the calibration images are the training data, without labels being read."""
    wanted = [(block, stage) for block in chosen("squeezenet", setting) for stage in STAGES
              if f"squeezenet, {described(block)}, {stage}" not in results.there]  # fmt: skip
    if not wanted and "squeezenet, dense" in results.there:
        return
    subject = squeezenet(folder)
    pool = subject.pool[: 25 * setting.batches]
    task = es.tasks.classification(list(zip(pool.batches(25), torch.split(pool.y, 25), strict=True)))
    judged = {"val": subject.val, "test": subject.test[: setting.judged]}

    def measured(model: nn.Module) -> dict[str, Any]:
        return {f"{split}_{k}": v for split, images in judged.items() for k, v in scores(model, images).items()}

    if "squeezenet, dense" not in results.there:
        results.add(
            "compact.swap", "squeezenet, dense", measured(subject.model) | size(subject.model, "squeezenet"), None
        )
    for block, stage in wanted:
        fields = {"batches": setting.batches, "regression": setting.steps, **STAGES[stage]}
        model, told = swapped(subject.model, block, "squeezenet", fields, task, 0)
        results.add(block.name, f"squeezenet, {described(block)}, {stage}", measured(model) | told, 0)


def chosen(network: str, setting: Setting) -> tuple[Block, ...]:
    """The blocks of a setting."""
    return BLOCKS[network][:2] if setting.mode == "quick" else BLOCKS[network]


def on_resnet20(setting: Setting, folder: Path, results: Results) -> None:
    """Seed after seed: the dense network, then blocks from the weights alone and regressed, both fine-tuned too."""
    for seed in range(setting.seeds):
        tuned_end = f", fine-tuned, seed {seed}"
        names = {
            (block, stage): [f"resnet20, {described(block)}, {stage}{end}" for end in (f", seed {seed}", tuned_end)]
            for block in chosen("resnet20", setting)
            for stage in ("weights alone", "regressed")
        }  # fmt: skip
        wanted = {key: rows for key, rows in names.items() if not results.there.issuperset(rows)}
        if not wanted:
            continue
        task = task_of("resnet20", setting.images, setting.judged, folder, seed)
        model = dense("resnet20", 1, blind(task), folder, seed)
        results.add(
            "compact.swap", f"resnet20, dense, seed {seed}", accuracy(model, task) | size(model, "resnet20"), seed
        )
        for (block, stage), (before, after) in wanted.items():
            fields = {"batches": setting.batches, "regression": setting.steps, **STAGES[stage]}
            result, told = swapped(model, block, "resnet20", fields, blind(task), seed)
            results.add(block.name, before, accuracy(result, task) | told, seed)
            started = time.monotonic()
            tuned = Finetune(**training("resnet20", setting.epochs))(result, Context(task=blind(task), seed=seed))
            told = {"seconds": round(time.monotonic() - started, 1), **size(tuned, "resnet20")}
            results.add(block.name, after, accuracy(tuned, task) | told, seed)


def accuracy(model: nn.Module, task: es.Task) -> dict[str, float]:
    """Top-1 in percent."""
    return {split: round(task.measure(model, split).value, 2) for split in ("val", "test")}


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--again", action="store_true", help="rows that are there already as well")
    parser.add_argument("--networks", nargs="+", choices=[*BLOCKS], default=[*BLOCKS])
    parser.add_argument("--seeds", type=int, help="of ResNet-20")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("ESPALIER_DATA"))
    given = parser.parse_args()
    if not given.data_dir:
        parser.error("--data-dir or ESPALIER_DATA must name the data folder")
    torch.set_num_threads(given.threads)
    setting = QUICK if given.quick else FULL
    setting = replace(setting, seeds=given.seeds or setting.seeds)
    results = Results(setting, again=given.again)
    for name, on in (("squeezenet", on_squeezenet), ("resnet20", on_resnet20)):
        if name in given.networks:
            on(setting, Path(given.data_dir), results)


if __name__ == "__main__":
    main()
