"""LogQuant against its formula written out."""

from __future__ import annotations

import math

import pytest
import torch

from espalier.core.inputs import Observed, QuantizedInput
from espalier.core.quantized import QuantizedWeight
from espalier.quantize.log import Log, LogInput


def log_quant(x: float, bits: int, fsr: int, per_octave: int) -> float:
    """The paper's formula in the exponents of the base: the lower end of the clip is zero, the upper FSR - 1."""
    if x == 0:
        return 0.0
    e = round(per_octave * math.log2(abs(x)))
    low = fsr - 2**bits
    return 0.0 if e <= low else math.copysign(2 ** (min(e, fsr - 1) / per_octave), x)


@pytest.mark.parametrize(("base", "per_octave"), [("2", 1), ("sqrt2", 2)])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_weights_and_inputs_by_the_formula(base, per_octave, bits):
    values = torch.randn(2000, generator=torch.Generator().manual_seed(0)) * 0.7
    values[:3] = torch.tensor([0.0, 5.0, -5.0])
    fsr = round(per_octave * math.log2(5.0)) + 1
    found = QuantizedWeight(Log(base=base), values, bits).eval()(values)
    wanted = torch.tensor([log_quant(v, bits - 1, fsr, per_octave) for v in values.tolist()])
    assert torch.equal(found, wanted)
    positive = values.abs()
    seen = Observed(positive, torch.tensor([[0.0, 5.0]]))
    found = QuantizedInput(LogInput(base=base), bits, seen, signed=False).eval()(positive)
    assert torch.equal(found, torch.tensor([log_quant(v, bits, fsr, per_octave) for v in positive.tolist()]))


def test_the_sought_range_has_less_error_than_any_other():
    values = torch.randn(3000, generator=torch.Generator().manual_seed(1))
    errors = {fsr: torch.tensor([log_quant(v, 1, fsr, 1) - v for v in values.tolist()]).norm() for fsr in range(-3, 4)}
    found = QuantizedWeight(Log(fsr="error"), values, 2).eval()(values)
    assert float((found - values).norm()) == pytest.approx(float(min(errors.values())), rel=1e-6)
    assert float((QuantizedWeight(Log(), values, 2).eval()(values) - values).norm()) > float(min(errors.values()))


def test_gradients_pass_through_and_stop_where_inputs_are_clipped():
    seen = Observed(torch.tensor([0.5, 1.0]), torch.tensor([[0.5, 1.0]]))
    module = QuantizedInput(LogInput(), 3, seen, signed=False).train()
    x = torch.tensor([0.3, 1.4, 1.5, -0.2], requires_grad=True)
    module(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1, 1, 0, 0]
