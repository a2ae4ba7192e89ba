"""INQ: levels and rounding by the paper's numbers and by brute force, portions by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.quantize.incremental_digits import (
    accuracy,
    check_common,
    check_resumes,
    digits,
    latent_of,
    quantized,
    trained,
    view,
)
from torch import Tensor

from espalier.core.callback import Loop
from espalier.core.context import Context
from espalier.core.errors import UsageError
from espalier.core.quantized import Weight
from espalier.quantize.inq import PORTIONS, Inq, Partition, chosen_next, portion, power_levels, to_powers
from espalier.quantize.quantize import Quantize
from espalier.testing.compare import bits
from espalier.train import SGD, Constant, Cosine


def test_the_papers_level_sets() -> None:
    weight = torch.tensor([0.5, -0.7, 0.1])  # 4 * 0.7 / 3 = 0.93: n1 = -1
    assert power_levels(weight, 3).tolist() == [0, 0.25, 0.5]  # n2 = -2
    assert power_levels(weight, 2).tolist() == [0, 0.5]
    assert power_levels(weight, 5).tolist() == [0, *(2.0**k for k in range(-8, 0))]
    assert power_levels(torch.tensor([0.75]), 2).tolist() == [0, 1.0]  # 4 s / 3 is a power of two
    assert power_levels(torch.tensor([9.0, 0.5]), 2, torch.tensor([False, True])).tolist() == [0, 0.5]


def by_the_paper(value: float, levels: list[float]) -> float:
    for low, high in itertools.pairwise(levels):
        if (low + high) / 2 <= abs(value) < 3 * high / 2:
            return high if value > 0 else -high
    return 0.0


@settings(max_examples=100)
@given(values=st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=20), width=st.sampled_from([2, 3, 4, 5]))
def test_rounding_is_equation_four(values: list[float], width: int) -> None:
    weight = torch.tensor(values)
    levels = power_levels(weight, width)
    expected = [by_the_paper(value, levels.tolist()) for value in weight.tolist()]
    assert (to_powers(weight, levels) + 0).tolist() == [value + 0.0 for value in expected]


def test_larger_weights_take_the_largest_level_and_ties_go_up() -> None:
    levels = torch.tensor([0, 0.25, 0.5])
    assert to_powers(torch.tensor([3.0, -3.0, 0.375, 0.125]), levels).tolist() == [0.5, -0.5, 0.5, 0.25]


@pytest.mark.parametrize(("how", "expected"), [("large", [1, 4]), ("small", [2, 3])])
def test_the_first_portion(how: Partition, expected: list[int]) -> None:
    weight = torch.tensor([0.5, -0.9, 0.1, 0.2, -0.8, 7.0])
    kept = torch.tensor([True] * 5 + [False])
    mask = chosen_next(weight, torch.zeros(6, dtype=torch.bool), kept, 0.4, how)
    assert mask.nonzero().reshape(-1).tolist() == expected
    again = chosen_next(weight, mask, kept, 0.4, how)
    assert not again.any()
    assert int((chosen_next(weight, mask, kept, 1.0, how) | mask).sum()) == 5


def test_portions_share_the_epochs() -> None:
    assert [portion(e, 8, PORTIONS[5]) for e in range(8)] == [0.5, 0.5, 0.75, 0.75, 0.875, 0.875, 1, 1]
    assert [portion(e, 2, PORTIONS[5]) for e in range(2)] == [0.5, 0.875]


@pytest.mark.parametrize("epochs", [2, 6, 10, 15])
@pytest.mark.parametrize("width", [2, 5])
def test_the_learning_rate_starts_anew_with_each_portion(width: int, epochs: int) -> None:
    model = quantized(trained(), Inq(), width)
    schedule = Quantize(weights=Inq(), bits=width, lr_schedule=Cosine())._paced(model, epochs).lr_schedule
    shares = [portion(epoch, epochs, PORTIONS[width]) for epoch in range(epochs)]
    changes = [epoch for epoch in range(1, epochs) if shares[epoch] != shares[epoch - 1]]
    assert [step / 7 for step in range(1, 7 * epochs) if schedule.factor(step, 7 * epochs) == 1] == changes


class Watched(Inq):
    """Writes down after every step which weights are quantized, and the weights."""

    seen: list[tuple[Tensor, Tensor]] = []  # noqa: RUF012 - one test's notes

    def after_step(self, w: Weight, loop: Loop) -> None:
        super().after_step(w, loop)
        if w.name == "4.weight":
            self.seen.append((w.state["fixed"].clone(), w.latent.detach().clone()))


def test_what_is_quantized_never_moves_again_and_the_rest_does() -> None:
    Watched.seen.clear()
    model = quantized(
        trained(),
        Watched(),
        4,
        epochs=6,
        lr=0.01,
        optimizer=SGD(momentum=0.9, weight_decay=0.1),
        lr_schedule=Constant(),
    )
    shares = sorted({round(float(fixed.float().mean()), 2) for fixed, _ in Watched.seen})
    assert shares == [0.3, 0.5, 0.8, 0.9, 0.95, 1.0]
    for (fixed, before), (later, after) in zip(Watched.seen, Watched.seen[1:], strict=False):
        assert bool((later | ~fixed).all())
        assert bits(before[fixed]) == bits(after[fixed])
        if not later.all():
            assert bool((before[~later] != after[~later]).any())
    slot, form = latent_of(model, "4.weight")
    levels = form.state["levels"]
    assert set(slot.value().abs().unique().tolist()) <= set(levels.tolist())
    assert bits(slot.value()) == bits(slot.latent.detach())


def test_training_beats_rounding_at_once() -> None:
    at_once = quantized(trained(), Inq(), 3)
    step_by_step = quantized(trained(), Inq(), 3, epochs=16, lr=3e-3)
    assert accuracy(step_by_step) > max(0.9, accuracy(at_once))


@pytest.mark.parametrize("how", ["large", "random"])
def test_resume_goes_on_bit_for_bit(how: Partition) -> None:
    check_resumes(Inq(partition=how), 3)


def test_validation_sees_the_whole_weight_quantized() -> None:
    w = view(Inq(), torch.tensor([[0.5, -0.9, 0.1, 0.2]]), 3, training=False)
    assert bits(Inq().quantize(w)) == bits(to_powers(w.latent.detach(), w.state["levels"]))


def test_common() -> None:
    check_common(Inq(), 3)


def test_portions_that_do_not_rise_are_refused() -> None:
    with pytest.raises(UsageError, match="portions must rise"):
        Quantize(weights=Inq(portions=(0.5, 0.4, 1)), epochs=2, bits=3).transform(trained(), Context(task=digits()))
    with pytest.raises(UsageError, match="inq can do"):
        Quantize(weights=Inq(), bits=7)
