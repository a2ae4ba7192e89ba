"""Relaxed Quantization: the distribution against the noise it stands for, its limits, and its gradients."""

from __future__ import annotations

import pytest
import torch

from espalier.core.inputs import Observed, QuantizedInput
from espalier.core.quantized import QuantizedWeight
from espalier.quantize.relaxed import Relaxed, RelaxedInput, log_probabilities, relax

ALPHA, SIGMA = torch.tensor(0.5), torch.tensor(0.2)


def test_the_chances_are_those_of_rounding_with_logistic_noise():
    """Monte Carlo of the definition: add the noise, round, drop what leaves the grid (the truncated distribution)."""
    generator = torch.Generator().manual_seed(0)
    for x in (0.13, -0.9, 0.7):
        uniform = torch.rand(400_000, generator=generator).clamp(1e-7, 1 - 1e-7)
        noisy = x + SIGMA * (torch.log(uniform) - torch.log1p(-uniform))
        codes = torch.round(noisy / ALPHA)
        codes = codes[(codes >= -2) & (codes <= 1)]
        seen = torch.stack([(codes == c).float().mean() for c in (-2, -1, 0, 1)])
        log_pi, grid = log_probabilities(torch.tensor([x]), ALPHA, SIGMA, -2, 1)
        assert grid.tolist() == [-2, -1, 0, 1]
        assert torch.allclose(log_pi.exp()[0], seen, atol=4e-3)


def test_without_noise_it_is_rounding():
    x = torch.randn(500, generator=torch.Generator().manual_seed(1))
    rounded = torch.round(x / ALPHA).clamp(-4, 3) * ALPHA
    for estimator in ("relaxed", "straight-through"):
        for reach in (3.0, None):
            found = relax(x, ALPHA, torch.tensor(1e-4), -4, 3, reach=reach, estimator=estimator)
            assert float((found - rounded).abs().gt(1e-3).float().mean()) < 0.01


def test_the_local_grid_is_the_whole_one_but_for_what_is_far():
    x = torch.randn(200, generator=torch.Generator().manual_seed(2))
    whole, codes = log_probabilities(x, ALPHA, SIGMA, -8, 7)
    local, near = log_probabilities(x, ALPHA, SIGMA, -8, 7, reach=8.0)
    assert near.shape[-1] == 9 < len(codes)
    valid = (near >= -8) & (near <= 7)
    same = whole.exp().gather(1, (near.long() + 8).clamp(0, 15))
    assert torch.allclose(torch.where(valid, same, 0), local.exp(), atol=2e-3)


def test_straight_through_lies_on_the_grid_and_draws_by_the_chances():
    torch.manual_seed(3)
    x = torch.full((100_000,), 0.2)
    found = relax(x, ALPHA, SIGMA, -2, 1, estimator="straight-through")
    codes = torch.round(found / ALPHA)
    assert torch.allclose(codes * ALPHA, found, atol=1e-6)
    log_pi, _ = log_probabilities(x[:1], ALPHA, SIGMA, -2, 1)
    seen = torch.stack([(codes == c).float().mean() for c in (-2, -1, 0, 1)])
    assert torch.allclose(seen, log_pi.exp()[0], atol=6e-3)


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
