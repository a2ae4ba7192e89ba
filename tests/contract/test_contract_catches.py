"""The contract itself: a technique that breaks one clause fails the test of that clause."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

from espalier.core.context import Context
from espalier.core.errors import NeedError
from espalier.core.forms import Mask, dense_representation
from espalier.core.method import Technique
from espalier.core.model import copy_model
from espalier.core.parametrize import attach, bake, slots
from espalier.core.representation import Representation
from espalier.testing import EXAMPLES, MethodContract


class Sinner(Technique):
    """A technique without a card, so that only the clauses on the run are of interest."""

    verb: ClassVar[str] = "sin"


@dataclass(frozen=True, kw_only=True)
class TouchesArgument(Sinner):
    id: ClassVar[str] = "touches"

    def transform(self, model: nn.Module, context: Context) -> nn.Module:
        with torch.no_grad():
            next(context.models["original"].parameters()).add_(1)
        return model


@dataclass(frozen=True, kw_only=True)
class SharesMemory(Sinner):
    id: ClassVar[str] = "shares"

    def transform(self, model: nn.Module, context: Context) -> nn.Module:
        model[0].weight = context.models["original"][0].weight
        return model


@dataclass(frozen=True, kw_only=True)
class UsesTheCallersSeed(Sinner):
    id: ClassVar[str] = "callers-seed"

    def transform(self, model: nn.Module, context: Context) -> nn.Module:
        nn.init.normal_(model[0].weight)
        return model


@dataclass(frozen=True, kw_only=True)
class DrawsFromPython(Sinner):
    id: ClassVar[str] = "draws"

    def transform(self, model: nn.Module, context: Context) -> nn.Module:
        random.random()
        return model


@dataclass(frozen=True, kw_only=True)
class ChangesInterface(Sinner):
    id: ClassVar[str] = "interface"

    def transform(self, model: nn.Module, context: Context) -> nn.Module:
        return nn.Sequential(model, nn.Linear(3, 2))


@dataclass(frozen=True, kw_only=True)
class LosesHooks(Sinner):
    id: ClassVar[str] = "hooks"

    def transform(self, model: nn.Module, context: Context) -> nn.Module:
        model[0]._forward_hooks.clear()
        return model


@dataclass(frozen=True, kw_only=True)
class Thaws(Sinner):
    id: ClassVar[str] = "thaws"

    def transform(self, model: nn.Module, context: Context) -> nn.Module:
        return model.requires_grad_()


@dataclass(frozen=True, kw_only=True)
class Unties(Sinner):
    id: ClassVar[str] = "unties"

    def transform(self, model: nn.Module, context: Context) -> nn.Module:
        model.head.weight = nn.Parameter(model.embed.weight.detach() * 2)
        return model


class Lossy(Mask):
    """A form whose frozen weight is not the one it trains with."""

    def freeze(self, latent: torch.Tensor) -> Representation:
        return dense_representation(self(latent).half().float())


@dataclass(frozen=True, kw_only=True)
class FreezesOtherwise(Sinner):
    id: ClassVar[str] = "freezes-otherwise"

    def transform(self, model: nn.Module, context: Context) -> nn.Module:
        slot = slots(model)["0.weight"]
        attach(slot, Lossy(torch.ones_like(slot.latent, dtype=torch.bool)))
        return model


@dataclass(frozen=True, kw_only=True)
class Regrows(Sinner):
    id: ClassVar[str] = "regrows"

    def transform(self, model: nn.Module, context: Context) -> nn.Module:
        for slot in slots(model).values():
            bake(slot)
        with torch.no_grad():
            model[0].weight += torch.arange(model[0].weight.numel()).reshape(model[0].weight.shape)
        return model


@dataclass(frozen=True, kw_only=True)
class WorksBeforeChecking(Sinner):
    id: ClassVar[str] = "hasty"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"train"})

    def __call__(self, model: nn.Module, context: Context | None = None) -> nn.Module:
        copy_model(model)
        raise NeedError("train")

    def transform(self, model: nn.Module, context: Context) -> nn.Module:
        return model


@dataclass(frozen=True, kw_only=True)
class SaysNothing(Sinner):
    id: ClassVar[str] = "recipe"  # a recipe is not warned about: its steps are

    def transform(self, model: nn.Module, context: Context) -> nn.Module:
        return model


BY_NAME = {example.name: example for example in EXAMPLES}
CLAUSES = [
    (TouchesArgument(), "mlp", "test_argument_is_untouched"),
    (SharesMemory(), "mlp", "test_argument_is_untouched"),
    (ChangesInterface(), "mlp", "test_interface_stays"),
    (LosesHooks(), "hooked", "test_modes_and_hooks_stay"),
    (Thaws(), "frozen", "test_ties_and_frozen_stay"),
    (Unties(), "tied", "test_ties_and_frozen_stay"),
    (FreezesOtherwise(), "mlp", "test_frozen_form_is_the_model"),
    (SaysNothing(), "mlp", "test_no_silent_no_op"),
]


@pytest.mark.parametrize(("technique", "name", "clause"), CLAUSES, ids=lambda value: getattr(value, "id", value))
def test_a_broken_clause_fails(technique: Technique, name: str, clause: str) -> None:
    outcome = MethodContract.run(technique, BY_NAME[name], BY_NAME[name].build())
    with pytest.raises(AssertionError):
        getattr(MethodContract(), clause)(outcome)


@pytest.mark.parametrize("technique", [UsesTheCallersSeed(), DrawsFromPython()], ids=lambda t: t.id)
def test_foreign_randomness_fails(technique: Technique) -> None:
    mlp = BY_NAME["mlp"]
    outcome = MethodContract.run(technique, mlp, mlp.build())
    with pytest.raises(AssertionError):
        MethodContract().test_same_seed_same_result(technique, mlp, outcome)


@pytest.mark.parametrize("clause", ["test_masks_stay", "test_codes_stay"])
def test_undoing_an_earlier_step_fails(clause: str) -> None:
    with pytest.raises(AssertionError, match=r"came back|no longer do"):
        getattr(MethodContract(), clause)(Regrows(), BY_NAME["mlp"])


def test_work_before_the_needs_are_checked_fails() -> None:
    with pytest.raises(Exception, match="copied before the needs"):
        MethodContract().test_missing_need_is_named(WorksBeforeChecking())


def test_a_method_without_a_card_fails() -> None:
    with pytest.raises(AssertionError, match="Paper is missing"):
        MethodContract().test_card_is_complete(Thaws())
