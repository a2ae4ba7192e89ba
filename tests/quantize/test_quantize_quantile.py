"""Levels by quantiles: equal population, and the numbers of NF4."""

from __future__ import annotations

import itertools

import pytest
import torch

from espalier.core.callback import Loop
from espalier.core.context import Context
from espalier.core.quantized import QuantizedWeight
from espalier.quantize.quantile import Quantile, normal_levels

NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)  # fmt: skip - QLoRA's table, appendix E


@pytest.mark.parametrize("values", ["mean", "median", "even"])
@pytest.mark.parametrize("count", [64, 103, 1000])
def test_bins_are_equally_full_and_stand_for_their_weights(values, count):
    weight = torch.randn(count, generator=torch.Generator().manual_seed(0))
    found = QuantizedWeight(Quantile(values=values), weight, 3).eval()(weight)
    levels, population = found.unique(return_counts=True)
    assert len(levels) == 8
    assert int(population.max() - population.min()) <= 1
    bins = [weight[found == level] for level in levels]
    assert all(bool(a.max() < b.min()) for a, b in itertools.pairwise(bins))
    if values == "even":
        steps = levels.diff()
        assert torch.allclose(steps, steps[:1].expand(7), rtol=1e-4)
        unit = found / levels[-1]
        assert torch.allclose(levels[-1], (weight * unit).sum() / unit.square().sum())
    else:
        wanted = [b.mean() if values == "mean" else (b.median() - (-b).median()) / 2 for b in bins]
        assert torch.allclose(levels, torch.stack(wanted), atol=1e-6)


def test_normal_quantiles_are_nf4():
    assert torch.allclose(normal_levels(4), torch.tensor(NF4), atol=1e-5)
    weight = torch.randn(30, 30, generator=torch.Generator().manual_seed(1))
    found = QuantizedWeight(Quantile(values="normal"), weight, 4).eval()(weight)
    levels = torch.tensor(NF4) * weight.abs().max()
    assert torch.allclose(found, levels[(weight[..., None] - levels).abs().argmin(-1)], atol=1e-4)


def test_equal_weights_and_too_few_of_them():
    for weight in (torch.full((9,), 0.3), torch.tensor([0.1, -0.2]), torch.tensor([1.0, 1, 1, 1, 1, 1, 1, 2])):
        for values in ("mean", "median"):
            found = QuantizedWeight(Quantile(values=values), weight, 4).eval()(weight)
            assert torch.allclose(found, weight)


def test_bins_follow_the_weights_every_so_many_steps():
    weight = torch.randn(64, generator=torch.Generator().manual_seed(2))
    form = QuantizedWeight(Quantile(every=3), weight, 2)
    loop = Loop(form, torch.optim.SGD([torch.zeros(1)], 0.1), Context(), torch.Generator(), 1, 9)
    before = form.state["levels"].clone()
    for step, moves in ((1, False), (2, False), (3, True)):
        loop.step = step
        form.method.after_step(form.view(weight * 2), loop)
        assert torch.allclose(form.state["levels"], before * 2 if moves else before)
