"""ELQ: its objective by finite differences, its values by hand."""

from __future__ import annotations

import pytest
import torch
from tests.quantize.incremental_digits import (
    accuracy,
    check_common,
    check_resumes,
    latent_of,
    quantized,
    trained,
)

from espalier.core.callback import Loop
from espalier.core.errors import UsageError
from espalier.core.quantized import Weight
from espalier.quantize.elq import Elq, constants, perturbed, to_signs
from espalier.quantize.gradient_quantization import GradientQuantization
from espalier.quantize.inq import to_powers
from espalier.quantize.quantize import Quantize


def test_values_by_hand() -> None:
    weight = torch.tensor([0.1, -0.5, 1.0, -2.0, 9.0])
    kept = torch.tensor([True] * 4 + [False])  # mean 0.9, threshold 0.63
    c, threshold = constants(weight, 2, kept)
    assert (float(c), float(threshold)) == pytest.approx((1.5, 0.63))
    assert to_signs(weight, c, threshold).tolist() == [0, 0, 1.5, -1.5, 1.5]
    c, threshold = constants(weight, 1, kept)
    assert float(c) == pytest.approx(0.9)
    assert to_signs(torch.tensor([0.0, -3.0]), c, threshold).tolist() == pytest.approx([0.9, -0.9])


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_gradient_of_the_objective(sign: float) -> None:
    torch.manual_seed(0)
    g, w = torch.randn(3, 4).double(), torch.randn(3, 4).double()
    fixed = w - sign * torch.randn(3, 4).double().abs() * g.sign()  # <g, w - w^> has the sign

    def objective(at: torch.Tensor) -> torch.Tensor:
        error = at - fixed
        return (g * at).sum() + 0.3 * (g * error).sum().abs() + 0.2 / 2 * error.square().sum()

    found = perturbed(g, w - fixed, 0.3, 0.2)
    for i in range(w.numel()):
        step = torch.zeros(12).double()
        step[i] = 1e-6
        change = (objective(w + step.reshape(3, 4)) - objective(w - step.reshape(3, 4))) / 2e-6
        assert float(found.reshape(-1)[i]) == pytest.approx(float(change), abs=1e-6)


@pytest.mark.parametrize("width", [1, 2])
def test_training_beats_rounding_at_once(width: int) -> None:
    at_once = quantized(trained(), Elq(), width)
    step_by_step = quantized(trained(), Elq(), width, epochs=20, lr=3e-3)
    assert accuracy(step_by_step) > max(0.8, accuracy(at_once))
    slot, form = latent_of(step_by_step, "4.weight")
    assert len(slot.value().unique()) <= width + 1
    assert set(slot.value().abs().unique().tolist()) <= {0.0, float(form.state["c"])}


def test_the_pull_towards_the_levels_shows() -> None:
    """With a strong a2 the weights still free lie nearer to their values than without."""

    class Gap(Elq):
        seen: list[float] = []  # noqa: RUF012 - one test's notes

        def after_step(self, w, loop):  # type: ignore[no-untyped-def]
            super().after_step(w, loop)
            free = ~w.state["fixed"]
            if w.name == "4.weight":
                self.seen.append(float((w.latent - self.project(w))[free].abs().mean()))

    found = []
    for weight in (0.0, 3.0):
        Gap.seen = []
        quantized(trained(), Gap(error_weight=weight, portions=(0.5, 1)), 2, epochs=4, lr=3e-3)
        found.append(Gap.seen[len(Gap.seen) // 2 - 1])
    assert found[1] < 0.8 * found[0]


def test_quantized_gradients_are_perturbed_after_they_are_quantized() -> None:
    """DoReFa's codes have no zero: whatever came before would move the weights that are fixed already."""
    counts: list[tuple[int, int]] = []

    class Seen(Elq):
        def before_step(self, w: Weight, loop: Loop) -> None:
            grad = w.latent.grad
            assert grad is not None
            given, fixed = grad.clone(), w.state["fixed"]
            assert bool((given[fixed] != 0).all()) or bool(fixed.all())
            assert len(given.unique()) <= 8
            super().before_step(w, loop)
            error = (w.latent - self.project(w)).masked_fill(fixed, 0)
            wanted = perturbed(given, error, self.loss_weight, self.error_weight).masked_fill(fixed, 0)
            assert torch.equal(grad, wanted)
            counts.append((int(fixed.sum()), len(grad.unique())))

    model = quantized(
        trained(), Seen(portions=(0.5, 1)), 2, epochs=2, lr=1e-2, gradients=GradientQuantization(form="dorefa"),
        gradient_bits=3,
    )  # fmt: skip
    assert max(number for _, number in counts) > 8
    assert {fixed > 0 for fixed, _ in counts} == {True}
    slot, form = latent_of(model, "4.weight")
    assert torch.equal(slot.latent, form.state["values"])


def test_it_is_not_inq() -> None:
    weight = torch.tensor([0.3, -0.5, 0.9])
    c, threshold = constants(weight, 2, None)
    assert not torch.equal(to_signs(weight, c, threshold), to_powers(weight, torch.tensor([0, 1.0])))


def test_resume_goes_on_bit_for_bit() -> None:
    check_resumes(Elq(), 2)


@pytest.mark.parametrize("width", [1, 2])
def test_common(width: int) -> None:
    check_common(Elq(), width)


def test_more_bits_are_refused() -> None:
    with pytest.raises(UsageError, match="elq can do 1, 2"):
        Quantize(weights=Elq(), bits=4)
