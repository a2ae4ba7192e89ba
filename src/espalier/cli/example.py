"""The demo: a small convolutional network trained on scikit-learn's digits (real, inside the package)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from espalier import api
from espalier.core.context import Context, Progress
from espalier.core.task import Task, classification
from espalier.data import standard
from espalier.prune import Cubic, Global, Prune
from espalier.recipes import DeepCompression
from espalier.runs import Result
from espalier.train import Finetune


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
    """Deep Compression with few epochs: the data is small."""
    return DeepCompression(
        strength=0.7,
        prune=Prune(scope=Global(), schedule=Cubic(), epochs=30, lr=2e-3, every=10),
        finetune=Finetune(epochs=10, lr=5e-4),
    )


def trained(listener: Callable[[Progress], None] | None) -> nn.Module:
    """The network after 30 epochs; the same weights at every call on one machine."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = network()
    context = Context(task=task(), listener=listener, path="train the original")
    return Finetune(epochs=30, lr=3e-3)(model, context)


def run(out: Path, listener: Callable[[Progress], None] | None = None) -> Result:
    """Train and compress into ``out``; a finished run there is read back instead."""
    return api.compress(
        trained(listener), task(), recipe(), out=out, listener=listener, resume=(out / "journal.jsonl").exists()
    )
