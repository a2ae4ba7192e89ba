"""Targeted and variational dropout: what is targeted by hand, the divergence against its integral, noise, refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.prune.sparse_training import digits, trained
from torch import Tensor

from espalier.core.context import Context
from espalier.core.parametrize import slots
from espalier.prune import Dropout, TargetedDropout, VariationalDropout
from espalier.prune.targeted_dropout import Targeted, targets
from espalier.prune.variational_dropout import Variational, divergence


def test_targets_by_hand() -> None:
    rows = torch.tensor([[3.0, -1.0, 2.0, 0.5], [0.1, 0.4, -0.3, 0.2], [5.0, 5.0, 5.0, 5.0]])
    found = targets(rows, 0.5, "weights")
    assert found.tolist() == [[False, True, False, True], [True, False, False, True], [True, True, False, False]]
    assert targets(rows, 0.4, "units")[:, 0].tolist() == [False, True, False]
    assert targets(rows, 1.0, "units")[:, 0].tolist() == [True, True, False], "one unit stays"


@given(seed=st.integers(0, 100), low=st.floats(0, 1), high=st.floats(0, 1))
@settings(max_examples=25, deadline=None)
def test_targets_nest_and_are_counted_per_unit(seed: int, low: float, high: float) -> None:
    rows = torch.randn(5, 9, generator=torch.Generator().manual_seed(seed))
    less, more = (targets(rows, share, "weights") for share in sorted((low, high)))
    assert not bool((less & ~more).any())
    assert more.sum(1).tolist() == [int(max(low, high) * 9 + 1e-9)] * 5


@pytest.mark.parametrize("of", ["weights", "units"])
def test_only_targets_are_dropped_and_as_often_as_asked(of) -> None:
    slot = slots(trained("mlp"))["1.weight"]
    rule = TargetedDropout(of=of, sparsity=0.5, rate=0.3)
    form = Targeted(slot, torch.ones_like(slot.latent, dtype=torch.bool), rule)
    form.share, form.generator = 0.5, torch.Generator().manual_seed(0)
    target = targets(slot.value(), 0.5, of)
    dropped = torch.stack([form(slot.latent) == 0 for _ in range(300)]).float().mean(0)
    assert float(dropped[~target].max()) == 0
    assert float(dropped[target].mean()) == pytest.approx(0.3, abs=0.02)
    assert torch.equal(form.eval()(slot.latent), slot.latent), "no noise when it is judged"


def true_divergence(alpha: float) -> float:
    """KL(N(1, alpha) || log-uniform) up to its constant: -log(alpha) / 2 + E log|1 + sqrt(alpha) eps|, by midpoints."""
    # an even number of midpoints keeps clear of the logarithm's pole as far as the grid allows
    grid = (np.arange(4_000_000) + 0.5) / 4_000_000 * 16 - 8
    density = np.exp(-(grid**2) / 2) / math.sqrt(2 * math.pi) * 16 / 4_000_000
    return float(-0.5 * math.log(alpha) + (np.log(np.abs(1 + math.sqrt(alpha) * grid)) * density).sum())


def test_divergence_is_the_integral_it_stands_for() -> None:
    """Eq. 14 is a fit of the KL, its constant chosen so that it is 0 for endless noise."""
    endless = true_divergence(1e6)
    for log_alpha in (-4.0, -1.0, 0.0, 1.0, 3.0):
        expected = true_divergence(math.exp(log_alpha)) - endless
        assert float(divergence(torch.tensor(log_alpha))) == pytest.approx(expected, abs=0.012)


@given(low=st.floats(-8, 8), high=st.floats(-8, 8))
@settings(max_examples=25, deadline=None)
def test_more_noise_costs_less(low: float, high: float) -> None:
    less, more = sorted((low, high))
    value: Tensor = divergence(torch.tensor([less, more], dtype=torch.float64))
    assert value[1] <= value[0]


def test_variational_noise_and_threshold() -> None:
    value = torch.tensor([[1.0, -2.0, 0.5]])
    form = Variational(value, torch.tensor([[True, True, False]]), 10.0)
    assert torch.allclose(form.log_alpha(value), torch.full((1, 3), -8.0), atol=1e-4)
    form.generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([form(value) for _ in range(3000)])
    assert torch.allclose(drawn.std(0), math.exp(-4) * value.abs() * torch.tensor([[1, 1, 0]]), rtol=0.05)
    with torch.no_grad():
        form.rho[0, 1] += 1.2  # log_alpha = 4: more noise than weight
    assert form.eval()(value).tolist() == [[1, 0, 0]]
    form.settle(value)
    assert form.train()(value).tolist() == [[1, 0, 0]], "settled: no noise, no way back"


def test_default_layers_keep_the_models_outputs() -> None:
    context = Context(task=digits())
    technique = Dropout(epochs=1, rule=TargetedDropout(of="units", sparsity=0.25))
    result = technique(trained("mlp"), context)
    gone = {name: int((s.value() == 0).all(1).sum()) for name, s in slots(result).items() if s.latent.ndim == 2}
    assert gone == {"1.weight": 16, "3.weight": 8, "5.weight": 0}


def test_strength_zero_removes_little() -> None:
    result = Dropout(epochs=1, lr=1e-3, rule=VariationalDropout(strength=0.0))(trained("mlp"), Context(task=digits()))
    strong = Dropout(epochs=1, lr=1e-3, rule=VariationalDropout(strength=50.0, speed=60.0))
    more = strong(trained("mlp"), Context(task=digits()))
    count = [sum(int((s.value() == 0).sum()) for s in slots(m).values() if s.latent.ndim == 2) for m in (result, more)]
    assert count[0] < count[1]
