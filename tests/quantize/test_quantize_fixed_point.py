"""Fixed point against arithmetic in fractions; the exponent follows the overflows."""

from __future__ import annotations

from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from espalier.core.errors import NumericError, UsageError
from espalier.core.forms import Mask
from espalier.core.inputs import Observed, QuantizedInput
from espalier.core.quantized import QuantizedWeight
from espalier.core.representation import Affine as StoredAffine
from espalier.quantize.fixed_point import FixedPoint, FixedPointInput, integer_bits


def at(step: int) -> Any:
    return SimpleNamespace(step=step)


@pytest.mark.parametrize(("largest", "m"), [(1.0, 0), (1.01, 1), (0.5, -1), (0.51, 0), (4.0, 2), (5.0, 3), (0.0, 0)])
def test_integer_bits_are_the_rounded_up_logarithm(largest, m):
    assert integer_bits(largest) == m


def test_nan_is_named():
    with pytest.raises(NumericError, match="NaN or infinity"):
        integer_bits(float("nan"))


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_values_are_the_nearest_integers_times_a_power_of_two(bits):
    weight = torch.randn(4, 30, generator=torch.Generator().manual_seed(bits)) * 3
    form = QuantizedWeight(FixedPoint(), weight, bits).eval()
    scale = Fraction(float(form.state["scale"]))
    m = integer_bits(float(weight.abs().max()))
    assert scale == Fraction(2) ** (m - bits + 1)
    for value, found in zip(weight.flatten().tolist(), form(weight).flatten().tolist(), strict=True):
        code = min(max(round(Fraction(value) / scale), -(2 ** (bits - 1))), 2 ** (bits - 1) - 1)
        assert Fraction(found) == code * scale
    stored = form.freeze(weight)
    assert isinstance(stored, StoredAffine)
    assert stored.scale.shape == ()
    assert np.array_equal(stored.dense(), form(weight).numpy())


def test_q2_5_is_what_it_says():
    form = QuantizedWeight(FixedPoint(integer_bits=2), torch.tensor([[0.3, 9.0, -9.0]]), 8).eval()
    assert form(torch.tensor([[0.3, 9.0, -9.0]])).tolist() == [[10 / 32, 127 / 32, -4.0]]


def test_the_scale_follows_the_overflows():
    weight = torch.full((10, 100), 0.3)
    form = QuantizedWeight(FixedPoint(every=10), weight, 4)
    assert float(form.state["scale"]) == 2**-4
    method, latent = form.method, torch.full((10, 100), 0.9)
    method.after_step(form.view(latent), at(8))
    assert float(form.state["scale"]) == 2**-4
    method.after_step(form.view(latent), at(9))
    assert float(form.state["scale"]) == 2**-3
    latent.fill_(0.1)
    for step in (19, 29, 39, 49, 59):
        method.after_step(form.view(latent), at(step))
    assert float(form.state["scale"]) == 2**-6  # the next would make 6.4 of 0.1 and 12.8 overflow
    static = QuantizedWeight(FixedPoint(mode="static", every=1), weight, 4)
    static.method.after_step(static.view(torch.full((10, 100), 50.0)), at(0))
    assert float(static.state["scale"]) == 2**-4


def test_few_overflows_are_allowed_and_pruned_weights_do_not_count():
    weight = torch.full((100, 100), 0.3)
    some = weight.clone()
    some.view(-1)[:1] = 9.0
    form = QuantizedWeight(FixedPoint(every=1), weight, 4)
    form.method.after_step(form.view(some), at(0))
    assert float(form.state["scale"]) == 2**-4
    some.view(-1)[:5] = 9.0
    masked = QuantizedWeight(FixedPoint(every=1), weight, 4, inner=Mask(some < 1))
    masked.method.after_step(masked.view(some), at(0))
    assert float(masked.state["scale"]) == 2**-4
    form.method.after_step(form.view(some), at(0))
    assert float(form.state["scale"]) == 2**-3
    few = torch.full((100, 100), 0.1)
    few.view(-1)[:200] = 0.9  # 2 % would overflow with half the range
    form.method.after_step(form.view(few), at(0))
    assert float(form.state["scale"]) == 2**-3


def test_stochastic_rounding_is_unbiased_in_training_and_off_after():
    weight = torch.full((200, 500), 0.3)
    form = QuantizedWeight(FixedPoint(rounding="stochastic", integer_bits=0), weight, 3)
    torch.manual_seed(0)
    values = form(weight)
    assert set(values.unique().tolist()) == {0.25, 0.5}
    assert abs(float(values.mean()) - 0.3) < 0.002
    assert not torch.equal(values, form(weight))
    form.eval()
    assert form(weight).unique().tolist() == [0.25]


def test_the_gradient_passes_where_nothing_is_clipped():
    weight = torch.tensor([[0.3, 5.0, -5.0, 0.9]], requires_grad=True)
    form = QuantizedWeight(FixedPoint(integer_bits=0), weight.detach(), 4)
    form(weight).sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [[1.0, 0.0, 0.0, 1.0]]


@pytest.mark.parametrize("signed", [False, True])
def test_inputs_have_a_sign_bit_only_where_there_is_a_sign(signed):
    sample = torch.linspace(-3.5 if signed else 0.0, 3.5, 1000)
    quantizer = QuantizedInput(
        FixedPointInput(), 4, Observed(sample, torch.stack(sample.aminmax())[None]), signed=signed
    )
    quantizer.eval()
    step = 0.5 if signed else 0.25
    low, high = (-8, 7) if signed else (0, 15)
    x = torch.linspace(-6, 6, 999)
    expected = np.clip(np.round(x.double().numpy() / step), low, high) * step
    assert np.allclose(quantizer(x).numpy(), expected, atol=0)
    quantizer.train()
    assert np.allclose(quantizer(x).numpy(), expected, atol=0)


def test_inputs_count_overflows_between_adjustments():
    sample = torch.linspace(0, 0.9, 100)
    observed = Observed(sample, torch.stack(sample.aminmax())[None])
    quantizer = QuantizedInput(FixedPointInput(every=2, overflow=0.1), 4, observed, signed=False)
    assert float(quantizer.state["scale"]) == 2**-4
    quantizer(torch.tensor([0.2] * 8 + [3.0]))
    quantizer.method.after_step(quantizer.view(), at(0))
    quantizer(torch.tensor([0.2] * 8 + [3.0]))
    assert quantizer.state["seen"].tolist() == [18, 2, 2]
    quantizer.method.after_step(quantizer.view(), at(1))
    assert float(quantizer.state["scale"]) == 2**-3
    assert quantizer.state["seen"].tolist() == [0, 0, 0]
    for step in (3, 5):
        quantizer(torch.full((9,), 0.6))
        quantizer.method.after_step(quantizer.view(), at(step))
    assert float(quantizer.state["scale"]) == 2**-4
    quantizer.eval()
    quantizer(torch.full((9,), 99.0))
    assert quantizer.state["seen"].tolist() == [0, 0, 0]


def test_bad_modes_are_refused():
    with pytest.raises(UsageError, match="mode"):
        FixedPoint(mode="moving")  # type: ignore[arg-type]
