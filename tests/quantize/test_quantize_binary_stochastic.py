"""Stochastic BinaryConnect: its chances, its mean, and what is used outside training."""

from __future__ import annotations

import pytest
import torch
from tests.quantize.binary_nets import accuracy, freezes_bit_for_bit, keeps_masks_and_tables, run, trained, view

from espalier.core.errors import UsageError
from espalier.core.model import evaluating
from espalier.core.parametrize import slots
from espalier.quantize.binary_stochastic import BinaryStochastic, hard_sigmoid


def test_hard_sigmoid() -> None:
    assert hard_sigmoid(torch.tensor([-3.0, -1.0, 0.0, 0.5, 2.0])).tolist() == [0.0, 0.0, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("scale", ["one", "glorot"])
def test_unbiased_within_the_clip(scale: str) -> None:
    method = BinaryStochastic(scale=scale)
    height = method.height((100, 100))
    weight = torch.linspace(-1.2, 1.2, 10_000).reshape(100, 100) * height
    torch.manual_seed(0)
    w = view(method, weight, training=True)
    drawn = torch.stack([method.quantize(w) for _ in range(400)])
    assert torch.allclose(drawn.abs(), torch.tensor(height))
    gap = (drawn.mean(0) - weight.clamp(-height, height)) / height
    assert float(gap.abs().max()) < 5 / 400**0.5  # five standard errors of the widest
    assert abs(float(gap.mean())) < 5 / (400 * 10_000) ** 0.5
    outer = weight.abs() >= height
    assert torch.equal(drawn[:, outer], (weight.sign() * height)[outer].expand(400, -1))


def test_gradient_goes_straight_through() -> None:
    weight = torch.randn(3, 5, requires_grad=True)
    gradient = torch.randn(3, 5)
    BinaryStochastic().quantize(view(BinaryStochastic(), weight, training=True)).backward(gradient)
    assert torch.equal(weight.grad, gradient)


def test_chance_is_torchs_and_only_in_training() -> None:
    weight = torch.randn(30, 30) / 3
    w = view(BinaryStochastic(), weight, training=True)
    torch.manual_seed(3)
    first = BinaryStochastic().quantize(w)
    torch.manual_seed(3)
    assert torch.equal(first, BinaryStochastic().quantize(w))
    assert not torch.equal(first, BinaryStochastic().quantize(w))
    before = torch.get_rng_state()
    still = view(BinaryStochastic(), weight)
    assert torch.equal(BinaryStochastic().quantize(still), torch.where(weight >= 0, 1.0, -1.0))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("evaluate", ["binary", "real"])
def test_frozen_form(evaluate: str) -> None:
    freezes_bit_for_bit(BinaryStochastic(evaluate=evaluate))


def test_masks_and_tables_stay() -> None:
    keeps_masks_and_tables(BinaryStochastic())


def test_digits_with_signs_and_with_real_weights() -> None:
    for evaluate in ("binary", "real"):
        result = run(trained("cnn"), weights=BinaryStochastic(evaluate=evaluate), epochs=2, lr=3e-3)
        assert accuracy(result) > 90
        with evaluating(result):
            inner = slots(result)["4.weight"].value()
        assert (len(inner.unique()) == 2) == (evaluate == "binary")


def test_unknown_evaluation_is_refused() -> None:
    with pytest.raises(UsageError, match="evaluate"):
        BinaryStochastic(evaluate="both")
