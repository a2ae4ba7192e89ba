"""Deep Compression: one strength sets sparsity and bits, the stages run in the paper's order."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from espalier.core.context import Context
from espalier.core.errors import UsageError
from espalier.core.method import Technique
from espalier.core.parametrize import slots
from espalier.prune import Listed, Prune, Threshold
from espalier.recipes import DeepCompression
from espalier.recipes.deep_compression import STRONGEST, WEAKEST, bits_at, sparsity_at
from espalier.share import KMeans
from espalier.testing import EXAMPLES, effective, shortened
from espalier.train import Finetune

BY_NAME = {example.name: example for example in EXAMPLES}


@dataclass
class Watching(Context):
    """Notes the steps as they run."""

    ran: list[tuple[str, Technique]] = field(default_factory=list)

    def run(self, child: Technique, model: nn.Module, name: str | None = None) -> nn.Module:
        self.ran.append((name or child.id, child))
        return super().run(child, model, name)


@given(a=st.floats(0, 1), b=st.floats(0, 1))
def test_more_strength_never_keeps_more(a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert WEAKEST - 1e-9 <= sparsity_at(low) <= sparsity_at(high) <= STRONGEST + 1e-9
    for convolution in (True, False):
        assert bits_at(low, convolution=convolution) >= bits_at(high, convolution=convolution) >= 3


def test_ends_of_the_strength() -> None:
    assert (sparsity_at(0), sparsity_at(1)) == pytest.approx((WEAKEST, STRONGEST))
    assert [bits_at(s, convolution=c) for c in (True, False) for s in (0, 1)] == [8, 4, 6, 3]


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_stages_run_in_order_as_the_strength_says(strength: float) -> None:
    example = BY_NAME["convolution"]
    context = Watching(task=example.task())
    model = example.build()
    result = shortened(DeepCompression(strength=strength))(model, context)
    (_, _), (first, prune), (second, share), (third, finetune) = context.ran
    assert (first, second, third) == ("01-prune", "02-kmeans", "03-finetune")
    assert isinstance(prune, Prune)
    assert isinstance(share, KMeans)
    assert isinstance(finetune, Finetune)
    assert prune.sparsity == pytest.approx(sparsity_at(strength))
    widths = {"0.weight": bits_at(strength, convolution=True), "4.weight": bits_at(strength, convolution=False)}
    assert share.bits == widths
    found = [weight for name, weight in effective(result).items() if name in widths]
    total, zeros = sum(w.numel() for w in found), sum(int((w == 0).sum()) for w in found)
    assert zeros == int(sparsity_at(strength) * total + 1e-9)
    for name, width in widths.items():
        assert effective(result)[name].unique().numel() <= 2**width
        assert slots(result)[name].phase == "codes"


def test_without_a_strength_the_stages_own_fields_stand() -> None:
    example = BY_NAME["mlp"]
    stages = {"prune": Prune(sparsity=0.25), "share": KMeans(bits=2), "finetune": Finetune(epochs=1)}
    context = Watching(task=example.task())
    result = DeepCompression(strength=None, **stages)(example.build(), context)  # type: ignore[arg-type]
    assert [step for _, step in context.ran[1:]] == list(stages.values())
    assert int((effective(result)["0.weight"] == 0).sum()) == 12
    assert torch.count_nonzero(effective(result)["3.weight"]) == 18


@pytest.mark.parametrize(
    "stage", [Prune(criterion=Threshold()), Prune(schedule=Listed())], ids=lambda s: s.criterion.id
)
def test_a_stage_that_decides_the_sparsity_itself_goes_without_strength(stage: Prune) -> None:
    with pytest.raises(UsageError, match=r"strength=0.5 sets the sparsity .*leave.*unset\); or set strength to null"):
        DeepCompression(prune=stage)
    assert DeepCompression(prune=stage, strength=None).prune == stage


def test_needs_what_its_stages_need() -> None:
    assert DeepCompression().needs == {"train"}
