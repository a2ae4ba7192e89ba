"""The demo: a small convolutional network trained on scikit-learn's digits (real, inside the package)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import nn

from espalier import api
from espalier.core.context import Context, Progress
from espalier.core.files import write_atomic
from espalier.core.task import Task, classification
from espalier.data import standard
from espalier.prune import Cubic, Global, Prune
from espalier.recipes import DeepCompression
from espalier.runs import Result
from espalier.train import L1, Finetune


def network() -> nn.Module:
    """1x8x8 -> 10 classes, 57,000 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(512, 96), nn.ReLU(), nn.Dropout(0.3), nn.Linear(96, 10),
    )  # fmt: skip


def task() -> Task:
    """The digits, split 60/20/20."""
    data = standard("digits", batch_size=64)
    return classification(data.train, data.val, data.test)


def recipe() -> DeepCompression:
    """Deep Compression with few epochs: the data is small. The L1 penalty empties whole rows, which code well."""
    return DeepCompression(
        strength=0.65,
        prune=Prune(scope=Global(), schedule=Cubic(), epochs=25, lr=3e-3, every=10, penalties=(L1(strength=2e-5),)),
        finetune=Finetune(epochs=8, lr=1e-3),
    )


def original(kept: Path, listener: Callable[[Progress], None] | None) -> nn.Module:
    """The network after 25 epochs; read from ``kept`` if it was trained before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = network()
    if kept.is_file():
        model.load_state_dict(load_file(kept))
        return model
    context = Context(task=task(), listener=listener, path="train the original")
    model = Finetune(epochs=25, lr=3e-3)(model, context)
    write_atomic(kept, save(model.state_dict()), parents=True)
    return model


def run(out: Path, listener: Callable[[Progress], None] | None = None) -> Result:
    """Train and compress into ``out``; a finished run there is read back instead."""
    model = original(out.with_name(f"{out.name}-original.safetensors"), listener)
    resume = (out / "journal.jsonl").exists()
    return api.compress(model, task(), recipe(), out=out, listener=listener, resume=resume)
