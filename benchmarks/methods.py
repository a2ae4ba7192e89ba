"""One measured row per method: bytes of the re-loaded file, test error, seconds. LeNet-300-100 on MNIST.

python benchmarks/methods.py [--quick] [--data-dir DIR]

Every row starts from the same trained network and changes one thing, so that the rows of one kind can be compared
with each other; none is tuned. The random rows are the baseline the others must beat.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import save
from examples.lenet import LeNet300

import espalier as es
from espalier.core.context import Context
from espalier.core.method import Technique
from espalier.core.recipe import FileOptions, Recipe
from espalier.data import Normalisation, standard
from espalier.prune import Cubic, Global, Layer, Linear, Listed, Magnitude, OneShot, Prune, Random, Threshold
from espalier.recipes import DeepCompression
from espalier.share import KMeans
from espalier.train import (
    L1,
    L2,
    SGD,
    AdamW,
    BatchNorm,
    Constant,
    Cosine,
    Crop,
    EarlyStopping,
    Finetune,
    Flip,
    LabelSmoothing,
    OneCycle,
    Shift,
    Step,
)  # fmt: skip
from espalier.train import Linear as LinearRate

Row = tuple[str, str, tuple[Technique, ...], FileOptions]


def rows(epochs: int) -> Iterator[Row]:
    """(method id, what varies, steps, file options); pruning at 95 %, sharing at 4 bits."""
    auto = FileOptions()
    tune = Finetune(epochs=epochs, lr=1e-3)

    def prune(**fields: Any) -> Prune:
        return Prune(**{"sparsity": 0.95, "scope": Global(), **fields})

    for criterion in (Magnitude(), Random(), Threshold(quality=1.9)):
        sparsity = None if isinstance(criterion, Threshold) else 0.95
        yield criterion.name, "one-shot, then fine-tuned", (prune(criterion=criterion, sparsity=sparsity), tune), auto
    for scope in (Layer(), Global()):
        yield scope.name, "one-shot, then fine-tuned", (prune(scope=scope), tune), auto
    for schedule in (OneShot(), Linear(), Cubic(), Listed(values=(0.8, 0.9, 0.95))):
        sparsity = None if isinstance(schedule, Listed) else 0.95
        step = prune(schedule=schedule, sparsity=sparsity, epochs=2 * epochs)
        yield schedule.name, "while training", (step,), auto
    yield "prune.prune", "cubic, global", (prune(schedule=Cubic(), epochs=2 * epochs),), auto
    yield "prune.weights", "cubic, global", (prune(schedule=Cubic(), epochs=2 * epochs),), auto
    for init in ("linear", "density", "random"):
        yield "share.kmeans", f"Lloyd, {init} initialisation, no training", (KMeans(bits=4, init=init),), auto
    yield "share.kmeans", "exact, no training", (KMeans(bits=4, algorithm="exact"),), auto
    yield "share.kmeans", "exact, centroids fine-tuned", (KMeans(bits=4, algorithm="exact"), tune), auto
    yield "share.kmeans", "one codebook for all layers", (KMeans(bits=4, group="all"),), auto
    sparse = (prune(schedule=Cubic(), epochs=2 * epochs), KMeans(bits=4), tune)
    for coder in ("adaptive", "rans", "huffman", "packed"):
        yield f"encode.{coder}", "pruned 95 %, 4 bits", sparse, FileOptions(coders=(coder,))
    yield "encode.planes", "fp32, nothing changed", (Finetune(epochs=1, lr=1e-6),), FileOptions(floats="fp32")
    yield "recipes.deep-compression", "strength 0.7", (_recipe(epochs),), auto
    base = prune(schedule=Cubic(), epochs=2 * epochs)
    variants: list[tuple[str, dict[str, Any]]] = [
        ("train.adamw", {"optimizer": AdamW()}), ("train.sgd", {"optimizer": SGD(), "lr": 0.05}),
        ("train.constant", {"lr_schedule": Constant()}), ("train.linear", {"lr_schedule": LinearRate()}),
        ("train.step", {"lr_schedule": Step()}), ("train.cosine", {"lr_schedule": Cosine()}),
        ("train.one-cycle", {"lr_schedule": OneCycle()}), ("train.l1", {"penalties": (L1(strength=3e-5),)}),
        ("train.l2", {"penalties": (L2(strength=1e-5),)}), ("train.label-smoothing", {"smoothing": LabelSmoothing()}),
        ("train.early-stopping", {"stopping": EarlyStopping()}), ("train.shift", {"augment": (Shift(pixels=1),)}),
        ("train.crop", {"augment": (Crop(padding=1),)}), ("train.flip", {"augment": (Flip(),)}),
    ]  # fmt: skip
    for name, fields in variants:
        yield name, "in the pruning step (cubic, 95 %)", (base.replace(**fields),), auto
    yield "train.finetune", "the trained network, further", (tune,), auto
    yield "train.batch-norm", "network with batch norm, after pruning", (prune(), BatchNorm()), auto


def _recipe(epochs: int) -> DeepCompression:
    recipe = DeepCompression(strength=0.7)
    return recipe.replace(prune=recipe.prune.replace(epochs=2 * epochs), finetune=Finetune(epochs=epochs, lr=1e-3))


def with_norm() -> torch.nn.Module:
    """The network with a batch norm before each ReLU, for what needs one."""
    nn = torch.nn
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 300), nn.BatchNorm1d(300), nn.ReLU(), nn.Linear(300, 100), nn.BatchNorm1d(100),
        nn.ReLU(), nn.Linear(100, 10),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one epoch instead of three")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data-dir", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    epochs = 1 if arguments.quick else 3
    data = standard("mnist", arguments.data_dir, batch_size=128, normalisation=Normalisation((0.0,), (1.0,)))
    task = es.tasks.classification(data.train, data.val, data.test)
    torch.manual_seed(0)
    plain, normed = LeNet300(), with_norm()
    trained = {}
    for name, model in (("plain", plain), ("normed", normed)):
        trained[name] = Finetune(epochs=2 * epochs, lr=2e-3)(model, Context(task=task))
    found = []
    for name, what, steps, options in rows(epochs):
        model = trained["normed" if name == "train.batch-norm" else "plain"]
        with tempfile.TemporaryDirectory() as folder:
            started = time.monotonic()
            recipe = Recipe(steps=steps, file=options)
            record = es.compress(model, task, recipe, out=Path(folder) / "run", timing_seconds=0).record
            seconds = time.monotonic() - started
        measured = {
            "bytes": record["files"]["model.weights.espalier"]["bytes"],
            "test_error": 100 - record["test"]["compressed"]["value"],
            "test_error_before": 100 - record["test"]["original"]["value"],
            "nonzero": record["compressed"]["nonzero"],
            "seconds": round(seconds, 1),
        }
        print(f"{name:28} {what:44} {measured}", flush=True)
        setting = {"network": "LeNet-300-100", "data": "MNIST", "epochs": epochs, "threads": arguments.threads}
        found.append({"id": name, "row": what, "claimed": {}, "measured": measured, "setting": setting, "seed": 0})
    save("methods" + ("_quick" if arguments.quick else ""), found)


if __name__ == "__main__":
    main()
