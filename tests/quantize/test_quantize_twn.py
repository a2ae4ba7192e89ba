"""Ternary weight networks: the exact solution against brute force, the approximate one by its formula."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from espalier.core.context import Context
from espalier.core.errors import UsageError
from espalier.core.forms import Mask
from espalier.core.parametrize import slots
from espalier.core.quantized import QuantizedWeight
from espalier.core.task import Task
from espalier.quantize import Quantize
from espalier.quantize.twn import TWN, exact
from espalier.train import SGD, Constant


def brute_force(magnitudes: Tensor) -> float:
    """The smallest squared error over all thresholds, each with its best scale."""
    found = [float(magnitudes.square().sum())]
    for threshold in [-1.0, *magnitudes.tolist()]:
        beyond = magnitudes[magnitudes > threshold]
        if len(beyond):
            kept = torch.where(magnitudes > threshold, beyond.mean(), 0.0)
            found.append(float((magnitudes - kept).square().sum()))
    return min(found)


@given(values=st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=24))
@settings(max_examples=60)
def test_exact_is_the_best_of_all_thresholds(values):
    weight = torch.tensor(values)[None]
    value = QuantizedWeight(TWN(solution="exact"), weight, 2)(weight)
    assert float((weight - value).double().square().sum()) <= brute_force(weight[0].abs().double()) + 1e-5


def test_exact_on_many_rows_at_once():
    torch.manual_seed(0)
    rows = torch.randn(20, 300).abs()
    threshold, scale = exact(rows)
    for row, t, a in zip(rows, threshold, scale, strict=True):
        error = (row - torch.where(row > t, a, 0.0)).double().square().sum()
        assert float(error) == pytest.approx(brute_force(row.double()), rel=1e-6)


@pytest.mark.parametrize("per", ["tensor", "channel"])
def test_approximate_by_the_formula(per):
    torch.manual_seed(0)
    weight, kept = torch.randn(4, 5, 3, 3), torch.rand(4, 5, 3, 3) > 0.3
    value = QuantizedWeight(TWN(per=per), weight, 2, inner=Mask(kept))(weight)
    parts = [(weight, kept, value)] if per == "tensor" else zip(weight, kept, value, strict=True)
    for w, k, found in parts:
        magnitudes = w[k].abs()
        threshold = 0.7 * magnitudes.mean()
        scale = magnitudes[magnitudes > threshold].mean()
        expected = torch.where(k & (w.abs() > threshold), scale * w.sign(), 0.0)
        assert torch.allclose(found, expected, atol=1e-6)


def test_gaussian_weights_have_the_known_optimum():
    """The paper: for normal weights the best threshold is near 0.6 sigma, 0.75 of the mean magnitude."""
    torch.manual_seed(0)
    magnitudes = torch.randn(1, 200_000).abs()
    threshold, _ = exact(magnitudes)
    assert float(threshold) == pytest.approx(0.6, abs=0.02)
    assert float(threshold / magnitudes.mean()) == pytest.approx(0.75, abs=0.03)


def test_the_gradient_of_the_ternary_weight_goes_to_the_latent_one_and_the_scale_follows():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 2, bias=False))
    x, y, weight = torch.randn(8, 6), torch.randn(8, 2), model[0].weight.detach().clone()
    step = Quantize(weights=TWN(), bits=2, ends="same", epochs=1, lr=0.1, lr_schedule=Constant(),
                    optimizer=SGD(momentum=0.0))  # fmt: skip
    result = step(model, Context(task=Task(train=[(x, y)], loss=nn.functional.mse_loss)))
    effective = QuantizedWeight(TWN(), weight, 2)(weight).detach().requires_grad_()
    nn.functional.mse_loss(x @ effective.T, y).backward()
    expected = weight - 0.1 * effective.grad
    slot = slots(result)["0.weight"]
    assert torch.allclose(slot.latent, expected, atol=1e-6)
    assert torch.allclose(slot.value(), QuantizedWeight(TWN(), expected, 2)(expected), atol=1e-6)


def test_refusals():
    with pytest.raises(UsageError, match=r"factor=0"):
        TWN(factor=0.0)
    with pytest.raises(UsageError, match=r"twn can do 2"):
        Quantize(weights=TWN(), bits=1)
