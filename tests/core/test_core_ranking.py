"""Exactly as many as asked for, ties by position, nested as the count grows."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from espalier.core.ranking import smallest

scores = st.lists(st.sampled_from([0.0, 1.0, 2.0, 2.5, float("inf"), -float("inf")]), min_size=0, max_size=20).map(
    torch.tensor
)


@given(values=scores, count=st.integers(-2, 25))
@settings(deadline=None)
def test_as_a_stable_sort(values: Tensor, count: int) -> None:
    mask = smallest(values, count)
    kept = min(max(count, 0), values.numel())
    expected = torch.zeros_like(values, dtype=torch.bool)
    expected[torch.sort(values, stable=True).indices[:kept]] = True
    assert torch.equal(mask, expected)


@given(values=scores)
@settings(deadline=None)
def test_masks_nest(values: Tensor) -> None:
    for count in range(values.numel()):
        assert not (smallest(values, count) & ~smallest(values, count + 1)).any()


@given(values=scores, count=st.integers(0, 20))
@settings(deadline=None)
def test_what_is_gone_goes_first(values: Tensor, count: int) -> None:
    gone = smallest(values, count // 2)
    again = smallest(values.masked_fill(gone, -torch.inf), count)
    assert not (gone & ~again).any()
    assert int(again.sum()) == min(count, values.numel())


def test_shape_and_dtype() -> None:
    values = torch.arange(24).reshape(2, 3, 4).flip(0).to(torch.bfloat16)
    mask = smallest(values, 5)
    assert mask.shape == values.shape
    assert mask.dtype == torch.bool
    assert int(mask.sum()) == 5
    assert smallest(values.permute(2, 0, 1), 5).shape == (4, 2, 3)
    assert torch.equal(smallest(values.permute(2, 0, 1), 5), mask.permute(2, 0, 1))
