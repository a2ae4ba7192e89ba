"""The two networks that many benchmarks start from: LeNet-5 on MNIST, ResNet-20 on CIFAR-10 (JPEG)."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import torch
from examples.lenet import LeNet5
from torch import nn

import espalier as es
from espalier.compact import load_pretrained, resnet20
from espalier.core.context import Context
from espalier.core.model import copy_model
from espalier.core.recipe import FileOptions
from espalier.data import Loader, Normalisation, standard
from espalier.runs.files import freeze_model, load, write_weights
from espalier.train import SGD, AdamW, Crop, Finetune, Flip

NORMALISATIONS = {
    "lenet5": Normalisation(mean=(0.0,), std=(1.0,)),
    "resnet20": Normalisation(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
}


def training(network: str, epochs: int, lr: float | None = None) -> dict[str, Any]:
    """The same training for every row, as fields of a step."""
    if network == "lenet5":
        return {"epochs": epochs, "lr": lr or 1.5e-3, "optimizer": AdamW(weight_decay=0.0)}
    return {
        "epochs": epochs, "lr": lr or 0.02, "optimizer": SGD(momentum=0.9, weight_decay=5e-4),
        "augment": (Crop(), Flip()), "precision": "bf16", "reestimate": True,
    }  # fmt: skip


def task_of(network: str, images: int, judged: int, folder: Path, seed: int, batch: int = 128) -> es.Task:
    """Seeded splits; the training images a seeded subset, of val and test the first ones."""
    name, variant = ("mnist", "auto") if network == "lenet5" else ("cifar10", "jpeg")
    scale = NORMALISATIONS[network]
    splits = standard(name, folder, variant=variant, seed=seed, normalisation=scale)
    rows = torch.randperm(len(splits.train.x), generator=torch.Generator().manual_seed(0))[:images]
    train = Loader(splits.train.x[rows], splits.train.y[rows], batch_size=batch, shuffle=True, normalisation=scale)
    held = (
        Loader(part.x[:judged], part.y[:judged], batch_size=500, normalisation=scale)
        for part in (splits.val, splits.test)
    )
    return es.tasks.classification(train, *held)


def blind(task: es.Task) -> es.Task:
    """The task without val and test: nothing is chosen by them, so no epoch looks at them."""
    return dataclasses.replace(task, val=None, test=None)


def dense(network: str, epochs: int, task: es.Task, folder: Path, seed: int) -> nn.Module:
    """LeNet-5 trained from scratch, or the published ResNet-20 fine-tuned to the JPEG images."""
    context = Context(task=task, seed=seed)
    if network == "lenet5":
        torch.manual_seed(seed)
        fresh = LeNet5()
        fresh.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # twice as fast
        return Finetune(**training(network, epochs))(fresh, context).eval()
    published = load_pretrained(resnet20(), folder / "cifar10_resnets" / "resnet20-12fca82f.th")
    return Finetune(**training(network, epochs, lr=0.01))(published, context).eval()


def stored(
    result: nn.Module, model: nn.Module, task: es.Task, coders: tuple[str, ...] = ("adaptive",)
) -> dict[str, Any]:
    """Bytes and errors of ``result`` as a file of weights, remaining floats as fp16, loaded again into ``model``."""
    file = FileOptions(coders=coders)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.weights.espalier"
        write_weights(freeze_model(result, None), path, file, "fp16")
        loaded = load(path, into=copy_model(model)).eval()
        length = path.stat().st_size
    val, test = task.measure(loaded, "val"), task.measure(loaded, "test")
    return {
        "bytes": length, "val_error": 100 - val.value, "test_error": 100 - test.value, "test_stderr": test.stderr,
    }  # fmt: skip
