"""A small network on the digits, and the checks that every weight quantizer of the incremental kind has in common."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from tests.train.conftest import StoredContext
from torch import Tensor, nn

from espalier.core.context import Context
from espalier.core.forms import Form, Mask, Shared
from espalier.core.model import evaluating
from espalier.core.parametrize import Slot, attach, form_specs, plain, restore_forms, slots
from espalier.core.quantized import QuantizedWeight, State, Weight, WeightQuantizer
from espalier.core.registry import register
from espalier.core.task import Task
from espalier.data import standard
from espalier.quantize.quantize import Quantize, put
from espalier.testing.compare import bits, frozen_copy
from espalier.train import SGD, Finetune


@cache
def digits() -> Task:
    splits = standard("digits")
    return Task(train=splits.train, val=splits.val)


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(64, 10),
    )  # fmt: skip


@cache
def _trained() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Finetune(epochs=8, lr=1e-2).transform(network(), Context(task=digits()))


def trained() -> nn.Module:
    """A copy of a network that knows the digits."""
    return copy.deepcopy(_trained())


def accuracy(model: nn.Module) -> float:
    right = total = 0
    with evaluating(model), torch.no_grad():
        for x, y in digits().data("val"):
            right += int((model(x).argmax(1) == y).sum())
            total += len(y)
    return right / total


def quantized(model: nn.Module, method: WeightQuantizer, width: int, **fields: Any) -> nn.Module:
    """The network after the step, every layer in ``width`` bits."""
    step = Quantize(weights=method, bits=width, ends="same", **fields)
    return step.transform(model, Context(task=digits()))


def view(method: WeightQuantizer, weight: Tensor, width: int, kept: Tensor | None = None, **more: Any) -> Weight:
    """A weight as ``method`` sees it at the start of a training."""
    latent = nn.Parameter(method.latent(weight, width).clone())
    state = State(method.start(weight, width, 0, kept))
    return Weight("w", latent, width, 0, kept, state, more.get("training", True))


def latent_of(model: nn.Module, name: str = "0.weight") -> tuple[Slot, QuantizedWeight]:
    slot = slots(model)[name]
    assert isinstance(slot.form, QuantizedWeight)
    return slot, slot.form


def answers(model: nn.Module) -> list[Tensor]:
    with evaluating(model), torch.no_grad():
        return [model(x) for x, _ in digits().data("val")]


def check_common(method: WeightQuantizer, width: int) -> None:
    """Frozen bit for bit for every dtype, masks and clusters kept, odd weights survived, checkpoints restored."""
    register("quantize", (type(method),))
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 1)).to(dtype)
        x = torch.randn(7, 6, dtype=dtype)
        Quantize(weights=method, bits=width, ends="same").transform(model, Context())
        with torch.no_grad():
            assert bits(model.eval()(x)) == bits(frozen_copy(model).eval()(x))
    for odd in (torch.zeros(3, 4), torch.full((2, 1), 0.3), torch.randn(4, 1, 1), torch.randn(7)):
        holder = nn.Module()
        holder.weight = nn.Parameter(odd)
        put(slots(holder)["weight"], method, width)
        for mode in (True, False):
            assert bool(slots(holder.train(mode))["weight"].value().isfinite().all())
    _keeps(method, width)
    _restores(method, width)


def _keeps(method: WeightQuantizer, width: int) -> None:
    torch.manual_seed(1)
    model = network()
    masked, shared = slots(model)["0.weight"], slots(model)["4.weight"]
    mask = torch.rand(masked.latent.shape) > 0.4
    attach(masked, Mask(mask))
    index = torch.randint(0, 6, shared.latent.shape, dtype=torch.int32)
    attach(shared, Shared(index, torch.randn(6), zero=True))
    model = quantized(model, method, width, epochs=2)
    found = plain(model.eval())
    first, second = found[0].weight, found[4].weight  # type: ignore[index]
    assert bool((first[~mask] == 0).all())
    assert bool((second[index == 0] == 0).all())
    assert all(len(second[index == k].unique()) <= 1 for k in range(7))
    assert bits(answers(model)) == bits(answers(frozen_copy(model)))
    other = network()
    restore_forms(other, form_specs(model))
    other.load_state_dict(model.state_dict())
    assert bits(answers(model)) == bits(answers(other))


def _restores(method: WeightQuantizer, width: int) -> None:
    model = quantized(trained(), method, width, epochs=1)
    other = network()
    restore_forms(other, form_specs(model))
    other.load_state_dict(model.state_dict())
    assert bits(answers(model)) == bits(answers(other))
    slot, form = latent_of(model, "4.weight")
    before, keep = slot.value(), torch.tensor([3, 0])
    for dim in (0, 1):
        smaller, latent = form.take(dim, keep), form.take_latent(slot.latent, dim, keep)
        assert isinstance(smaller, Form)
        assert bits(smaller.eval()(latent)) == bits(form.eval()(slot.latent).index_select(dim, keep))
    assert bits(before) == bits(slot.value())


def check_resumes(method: WeightQuantizer, width: int, **fields: Any) -> None:
    """A training that was killed twice ends as the one that ran through."""
    step = Quantize(weights=method, bits=width, ends="same", epochs=4, optimizer=SGD(), **fields)
    through = step.transform(trained(), StoredContext(task=digits(), seed=4))
    broken = StoredContext(task=digits(), seed=4)
    for die_after in (1, 3):
        broken.epochs().die_after = die_after
        with pytest.raises(KeyboardInterrupt):
            step.transform(trained(), broken)
    assert bits(step.transform(trained(), broken).state_dict()) == bits(through.state_dict())
