"""Recipe: techniques in order, itself a technique; plain data and YAML both ways.

steps:
  - prune.prune: {criterion: magnitude, sparsity: 0.9, epochs: 10}
  - share.kmeans: {bits: {"type:Conv2d": 8, "type:Linear": 5}}
  - train.finetune                     # a step with its defaults
file: {floats: fp16}
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import yaml

from espalier.core import registry
from espalier.core.errors import UsageError, did_you_mean
from espalier.core.method import Method, Technique, check_names, fields_of, fits

if TYPE_CHECKING:
    from torch import nn

    from espalier.core.context import Context


@dataclass(frozen=True, kw_only=True)
class FileOptions:
    """How the result is written. ``floats``: ``auto`` takes fp16 where the metric on val allows it."""

    coders: tuple[str, ...] = ("adaptive", "rans", "huffman")
    floats: typing.Literal["auto", "fp32", "fp16"] = "auto"

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        bad = [f"{name}={getattr(self, name)!r}" for name, hint in hints.items() if not fits(hint, getattr(self, name))]
        if bad:
            raise UsageError(
                f"file: {', '.join(bad)} not allowed; floats is auto, fp32 or fp16, coders a list of names."
            )


@dataclass(frozen=True, kw_only=True)
class Recipe(Technique):
    """Techniques in order. The empty recipe is the identity; recipes nest."""

    id: ClassVar[str] = "recipe"
    steps: tuple[Technique, ...] = ()
    file: FileOptions = field(default_factory=FileOptions)

    def transform(self, model: nn.Module, context: Context) -> nn.Module:
        """Run the steps in order, each through ``context.run``."""
        for number, step in enumerate(self.steps, 1):
            model = context.run(step, model, f"{number:02d}-{step.id}")
        return model

    @classmethod
    def from_yaml(cls, text: str) -> Recipe:
        """Read a recipe. Raises ``UsageError`` saying what is wrong and what is allowed."""
        try:
            data = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UsageError(f"the recipe is no YAML: {error}") from error
        return cls.from_data(data)

    @classmethod
    def from_data(cls, data: Any) -> Recipe:
        """Build a recipe from plain data: a mapping with ``steps`` (and ``file``), or a list of steps."""
        if isinstance(data, list):
            data = {"steps": data}
        if not isinstance(data, Mapping) or not isinstance(data.get("steps", []), list):
            raise UsageError(f"a recipe is a mapping with a list 'steps'; got {type(data).__name__}.")
        unknown = [key for key in data if key not in ("steps", "file")]
        if unknown:
            raise UsageError(f"a recipe has no part {unknown[0]!r}.{did_you_mean(str(unknown[0]), ['steps', 'file'])}")
        options = data.get("file") or {}
        if not isinstance(options, Mapping):
            raise UsageError(f"file takes named options; got {options!r}.")
        names = [option.name for option in dataclasses.fields(FileOptions)]
        for key in options:
            if key not in names:
                raise UsageError(f"file has no option {key!r}.{did_you_mean(str(key), names)}")
        given: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in options.items()}
        file = FileOptions(**given)
        return cls(steps=tuple(step_from_data(step) for step in data.get("steps", [])), file=file)

    def to_yaml(self) -> str:
        """The recipe as YAML with every field written out; ``from_yaml`` gives an equal recipe back."""
        return yaml.safe_dump(self.to_data(), sort_keys=False, width=120)

    def to_data(self) -> dict[str, Any]:
        """The recipe as plain data."""
        return {
            "steps": [step_to_data(step) for step in self.steps],
            "file": {"coders": list(self.file.coders), "floats": self.file.floats},
        }


def step_to_data(step: Technique) -> dict[str, Any]:
    """One step as ``{"verb.id": fields}``; a nested recipe as ``{"recipe": {...}}``."""
    if isinstance(step, Recipe):
        return {"recipe": step.to_data()}
    return {step.name: fields_to_data(step)}


def fields_to_data(method: Method) -> dict[str, Any]:
    """The fields of a method as plain data."""
    return {name: _plain(getattr(method, name)) for name in (f.name for f in dataclasses.fields(method))}


def _plain(value: Any) -> Any:
    if isinstance(value, Technique):
        return step_to_data(value)
    if isinstance(value, Method):
        inner = fields_to_data(value)
        return {value.id: inner} if inner else value.id
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value


def step_from_data(data: Any) -> Technique:
    """Build one step from ``"verb.id"`` or ``{"verb.id": fields}``."""
    if isinstance(data, str):
        data = {data: {}}
    if not isinstance(data, Mapping) or len(data) != 1:
        raise UsageError(f"a step is 'verb.id' or {{verb.id: fields}}; got {data!r}.")
    ((name, given),) = data.items()
    if name == "recipe":
        return Recipe.from_data(given)
    return typing.cast(Technique, method_from_data(registry.technique(str(name)), given))


def method_from_data(cls: type[Method], given: Any) -> Method:
    """Build a method of class ``cls`` from plain fields, its parts resolved by name."""
    given = {} if given is None else given
    if not isinstance(given, Mapping):
        raise UsageError(f"{cls.verb}.{cls.id} takes named fields; got {given!r}.")
    check_names(cls, given)
    known = {f.name: f for f in fields_of(cls)}
    return cls(**{name: _resolve(known[name].annotation, value) for name, value in given.items()})


def _resolve(annotation: Any, value: Any) -> Any:
    """Turn plain data into what a field of this type holds."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _resolve(args[0], value)
    if origin is tuple:
        if not isinstance(value, list):
            return value
        inner = args[:1] * len(value) if len(args) == 2 and args[1] is Ellipsis else args
        return tuple(map(_resolve, inner, value)) if len(inner) == len(value) else tuple(value)
    if annotation is float and isinstance(value, str):
        return _number(value)  # YAML 1.1 reads 1e-4 as a word
    if isinstance(annotation, type) and issubclass(annotation, Method):
        if issubclass(annotation, Technique) and not isinstance(value, Method):
            return step_from_data(value)
        if isinstance(value, str):
            return method_from_data(registry.part(annotation, value), {})
        if isinstance(value, Mapping) and len(value) == 1:
            ((name, given),) = value.items()
            return method_from_data(registry.part(annotation, str(name)), given)
        return value
    if args and origin is not typing.Literal and not (isinstance(origin, type) and issubclass(origin, Mapping)):
        for arg in args:
            if arg is type(None) and value is None:
                return None
        for arg in args:
            if fits(arg, value):
                return value
        refusals = []
        for arg in args:
            try:
                found = _resolve(arg, value)
            except UsageError as error:
                refusals.append(error)
                continue
            if fits(arg, found):
                return found
        if refusals and isinstance(value, (str, Mapping)):  # a part's own words are the clearest
            raise refusals[-1]
    return value


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text
