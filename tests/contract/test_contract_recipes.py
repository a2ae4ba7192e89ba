"""Any steps in any order: they travel as YAML, keep the contract, and refuse only what would undo earlier work."""

from __future__ import annotations

import dataclasses
import typing
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

from espalier.api import fill_registry
from espalier.core import registry
from espalier.core.context import Context
from espalier.core.errors import EspalierWarning, ModelError, PhaseError, UsageError
from espalier.core.method import Method, Technique, fields_of
from espalier.core.parametrize import slots
from espalier.core.recipe import Recipe
from espalier.prune import Prune
from espalier.prune.removing import Removing
from espalier.share import KMeans
from espalier.testing import EXAMPLES, bits, effective, fingerprint, frozen_copy, outputs, shortened
from espalier.train import Finetune

fill_registry()
TECHNIQUES = [cls for cls in registry.methods() if issubclass(cls, Technique)]
BY_NAME = {example.name: example for example in EXAMPLES}


@st.composite
def steps(draw: st.DrawFn, depth: int = 1) -> Technique:
    """A registered technique with drawn parts and epochs; sometimes a recipe of two."""
    if depth and draw(st.integers(0, 5)) == 0:
        return Recipe(steps=(draw(steps(0)), draw(steps(0))))
    cls = draw(st.sampled_from(TECHNIQUES))
    chosen: dict[str, Any] = {}
    for field in fields_of(cls):
        base = registry.part_type(field)
        if field.name == "epochs":
            chosen["epochs"] = draw(st.integers(0, 1))
        elif base is not None and isinstance(field.default, Method) and not issubclass(base, Technique):
            kinds = [part for part in registry.methods() if issubclass(part, base)]
            chosen[field.name] = draw(st.sampled_from(kinds))()
        elif field.annotation is bool and field.name != "densify":
            chosen[field.name] = draw(st.booleans())
    try:
        return shortened(cls(**chosen))
    except UsageError:  # parts that do not go together
        assume(False)
        raise


recipes = st.lists(steps(), min_size=2, max_size=4).map(lambda found: Recipe(steps=tuple(found)))


@given(recipe=recipes, name=st.sampled_from(["mlp", "convolution", "tied", "frozen", "recurrent"]))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
def test_random_recipes(recipe: Recipe, name: str) -> None:
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    example = BY_NAME[name]
    model, task = example.build(), example.task()
    before = fingerprint(model)
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EspalierWarning)
        for _ in range(2):
            try:
                found.append(recipe(model, Context(task=task, seed=7)))
            except PhaseError:
                assert shares_then_changes(recipe)
                found.append(None)
            except ModelError:  # nothing of that structure in this model
                assert any(isinstance(step, Prune) and isinstance(step.pattern, Removing) for step in flat(recipe))
                found.append(None)
            assert fingerprint(model) == before
    one, two = found
    assert (one is None) == (two is None)
    if one is not None and two is not None:
        assert bits(one.state_dict()) == bits(two.state_dict())
        assert bits(outputs(frozen_copy(one), task)) == bits(outputs(one, task))
        assert [t.shape for t in outputs(one, task)] == [t.shape for t in outputs(model, task)]


def flat(technique: Technique) -> typing.Iterator[Technique]:
    """The steps of nested recipes in order."""
    if isinstance(technique, Recipe):
        for step in technique.steps:
            yield from flat(step)
    else:
        yield technique


def shares_then_changes(recipe: Recipe) -> bool:
    """Whether two steps that fix, or change, masks and codes follow each other: the second may be refused."""
    return sum(not isinstance(step, Finetune) for step in flat(recipe)) > 1


@dataclass
class Watching(Context):
    """Notes every step in the order it runs."""

    ran: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def run(self, child: Technique, model: nn.Module, name: str | None = None) -> nn.Module:
        self.ran.append((f"{self.path}/{name or child.id}", child.name))
        return super().run(child, model, name)


def test_steps_run_in_order_under_their_paths() -> None:
    mlp = BY_NAME["mlp"]
    context = Watching(task=mlp.task())
    Recipe(steps=(Prune(), Recipe(steps=(Finetune(epochs=1), KMeans()))))(mlp.build(), context)
    assert context.ran == [
        ("/recipe", "recipe"),
        ("recipe/01-prune", "prune.prune"),
        ("recipe/02-recipe", "recipe"),
        ("recipe/02-recipe/01-finetune", "train.finetune"),
        ("recipe/02-recipe/02-kmeans", "share.kmeans"),
    ]


def test_a_pair_that_does_not_commute_keeps_its_order() -> None:
    mlp = BY_NAME["mlp"]
    pair = (Prune(sparsity=0.5), Finetune(epochs=1))
    there, back = (Recipe.from_yaml(Recipe(steps=order).to_yaml()) for order in (pair, pair[::-1]))
    assert there.steps == pair
    assert back.steps == pair[::-1]
    one, two = (effective(r(mlp.build(), Context(task=mlp.task())))["0.weight"] for r in (there, back))
    assert int((one == 0).sum()) == int((two == 0).sum()) == one.numel() // 2
    assert not torch.equal(one, two)


def test_prune_then_share_keeps_the_zeros() -> None:
    mlp = BY_NAME["mlp"]
    result = Recipe(steps=(Prune(sparsity=0.75), KMeans(bits=2)))(mlp.build())
    for name in ("0.weight", "3.weight"):
        weight = effective(result)[name]
        assert int((weight == 0).sum()) == int(0.75 * weight.numel())
        assert weight.unique().numel() <= 4


@pytest.mark.parametrize("later", [Prune(), KMeans(bits=1)], ids=lambda t: t.name)
def test_share_then_change_is_refused(later: Technique) -> None:
    mlp = BY_NAME["mlp"]
    with pytest.raises(PhaseError, match=r"0\.weight.*codes or few numbers.*densify"):
        Recipe(steps=(KMeans(bits=2), later))(mlp.build())
    allowed = Recipe(steps=(KMeans(bits=2), later.replace(densify=True)))(mlp.build())
    wanted = "mask" if isinstance(later, Prune) else "codes"
    assert {slot.phase for slot in slots(allowed).values() if len(slot.shape) == 2} == {wanted}


def test_the_empty_recipe_is_the_identity() -> None:
    mlp = BY_NAME["mlp"]
    model = mlp.build()
    result = Recipe()(model)
    assert result is not model
    assert bits(result.state_dict()) == bits(model.state_dict())
