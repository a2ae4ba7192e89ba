"""Training forms: what they compute, what their gradient is, and that the frozen form is the same tensor."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from espalier.core.forms import FORMS, Mask, Shared, dense_representation, from_numpy, to_numpy
from espalier.core.parametrize import attach, freeze, slots
from espalier.core.representation import Codebook, Masked
from espalier.testing import bits

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def layer(dtype: torch.dtype = torch.float32, seed: int = 0, shape: tuple[int, int] = (4, 5)) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(shape[1], shape[0], bias=False).to(dtype)


def shared_layer(dtype: torch.dtype, k: int, seed: int, *, zero: bool) -> nn.Linear:
    found = layer(dtype, seed)
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(k + int(zero), found.weight.shape, generator=generator)
    centroids = torch.randn(k, generator=generator, dtype=torch.float64)
    attach(slots(found)["weight"], Shared(index, centroids, zero=zero))
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=st.integers(0, 1000), k=st.integers(1, 20), zero=st.booleans())
@settings(max_examples=15, deadline=None)
def test_frozen_codes_are_the_weight_bit_for_bit(dtype: torch.dtype, seed: int, k: int, zero: bool) -> None:
    found = shared_layer(dtype, k, seed, zero=zero)
    frozen = freeze(found)[0]["weight"]
    assert isinstance(frozen, Codebook)
    assert bits(from_numpy(frozen.dense(), frozen.dtype)) == bits(found.weight)
    assert frozen.indices.dtype == np.uint8
    values = frozen.centroids[1:] if zero else frozen.centroids
    assert np.array_equal(values, np.sort(values))
    if zero:
        assert frozen.has_zero


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=st.integers(0, 1000), share=st.floats(0, 1))
@settings(max_examples=15, deadline=None)
def test_frozen_mask_is_the_weight_bit_for_bit(dtype: torch.dtype, seed: int, share: float) -> None:
    found = layer(dtype, seed)
    mask = torch.rand(found.weight.shape, generator=torch.Generator().manual_seed(seed)) < share
    latent = found.weight
    attach(slots(found)["weight"], Mask(mask))
    frozen = freeze(found)[0]["weight"]
    assert isinstance(frozen, Masked)
    assert bits(from_numpy(frozen.dense(), frozen.dtype)) == bits(found.weight)
    assert frozen.inner.numel == int(mask.sum())
    assert bits(found.weight[mask]) == bits(latent[mask])


def test_a_negative_zero_under_the_mask_is_a_plain_zero() -> None:
    found = layer()
    with torch.no_grad():
        found.weight.mul_(-0.0)
    attach(slots(found)["weight"], Mask(torch.zeros(4, 5, dtype=torch.bool)))
    assert bits(found.weight) == bits(torch.zeros(4, 5))
    assert bits(from_numpy(freeze(found)[0]["weight"].dense(), "float32")) == bits(found.weight)


def test_more_than_256_symbols_take_wider_indices() -> None:
    found = layer(shape=(20, 20))
    attach(slots(found)["weight"], Shared(torch.arange(400).reshape(20, 20), torch.linspace(1, -1, 400), zero=False))
    frozen = freeze(found)[0]["weight"]
    assert isinstance(frozen, Codebook)
    assert frozen.indices.dtype == np.uint16
    assert bits(from_numpy(frozen.dense(), "float32")) == bits(found.weight)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_a_mask_stays_whatever_the_optimizer_does(optimizer: type[torch.optim.Optimizer]) -> None:
    found = layer()
    mask = torch.arange(20).reshape(4, 5) % 3 == 0
    attach(slots(found)["weight"], Mask(mask))
    steps = optimizer(found.parameters(), lr=0.5, weight_decay=0.1)  # type: ignore[call-arg]
    before = found.weight.detach().clone()
    for _ in range(3):
        steps.zero_grad()
        found(torch.ones(2, 5)).square().sum().backward()
        steps.step()
    assert not found.weight[~mask].any()
    assert (found.weight[mask] != before[mask]).all()


@pytest.mark.parametrize("zero", [False, True])
def test_centroid_gradient_is_the_sum_over_its_members(zero: bool) -> None:
    """Deep Compression, equation 3, by brute force."""
    found = shared_layer(torch.float64, 4, 3, zero=zero)
    slot = slots(found)["weight"]
    x, y = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    (found(x) - y).square().sum().backward()

    weight = slot.value().requires_grad_()
    (nn.functional.linear(x, weight) - y).square().sum().backward()
    assert weight.grad is not None
    assert isinstance(slot.form, Shared)
    expected = [float(weight.grad[slot.form.index == symbol].sum()) for symbol in range(int(zero), 4 + int(zero))]
    assert torch.allclose(slot.latent.grad, torch.tensor(expected, dtype=torch.float64), rtol=1e-12)


def test_symbol_zero_is_never_trained() -> None:
    found = shared_layer(torch.float32, 3, 1, zero=True)
    form = slots(found)["weight"].form
    assert isinstance(form, Shared)
    zeros = form.index == 0
    assert zeros.any()
    steps = torch.optim.SGD(found.parameters(), lr=1.0)
    found(torch.ones(2, 5)).sum().backward()
    steps.step()
    assert not found.weight[zeros].any()
    assert found.weight[~zeros].all()


def test_gather_gradient_is_right_by_finite_differences() -> None:
    form = Shared(torch.tensor([[0, 1, 2], [2, 2, 0]]), torch.zeros(2), zero=True)
    latent = torch.randn(2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(form, (latent,))


def test_a_form_is_rebuilt_from_its_spec() -> None:
    weight = torch.randn(3, 4)
    for form in (Mask(weight > 0), Shared(torch.ones(3, 4), torch.zeros(7), zero=True)):
        blank = FORMS[form.kind].blank({"k": 7, **form.spec()}, weight)
        assert type(blank) is type(form)
        assert {n: b.shape for n, b in blank.named_buffers()} == {n: b.shape for n, b in form.named_buffers()}
        blank.load_state_dict(form.state_dict())
        assert bits(blank.state_dict()) == bits(form.state_dict())


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64, torch.uint8, torch.bool, torch.int8, torch.int16, torch.int32])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (2, 3)])
def test_every_stored_dtype_travels(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (torch.arange(int(np.prod(shape)) or 1)[: int(np.prod(shape))].reshape(shape) + 1).to(dtype)
    frozen = dense_representation(tensor)
    assert bits(from_numpy(frozen.dense(), frozen.dtype)) == bits(tensor)
    assert frozen.values is not to_numpy(tensor)


def test_the_stored_values_do_not_follow_the_model() -> None:
    tensor = torch.ones(3)
    frozen = dense_representation(tensor)
    tensor.mul_(2)
    assert frozen.dense().tolist() == [1, 1, 1]
