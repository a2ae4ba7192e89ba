"""INQ's set and rounding, against the paper's rules written out."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from espalier.core.quantized import QuantizedWeight
from espalier.quantize.power_of_two import PowerOfTwo, power_of_two, top_power


def by_the_paper(value: float, s: float, bits: int) -> float:
    """Equations 1 to 4 of arXiv:1702.03044."""
    n1 = math.floor(math.log2(4 * s / 3))
    n2 = n1 + 1 - 2 ** (bits - 1) // 2
    levels = [0.0, *(2.0**n for n in range(n2, n1 + 1))]
    for alpha, beta in itertools.pairwise(levels):
        if (alpha + beta) / 2 <= abs(value) < 3 * beta / 2:
            return math.copysign(beta, value)
    return 0.0


@given(st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=30), st.integers(2, 5))
def test_every_weight_as_the_paper_rounds_it(values: list[float], bits: int) -> None:
    weight = torch.tensor(values)
    s = float(weight.abs().max())
    if s < 1e-30:
        return
    found = power_of_two(weight, top_power(weight.abs().max()), bits)
    assert found.tolist() == [by_the_paper(v, s, bits) for v in weight.tolist()]


@pytest.mark.parametrize(("largest", "top"), [(0.74, 0.5), (0.75, 1.0), (1.4999, 1.0), (1.5, 2.0), (0.0, 1.0)])
def test_n1(largest, top):
    assert float(top_power(torch.tensor(largest))) == top


def test_the_papers_numbers():
    """Three bits with n1 = -1 give n2 = -2; two bits give zero and +-2^n1."""
    weight = torch.linspace(-0.7, 0.7, 1001)
    assert power_of_two(weight, top_power(weight.abs().max()), 3).unique().tolist() == [-0.5, -0.25, 0, 0.25, 0.5]
    assert power_of_two(weight, top_power(weight.abs().max()), 2).unique().tolist() == [-0.5, 0, 0.5]


def test_the_threshold_lies_at_three_halves_or_at_the_root_of_two():
    top = torch.tensor(1.0)
    between = torch.tensor([0.25 * 1.45, -0.25 * 1.45, 0.25 * 1.4, 0.25 * 1.5, -0.25 * 1.5])
    assert power_of_two(between, top, 4).tolist() == [0.25, -0.25, 0.25, 0.5, -0.5]
    assert power_of_two(between, top, 4, "log").tolist() == [0.5, -0.5, 0.25, 0.5, -0.5]


def test_clipped_weights_have_no_gradient_and_others_the_identity():
    latent = torch.tensor([[0.1, 0.4, -0.9]])
    form = QuantizedWeight(PowerOfTwo(), latent, 4).train()
    moved = torch.tensor([[0.1, 1.4, -1.6]], requires_grad=True)
    form(moved).sum().backward()
    assert moved.grad is not None
    assert moved.grad.tolist() == [[1, 1, 0]]


def test_one_bit_is_not_offered():
    assert 1 not in PowerOfTwo.widths
