"""Half-wave Gaussian quantization: published levels, the optimum, three slopes, digits, the graph."""

from __future__ import annotations

import math

import pytest
import torch
from tests.quantize.binary_nets import accuracy, run, traces, trained
from torch import Tensor

from espalier.core.errors import UsageError
from espalier.core.inputs import Input, Observed
from espalier.core.quantized import State
from espalier.quantize import Quantize
from espalier.quantize.bwn import BWN
from espalier.quantize.hwgq import HWGQ, centroids, error, lloyd_max, uniform_step


def view(method: HWGQ, bits: int, sample: Tensor | None = None) -> Input:
    sample = torch.randn(1000) if sample is None else sample
    observed = Observed(sample, torch.stack([sample.min(), sample.max()])[None])
    return Input(bits, False, State(method.start(observed, bits, signed=False)), False)


def test_published_levels() -> None:
    """The authors' files: 0.453 and 1.51 for two levels, steps of 0.538 for three; Max 1960, table I, six levels."""
    assert lloyd_max(2) == pytest.approx((0.453, 1.51), abs=5e-4)
    assert uniform_step(3) == pytest.approx(0.538, abs=1e-3)
    assert lloyd_max(3) == pytest.approx((0.3177, 1.0, 1.894), abs=5e-4)


@pytest.mark.parametrize("count", [1, 3, 15, 127])
def test_every_level_is_the_mean_of_what_it_stands_for(count: int) -> None:
    levels = torch.tensor(lloyd_max(count), dtype=torch.float64)
    assert torch.allclose(centroids(levels), levels, atol=1e-10)
    assert bool((levels.diff() > 0).all())


def test_centroids_and_error_by_numerical_integration() -> None:
    levels = torch.tensor([0.2, 0.9, 1.4], dtype=torch.float64)
    x = torch.linspace(0, 12, 2_000_001, dtype=torch.float64)
    density = torch.exp(-x.square() / 2)
    near = (x[:, None] - levels).abs().argmin(1)
    for i, mean in enumerate(centroids(levels)):
        assert float((x * density)[near == i].sum() / density[near == i].sum()) == pytest.approx(float(mean), abs=1e-5)
    measured = ((x - levels[near]).square() * density).sum() / density.sum()
    assert error(levels) + 1 == pytest.approx(float(measured), abs=1e-5)


@pytest.mark.parametrize("count", [1, 3, 7])
def test_uniform_step_beats_its_neighbours(count: int) -> None:
    steps, best = torch.arange(1, count + 1).double(), uniform_step(count)
    assert all(error(best * factor * steps) > error(best * steps) for factor in (0.98, 0.999, 1.001, 1.02))


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("bits", [1, 2, 4, 7])
def test_values_by_search(uniform: bool, bits: int) -> None:
    """Zero up to 0, above it the nearest positive level, also for what lies nearer to zero."""
    method = HWGQ(uniform=uniform)
    a = view(method, bits)
    x = torch.cat([torch.linspace(-2, 6, 1001), torch.tensor([0.0, 1e-6])])
    levels = a.state["levels"]
    nearest = levels[1:][(x[:, None] - levels[1:]).abs().argmin(1)]
    assert torch.allclose(method.quantize(x, a), torch.where(x > 0, nearest, 0.0), atol=1e-6)
    assert len(levels) == 2**bits


@pytest.mark.parametrize("uniform", [True, False])
def test_training_and_eval_give_the_same_values(uniform: bool) -> None:
    method = HWGQ(uniform=uniform)
    a, x = view(method, 3), torch.randn(500)
    assert torch.equal(method.quantize(x.clone().requires_grad_(), a).detach(), method.quantize(x, a))


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_three_slopes(scale: float) -> None:
    sample = torch.full((10,), scale / math.sqrt(2))
    x = torch.tensor([-1.0, 0.0, 0.3, 1.5, 1.7, 5.0]) * scale
    top = 3 * uniform_step(3)
    slopes = {
        "clipped": [0, 0, 1, 1, 0, 0],
        "vanilla": [0, 0, 1, 1, 1, 1],
        "log-tailed": [0, 0, 1, 1, 1 / (1.7 - top + 1), 1 / (5 - top + 1)],
    }
    for backward, wanted in slopes.items():
        method = HWGQ(backward=backward, normalise=True)
        given = x.clone().requires_grad_()
        method.quantize(given, view(method, 2, sample)).backward(torch.full((6,), 2.0))
        assert given.grad.tolist() == pytest.approx([2 * w for w in wanted], rel=1e-5)


def test_normalise_finds_the_scale_of_a_rectified_normal_distribution() -> None:
    torch.manual_seed(0)
    x = torch.randn(200_000) * 2.5
    for sample in (x, x.relu()):
        assert float(view(HWGQ(normalise=True), 2, sample).state["scale"]) == pytest.approx(2.5, rel=0.01)
    assert float(view(HWGQ(), 2, x).state["scale"]) == 1.0
    assert float(view(HWGQ(normalise=True), 2, torch.zeros(5)).state["scale"]) == 1.0


@pytest.mark.parametrize("uniform", [True, False])
def test_digits_and_the_graph(uniform: bool) -> None:
    method = HWGQ(uniform=uniform)
    result = run(trained("cnn"), weights=BWN(), activations=method, activation_bits=2, epochs=2, lr=3e-3)
    assert accuracy(result) > 90
    traces(result)


def test_eight_bits_are_refused() -> None:
    with pytest.raises(UsageError, match="hwgq can do 1, 2, 3, 4, 5, 6, 7"):
        Quantize(activations=HWGQ(), activation_bits=8)
