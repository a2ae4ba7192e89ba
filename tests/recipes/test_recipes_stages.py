"""Recipes that are stages in a row: what a strength sets, which stages run, and what stands at the end."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from espalier.core.context import Context
from espalier.core.errors import EspalierWarning, UsageError
from espalier.core.inputs import quantized_inputs
from espalier.core.method import Technique
from espalier.core.parametrize import slots
from espalier.core.quantized import QuantizedWeight
from espalier.core.task import Task, classification
from espalier.data import standard
from espalier.factorize import SVD, Budget, Energy, Factorization
from espalier.measure.frozen import file_length
from espalier.prune import Channels, Listed, Prune
from espalier.quantize import BWN, TTQ, TWN, Quantize
from espalier.recipes import LowRankInt8, MobileInt8, TernaryNetwork
from espalier.testing import effective
from espalier.train import Finetune


@cache
def digits() -> Task:
    splits = standard("digits", batch_size=64)
    return classification(splits.train, splits.val)


@cache
def trained() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(),
        nn.Linear(96, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip
    return Finetune(epochs=5, lr=5e-3)(net, Context(task=digits()))


@cache
def flat() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 10))
    return Finetune(epochs=4, lr=5e-3)(net, Context(task=digits()))


@dataclass
class Watching(Context):
    """Notes the steps as they run."""

    ran: list[tuple[str, Technique]] = field(default_factory=list)

    def run(self, child: Technique, model: nn.Module, name: str | None = None) -> nn.Module:
        self.ran.append((f"{self.path}/{name or child.id}", child))
        return super().run(child, model, name)

    def stages(self) -> list[str]:
        """The names of the stages themselves."""
        whole = self.ran[0][0].removeprefix("/")
        return [name.removeprefix(f"{whole}/") for name, _ in self.ran if name.rpartition("/")[0] == whole]


TUNE = Finetune(epochs=2, lr=2e-3)


def accuracy(model: nn.Module) -> float:
    return digits().measure(model, "val").value


# --- ternary -------------------------------------------------------------------------------------------------------


def ternary(**fields: Any) -> TernaryNetwork:
    quantize = Quantize(weights=fields.pop("weights", TTQ()), bits=2, epochs=4, lr=3e-3)
    return TernaryNetwork(quantize=quantize, finetune=TUNE, **fields)


def test_inner_layers_have_three_values_the_ends_eight_bits() -> None:
    context = Watching(task=digits())
    result = ternary()(trained(), context)
    assert context.stages() == ["01-quantize", "02-finetune"]
    for name in ("3.weight", "7.weight"):
        values = effective(result)[name].unique()
        assert values.numel() <= 3
        assert 0 in values
    found = {name: slot.form.bits for name, slot in slots(result).items() if isinstance(slot.form, QuantizedWeight)}
    assert found == {"0.weight": 8, "3.weight": 2, "7.weight": 2, "9.weight": 8}
    assert accuracy(result) > 75


def test_strength_is_the_share_of_zeros_and_the_file_is_the_smaller_for_it() -> None:
    weak, strong = (ternary(strength=strength)(trained(), Context(task=digits())) for strength in (0.0, 1.0))
    shares = [float((effective(model)["3.weight"] == 0).float().mean()) for model in (weak, strong)]
    assert shares == pytest.approx([0.3, 0.95], abs=0.02)
    assert file_length(strong, Context(), ("adaptive",)) < 0.7 * file_length(weak, Context(), ("adaptive",))


def test_strength_leaves_the_other_fields_of_ttq_alone() -> None:
    result = ternary(weights=TTQ(init="one"))(trained(), Context(task=digits()))
    form = slots(result)["3.weight"].form
    assert isinstance(form, QuantizedWeight)
    assert form.method == TTQ(init="one", threshold="sparsity", sparsity=0.625)


def test_other_ternary_weights_go_without_a_strength() -> None:
    result = ternary(weights=TWN(), strength=None)(trained(), Context(task=digits()))
    assert effective(result)["3.weight"].unique().numel() == 3
    with pytest.raises(UsageError, match="with weights=twn set strength to null"):
        ternary(weights=TWN())
    with pytest.raises(UsageError, match="threshold=learned of ttq learns; set strength to null"):
        ternary(weights=TTQ(threshold="learned"))
    with pytest.raises(UsageError, match="no three values"):
        TernaryNetwork(quantize=Quantize(weights=BWN(), bits=1))


# --- mobile --------------------------------------------------------------------------------------------------------


def mobile(**fields: Any) -> MobileInt8:
    return MobileInt8(finetune=TUNE, **fields)


def test_channels_go_then_everything_is_int8() -> None:
    context = Watching(task=digits())
    result = mobile(strength=0.5)(trained(), context)
    assert context.stages() == ["01-prune", "02-finetune", "03-ptq-int8"]
    assert effective(result)["3.weight"].shape[0] % 4 == 0
    before, after = (sum(weight.numel() for weight in effective(model).values()) for model in (trained(), result))
    assert after < 0.8 * before
    assert {q.bits for q in quantized_inputs(result).values()} == {8}
    assert {slot.form.bits for slot in slots(result).values() if isinstance(slot.form, QuantizedWeight)} == {8}
    assert accuracy(result) > 80


def test_a_model_without_channels_that_can_go_still_becomes_int8() -> None:
    context = Watching(task=digits())
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with pytest.warns(EspalierWarning, match="goes on with all channels"):
        result = mobile()(net, context)
    assert isinstance(slots(result)["1.weight"].form, QuantizedWeight)


def test_a_pruning_that_decides_itself_goes_without_strength() -> None:
    stage = Prune(pattern=Channels(), schedule=Listed(), epochs=3)
    with pytest.raises(UsageError, match="set strength to null"):
        MobileInt8(prune=stage)
    assert MobileInt8(prune=stage, strength=None).prune == stage


# --- low rank ------------------------------------------------------------------------------------------------------


def test_both_kinds_of_layers_are_factorized_then_int8() -> None:
    context = Watching(task=digits())
    result = LowRankInt8(strength=0.3, finetune=TUNE)(trained(), context)
    assert context.stages() == ["01-tucker", "02-finetune", "03-ptq-int8"]
    (rank,) = [step.rank for _, step in context.ran if isinstance(step, Factorization)]
    assert isinstance(rank, Budget)
    assert rank.keep == pytest.approx(0.8 * 0.125**0.3)
    before, after = (sum(weight.numel() for weight in effective(model).values()) for model in (trained(), result))
    assert after < 0.7 * before
    assert accuracy(result) > 80


def test_a_network_without_convolutions_is_factorized_too() -> None:
    context = Watching(task=digits())
    result = LowRankInt8(strength=0.3, finetune=TUNE)(flat(), context)
    before, after = (sum(weight.numel() for weight in effective(model).values()) for model in (flat(), result))
    assert after < 0.7 * before


def test_ranks_that_decide_themselves_go_without_strength() -> None:
    by_energy = SVD(rank=Energy())
    with pytest.raises(UsageError, match="rank=energy of svd decides that itself"):
        LowRankInt8(factorize=by_energy)
    assert LowRankInt8(factorize=by_energy, strength=None).factorize == by_energy
