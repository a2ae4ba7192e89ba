"""PACT's clip and its gradient, SAWB's clip against the best one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from espalier.core.errors import UsageError
from espalier.core.forms import Mask
from espalier.core.inputs import Observed, QuantizedInput
from espalier.core.quantized import QuantizedWeight
from espalier.core.representation import Codebook
from espalier.quantize import Quantize
from espalier.quantize.pact import PACT
from espalier.quantize.sawb import COEFFICIENTS, SAWB, bound, even_grid


def observed(values: Tensor) -> Observed:
    return Observed(values, torch.stack(values.aminmax())[None])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_pact_is_the_papers_formula_and_gradient(bits):
    x = (torch.randn(400, generator=torch.Generator().manual_seed(bits)) * 2).requires_grad_()
    quantizer = QuantizedInput(PACT(alpha=1.5), bits, observed(x.detach().abs()), signed=False)
    alpha = quantizer.state["alpha"]
    flow = torch.randn(400, generator=torch.Generator().manual_seed(9))
    values = quantizer(x)
    (values * flow).sum().backward()

    y, bound_ = x.detach().clone().requires_grad_(), torch.tensor(1.5, requires_grad=True)
    clipped = 0.5 * (y.abs() - (y - bound_).abs() + bound_)  # eq. 1
    (clipped * flow).sum().backward()
    n = 2**bits - 1
    expected = torch.round(clipped.detach() * n / 1.5) * 1.5 / n  # eq. 2
    assert torch.allclose(values.detach(), expected, atol=1e-6)
    assert torch.equal(x.grad, y.grad)  # type: ignore[arg-type]
    assert torch.allclose(alpha.grad, bound_.grad)  # type: ignore[arg-type]
    assert torch.allclose(quantizer.eval()(x), expected, atol=1e-6)


def test_pact_clips_both_ways_where_there_is_a_sign():
    x = torch.tensor([-5.0, -2.0, -0.6, 0.0, 0.7, 2.0, 5.0], requires_grad=True)
    quantizer = QuantizedInput(PACT(alpha=3.0), 3, observed(x.detach()), signed=True)
    values = quantizer(x)
    assert values.tolist() == [-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0]
    values.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 1, 1, 1, 0]
    assert float(quantizer.state["alpha"].grad) == 0
    assert torch.equal(quantizer.eval()(x), values)


def test_pact_pulls_its_bound_down():
    quantizer = QuantizedInput(PACT(strength=0.1), 4, Observed.nothing(), signed=False)
    assert float(quantizer.state["alpha"].detach()) == 10
    term = quantizer.method.penalty(quantizer.view())
    assert term is not None
    term.backward()
    assert np.isclose(float(quantizer.state["alpha"].grad), 0.1 * 10)
    seen = QuantizedInput(PACT(alpha=None), 4, observed(torch.linspace(0, 3.25, 10)), signed=False)
    assert float(seen.state["alpha"].detach()) == 3.25
    with torch.no_grad():
        seen.state["alpha"].fill_(-2.0)
        seen.method.after_step(seen.view(), None)  # type: ignore[arg-type]
    assert float(seen.state["alpha"].detach()) == 2


def even_error(values: np.ndarray, alpha: float, bits: int) -> float:
    levels = np.linspace(-alpha, alpha, 2**bits)
    places = np.clip(np.searchsorted((levels[1:] + levels[:-1]) / 2, values), 0, 2**bits - 1)
    return float(((values - levels[places]) ** 2).mean())


@pytest.mark.parametrize("bits", sorted(COEFFICIENTS))
@pytest.mark.parametrize("kind", ["normal", "uniform", "laplace", "logistic"])
def test_sawb_clips_near_the_best_place(kind, bits):
    values = getattr(np.random.default_rng(bits), kind)(*((-1, 1) if kind == "uniform" else ()), size=40_000)
    alpha = float(bound(torch.from_numpy(values), bits, None))
    tried = np.linspace(0.2, np.abs(values).max(), 150)
    best = min(even_error(values, clip, bits) for clip in tried)
    assert even_error(values, alpha, bits) <= best * (1.05 if bits <= 3 else 1.25)


def test_sawb_regression_of_two_bits_is_the_published_one():
    rng, found = np.random.default_rng(0), []
    draws = [rng.normal(size=40_000), rng.uniform(-1, 1, 40_000), rng.laplace(size=40_000)]
    draws += [rng.logistic(size=40_000), rng.triangular(-1, 0, 1, 40_000), rng.vonmises(0, 1, 40_000)]
    for values in draws:
        mean = np.abs(values).mean()
        tried = np.linspace(1, 3, 201) * mean
        best = tried[np.argmin([even_error(values, clip, 2) for clip in tried])]
        found.append((np.sqrt((values**2).mean()) / mean, best / mean))
    c1, c2 = np.polyfit(*zip(*found, strict=True), 1)
    assert np.allclose((c1, c2), COEFFICIENTS[2], atol=0.12)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_sawb_weights_are_the_nearest_of_an_even_grid(bits):
    weight = torch.randn(6, 50, generator=torch.Generator().manual_seed(bits))
    form = QuantizedWeight(SAWB(), weight, bits).eval()
    alpha = float(bound(weight, bits, None))
    c1, c2 = COEFFICIENTS[bits]
    assert np.isclose(alpha, c1 * float(weight.square().mean().sqrt()) + c2 * float(weight.abs().mean()), rtol=1e-5)
    levels = np.linspace(-alpha, alpha, 2**bits)
    w = weight.double().numpy()
    nearest = levels[np.abs(w[..., None] - levels).argmin(-1)]
    assert np.allclose(form(weight).numpy(), nearest, atol=1e-5)
    stored = form.freeze(weight)
    assert isinstance(stored, Codebook)
    assert stored.centroids.size == 2**bits
    assert np.array_equal(stored.dense(), form(weight).numpy())


def test_sawb_counts_kept_weights_and_takes_what_is_odd():
    weight = torch.randn(6, 50, generator=torch.Generator().manual_seed(7))
    mask = torch.rand(6, 50, generator=torch.Generator().manual_seed(8)) < 0.3
    assert torch.allclose(bound(weight, 4, mask), bound(weight[mask], 4, None))
    form = QuantizedWeight(SAWB(), weight, 4, inner=Mask(mask)).eval()
    assert torch.equal(form(weight) == 0, ~mask)
    same = torch.tensor([[0.5, -0.5, 0.5]])
    assert torch.equal(even_grid(same, bound(same, 5, None), 5), same)
    assert not bool(even_grid(torch.zeros(2, 3), bound(torch.zeros(2, 3), 2, None), 2).any())
    spike = torch.zeros(1, 5000)
    spike[0, 0] = 1.0
    assert 0 < float(bound(spike, 2, None)) <= 1


def test_bits_without_coefficients_are_refused():
    with pytest.raises(UsageError, match="sawb can do 2, 3, 4, 5"):
        Quantize(weights=SAWB(), bits=8)
    with pytest.raises(UsageError, match="alpha"):
        PACT(alpha=-1.0)
