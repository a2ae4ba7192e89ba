"""Every registered part: it stands as it is, travels in a recipe, runs inside a technique that holds it."""

from __future__ import annotations

import types
import typing
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import espalier
from espalier.api import fill_registry
from espalier.core import registry
from espalier.core.context import Context
from espalier.core.errors import EspalierWarning, UnknownNameError, UsageError
from espalier.core.fields import Range
from espalier.core.method import Method, Technique, fields_of, parse_card
from espalier.core.recipe import FileOptions, Recipe
from espalier.prune import Global, Linear, Units
from espalier.quantize import AffineInput
from espalier.testing import EXAMPLES, bits, frozen_copy, outputs, shortened

fill_registry()
METHODS = list(registry.methods())
PARTS = [cls for cls in METHODS if not issubclass(cls, Technique)]
CODERS = [cls for cls in PARTS if cls.kind == "coder"]
"""Parts of a file, named in a recipe's ``file`` options; all others are parts of techniques."""
SOURCE = Path(espalier.__file__).parent


FOR = {"prune.heads": "attention", "prune.layers": "twice", "prune.activations": "mlp"}
"""Parts that find nothing to do in most networks, and the example they find something in."""


REFUSED = {("federated", "stopping")}
"""Fields in which a technique takes no part at all, and says why."""


def named(cls: type[Method]) -> str:
    return f"{cls.verb}.{cls.id}"


def carriers(part: type[Method]) -> Iterator[Technique]:
    """Every technique with this part in a field that takes it, training where it can; also parts of its parts."""
    for technique in METHODS:
        if issubclass(technique, Technique):
            yield from (shortened(made, 2) for made in _carrying(technique, part(), ()) if isinstance(made, Technique))


def _carrying(cls: type[Method], part: Method, inside: tuple[type[Method], ...]) -> Iterator[Method]:
    """``cls`` with ``part`` in every field that takes it, or in a part that does."""
    for field in fields_of(cls):
        base = registry.part_type(field)
        if base is None or cls in inside or (cls.id, field.name) in REFUSED:
            continue
        direct = [part] if isinstance(part, base) else []
        nested = [made for held in PARTS if issubclass(held, base) for made in _carrying(held, part, (*inside, cls))]
        for value in (*direct, *nested):
            given: Any = (value,) if typing.get_origin(field.annotation) is tuple else value
            training = {"epochs": 1} if "epochs" in {f.name for f in fields_of(cls)} else {}
            yield fitting(cls, {field.name: given, **training})


COMPANIONS: tuple[dict[str, Any], ...] = (
    {}, {"pattern": Units()}, {"scope": Global()}, {"schedule": Linear()}, {"activations": AffineInput(), "epochs": 2},
)  # fmt: skip
"""What a part may need beside it where it does not go with a technique's defaults; they say so themselves."""


def fitting(cls: type[Method], fields: dict[str, Any]) -> Method:
    """``cls`` with ``fields`` and the first companions they go with."""
    for companions in COMPANIONS:
        try:
            return cls(**{**companions, **fields, **{k: v for k, v in companions.items() if k == "epochs"}})
        except UsageError as error:
            refusal = error
    raise refusal


def bare_numbers(annotation: Any) -> Iterator[Any]:
    """Numeric types inside ``annotation`` that carry no range."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        if not any(isinstance(extra, Range) for extra in args[1:]):
            yield from bare_numbers(args[0])
    elif origin is not typing.Literal and args:
        for arg in args:
            yield from bare_numbers(arg)
    elif annotation in (int, float):
        yield annotation


@pytest.mark.parametrize("cls", METHODS, ids=named)
def test_runs_as_it_stands_and_is_found(cls: type[Method]) -> None:
    assert cls() == cls()
    assert registry.lookup(named(cls)) is cls
    room = getattr(espalier, cls.__module__.split(".")[1])
    offered = [getattr(room, name) for name in room.__all__]
    assert any(cls is item or (isinstance(item, tuple) and cls in item) for item in offered), (
        "its room does not offer it"
    )


@pytest.mark.parametrize("cls", METHODS, ids=named)
def test_numbers_are_typed_by_the_vocabulary(cls: type[Method]) -> None:
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in fields_of(cls):
        assert not list(bare_numbers(hints[field.name])), (
            f"{named(cls)}.{field.name} has a number without unit and range"
        )
        assert not isinstance(field.annotation, types.FunctionType)
        assert "Callable" not in field.type_name, f"{named(cls)}.{field.name}: callables do not travel"


@pytest.mark.parametrize("cls", METHODS, ids=named)
def test_header_has_the_layout(cls: type[Method]) -> None:
    path = SOURCE.joinpath(*cls.__module__.split(".")[1:]).with_suffix(".py")
    text = path.read_text()
    assert text.startswith('r"""'), f"{path.name} starts with a raw docstring"
    card = parse_card(text[4 : text.index('"""', 4)])
    assert card == cls.card()
    assert card.summary.endswith(".")
    assert card.paper
    assert card.formula, f"{path.name} gives no Formula"


@pytest.mark.parametrize("cls", CODERS, ids=named)
def test_coder_travels_by_name(cls: type[Method]) -> None:
    recipe = Recipe(file=FileOptions(coders=(cls.id,)))
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


@pytest.mark.parametrize("cls", [part for part in PARTS if part not in CODERS], ids=named)
def test_part_works_inside_a_technique(cls: type[Method]) -> None:
    found = list(carriers(cls))
    assert found, f"no technique takes {named(cls)}"
    for technique in found:
        assert Recipe.from_yaml(Recipe(steps=(technique,)).to_yaml()).steps == (technique,)
    example = next((e for e in EXAMPLES if e.name == FOR.get(named(cls))), EXAMPLES[1])
    task, model = example.task(), example.build()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EspalierWarning)
        result = found[0](model, Context(task=task))
        again = found[0](model, Context(task=task))
    assert bits(result.state_dict()) == bits(again.state_dict())
    assert bits(outputs(frozen_copy(result), task)) == bits(outputs(result, task))


@pytest.mark.parametrize("cls", PARTS, ids=named)
def test_part_is_no_step(cls: type[Method]) -> None:
    with pytest.raises(UnknownNameError, match=f"is a {cls.kind}, not a step"):
        registry.technique(named(cls))
