"""DoReFa against the paper's formulas, values and gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from espalier.core.context import Context
from espalier.core.errors import UsageError
from espalier.core.forms import Mask
from espalier.core.inputs import Observed, QuantizedInput, quantized_inputs
from espalier.core.quantized import QuantizedWeight
from espalier.core.representation import Codebook
from espalier.quantize import Quantize
from espalier.quantize.dorefa import DoReFa, DoReFaInput


def observed(values: Tensor) -> Observed:
    return Observed(values, torch.stack(values.aminmax())[None])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weights_are_the_papers(bits):
    weight = torch.randn(5, 40, generator=torch.Generator().manual_seed(bits))
    form = QuantizedWeight(DoReFa(), weight, bits).eval()
    w, n = np.tanh(weight.double().numpy()), 2**bits - 1
    expected = 2 * np.round(n * (w / (2 * np.abs(w).max()) + 0.5)) / n - 1
    assert np.allclose(form(weight).numpy(), expected, atol=1e-6)
    stored = form.freeze(weight)
    assert isinstance(stored, Codebook)
    assert stored.centroids.size <= 2**bits
    assert np.array_equal(stored.dense(), form(weight).numpy())


def test_one_bit_is_a_sign_and_a_mean_for_the_tensor():
    weight = torch.tensor([[0.5, -1.0, 0.0], [2.0, -0.5, -2.0]], requires_grad=True)
    form = QuantizedWeight(DoReFa(), weight.detach(), 1)
    values = form(weight)
    assert values.tolist() == [[1.0, -1.0, 1.0], [1.0, -1.0, -1.0]]
    (values * torch.arange(6.0).reshape(2, 3)).sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [[0, 1, 2], [3, 4, 5]]
    scaled = QuantizedWeight(DoReFa(), weight.detach() * 3, 1)(weight.detach() * 3)
    assert torch.equal(scaled, values.detach() * 3)


def test_the_gradient_goes_through_tanh_and_the_largest_weight():
    weight = torch.randn(3, 7, generator=torch.Generator().manual_seed(0)).requires_grad_()
    flow = torch.randn(3, 7, generator=torch.Generator().manual_seed(1))
    (QuantizedWeight(DoReFa(), weight.detach(), 3)(weight) * flow).sum().backward()
    w = weight.detach().double().numpy()

    def without_rounding(values: np.ndarray) -> float:
        bent = np.tanh(values)
        return float((flow.double().numpy() * (bent / np.abs(bent).max())).sum())

    expected = np.zeros_like(w)
    for place in np.ndindex(*w.shape):
        up, down = w.copy(), w.copy()
        up[place] += 1e-6
        down[place] -= 1e-6
        expected[place] = (without_rounding(up) - without_rounding(down)) / 2e-6
    assert weight.grad is not None
    assert np.allclose(weight.grad.numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("bits", [1, 2])
def test_pruned_weights_count_nowhere(bits):
    weight = torch.randn(4, 20, generator=torch.Generator().manual_seed(2))
    mask = weight.abs() < 0.8
    form = QuantizedWeight(DoReFa(), weight, bits, inner=Mask(mask)).eval()
    alone = QuantizedWeight(DoReFa(), weight[mask][None], bits).eval()(weight[mask][None])
    assert torch.allclose(form(weight)[mask], alone[0], rtol=1e-6)
    assert torch.equal(form(weight) == 0, ~mask)
    assert np.array_equal(form.freeze(weight).dense(), form(weight).numpy())


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_inputs_are_clipped_to_one_and_rounded_evenly(bits):
    x = (torch.rand(1001, generator=torch.Generator().manual_seed(3)) * 3 - 1).requires_grad_()
    quantizer = QuantizedInput(DoReFaInput(), bits, observed(x.detach().relu()), signed=False)
    n = 2**bits - 1
    expected = np.round(np.clip(x.detach().numpy(), 0, 1) * n) / n
    values = quantizer(x)
    assert np.allclose(values.detach().numpy(), expected, atol=1e-6)
    values.sum().backward()
    inner = (x > 0.01) & (x < 0.99)
    assert x.grad is not None
    assert bool((x.grad[inner] == 1).all())
    assert not bool(x.grad[(x < 0) | (x > 1)].any())
    assert torch.equal(quantizer.eval()(x), values)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_inputs_with_a_sign_lie_around_zero(bits):
    x = torch.rand(801, generator=torch.Generator().manual_seed(4)) * 4 - 2
    quantizer = QuantizedInput(DoReFaInput(), bits, observed(x), signed=True).eval()
    last = 2 ** (bits - 1) - 1
    assert np.allclose(quantizer(x).numpy(), np.round(np.clip(x.numpy(), -1, 1) * last) / last, atol=1e-6)
    one = QuantizedInput(DoReFaInput(), 1, observed(x), signed=True).eval()
    assert one(x).unique().tolist() == [0.0, 1.0]


def test_bits_out_of_range_are_refused():
    with pytest.raises(UsageError, match="bits"):
        Quantize(weights=DoReFa(), bits=17)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_ends_have_a_range_of_their_own(bits, task):
    def found(ends):
        net = nn.Sequential(nn.Flatten(), *(nn.Linear(64, 64) for _ in range(3)))
        step = Quantize(activations=DoReFaInput(), activation_bits=bits, ends=ends)
        return {path: (q.method.id, q.bits) for path, q in quantized_inputs(step(net, Context(task=task))).items()}

    assert found(8) == {"1": ("affine-input", 8), "2": ("dorefa-input", bits), "3": ("affine-input", 8)}
    assert set(found("same").values()) == {("dorefa-input", bits)}
