"""Trained ternary quantization: the paper's gradients by hand, thresholds, and training of the two magnitudes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from espalier.core.context import Context
from espalier.core.errors import UsageError
from espalier.core.forms import Mask
from espalier.core.parametrize import slots
from espalier.core.quantized import QuantizedWeight
from espalier.core.task import classification
from espalier.data import standard
from espalier.quantize import Quantize
from espalier.quantize.ttq import TTQ, threshold_of


def form_of(method: TTQ, weight: Tensor, mask: Tensor | None = None) -> QuantizedWeight:
    return QuantizedWeight(method, weight, 2, inner=None if mask is None else Mask(mask))


def test_forward_and_gradients_as_in_the_paper():
    torch.manual_seed(0)
    weight, g = torch.randn(5, 8), torch.randn(5, 8)
    form = form_of(TTQ(factor=0.3), weight)
    positive, negative, threshold = 0.7, 1.3, 0.3 * float(weight.abs().max())
    with torch.no_grad():
        form.state["units"].fill_(1.0)
        form.state["positive"].fill_(positive)
        form.state["negative"].fill_(negative)
    latent = weight.clone().requires_grad_()
    value = form(latent)
    value.backward(g)
    above, below = weight > threshold, weight < -threshold
    assert torch.allclose(value, positive * above.float() - negative * below.float())
    assert float(form.state["positive"].grad) == pytest.approx(float(g[above].sum()), abs=1e-5)
    assert float(form.state["negative"].grad) == pytest.approx(-float(g[below].sum()), abs=1e-5)
    scale = torch.where(above, positive, torch.where(below, negative, 1.0))
    assert torch.allclose(latent.grad, g * scale)


def test_magnitudes_have_the_slope_of_finite_differences():
    torch.manual_seed(1)
    weight, g = torch.randn(4, 6).double(), torch.randn(4, 6).double()
    form = form_of(TTQ(), weight)
    (form(weight) * g).sum().backward()
    for name in ("positive", "negative"):
        magnitude, slope = form.state[name], form.state[name].grad
        values = []
        for change in (0.125, -0.125):
            with torch.no_grad():
                magnitude += change
                values.append(float((form(weight) * g).sum()))
                magnitude -= change
        assert (values[0] - values[1]) / 0.25 == pytest.approx(float(slope), abs=1e-4)


def test_magnitudes_start_at_the_means_of_their_sides_or_at_one():
    weight = torch.tensor([[1.0, 0.5, 0.01, -0.2, -0.4, -0.02]])
    mask = torch.tensor([[True, True, True, True, True, False]])
    for method, expected in ((TTQ(factor=0.1), [0.75, 0.3]), (TTQ(init="one"), [1, 1])):
        state = form_of(method, weight, mask).state
        assert state["units"].tolist() == pytest.approx(expected)
        assert [state[name].tolist() for name in ("positive", "negative")] == [1, 1]


def test_a_step_is_the_same_share_at_every_scale():
    """In front of a norm weights 100 times as small have gradients 100 times as large; W_p moves by the same share."""
    torch.manual_seed(3)
    weight, g = torch.randn(5, 8), torch.randn(5, 8)
    moved = []
    for scale in (1.0, 0.01):
        form = form_of(TTQ(), weight * scale)
        form(weight * scale).backward(g / scale)
        moved.append([float(form.state[name].grad) for name in ("positive", "negative")])
    assert moved[0] == pytest.approx(moved[1], rel=1e-4)


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 0.9])
def test_a_fixed_share_is_zero_among_the_kept(sparsity):
    torch.manual_seed(0)
    weight, mask = torch.randn(10, 40), torch.rand(10, 40) > 0.5
    value = form_of(TTQ(threshold="sparsity", sparsity=sparsity), weight, mask)(weight)
    kept = int(mask.sum())
    assert int((value[mask] == 0).sum()) == int(sparsity * kept)


def test_a_threshold_is_a_share_of_the_largest():
    assert float(threshold_of(torch.tensor([0.1, 4.0, 2.0]), "factor", 0.05, 0.0)) == pytest.approx(0.2)
    assert float(threshold_of(torch.zeros(0), "factor", 0.05, 0.0)) == 0


def test_a_learned_threshold_has_the_slope_of_its_ramp():
    """Finite differences of W clip(|w| / 2D, 0, 1), the ramp in the place of the step, along t, over sqrt(n)."""
    torch.manual_seed(2)
    weight, g = torch.randn(6, 30).double(), torch.randn(6, 30).double()
    form = form_of(TTQ(threshold="learned", factor=0.2), weight)
    (form(weight) * g).sum().backward()
    positive, negative = form.state["units"].tolist()
    largest = float(form.state["largest"])

    def ramp(t: float) -> float:
        height = torch.where(weight > 0, positive, -negative)
        return float((g * height * (weight.abs() / (2 * t * largest)).clamp(0, 1)).sum())

    expected = (ramp(0.2 + 1e-6) - ramp(0.2 - 1e-6)) / 2e-6 / weight.numel() ** 0.5
    assert float(form.state["factor"].grad) == pytest.approx(expected, rel=1e-3)


def test_all_three_are_trained_and_the_threshold_follows_the_weights():
    digits = standard("digits", batch_size=128)
    task = classification(digits.train, digits.val)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    for threshold in ("factor", "sparsity", "learned"):
        step = Quantize(weights=TTQ(threshold=threshold), bits=2, ends="same", epochs=1, lr=3e-3)
        before = step.replace(epochs=0)(model, Context(task=task))
        result = step(model, Context(task=task))
        for old, new in zip(slots(before).values(), slots(result).values(), strict=True):
            if isinstance(new.form, QuantizedWeight) and isinstance(old.form, QuantizedWeight):
                fresh = form_of(TTQ(threshold=threshold), new.latent.detach()).state
                for name, tensor in new.form.state.tensors().items():
                    if isinstance(tensor, nn.Parameter):
                        assert not torch.equal(tensor, old.form.state[name])
                    else:
                        there = old.form.state if name == "units" else fresh
                        assert torch.equal(tensor, there[name])
                if threshold == "sparsity":
                    assert float((new.value() == 0).float().mean()) == pytest.approx(0.5, abs=0.01)


def test_refusals():
    with pytest.raises(UsageError, match=r"learned threshold starts at factor=0\.001"):
        TTQ(threshold="learned", factor=0.0)
    with pytest.raises(UsageError, match=r"sparsity=1"):
        TTQ(sparsity=1.0)
