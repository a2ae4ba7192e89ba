"""BinaryConnect: a run worked out by hand, the scales, and digits."""

from __future__ import annotations

import math

import pytest
import torch
from tests.quantize.binary_nets import accuracy, freezes_bit_for_bit, keeps_masks_and_tables, loop, run, trained, view
from torch import nn
from torch.nn import functional as F

from espalier.core.context import Context
from espalier.core.errors import UsageError
from espalier.core.parametrize import slots
from espalier.core.task import Task
from espalier.quantize import Quantize
from espalier.quantize.binary import Binary, glorot, signs
from espalier.train import SGD, Constant


def test_signs_have_no_zero() -> None:
    assert signs(torch.tensor([-2.0, -0.0, 0.0, 3.0])).tolist() == [-1.0, 1.0, 1.0, 1.0]


def test_glorot_counts_the_kernel_on_both_sides() -> None:
    assert glorot((20, 10)) == pytest.approx(math.sqrt(1.5 / 30))
    assert glorot((20, 10, 3, 3)) == pytest.approx(math.sqrt(1.5 / (9 * 10 + 9 * 20)))
    assert glorot((7,)) == pytest.approx(math.sqrt(1.5 / 8))


@pytest.mark.parametrize("scale", ["one", "glorot"])
@pytest.mark.parametrize("lr_scale", ["one", "glorot"])
def test_training_by_hand(scale: str, lr_scale: str) -> None:
    """Gradient descent on one batch: forward and backward at H sign(w), the step scaled, the weight clipped."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 2, bias=False)).double()
    x, y = torch.randn(8, 6).double(), torch.randn(8, 2).double()
    c = math.sqrt(1.5 / 8)
    height = c if scale == "glorot" else 1.0
    factor = 1 / c**2 if lr_scale == "glorot" else 1.0  # the square: plain gradient descent
    latent, lr, steps = (model[0].weight.detach() / c).clamp(-1, 1) * height, 1.0, 5
    moved = False
    for _ in range(steps):
        effective = (torch.where(latent >= 0, 1.0, -1.0).double() * height).requires_grad_()
        (gradient,) = torch.autograd.grad(F.mse_loss(x @ effective.T, y), effective)
        stepped = latent - factor * lr * gradient
        moved = moved or bool((stepped.abs() > height).any())
        latent = stepped.clamp(-height, height)
    result = Quantize(
        weights=Binary(scale=scale, lr_scale=lr_scale), epochs=steps, lr=lr, ends="same", lr_schedule=Constant(),
        optimizer=SGD(momentum=0.0, weight_decay=0.0),
    )(model, Context(task=Task(train=[(x, y)], loss=F.mse_loss)))  # fmt: skip
    slot = slots(result)["0.weight"]
    assert moved  # the clip has been at work
    assert torch.allclose(slot.latent.detach(), latent, atol=1e-6)
    assert torch.allclose(slot.value().abs(), torch.full((2, 6), height).double())


def test_step_is_scaled_once_with_adam_and_squared_with_plain_descent() -> None:
    c = glorot((4, 4))
    for optimizer, factor in ((torch.optim.Adam, 1 / c), (torch.optim.SGD, 1 / c**2)):
        w, there = view(Binary(), torch.zeros(4, 4)), loop(optimizer)
        Binary().before_step(w, there)
        w.latent.add_(0.01)
        Binary().after_step(w, there)
        assert torch.allclose(w.latent, torch.full((4, 4), 0.01 * factor))


def test_gradient_goes_straight_through() -> None:
    weight = torch.randn(3, 5, requires_grad=True)
    gradient = torch.randn(3, 5)
    Binary().quantize(view(Binary(), weight, training=True)).backward(gradient)
    assert torch.equal(weight.grad, gradient)


@pytest.mark.parametrize("scale", ["one", "glorot"])
def test_frozen_form(scale: str) -> None:
    freezes_bit_for_bit(Binary(scale=scale))


def test_masks_and_tables_stay() -> None:
    keeps_masks_and_tables(Binary())


def test_digits() -> None:
    untrained = run(trained("cnn"), weights=Binary())
    result = run(trained("cnn"), weights=Binary(), epochs=2, lr=3e-3)
    assert accuracy(result) > max(94.0, accuracy(untrained))


def test_other_bits_are_refused() -> None:
    with pytest.raises(UsageError, match="binary can do 1"):
        Quantize(weights=Binary(), bits=2)
