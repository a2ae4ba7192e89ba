"""Binary weight networks: the best scale by brute force, the paper's gradient, masks, digits."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from tests.quantize.binary_nets import accuracy, freezes_bit_for_bit, keeps_masks_and_tables, run, trained, view
from torch import nn

from espalier.core.errors import UsageError
from espalier.core.parametrize import slots
from espalier.core.representation import Affine
from espalier.quantize import Quantize
from espalier.quantize.bwn import BWN


def test_least_squared_error_over_all_sign_patterns() -> None:
    """For every b in {-1, 1}^6 the best a is <w, b> / n; none of them is closer to a filter than the method's."""
    weight = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = BWN().quantize(view(BWN(), weight))
    patterns = torch.tensor(list(product((-1.0, 1.0), repeat=6)), dtype=torch.float64)
    for row, mine in zip(weight, found, strict=True):
        best = min(float((row - (row @ b) / 6 * b).square().sum()) for b in patterns)
        assert float((row - mine).square().sum()) == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("axis", [0, 1, None])
def test_gradient_of_the_paper(axis: int | None) -> None:
    torch.manual_seed(0)
    weight, gradient = torch.randn(3, 4).requires_grad_(), torch.randn(3, 4)
    BWN().quantize(view(BWN(), weight, axis=axis, training=True)).backward(gradient)
    wanted = torch.empty(3, 4)
    groups = {0: [(i, slice(None)) for i in range(3)], 1: [(slice(None), j) for j in range(4)], None: [...]}[axis]
    for group in groups:
        w = weight.detach()[group]
        alpha, n = w.abs().mean(), w.numel()
        wanted[group] = gradient[group] * (1 / n + alpha * (w.abs() <= 1))
    assert bool((weight.detach().abs() > 1).any())
    assert torch.allclose(weight.grad, wanted)


def test_straight_through() -> None:
    weight, gradient = torch.randn(3, 4).requires_grad_(), torch.randn(3, 4)
    method = BWN(gradient="straight-through")
    method.quantize(view(method, weight, training=True)).backward(gradient)
    assert torch.equal(weight.grad, gradient)


def test_kept_weights_alone_make_the_scale_and_n() -> None:
    weight = torch.tensor([[1.0, -3.0, 100.0], [50.0, 60.0, 2.0]]).requires_grad_()
    kept = torch.tensor([[True, True, False], [False, False, True]])
    w = view(BWN(), weight, kept=kept, training=True)
    assert BWN().scale(w).tolist() == [2.0, 2.0]
    BWN().quantize(w).sum().backward()
    assert weight.grad[0].tolist() == pytest.approx([0.5 + 2, 0.5, 0.5])


@pytest.mark.parametrize("gradient", ["paper", "straight-through"])
def test_frozen_form(gradient: str) -> None:
    freezes_bit_for_bit(BWN(gradient=gradient))


def test_stored_as_signs_and_one_scale_per_filter() -> None:
    result = Quantize(weights=BWN(), ends="same")(nn.Linear(5, 3))
    slot = slots(result)["weight"]
    frozen = slot.form.freeze(slot.latent)
    assert isinstance(frozen, Affine)
    assert set(frozen.codes.ravel().tolist()) <= {-1, 1}
    assert frozen.scale.shape == (3,)


def test_masks_and_tables_stay() -> None:
    keeps_masks_and_tables(BWN())


def test_digits() -> None:
    result = run(trained("cnn"), weights=BWN(), epochs=2, lr=3e-3)
    assert accuracy(result) > 94


def test_unknown_gradient_is_refused() -> None:
    with pytest.raises(UsageError, match="gradient"):
        BWN(gradient="exact")
