"""The context: needs named in one go, seeds by path, warnings for steps without effect, children, progress."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from espalier.core.context import Context, Progress, derive_seed
from espalier.core.errors import EspalierWarning, NeedError, NoEffectWarning
from espalier.core.method import Technique
from espalier.core.recipe import Recipe
from espalier.core.task import Task
from espalier.testing import EXAMPLES

BY_NAME = {example.name: example for example in EXAMPLES}


@dataclass(frozen=True, kw_only=True)
class Asks(Technique):
    id: ClassVar[str] = "asks"
    verb: ClassVar[str] = "toy"
    wanted: tuple[str, ...] = ()

    @property
    def needs(self) -> frozenset[str]:
        return frozenset(self.wanted)

    def transform(self, model: nn.Module, context: Context) -> nn.Module:
        return model


@dataclass(frozen=True, kw_only=True)
class Draws(Technique):
    """Adds noise: from the step's generator, the forked global one, or both."""

    id: ClassVar[str] = "draws"
    verb: ClassVar[str] = "toy"

    def transform(self, model: nn.Module, context: Context) -> nn.Module:
        with torch.no_grad(), context.forked():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape))
                parameter.add_(torch.randn(parameter.shape, generator=context.generator("salt")))
        return model


def linear() -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(3, 2)


def test_everything_missing_is_named_in_one_error() -> None:
    step = Asks(wanted=("train", "val", "labels", "loss", "model:teacher"))
    with pytest.raises(NeedError) as caught:
        step(linear(), Context())
    for words in (
        "toy.asks needs", "labels in the batches", "a loss (Task(loss=...))", "a model called 'teacher'",
        "training data (Task(train=...))", "validation data (Task(val=...))",
    ):  # fmt: skip
        assert words in str(caught.value)


def test_what_is_there_is_not_missed() -> None:
    task = BY_NAME["mlp"].task()
    context = Context(task=task, models={"teacher": linear()})
    context.check(Asks(wanted=("train", "val", "labels", "model:teacher", "model:original")))
    with pytest.raises(NeedError, match="labels in the batches"):
        Context(task=Task(train=[torch.ones(2, 3)])).check(Asks(wanted=("labels", "train")))


def test_needs_of_the_last_step_are_named_before_the_first_runs() -> None:
    model = linear()
    model.register_forward_pre_hook(lambda *_: pytest.fail("ran"))
    with pytest.raises(NeedError, match="training data"):
        Recipe(steps=(Draws(), Recipe(steps=(Asks(wanted=("train",)),))))(model, Context())


def test_named_models() -> None:
    context = Context(models={"teacher": linear(), "best": linear()})
    assert context.model("teacher") is context.models["teacher"]
    with pytest.raises(NeedError, match="no model is called 'techer'; there is best, teacher"):
        context.model("techer")
    with pytest.raises(NeedError, match="there is none"):
        Context().model("original")
    with pytest.raises(NeedError, match="needs a task"):
        _ = Context().data


def test_the_argument_is_the_original_for_all_steps() -> None:
    model, seen = linear(), []

    @dataclass(frozen=True, kw_only=True)
    class Looks(Draws):
        def transform(self, model: nn.Module, context: Context) -> nn.Module:
            seen.append(context.model("original"))
            return super().transform(model, context)

    Recipe(steps=(Looks(), Looks()))(model, Context())
    assert all(found is model for found in seen)
    assert len(seen) == 2


@given(seed=st.integers(0, 2**40), path=st.text(max_size=10))
def test_derived_seeds_are_seeds(seed: int, path: str) -> None:
    found = derive_seed(seed, path)
    assert 0 <= found < 2**63
    assert found == derive_seed(seed, path)
    assert found != derive_seed(seed + 1, path)
    assert found != derive_seed(seed, path + "x")
    torch.Generator().manual_seed(found)


def test_a_step_is_seeded_by_root_seed_and_path() -> None:
    results = {}
    for seed in (0, 1):
        for depth in (1, 2):
            step: Technique = Draws()
            for _ in range(depth):
                step = Recipe(steps=(step,))
            results[seed, depth] = step(linear(), Context(seed=seed)).weight
            again = step(linear(), Context(seed=seed)).weight
            assert torch.equal(results[seed, depth], again)
    values = list(results.values())
    assert not any(torch.equal(one, other) for i, one in enumerate(values) for other in values[i + 1 :])


def test_one_generator_per_salt_and_the_callers_is_left_alone() -> None:
    context = Context(seed=3, path="01-x")
    draws = [torch.rand(4, generator=context.generator(salt)) for salt in ("a", "a", "b")]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    torch.manual_seed(5)
    state = torch.get_rng_state()
    Draws()(linear(), Context())
    with context.forked():
        torch.rand(3)
    with pytest.raises(KeyError), context.forked(), context.entered():
        torch.rand(3)
        raise KeyError
    assert torch.equal(torch.get_rng_state(), state)


def test_no_effect_warns_with_the_reasons() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Skips(Asks):
        def transform(self, model: nn.Module, context: Context) -> nn.Module:
            context.skip("weight", "too small")
            context.skip("bias", "too small")
            return model

    with pytest.warns(NoEffectWarning, match=r"toy.asks changed nothing \(too small\)\.$"):
        Skips()(linear())
    with pytest.warns(NoEffectWarning, match="toy.asks changed nothing"):
        Recipe(steps=(Draws(), Asks()))(linear())
    Recipe(steps=())(linear())
    Draws()(linear())


def test_a_change_of_structure_alone_is_a_change() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Swaps(Asks):
        def transform(self, model: nn.Module, context: Context) -> nn.Module:
            return nn.Sequential(*(nn.ReLU() if isinstance(m, nn.Tanh) else m for m in model))

    Swaps()(nn.Sequential(nn.Linear(3, 2), nn.Tanh()))


def test_children_share_what_is_common_and_own_their_record() -> None:
    told: list[Progress] = []
    parent = Context(task=Task(), seed=4, path="02-recipe", deadline=1.0, listener=told.append, models={"a": linear()})
    child = parent.child("01-draws", Draws())
    assert child.path == "02-recipe/01-draws"
    assert (child.task, child.seed, child.deadline, child.models) == (parent.task, 4, 1.0, parent.models)
    assert child.models is parent.models
    assert (child.record.path, child.record.method) == (child.path, "toy.draws")
    child.skip("w", "why")
    child.note("a note")
    with pytest.warns(EspalierWarning, match="careful"):
        child.warn("careful")
    assert child.record.skipped == [{"name": "w", "reason": "why"}]
    assert (child.record.notes, child.record.warnings) == (["a note"], ["careful"])
    assert not parent.record.skipped
    child.progress("training", 3, 10, loss=0.5)
    assert told == [Progress("02-recipe/01-draws", "training", 3, 10, {"loss": 0.5})]
    assert Context().epochs() is None
    Context().progress("unheard", 1, 2)


def test_the_clock() -> None:
    assert not Context().out_of_time()
    assert Context(deadline=time.monotonic() - 1).out_of_time()
    assert not Context(deadline=time.monotonic() + 100).out_of_time()


def test_modes_come_back_even_from_a_technique_that_changes_them() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Evals(Draws):
        def transform(self, model: nn.Module, context: Context) -> nn.Module:
            return super().transform(model, context).eval()

    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.Linear(2, 2))
    model[1].eval()
    result = Evals()(model)
    assert [m.training for m in result.modules()] == [True, True, False, True]

    @dataclass(frozen=True, kw_only=True)
    class Looks(Draws):
        def transform(self, model: nn.Module, context: Context) -> nn.Module:
            assert [m.training for m in model.modules()] == [True, True, False, True]
            return super().transform(model, context)

    Recipe(steps=(Evals(), Looks()))(model)


def test_a_failing_step_leaves_the_argument_as_it_was() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Fails(Draws):
        def transform(self, model: nn.Module, context: Context) -> nn.Module:
            context.model("original").eval()
            raise OSError("disk gone")

    model = linear()
    with pytest.raises(OSError, match="disk gone"):
        Fails()(model)
    assert model.training


def test_measure_tells_how_far_it_is() -> None:
    mlp, told = BY_NAME["mlp"], []
    model, task = mlp.build(), mlp.task()
    score = Context(task=task, listener=told.append).measure(model)
    assert score == task.measure(model, "val")
    assert told
    assert (told[-1].label, told[-1].done, told[-1].total) == ("val metric", 1, 1)
