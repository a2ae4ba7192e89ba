"""APoT: the paper's levels, and the gradient of the clip."""

from __future__ import annotations

import itertools

import pytest
import torch

from espalier.core.callback import Loop
from espalier.core.context import Context
from espalier.core.inputs import Observed, QuantizedInput
from espalier.core.quantized import QuantizedWeight
from espalier.quantize.apot import APoT, APoTInput, apot_levels, clipped
from espalier.quantize.level_sets import midpoints, with_signs


@pytest.mark.parametrize(("bits", "k"), [(2, 1), (2, 2), (4, 2), (6, 2), (6, 3), (8, 2), (8, 4), (4, 1), (4, 4)])
def test_levels_are_the_papers_sums(bits, k):
    n = bits // k
    terms = [[0.0, *(2.0 ** -(i + j * n) for j in range(2**k - 1))] for i in range(n)]
    sums = sorted(sum(choice) for choice in itertools.product(*terms))
    assert len(set(sums)) == 2**bits
    assert torch.allclose(apot_levels(bits, k).double(), torch.tensor(sums).double() / max(sums), atol=1e-7)


def test_one_base_bit_is_uniform_and_all_of_them_are_powers_of_two():
    assert torch.allclose(apot_levels(4, 1), torch.arange(16) / 15)
    assert apot_levels(3, 3).tolist() == [0, *(2.0**-n for n in range(6, -1, -1))]


def test_odd_bits_have_a_smaller_term():
    """The sets the authors' code builds: {0, 1/2, 1/4, 1/16} + {0, 1/8} for 3 bits."""
    sums = sorted(a + b for a in (0, 1 / 2, 1 / 4, 1 / 16) for b in (0, 1 / 8))
    assert torch.allclose(apot_levels(3, 2), torch.tensor(sums) / max(sums))
    terms = ((0, 1 / 2, 1 / 8, 1 / 64), (0, 1 / 4, 1 / 16, 1 / 128), (0, 1 / 32))
    sums = sorted(sum(choice) for choice in itertools.product(*terms))
    assert torch.allclose(apot_levels(5, 2), torch.tensor(sums) / max(sums))
    assert apot_levels(1, 2).tolist() == [0, 1]


def test_the_gradient_of_alpha_is_the_papers():
    levels = with_signs(apot_levels(3, 2))
    x = torch.randn(400, generator=torch.Generator().manual_seed(0)) * 2
    alpha = torch.tensor(1.5, requires_grad=True)
    value = x.clone().requires_grad_()
    weights = torch.randn(400, generator=torch.Generator().manual_seed(1))
    found = clipped(value, alpha, levels, midpoints(levels), clips=True)
    (found * weights).sum().backward()
    nearest = levels[((x / 1.5)[:, None] - levels).abs().argmin(1)]
    assert torch.allclose(found, 1.5 * nearest)
    each = torch.where(x.abs() > 1.5, x.sign(), nearest - x / 1.5)
    assert alpha.grad is not None
    assert torch.allclose(alpha.grad, (each * weights).sum(), rtol=1e-5)
    assert value.grad is not None
    assert torch.equal(value.grad, torch.where(x.abs() <= 1.5, weights, 0))


def test_the_straight_through_part_of_alpha_agrees_with_finite_differences():
    """With what rounding adds taken as fixed, x^ = alpha (clip + added) has a derivative that can be measured."""
    levels = apot_levels(4, 2)
    x, step = torch.tensor([0.2, 0.9, 1.7, 3.0]), 1e-3

    def frozen(alpha: float) -> torch.Tensor:
        offset = levels[((x / 1.5).clamp(0, 1)[:, None] - levels).abs().argmin(1)] - (x / 1.5).clamp(0, 1)
        return alpha * ((x / alpha).clamp(0, 1) + offset)

    numeric = (frozen(1.5 + step) - frozen(1.5 - step)) / (2 * step)
    alpha = torch.tensor(1.5, requires_grad=True)
    rows = [torch.autograd.grad(clipped(v, alpha, levels, midpoints(levels), clips=True), alpha)[0] for v in x]
    assert torch.allclose(torch.stack(rows), numeric, atol=1e-3)


def test_weights_are_normalised_and_may_keep_their_scale():
    weight = torch.randn(8, 9, generator=torch.Generator().manual_seed(2)) * 0.02 + 0.01
    normal = (weight - weight.mean()) / weight.std()
    levels = with_signs(apot_levels(3, 2)) * 3.0
    wanted = levels[(normal[..., None] - levels).abs().argmin(-1)]
    paper = QuantizedWeight(APoT(rescale=False), weight, 4).eval()(weight)
    kept = QuantizedWeight(APoT(), weight, 4).eval()(weight)
    assert torch.allclose(paper, wanted, atol=1e-6)
    assert torch.allclose(kept, wanted * weight.std(), atol=1e-7)


def test_two_bits_are_ternary():
    weight = torch.randn(50, 50, generator=torch.Generator().manual_seed(3))
    assert len(QuantizedWeight(APoT(), weight, 2).eval()(weight).unique()) == 3


def test_the_clip_of_inputs_starts_within_what_was_seen():
    seen = Observed(torch.rand(100), torch.tensor([[0.0, 1.0]]))
    assert float(QuantizedInput(APoTInput(), 4, seen, signed=False).state["alpha"].detach()) == 1
    seen = Observed(torch.rand(100), torch.tensor([[0.0, 30.0]]))
    assert float(QuantizedInput(APoTInput(), 4, seen, signed=False).state["alpha"].detach()) == 6


def test_mean_and_deviation_follow_the_weights():
    weight = torch.randn(8, 9, generator=torch.Generator().manual_seed(4))
    form = QuantizedWeight(APoT(), weight, 4)
    moved = 3 * weight + 1
    loop = Loop(form, torch.optim.SGD([torch.zeros(1)], 0.1), Context(), torch.Generator(), 1, 1)
    form.method.after_step(form.view(moved), loop)
    assert torch.allclose(form.eval()(moved), QuantizedWeight(APoT(), moved, 4).eval()(moved), atol=1e-6)
    assert torch.allclose(form.state["mean"], moved.mean())
