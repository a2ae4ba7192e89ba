"""Quantization-aware training: the grid is that of the weights and inputs as they are now."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from espalier.core.errors import UsageError
from espalier.core.forms import Mask
from espalier.core.inputs import Observed, QuantizedInput
from espalier.core.quantized import QuantizedWeight
from espalier.core.representation import Affine as StoredAffine
from espalier.quantize.qat import QAT, QATInput


def observed(values: Tensor) -> Observed:
    return Observed(values, torch.stack(values.aminmax())[None])


def by_the_paper(row: np.ndarray, bits: int, *, symmetric: bool) -> np.ndarray:
    low, high = min(row.min(), 0.0), max(row.max(), 0.0)
    if symmetric:
        last = 2 ** (bits - 1) - 1
        scale = max(-low, high) / last
        return np.clip(np.round(row / scale), -last, last) * scale
    scale = (high - low) / (2**bits - 2)
    zero = round(1 - low / scale)
    return (np.clip(np.round(row / scale) + zero, 1, 2**bits - 1) - zero) * scale


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weights_are_what_the_formula_says(bits, symmetric):
    weight = torch.randn(5, 40, generator=torch.Generator().manual_seed(bits)) + 0.3
    form = QuantizedWeight(QAT(symmetric=symmetric), weight, bits).eval()
    expected = np.stack([by_the_paper(row, bits, symmetric=symmetric) for row in weight.double().numpy()])
    assert np.allclose(form(weight).numpy(), expected, atol=1e-5)
    whole = QuantizedWeight(QAT(symmetric=symmetric, per="tensor"), weight, bits).eval()
    expected = by_the_paper(weight.double().numpy(), bits, symmetric=symmetric)
    assert np.allclose(whole(weight).numpy(), expected, atol=1e-5)
    stored = form.freeze(weight)
    assert isinstance(stored, StoredAffine)
    assert len(np.unique(stored.codes)) <= 2**bits - 1
    assert int(stored.codes.min()) > (-(2 ** (bits - 1)) if symmetric else 0)
    assert np.array_equal(stored.dense(), form(weight).numpy())


def test_the_grid_follows_the_weights():
    weight = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    form = QuantizedWeight(QAT(), weight, 3)
    assert torch.allclose(form(weight * 10), form(weight) * 10, rtol=1e-5)
    assert not form.state.tensors()


def test_pruned_weights_have_no_say_in_the_range():
    weight = torch.randn(3, 20, generator=torch.Generator().manual_seed(1))
    mask = weight.abs() < 1
    assert not bool(mask.all())
    form = QuantizedWeight(QAT(), weight, 4, inner=Mask(mask)).eval()
    alone = QuantizedWeight(QAT(), weight, 4).eval()(torch.where(mask, weight, 0))
    assert torch.equal(form(weight), torch.where(mask, alone, 0))
    assert np.array_equal(form.freeze(weight).dense(), form(weight).numpy())


def test_every_weight_gets_its_gradient():
    weight = torch.randn(3, 20, generator=torch.Generator().manual_seed(2)).requires_grad_()
    QuantizedWeight(QAT(), weight.detach(), 2)(weight).sum().backward()
    assert weight.grad is not None
    assert bool((weight.grad == 1).all())


def test_ranges_of_inputs_follow_in_training_and_rest_after():
    start = torch.linspace(-1, 2, 100)
    quantizer = QuantizedInput(QATInput(decay=0.75), 4, observed(start), signed=True)
    low, high = -1.0, 2.0
    for number in range(1, 4):
        batch = torch.linspace(-2.0 * number, 3.0 * number, 500)
        values = quantizer(batch)
        low, high = 0.75 * low + 0.25 * -2.0 * number, 0.75 * high + 0.25 * 3.0 * number
        scale = (high - low) / 15
        zero = round(-low / scale)
        expected = (np.clip(np.round(batch.double().numpy() / scale) + zero, 0, 15) - zero) * scale
        assert np.allclose(values.numpy(), expected, atol=1e-5)
    assert np.allclose([float(quantizer.state["low"]), float(quantizer.state["high"])], [low, high])
    quantizer.eval()
    before = {name: tensor.clone() for name, tensor in quantizer.state.tensors().items()}
    assert torch.equal(quantizer(batch), values)
    quantizer(batch * 100)
    assert all(torch.equal(before[name], tensor) for name, tensor in quantizer.state.tensors().items())


def test_a_resumed_range_goes_on():
    first = QuantizedInput(QATInput(decay=0.5), 3, observed(torch.rand(50)), signed=False)
    first(torch.rand(50) * 4)
    second = QuantizedInput(QATInput(decay=0.5), 3, Observed.nothing(), signed=False)
    second.load_state_dict(first.state_dict())
    batch = torch.rand(100) * 2
    assert torch.equal(first(batch), second(batch))
    assert torch.equal(first.state["high"], second.state["high"])


def test_inputs_can_wait():
    quantizer = QuantizedInput(QATInput(delay=2), 2, observed(torch.linspace(0, 1, 9)), signed=False)
    x = torch.rand(200, generator=torch.Generator().manual_seed(3))
    assert torch.equal(quantizer(x), x)
    assert torch.equal(quantizer(x), x)
    assert len(quantizer(x).unique()) <= 4
    assert len(quantizer.eval()(x).unique()) <= 4


def test_bad_fields_are_refused():
    with pytest.raises(UsageError, match="decay"):
        QATInput(decay=-0.1)
