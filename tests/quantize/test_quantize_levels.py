"""Any finite set: the nearest, the fit, the search, and the weight that is overwritten."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from espalier.core.context import Context
from espalier.core.errors import UsageError
from espalier.core.parametrize import slots
from espalier.core.quantized import QuantizedWeight
from espalier.core.recipe import fields_to_data
from espalier.core.task import classification
from espalier.data import standard
from espalier.quantize import Quantize
from espalier.quantize.levels import Levels, fitting_scale, searched


def test_a_given_set_is_taken_as_it_is():
    weight = torch.tensor([-9.0, -1.2, -0.4, 0.2, 0.6, 1.6, 1.4])
    found = QuantizedWeight(Levels(levels=(2, -1, 0, 1, -2)), weight, 3).eval()(weight)
    assert found.tolist() == [-2, -1, 0, 0, 1, 2, 1]
    found = QuantizedWeight(Levels(range=(-2.0, 2.0)), weight, 2).eval()(weight)
    assert torch.allclose(found, torch.tensor([-2, -2 / 3, -2 / 3, 2 / 3, 2 / 3, 2, 2]))


@pytest.mark.parametrize("levels", [(-1.0, 0.0, 1.0), (-2.0, -1.0, 0.0, 1.0, 2.0), (0.5, 1.0, -3.0)])
def test_the_scales_fit(levels):
    weight = torch.randn(300, generator=torch.Generator().manual_seed(0)) * 0.05
    q = torch.tensor(sorted(levels))
    assert torch.allclose(fitting_scale(weight, q, "max"), weight.abs().max() / max(map(abs, levels)))
    assert float(fitting_scale(weight, q, "none")) == 1

    def error(scale: float) -> float:
        return float((weight[:, None] - scale * q).abs().amin(1).square().sum())

    found = float(fitting_scale(weight, q, "l2"))
    assert error(found) <= error(float(weight.abs().max()) / max(map(abs, levels)))
    assert error(found) <= min(error(found * 0.98), error(found * 1.02)) * 1.02


def test_the_search_is_the_best_set():
    values = torch.randn(11, generator=torch.Generator().manual_seed(1))
    ordered = np.sort(values.double().numpy())
    best = min(
        sum(float(((part - part.mean()) ** 2).sum()) for part in np.split(ordered, cuts))
        for cuts in itertools.combinations(range(1, 11), 3)
    )
    found = searched(values, 4)
    assert float((values[:, None] - found).abs().amin(1).square().sum()) == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("mode", ["latent", "overwrite"])
def test_overwriting_leaves_the_weight_itself_on_the_set(mode):
    digits = standard("digits", batch_size=64)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    method = Levels(range=(-2, 2), scale="max", mode=mode)
    step = Quantize(weights=method, bits=4, ends="same", epochs=1, lr=1e-2)
    slot = slots(step(model, Context(task=classification(digits.train))))["1.weight"]
    assert torch.equal(slot.latent, slot.value()) == (mode == "overwrite")
    assert not torch.equal(slot.value(), slots(step.replace(epochs=0)(model, Context()))["1.weight"].value())


def test_the_gradient_goes_straight_through():
    latent = torch.randn(4, 4, requires_grad=True)
    form = QuantizedWeight(Levels(levels=(-1, 1)), latent.detach(), 1).train()
    weights = torch.randn(4, 4)
    (form(latent) * weights).sum().backward()
    assert latent.grad is not None
    assert torch.equal(latent.grad, weights)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"levels": (1.0,)}, "one value"),
        ({"levels": (1.0, 2.0), "range": (0.0, 1.0)}, "both given"),
        ({"range": (1.0, -1.0)}, "low end first"),
        ({"levels": (0.0, float("inf"))}, "infinite"),
    ],
)
def test_what_is_no_set_is_refused(fields, said):
    with pytest.raises(UsageError, match=said):
        Levels(**fields)


def test_too_many_levels_for_the_bits():
    with pytest.raises(UsageError, match="5 levels need 3 bits, and 2 were given"):
        QuantizedWeight(Levels(levels=(-2, -1, 0, 1, 2)), torch.randn(3, 3), 2)


def test_a_set_survives_as_data():
    method = Levels(levels=(-1.0, 0.0, 1.0))
    assert list(fields_to_data(method)["levels"]) == [-1.0, 0.0, 1.0]
