"""LQ-Net: QEM against its definition with an explicit B, and the moving basis."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from espalier.core.callback import Loop
from espalier.core.context import Context
from espalier.core.errors import UsageError
from espalier.core.inputs import Observed, QuantizedInput
from espalier.core.parametrize import freeze
from espalier.core.quantized import QuantizedWeight
from espalier.core.representation import Affine, Codebook
from espalier.quantize import Quantize
from espalier.quantize.lq_net import EPSILON, LQNet, LQNetInput, binary_codes, fitted, qem, sorted_levels


def explicit_step(row: np.ndarray, basis: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """One QEM step with B written out: nearest code of each value, then least squares."""
    levels = codes @ basis
    chosen = codes[np.abs(row[:, None] - levels).argmin(1)]
    gram = chosen.T @ chosen + EPSILON * np.eye(len(basis))
    found: np.ndarray = np.linalg.solve(gram, chosen.T @ row + EPSILON * basis)
    return found


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_qem_is_the_explicit_least_squares(bits, signed):
    generator = torch.Generator().manual_seed(bits)
    rows = torch.randn(3, 200, generator=generator)
    rows = rows if signed else rows.relu()
    basis = torch.rand(3, bits, generator=generator) + 0.1
    codes = binary_codes(bits, signed=signed).double().numpy()
    found = qem(rows, torch.ones_like(rows), basis, signed=signed)
    wanted = [explicit_step(r.double().numpy(), b.double().numpy(), codes) for r, b in zip(rows, basis, strict=True)]
    assert np.allclose(found.numpy(), np.stack(wanted), atol=1e-5)


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_the_error_falls_with_every_step(bits):
    rows = torch.randn(4, 300, generator=torch.Generator().manual_seed(7))
    errors = []
    for steps in (0, 1, 2, 5, 20):
        levels, _ = sorted_levels(fitted(rows, torch.ones_like(rows), bits, steps, signed=True), signed=True)
        errors.append((rows[..., None] - levels[:, None]).abs().amin(-1).square().sum(1))
    for before, after in itertools.pairwise(errors):
        assert bool((after <= before + 1e-3).all())
    assert float(errors[-1].sum()) < float(errors[0].sum())


def test_one_bit_is_the_mean_magnitude():
    weight = torch.randn(5, 40, generator=torch.Generator().manual_seed(1))
    found = QuantizedWeight(LQNet(), weight, 1).eval()(weight)
    assert torch.allclose(found, weight.abs().mean(1, keepdim=True) * weight.sign(), atol=1e-5)


def test_pruned_weights_take_no_part():
    rows = torch.randn(1, 60, generator=torch.Generator().manual_seed(2))
    present = torch.ones_like(rows)
    present[:, 40:] = 0
    basis = torch.tensor([[0.4, 0.9]])
    assert torch.allclose(
        qem(rows * present, present, basis, signed=True), qem(rows[:, :40], present[:, :40], basis, signed=True)
    )


def test_the_basis_moves_by_a_tenth_at_each_step():
    weight = torch.randn(4, 50, generator=torch.Generator().manual_seed(3))
    form = QuantizedWeight(LQNet(), weight, 2).train()
    moved = weight * 2
    before = form.state["basis"].clone()
    best = qem(moved, torch.ones_like(moved), before[..., 0], signed=True)[..., None]
    loop = Loop(form, torch.optim.SGD([torch.zeros(1)], 0.1), Context(), torch.Generator(), 1, 1)
    form.method.before_step(form.view(moved), loop)
    assert torch.allclose(form.state["basis"], 0.9 * before + 0.1 * best)


def test_inputs_follow_the_batches_in_training_only():
    x = torch.rand(400, generator=torch.Generator().manual_seed(4))
    module = QuantizedInput(LQNetInput(), 2, Observed(x, torch.tensor([[0.0, 1.0]])), signed=False)
    before = {name: tensor.clone() for name, tensor in module.state.tensors().items()}
    module.eval()(3 * x)
    assert all(torch.equal(module.state[name], before[name]) for name in before)
    best = qem(3 * x[None], torch.ones(1, 400), before["basis"][None], signed=False)[0]
    seen = (3 * x).requires_grad_()
    module.train()(seen).sum().backward()
    assert torch.allclose(module.state["basis"], 0.9 * before["basis"] + 0.1 * best)
    assert torch.equal(module.state["levels"], sorted_levels(module.state["basis"][None], signed=False)[0][0])
    assert seen.grad is not None
    assert torch.equal(seen.grad, (seen <= before["levels"][-1]).float())


def test_each_channel_has_its_table_in_the_file():
    weight = torch.randn(6, 30, generator=torch.Generator().manual_seed(5))
    stored = QuantizedWeight(LQNet(), weight, 2).freeze(weight)
    assert isinstance(stored, Codebook)
    assert stored.axis == 0
    assert stored.centroids.shape == (6, 4)


def test_the_ends_are_on_the_uniform_grid_for_a_table_of_each_channel_would_be_larger_than_the_codes():
    model = nn.Sequential(nn.Conv2d(1, 20, 5), nn.ReLU(), nn.Conv2d(20, 10, 5), nn.Flatten(), nn.Linear(160, 10))
    stored = freeze(Quantize(weights=LQNet(), bits=2)(model, Context()))[0]
    assert isinstance(stored["2.weight"], Codebook)
    assert stored["2.weight"].centroids.shape == (10, 4)
    for end in ("0.weight", "4.weight"):
        assert isinstance(stored[end], Affine)
        assert stored[end].bits() < 1.4 * 8 * stored[end].numel
    with pytest.raises(UsageError, match=r"bits=5: lq-net can do 1, 2, 3, 4"):
        Quantize(weights=LQNet(), bits=5)
