"""Loss-aware binarization, ternarization and quantization: the weighed least squares against brute force."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.core.callback import Callback, Loop
from espalier.core.context import Context
from espalier.core.errors import UsageError
from espalier.core.parametrize import slots
from espalier.core.quantized import QuantizedWeight, WeightQuantizer
from espalier.core.task import Task, classification
from espalier.data import standard
from espalier.quantize import Quantize
from espalier.quantize.lab import LAB, binary_scale
from espalier.quantize.laq import LAQ, levels_of, nearest
from espalier.quantize.lat import LAT, alternating, exact
from espalier.quantize.twn import TWN
from espalier.train import SGD, AdamW, Constant

numbers = st.lists(st.tuples(st.floats(-3, 3), st.floats(0.01, 3)), min_size=1, max_size=7)


def least(weight: Tensor, d: Tensor, choices: tuple[float, ...]) -> float:
    """The smallest sum of d (a b - w)^2 over all b of ``choices``, each with its best a."""
    found = [float((d * weight.square()).sum())]
    for b in itertools.product(choices, repeat=len(weight)):
        codes = torch.tensor(b, dtype=torch.float64)
        mass = float((d * codes.square()).sum())
        if mass:
            a = float((d * codes * weight).sum()) / mass
            found.append(float((d * (a * codes - weight).square()).sum()))
    return min(found)


def error(weight: Tensor, d: Tensor, value: Tensor) -> float:
    return float((d * (value.double() - weight).square()).sum())


@given(pairs=numbers)
@settings(max_examples=40)
def test_binarization_is_the_best_of_all_signs(pairs):
    weight, d = (torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True))
    scale = binary_scale(weight[None], d[None])[0]
    value = scale * torch.where(weight < 0, -1.0, 1.0)
    assert error(weight, d, value) <= least(weight, d, (-1.0, 1.0)) + 1e-5


@given(pairs=numbers)
@settings(max_examples=40)
def test_exact_ternarization_is_the_best_of_all_codes(pairs):
    weight, d = (torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True))
    scale = exact(weight.abs()[None], d[None])[0]
    value = torch.where(weight.abs() > scale / 2, scale * weight.sign(), 0.0)
    assert error(weight, d, value) <= least(weight, d, (-1.0, 0.0, 1.0)) + 1e-5


def test_turns_end_in_a_fixed_point_that_is_no_better_than_the_exact_solution():
    torch.manual_seed(0)
    magnitudes, d = torch.randn(6, 400).double().abs(), torch.rand(6, 400).double()
    scale = alternating(magnitudes, d, None)
    for _ in range(10):
        scale = alternating(magnitudes, d, scale)
    beyond = magnitudes > scale[:, None] / 2
    assert torch.allclose(scale, (d * magnitudes * beyond).sum(1) / (d * beyond).sum(1), rtol=1e-3)
    best = exact(magnitudes, d)

    def errors(a: Tensor) -> Tensor:
        return (d * (torch.where(magnitudes > a[:, None] / 2, a[:, None], 0.0) - magnitudes).square()).sum(1)

    assert (errors(best) <= errors(scale) + 1e-9).all()
    assert (errors(scale) <= 1.01 * errors(best)).all()


@pytest.mark.parametrize("per", ["tensor", "channel"])
def test_with_equal_curvature_exact_ternarization_is_that_of_twn(per):
    torch.manual_seed(0)
    weight = torch.randn(5, 7, 3, 3)
    found = QuantizedWeight(LAT(solution="exact", per=per), weight, 2)(weight)
    assert torch.equal(found, QuantizedWeight(TWN(solution="exact", per=per), weight, 2)(weight))


def test_two_scales_treat_the_signs_apart():
    torch.manual_seed(0)
    weight = torch.cat([torch.rand(4, 60), -3 * torch.rand(4, 20)], 1)
    for solution in ("exact", "approximate"):
        value = QuantizedWeight(LAT(solution=solution, scales="two"), weight, 2)(weight)
        one = QuantizedWeight(LAT(solution=solution), weight, 2)(weight)
        assert len(value.unique()) == 3
        assert -float(value.min()) > 2 * float(value.max()) > 0
        assert float((value - weight).square().sum()) < float((one - weight).square().sum())
    for sign in (1, -1):
        side = weight.clamp(min=0) if sign > 0 else -weight.clamp(max=0)
        alone = exact(side.double().reshape(1, -1), (side > 0).double().reshape(1, -1))
        state = QuantizedWeight(LAT(solution="exact", scales="two"), weight, 2).state
        assert float(state["positive" if sign > 0 else "negative"]) == pytest.approx(float(alone))


def test_levels_of_both_kinds():
    assert levels_of(3, "linear").tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert levels_of(3, "log").tolist() == [0, 0.25, 0.5, 1]
    for kind, width in itertools.product(("linear", "log"), (3, 5, 8)):
        levels = levels_of(width, kind)
        assert len(levels) == 2 ** (width - 1)
        assert (levels.diff() > 0).all()
        x = torch.rand(500)
        index = nearest(x * 0.7, torch.tensor(0.7), levels)
        assert torch.allclose((x - levels[index]).abs(), (x[:, None] - levels).abs().amin(1), atol=1e-6)


@pytest.mark.parametrize("levels", ["linear", "log"])
def test_quantization_lowers_the_weighed_error_and_weighs(levels):
    torch.manual_seed(0)
    weight = torch.randn(8, 50)
    d = torch.where(torch.arange(50) < 25, 1.0, 1e-3).expand(8, 50)
    method = LAQ(levels=levels)
    found = []
    for curvature in (None, d):
        scale = method.solve(weight, 3, curvature, 0, None, None)
        for _ in range(20):
            scale = method.solve(weight, 3, curvature, 0, None, scale)
        form = QuantizedWeight(method, weight, 3)
        form.state["scale"].copy_(scale)
        found.append(error(weight.double(), d.double(), form(weight)))
        b = form(weight).double() / scale
        mass = (d if curvature is not None else torch.ones_like(d)).double()
        optimum = (mass * b * weight.double()).sum() / (mass * b.square()).sum()
        assert float(scale) == pytest.approx(float(optimum), rel=1e-4)
    assert found[1] < found[0]


class _Heard(Callback):
    """What the optimizer knew after every step."""

    def __init__(self, name: str) -> None:
        self.name, self.moments = name, torch.empty(0)

    def after_step(self, loop: Loop) -> None:
        self.moments = loop.optimizer.state[slots(loop.model)[self.name].latent]["exp_avg_sq"].clone()


@pytest.mark.parametrize(("method", "width"), [(LAB(), 1), (LAT(solution="exact"), 2), (LAT(), 2), (LAQ(), 3)])
def test_the_scale_is_that_of_the_optimizers_second_moments(method, width):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4, bias=False))
    x, y, weight = torch.randn(16, 6), torch.randn(16, 4), model[0].weight.detach().clone()
    step = Quantize(weights=method, bits=width, ends="same", epochs=1, lr=0.01, lr_schedule=Constant(),
                    optimizer=AdamW(weight_decay=0.0))  # fmt: skip
    result = step(model, Context(task=Task(train=[(x, y)], loss=F.mse_loss)))
    form = QuantizedWeight(method, weight, width)
    effective = form(weight).detach().requires_grad_()
    F.mse_loss(x @ effective.T, y).backward()
    g = effective.grad
    latent = weight - 0.01 * g / (g.abs() + 1e-8)  # Adam's first step
    d = (0.001 * g.square()).sqrt() + 1e-8
    slot = slots(result)["0.weight"]
    assert torch.allclose(slot.latent, latent, atol=1e-6)
    if isinstance(method, LAB):
        expected = (d * latent.abs()).sum() / d.sum()
    elif isinstance(method, LAT) and method.solution == "exact":
        expected = exact(latent.abs().double().reshape(1, -1), d.double().reshape(1, -1))[0]
    elif isinstance(method, LAT):
        before = form.state["scale"].double().reshape(1)
        expected = alternating(latent.abs().double().reshape(1, -1), d.double().reshape(1, -1), before)[0]
    else:
        assert isinstance(method, LAQ)
        expected = method.solve(latent, width, d, 0, None, form.state["scale"])
    assert isinstance(slot.form, QuantizedWeight)
    assert float(slot.form.state["scale"]) == pytest.approx(float(expected), rel=1e-4)
    assert float(slot.form.state["scale"]) != pytest.approx(float(form.state["scale"]), rel=1e-4)


@pytest.mark.parametrize("method", [LAB(), LAT(), LAQ()])
def test_without_second_moments_there_is_no_curvature(method: WeightQuantizer):
    digits = standard("digits")
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    step = Quantize(weights=method, bits=method.widths[0], ends="same", epochs=1, optimizer=SGD())
    with pytest.raises(UsageError, match=r"second moments .*SGD does not keep\. Train with train\.adamw"):
        step(model, Context(task=classification(digits.train)))


def test_a_frozen_weight_stays_as_it_is():
    digits = standard("digits")
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    model[1].weight.requires_grad_(requires_grad=False)
    step = Quantize(weights=LAT(), bits=2, ends="same", epochs=1)
    result = step(model, Context(task=classification(digits.train)))
    value = slots(result)["1.weight"].value()
    assert torch.equal(value, QuantizedWeight(LAT(), model[1].weight, 2)(model[1].weight))


def test_refusals():
    with pytest.raises(UsageError, match=r"laq can do 3, 4, 5, 6, 7, 8"):
        Quantize(weights=LAQ(), bits=2)
    with pytest.raises(UsageError, match=r"scales='three'"):
        LAT(scales="three")
