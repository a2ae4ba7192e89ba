"""Relaxed Quantization: the distribution against the noise it stands for, its limits, and its gradients."""

from __future__ import annotations

import pytest
import torch

from espalier.core.inputs import Observed, QuantizedInput
from espalier.core.quantized import QuantizedWeight
from espalier.quantize.relaxed import Relaxed, RelaxedInput, relax

ALPHA, SIGMA = torch.tensor(0.5), torch.tensor(0.2)


def chances(x, low, high, alpha=ALPHA, sigma=SIGMA):
    """pi (points, n) as the paper has it: differences of the logistic distribution function, over their sum."""
    codes = torch.arange(low, high + 1, dtype=torch.float64)[:, None]
    ends = [torch.sigmoid(((codes + half) * alpha - x.double()) / sigma) for half in (0.5, -0.5)]
    return (ends[0] - ends[1]) / (ends[0] - ends[1]).sum(0)


def shares(found, low, high, alpha=ALPHA):
    codes = torch.round(found / alpha)
    return torch.stack([(codes == code).float().mean() for code in range(low, high + 1)])


def test_the_chances_are_those_of_rounding_with_logistic_noise():
    """Monte Carlo of the definition: add the noise, round, drop what leaves the grid (the truncated distribution)."""
    torch.manual_seed(0)
    for x in (0.13, -0.9, 0.7):
        same = torch.full((400_000,), x)
        uniform = torch.rand(len(same)).clamp(1e-7, 1 - 1e-7)
        noisy = same + SIGMA * (torch.log(uniform) - torch.log1p(-uniform))
        inside = noisy[(noisy > -2.5 * ALPHA) & (noisy < 1.5 * ALPHA)]
        drawn = relax(same, ALPHA, SIGMA, -2, 1, estimator="straight-through")
        assert torch.allclose(shares(drawn, -2, 1), shares(inside, -2, 1), atol=5e-3)


def test_without_noise_it_is_rounding():
    x = torch.randn(500, generator=torch.Generator().manual_seed(1))
    rounded = torch.round(x / ALPHA).clamp(-4, 3) * ALPHA
    for estimator in ("relaxed", "straight-through"):
        for reach in (3.0, None):
            found = relax(x, ALPHA, torch.tensor(1e-4), -4, 3, reach=reach, estimator=estimator)
            assert float((found - rounded).abs().gt(1e-3).float().mean()) < 0.01


def test_the_local_grid_is_the_whole_one_but_for_what_is_far():
    torch.manual_seed(2)
    for x in (0.13, -3.9, 3.4):
        same = torch.full((100_000,), x)
        local = shares(relax(same, ALPHA, SIGMA, -8, 7, reach=8.0, estimator="straight-through"), -8, 7)
        assert torch.allclose(local.double(), chances(torch.tensor([x]), -8, 7)[:, 0], atol=6e-3)


def test_straight_through_lies_on_the_grid_and_draws_by_the_chances():
    torch.manual_seed(3)
    found = relax(torch.full((100_000,), 0.2), ALPHA, SIGMA, -2, 1, estimator="straight-through")
    assert torch.allclose(torch.round(found / ALPHA) * ALPHA, found, atol=1e-6)
    assert torch.allclose(shares(found, -2, 1).double(), chances(torch.tensor([0.2]), -2, 1)[:, 0], atol=6e-3)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_a_relaxed_draw_is_the_softmax_of_the_formula(temperature):
    """The same uniform numbers, through the logarithms that the paper writes."""
    x = torch.linspace(-2, 1.5, 300, dtype=torch.float64)
    torch.manual_seed(7)
    found = relax(x, ALPHA.double(), SIGMA.double(), -3, 2, temperature=temperature)
    torch.manual_seed(7)
    pi = chances(x, -3, 2)
    gumbel = -torch.log(-torch.log(torch.rand_like(pi)))
    z = torch.softmax((torch.log(pi) + gumbel) / temperature, 0)
    assert torch.allclose(found, (z * torch.arange(-3, 3)[:, None]).sum(0) * ALPHA, atol=1e-6)


@pytest.mark.parametrize("reach", [3.0, None])
def test_gradients_agree_with_finite_differences(reach):
    """The draw is fixed by the seed; away from the ties of the window the relaxed value is smooth."""
    x = torch.tensor([0.11, -0.33, 0.61, 0.84, -1.12], dtype=torch.float64)
    inputs = (x.requires_grad_(), ALPHA.double().requires_grad_(), SIGMA.double().requires_grad_())

    def drawn(x: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(4)
        return relax(x, alpha, sigma, -4, 3, reach=reach, temperature=0.7)

    assert torch.autograd.gradcheck(drawn, inputs)


def test_far_outside_the_grid_nothing_overflows():
    x = torch.tensor([-1e4, 1e4, 50.0], requires_grad=True)
    found = relax(x, ALPHA, torch.tensor(1e-3), -4, 3, reach=3.0)
    found.sum().backward()
    assert torch.allclose(found, torch.tensor([-2.0, 1.5, 1.5]), atol=1e-3)
    assert x.grad is not None
    assert bool(torch.isfinite(x.grad).all())


def test_use_is_rounding_on_the_learned_grid():
    weight = torch.randn(30, 20, generator=torch.Generator().manual_seed(5))
    form = QuantizedWeight(Relaxed(), weight, 3)
    scale = form.state["log_scale"].exp()
    assert torch.allclose(scale, 2 * weight.abs().max() / 8)
    assert torch.equal(form.eval()(weight), (torch.round(weight / scale).clamp(-4, 3) * scale).detach())
    assert form.freeze(weight).kind == "affine"
    assert bool((form.train()(weight) != form(weight)).any())


@pytest.mark.parametrize("signed", [True, False])
def test_inputs_lie_on_their_grid(signed):
    x = torch.randn(400, generator=torch.Generator().manual_seed(6))
    x = x if signed else x.relu()
    module = QuantizedInput(RelaxedInput(), 3, Observed(x, torch.stack(x.aminmax())[None]), signed=signed)
    scale = module.state["log_scale"].exp()
    low, high = (-4, 3) if signed else (0, 7)
    assert torch.allclose(module.eval()(x), torch.round(x / scale).clamp(low, high) * scale, atol=1e-6)
    module(x.clone().requires_grad_()).sum().backward()
    module.train()(x).square().sum().backward()
    assert module.state["log_scale"].grad is not None
    assert module.state["log_sigma"].grad is not None
