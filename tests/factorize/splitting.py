"""What the tests of factorisation share: one layer split at given ranks, and a trained network of digits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from espalier.core.context import Context
from espalier.core.model import copy_model
from espalier.core.parametrize import slots
from espalier.core.record import Record
from espalier.core.selection import select
from espalier.core.task import Task, classification
from espalier.data import standard
from espalier.factorize import Factorization
from espalier.factorize.factorization import fill_row
from espalier.factorize.layer import layers_of
from espalier.factorize.split import Factors, Ranks, Split
from espalier.train import Finetune


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def context(x: Any) -> Context:
    return Context(task=Task(train=[(x,)], val=[(x,)]))


def split_of(method: Factorization, layer: nn.Module, x: Any) -> tuple[Split | str, nn.Sequential]:
    """How ``method`` splits ``layer`` where ``x`` comes in, and the model that holds it."""
    model, around = nn.Sequential(layer).eval(), context(x)
    chosen = layers_of(model, select(model, ("*",)), around, who="test", densify=False)
    return method.split(chosen[0], method.look(model, chosen, around), around), model


def put(split: Split, model: nn.Sequential, ranks: Ranks) -> tuple[nn.Sequential, Factors]:
    """``model`` with the row of layers in the place of its layer, whatever it costs."""
    around = Context()
    factors = split.factors(ranks, around)
    fill_row(model, split.layer, split.specs(ranks), factors.weights, factors.biases, around)
    return model, factors


def same(method: Factorization, layer: nn.Module, x: Tensor, ranks: Ranks | None = None) -> float:
    """The largest difference of the outputs, against the largest output, at ``ranks`` (the full ones)."""
    split, model = split_of(method, layer, x)
    assert isinstance(split, Split), split
    with torch.no_grad():
        before = model(x)
        after, _ = put(split, model, ranks or split.limits)
        assert sum(p.numel() for p in after.parameters()) == split.cost(ranks or split.limits).parameters
        return float((after(x) - before).abs().max() / before.abs().max())


@cache
def digits() -> Task:
    splits = standard("digits")
    return classification(splits.train, splits.val, splits.test)


@cache
def _trained() -> nn.Module:
    with seeded():
        model = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(),
            nn.MaxPool2d(2), nn.Conv2d(24, 24, 3, padding=1, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(384, 64),
            nn.ReLU(), nn.Linear(64, 10),
        )  # fmt: skip
    return Finetune(epochs=12, lr=3e-3)(model, Context(task=digits())).eval()


def trained() -> nn.Module:
    """A CNN that reads digits; a copy."""
    return copy_model(_trained())


def run(method: Factorization, model: nn.Module, task: Task | None = None, seed: int = 0) -> tuple[nn.Module, Record]:
    """The method's result and its record."""
    around = Context(task=task, seed=seed, models={"original": model})
    with around.entered():
        return method.transform(copy_model(model), around), around.record


def numbers(model: nn.Module) -> int:
    """How many numbers the parameters hold."""
    return sum(slot.latent.numel() for slot in slots(model).values())


def skipped(record: Record) -> dict[str, str]:
    return {row["name"]: row["reason"] for row in record.skipped}
