"""Nets trained on digits, and what the tests of pruning by training ask of them."""

from __future__ import annotations

from functools import cache

import torch
from torch import nn

from espalier.core.context import Context
from espalier.core.parametrize import slots
from espalier.core.task import Task, classification
from espalier.data import standard
from espalier.train import Finetune


@cache
def digits() -> Task:
    splits = standard("digits", batch_size=16)
    return classification(splits.train, splits.val, splits.test)


def mlp(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hidden = [nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU()]
        return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(32, 10))


def cnn(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first = [nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)]
        second = [nn.Conv2d(8, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten()]
        return nn.Sequential(*first, *second, nn.Linear(64, 10))


@cache
def trained(kind: str) -> nn.Module:
    """A trained net; techniques copy it."""
    model, epochs = (mlp(), 8) if kind == "mlp" else (cnn(), 3)
    return Finetune(epochs=epochs, lr=3e-3)(model, Context(task=digits()))


def accuracy(model: nn.Module) -> float:
    return digits().measure(model, "val").value


def zeros(model: nn.Module) -> float:
    """Share of the entries of all weights that are exactly zero."""
    values = [slot.value() for slot in slots(model).values() if slot.latent.ndim >= 2]
    return sum(int((v == 0).sum()) for v in values) / sum(v.numel() for v in values)
