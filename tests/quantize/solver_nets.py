"""Small trained networks and their data for the tests of post-training methods."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.core.context import Context
from espalier.core.metric import Accuracy
from espalier.core.task import Task
from espalier.data import standard
from espalier.train import fit


@cache
def digits_task() -> Task:
    """The digits with a few batches of each part."""
    data = standard("digits")
    return Task(train=data.train, val=data.val, test=data.test, loss=F.cross_entropy, metric=Accuracy())


def trained(model: nn.Module, epochs: int = 6) -> nn.Module:
    """``model`` trained on the digits, in eval mode."""
    fit(model, Context(task=digits_task()), epochs=epochs)
    return model.eval()


@cache
def convolutional() -> nn.Module:
    """Convolutions (one grouped) and linear layers with ReLUs, trained; copy it before changing it."""
    torch.manual_seed(0)
    return trained(
        nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, groups=2), nn.ReLU(), nn.Flatten(),
            nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10),
        )
    )  # fmt: skip


def mobile(activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Depthwise and pointwise convolutions with batch norms of uneven scales; input (3, 12, 12), 4 classes."""
    torch.manual_seed(0)

    def block(before: int, after: int, kernel: int, groups: int = 1, padding: int = 0) -> list[nn.Module]:
        layer = nn.Conv2d(before, after, kernel, padding=padding, groups=groups, bias=False)
        return [layer, nn.BatchNorm2d(after), activation()]

    model = nn.Sequential(
        *block(3, 8, 3), *block(8, 8, 3, groups=8, padding=1), *block(8, 12, 1), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(12, 4),
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.1, 3.0)
            nn.init.uniform_(module.bias, -0.5, 2.0)
            module.momentum = 1.0
    with torch.no_grad():
        model(torch.randn(64, 3, 12, 12))  # the statistics of all norms become those of such images
    return model.eval()


def image_task(samples: int = 16) -> Task:
    """Random images for :func:`mobile`."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(samples, 3, 12, 12, generator=generator)
    return Task(train=[(x, torch.arange(samples) % 4)], val=[(x, torch.arange(samples) % 4)], metric=Accuracy())


def context_for(task: Task, **models: nn.Module) -> Context:
    """A context with named models."""
    return Context(task=task, models=dict(models))


def answers(model: nn.Module, task: Task) -> Tensor:
    """The outputs on the validation batches."""
    with torch.no_grad():
        return torch.cat([task.predict(model, batch) for batch in task.data("val")])


def distance(model: nn.Module, other: nn.Module, task: Task) -> float:
    """Mean squared difference of the outputs on the validation batches."""
    return float((answers(model, task) - answers(other, task)).square().mean())
