"""The contract of a technique, as a pytest class to subclass."""

# ruff: noqa: S101 - a test suite that ships

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import pytest
import torch
from torch import nn

from espalier.core.context import Context
from espalier.core.errors import EspalierWarning, NeedError, NoEffectWarning, PhaseError, UsageError
from espalier.core.fields import Range
from espalier.core.forms import Shared
from espalier.core.method import Method, Technique, fields_of, ranges
from espalier.core.model import copy_model, digest, modes
from espalier.core.parametrize import slots
from espalier.core.recipe import Recipe, method_from_data
from espalier.core.task import Task
from espalier.prune import Prune
from espalier.share import KMeans
from espalier.testing.compare import (
    bits,
    effective,
    fingerprint,
    frozen_copy,
    generators,
    hooks,
    interface,
    outputs,
    storages,
)
from espalier.testing.models import EXAMPLES, Example

M = TypeVar("M", bound=Method)


def shortened(method: M, epochs: int = 1) -> M:
    """``method`` with every field called ``epochs``, its own and its parts', at most ``epochs``."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        if field.name == "epochs":
            changes["epochs"] = min(value, epochs)
        elif isinstance(value, Method):
            changes[field.name] = shortened(value, epochs)
        elif isinstance(value, tuple):
            changes[field.name] = tuple(shortened(v, epochs) if isinstance(v, Method) else v for v in value)
    return method.replace(**changes)


@dataclass(frozen=True)
class Outcome:
    """One run: the argument (and its fingerprint before), the task, the result, and what was warned."""

    argument: nn.Module
    before: dict[str, Any]
    task: Task
    result: nn.Module
    warned: tuple[type[Warning], ...]


class Untouchable(nn.Module):
    """Any work on it is an error."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Untouchable:
        raise AssertionError("the model was copied before the needs were checked")

    def forward(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("the model was run before the needs were checked")


class MethodContract:
    """Subclass and name ``method``: a technique, its class, or a tuple of these; parts are tested inside a technique.

    Register the class first (``espalier.core.registry.register``), else a recipe that names it cannot be read back.
    ``examples``: the models it must cope with. Override :meth:`context` where a run needs more than data and models.
    """

    method: ClassVar[Technique | type[Technique] | tuple[Technique | type[Technique], ...]]
    examples: ClassVar[tuple[Example, ...]] = EXAMPLES

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """One test per technique and example; runs are shared by the tests of a pair."""
        if "technique" in metafunc.fixturenames:
            given = self.method if isinstance(self.method, tuple) else (self.method,)
            found = [shortened(item() if isinstance(item, type) else item) for item in given]
            metafunc.parametrize("technique", found, ids=lambda t: t.name, scope="class")
        if "example" in metafunc.fixturenames:
            metafunc.parametrize("example", self.examples, ids=lambda e: e.name, scope="class")

    @classmethod
    def context(cls, technique: Technique, example: Example, task: Task, seed: int = 0) -> Context:
        """A context that has what ``technique`` needs; named models are copies of the example."""
        names = [need[6:] for need in technique.needs if need.startswith("model:") and need != "model:original"]
        return Context(task=task, seed=seed, models={name: example.build() for name in names})

    @classmethod
    def run(cls, technique: Technique, example: Example, model: nn.Module, seed: int = 0) -> Outcome:
        """Run ``technique``; espalier's own warnings are collected, any other is shown as ever."""
        task, before = example.task(), fingerprint(model)
        context = cls.context(technique, example, task, seed)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = technique(model, context)
        for warning in caught:
            if not issubclass(warning.category, EspalierWarning):
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        return Outcome(model, before, task, result, tuple(warning.category for warning in caught))

    @pytest.fixture(scope="class")
    @classmethod
    def outcome(cls, technique: Technique, example: Example) -> Outcome:
        """One run on the example; the tests of this pair share it and must not change it."""
        return cls.run(technique, example, example.build())

    # --- the description -----------------------------------------------------------------------------------------

    def test_card_is_complete(self, technique: Technique) -> None:
        """The file header names what it is and the paper, for the technique and all its parts."""
        for method in _with_parts(technique):
            card = method.card()
            assert card.summary, f"{method.name}: the first line of the file's docstring is missing"
            assert card.paper, f"{method.name}: the heading Paper is missing ('Paper  none' where there is none)"
            assert method.id, f"{method.name}: the class attribute id is missing"
            assert method.kind, f"{method.name}: the class attribute kind is missing"

    def test_recipe_round_trip(self, technique: Technique) -> None:
        """A recipe that holds it comes back equal from YAML and from JSON."""
        recipe = Recipe(steps=(technique, Recipe(steps=(technique,))))
        assert Recipe.from_yaml(recipe.to_yaml()) == recipe
        assert Recipe.from_data(json.loads(json.dumps(recipe.to_data(), allow_nan=False))) == recipe

    def test_unknown_field_is_refused(self, technique: Technique) -> None:
        """A misspelt field is refused with the right name."""
        for method in _with_parts(technique):
            for field in fields_of(type(method)):
                misspelt = field.name + "x"
                with pytest.raises(UsageError, match=f"(?s){misspelt}.*{field.name}"):
                    method_from_data(type(method), {misspelt: field.default})

    def test_bad_values_are_refused(self, technique: Technique) -> None:
        """A number out of range, NaN, and a value of the wrong type are refused with the field's name."""
        for method in _with_parts(technique):
            for field in fields_of(type(method)):
                limits = [field.range] if field.range else list(ranges(field.annotation))
                bad = [value for limit in limits for value in _outside(limit)]
                for value in (*bad, *((math.nan, True) if limits else ()), object()):
                    with pytest.raises(UsageError, match=field.name):
                        type(method)(**{field.name: value})

    def test_missing_need_is_named(self, technique: Technique) -> None:
        """What is missing is named before the model is copied or run."""
        task = self.examples[0].task()
        for need in technique.needs - {"model:original"}:
            lacking = dataclasses.replace(task, target=_nothing) if need == "labels" else task
            if need in ("train", "val", "test", "loss"):
                changes: dict[str, Any] = {need: None}
                lacking = dataclasses.replace(task, **changes)
            context = self.context(technique, self.examples[0], lacking)
            context.models.pop(need.removeprefix("model:"), None)
            with pytest.raises(NeedError, match=need.removeprefix("model:")):
                technique(Untouchable(), context)

    # --- the run -------------------------------------------------------------------------------------------------

    def test_argument_is_untouched(self, outcome: Outcome) -> None:
        """Values, gradients, identities, modes and hooks of the argument are as before; nothing is shared."""
        after = fingerprint(outcome.argument)
        for aspect, before in outcome.before.items():
            assert after[aspect] == before, f"the argument's {aspect} changed"
        assert outcome.result is not outcome.argument
        assert not storages(outcome.argument) & storages(outcome.result), "result and argument share memory"

    def test_same_seed_same_result(self, technique: Technique, example: Example, outcome: Outcome) -> None:
        """The caller's generators neither matter nor change; another seed runs too."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1234)
            before = generators()
            again = self.run(technique, example, example.build())
            other = self.run(technique, example, example.build(), seed=1)
            assert generators() == before, "a global generator was left changed"
        assert bits(again.result.state_dict()) == bits(outcome.result.state_dict())
        assert interface(outputs(other.result, other.task)) == interface(outputs(outcome.result, outcome.task))

    def test_interface_stays(self, outcome: Outcome) -> None:
        """Same structure, shapes and dtypes of the outputs, in eval and in training mode."""
        for training in (False, True):
            both = [_answers(model, outcome.task, training) for model in (outcome.argument, outcome.result)]
            assert interface(both[0]) == interface(both[1])

    def test_modes_and_hooks_stay(self, outcome: Outcome) -> None:
        """Every module that is still there has its mode and its hooks."""
        found, kept = modes(outcome.result), hooks(outcome.result)
        for path, training in outcome.before["modes"].items():
            assert found.get(path, training) == training, f"{path}: training mode is {found[path]}, was {training}"
        for place, before in outcome.before["hooks"].items():
            assert [hook for hook in kept.get(place, before) if hook in before] == before, f"{place}: a hook is gone"

    def test_ties_and_frozen_stay(self, outcome: Outcome) -> None:
        """Tied weights are still one parameter, frozen ones still frozen."""
        before, after = slots(outcome.argument), slots(outcome.result)
        for name in before.keys() & after.keys():
            assert after[name].names == before[name].names, f"{name} was tied to other names"
            assert after[name].latent.requires_grad == before[name].latent.requires_grad, (
                f"{name}: requires_grad changed"
            )

    def test_frozen_form_is_the_model(self, outcome: Outcome) -> None:
        """Filled from the stored representations alone, the plain model answers bit for bit the same."""
        copy = frozen_copy(outcome.result)
        assert bits(outputs(copy, outcome.task)) == bits(outputs(outcome.result, outcome.task))

    def test_file_holds_the_model(self, outcome: Outcome) -> None:
        """Filled from the bytes of a file, the plain model answers bit for bit the same."""
        copy = frozen_copy(outcome.result, through_file=True)
        assert bits(outputs(copy, outcome.task)) == bits(outputs(outcome.result, outcome.task))

    def test_no_silent_no_op(self, outcome: Outcome) -> None:
        """Where nothing changed, that is said."""
        if digest(outcome.result) == digest(outcome.argument):
            assert NoEffectWarning in outcome.warned, "nothing changed and nothing was said"

    # --- the phases ----------------------------------------------------------------------------------------------

    def test_masks_stay(self, technique: Technique, example: Example) -> None:
        """Pruned positions stay zero, or the step is refused."""
        masked = Prune(sparsity=0.5)(example.build(), Context(task=example.task()))
        after = self._after(technique, example, masked)
        for name, weight in effective(masked).items():
            if after is not None and weight.ndim >= 2 and name in after and after[name].shape == weight.shape:
                assert not after[name][weight == 0].any(), f"{name}: a pruned weight came back"

    def test_codes_stay(self, technique: Technique, example: Example) -> None:
        """Weights that share a value go on sharing it, or the step is refused."""
        shared = KMeans(bits=2)(example.build(), Context(task=example.task()))
        after = self._after(technique, example, shared)
        for name, slot in slots(shared).items():
            if after is None or not isinstance(slot.form, Shared) or name not in after:
                continue
            if after[name].shape == slot.shape:
                for symbol in set(slot.form.index.flatten().tolist()):
                    values = after[name][slot.form.index == symbol]
                    assert (values == values[0]).all(), f"{name}: weights that shared a value no longer do"

    def _after(self, technique: Technique, example: Example, model: nn.Module) -> dict[str, Any] | None:
        try:
            return effective(self.run(technique, example, model).result)
        except PhaseError:
            return None


def _with_parts(method: Method) -> Iterator[Method]:
    yield method
    for part in method.parts():
        yield from _with_parts(part)


def _nothing(_: Any) -> None:
    """The label of a batch without labels."""


def _answers(model: nn.Module, task: Task, training: bool) -> list[Any]:
    copy = copy_model(model).train(training)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        return [task.predict(copy, batch) for batch in task.data("val")]


def _outside(limit: Range) -> list[float]:
    """Numbers beyond both ends."""
    below = limit.low if limit.above else limit.low - 1
    whole = int(below) if below == int(below) else below
    above = limit.high if limit.below else limit.high + 1
    return [whole, *([] if math.isinf(limit.high) else [int(above)])]
