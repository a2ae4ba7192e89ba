"""Method: everything the literature offers, as a frozen dataclass with a paper card.

A method's fields *are* its hyper-parameters and the only home of their defaults. ``Technique`` adds
``(model, context) -> model``; all other methods are *parts* that travel as fields of a technique.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import inspect
import math
import sys
import types
import typing
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, Union, get_args, get_origin

from espalier.core.errors import EspalierError, UsageError, did_you_mean
from espalier.core.fields import Range

if TYPE_CHECKING:
    from torch import nn

    from espalier.core.context import Context

HEADINGS = ("Paper", "Formula", "Departs")


@dataclass(frozen=True)
class Card:
    """What the header of a method's file says: one line, the paper, the formula, deliberate differences."""

    summary: str
    paper: str
    formula: str
    departs: str


@dataclass(frozen=True)
class Field:
    """One hyper-parameter: name, plain type, range (if numeric), default (``MISSING`` if none)."""

    name: str
    annotation: Any
    range: Range | None
    default: Any

    @property
    def type_name(self) -> str:
        """The type as a person reads it."""
        return _type_name(self.annotation)


def parse_card(doc: str) -> Card:
    """Parse the module docstring of a method file (see CONTRIBUTING for the layout)."""
    lines = inspect.cleandoc(doc).splitlines()
    sections: dict[str, list[str]] = {}
    current: list[str] | None = None
    for line in lines[1:]:
        heading = line.split(" ", 1)[0]
        if heading in HEADINGS:
            current = sections.setdefault(heading, [])
            current.append(line[len(heading) :].strip())
        elif line.startswith((" ", "\t")) and current is not None:
            current.append(line.strip())
        else:
            current = None
    joined = {name: " ".join(part for part in parts if part) for name, parts in sections.items()}
    return Card(
        summary=lines[0].strip() if lines else "",
        paper=joined.get("Paper", ""),
        formula=joined.get("Formula", ""),
        departs=joined.get("Departs", ""),
    )


@dataclass(frozen=True, kw_only=True)
class Method:
    """Base of every method. Subclasses are frozen keyword-only dataclasses with a class attribute ``id``."""

    id: ClassVar[str] = ""
    verb: ClassVar[str] = ""
    kind: ClassVar[str] = ""

    def __new__(cls, *args: Any, **given: Any) -> Self:
        """Refuse what is no field here, before a generated ``__init__`` would with a TypeError and no close name."""
        if args:
            raise UsageError(
                f"{cls.__name__} takes its fields by name, {cls.__name__}(field=value); got {len(args)} without: "
                f"{', '.join(repr(value)[:60] for value in args[:3])}. Its fields: {', '.join(field_names(cls))}."
            )
        check_names(cls, given)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        problems = [problem for field in fields_of(type(self)) for problem in _check(field, getattr(self, field.name))]
        problems = problems or self.conflicts()  # conflicts() may rely on the types
        if problems:
            raise UsageError(f"{self.name}: " + "; ".join(problems) + ".")

    def conflicts(self) -> list[str]:
        """Sentences about fields that do not go together; empty when all is well."""
        return []

    @property
    def name(self) -> str:
        """``verb.id``, unique in the registry."""
        return f"{self.verb}.{self.id}" if self.verb else self.id or type(self).__name__

    @property
    def needs(self) -> frozenset[str]:
        """What must be there before any work: ``train``, ``val``, ``labels``, ``model:NAME``; union over parts."""
        return frozenset().union(*(part.needs for part in self.parts()))

    def parts(self) -> Iterator[Method]:
        """The methods held in this method's fields."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            for item in value if isinstance(value, tuple) else (value,):
                if isinstance(item, Method):
                    yield item

    @classmethod
    def card(cls) -> Card:
        """The paper card, parsed from the header of the file that defines the class."""
        return parse_card(sys.modules[cls.__module__].__doc__ or "")

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed; unknown fields raise ``UsageError``."""
        check_names(type(self), changes)
        return dataclasses.replace(self, **changes)


def field_names(cls: type[Method]) -> list[str]:
    """Names of the hyper-parameters of ``cls``."""
    return [field.name for field in dataclasses.fields(cls)]


def check_names(cls: type[Method], given: Mapping[str, Any]) -> None:
    """Raise ``UsageError`` naming every field in ``given`` that ``cls`` does not have."""
    names = field_names(cls)
    unknown = [name for name in given if name not in names]
    if unknown:
        label = f"{cls.verb}.{cls.id}" if cls.verb else cls.id
        raise UsageError(
            f"{label} has no field "
            + "; no field ".join(f"{name!r}.{did_you_mean(name, names)}" for name in unknown)
            + f" Its fields: {', '.join(names) or 'none'}."
        )


def fields_of(cls: type[Method]) -> list[Field]:
    """The hyper-parameters of ``cls`` with their types, ranges and defaults."""
    hints = typing.get_type_hints(cls, include_extras=True)
    found = []
    for field in dataclasses.fields(cls):
        annotation, limits = hints[field.name], None
        if get_origin(annotation) is Annotated:
            annotation, *extras = get_args(annotation)
            limits = next((extra for extra in extras if isinstance(extra, Range)), None)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        found.append(Field(field.name, annotation, limits, default))
    return found


def _type_name(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin is Annotated:
        return _type_name(get_args(annotation)[0])
    if origin is Literal:
        return " | ".join(repr(value) for value in get_args(annotation))
    if origin in (Union, types.UnionType):
        return " | ".join(_type_name(arg) for arg in get_args(annotation))
    if origin is not None:
        inner = ", ".join("..." if arg is Ellipsis else _type_name(arg) for arg in get_args(annotation))
        return f"{getattr(origin, '__name__', origin)}[{inner}]"
    return "None" if annotation is type(None) else getattr(annotation, "__name__", str(annotation))


def ranges(annotation: Any) -> Iterator[Range]:
    """The ranges of the numbers a field of this type may hold itself (not inside a tuple or mapping)."""
    if get_origin(annotation) is Annotated:
        yield from (extra for extra in get_args(annotation)[1:] if isinstance(extra, Range))
    elif get_origin(annotation) in (Union, types.UnionType):
        for arg in get_args(annotation):
            yield from ranges(arg)


def fits(annotation: Any, value: Any) -> bool:
    """Whether ``value`` has the annotated type (an int passes as float, bool never as a number), ranges included."""
    origin, args = get_origin(annotation), get_args(annotation)
    if annotation is Any:
        return True
    if origin is Annotated:
        limits = [extra for extra in args[1:] if isinstance(extra, Range)]
        return fits(args[0], value) and all(limit.allows(value) for limit in limits)
    if origin is Literal:
        return value in args
    if origin in (Union, types.UnionType):
        return any(fits(arg, value) for arg in args)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if len(args) == 2 and args[1] is Ellipsis:
            return all(fits(args[0], item) for item in value)
        return len(args) == len(value) and all(fits(arg, item) for arg, item in zip(args, value, strict=True))
    if origin is not None and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(fits(args[0], k) and fits(args[1], v) for k, v in value.items())
    if annotation is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, annotation)


def _check(field: Field, value: Any) -> list[str]:
    limits = [field.range] if field.range is not None else list(ranges(field.annotation))
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)
    if number and limits and not any(limit.allows(value) for limit in limits):
        allowed = " or ".join(f"{limit} {limit.unit}".strip() for limit in limits)
        return [f"{field.name}={value!r} is out of range (allowed: {allowed})"]
    if not fits(field.annotation, value):
        if hint := _part_hint(field, value):
            return [hint]
        known = ", ".join(sorted(_parts(field)))
        return [f"{field.name}={value!r} is not of type {field.type_name}" + (f" (one of: {known})" if known else "")]
    return []


def _parts(field: Field) -> dict[str, type[Method]]:
    """The parts that ``field`` takes, by id; of the rooms that were imported."""
    from espalier.core.registry import methods, part_type

    base = part_type(field)
    return {} if base is None else {cls.id: cls for cls in methods() if issubclass(cls, base)}


def _part_hint(field: Field, value: Any) -> str:
    """What to do where a field for a part got its name or its class in place of an object; else nothing.

    The names are those of the rooms that were imported: the caller's class comes from one of them.
    """
    from espalier.core.registry import part_type

    base = part_type(field)
    wrong = [item for item in (value if isinstance(value, tuple) else (value,)) if isinstance(item, (str, type))]
    if base is None or not wrong:
        return ""
    item, label = wrong[0], field.name
    parts = _parts(field)
    if isinstance(item, type):
        if not issubclass(item, base):
            return ""
        return f"{label} got the class {item.__name__}; pass an object: {_shown(field, value, item)}"
    if not parts:
        return f"{label} got the name {item!r}; pass an object of a class of type {base.__name__}"
    name = item.rpartition(".")[2]
    close = difflib.get_close_matches(name, sorted(parts), n=1, cutoff=0.6)
    default = type(field.default).id if isinstance(field.default, base) else min(parts)
    cls = parts[name if name in parts else close[0] if close else default]
    hint = "" if name in parts else did_you_mean(name, parts)
    return (
        f"{label}={item!r} is a name; the field takes a {base.kind or base.__name__} itself.{hint} "
        f"{'Pass' if name in parts or close else 'For example'} {_shown(field, value, cls)}"
    )


def _shown(field: Field, value: Any, cls: type[Method]) -> str:
    """How a caller writes the part: from its room where that offers it, else from its own module."""
    room = ".".join(cls.__module__.split(".")[:2])
    short = room.startswith("espalier.") and getattr(sys.modules.get(room), cls.__name__, None) is cls
    home = room.replace("espalier.", "es.") if short else cls.__module__
    call = f"{home}.{cls.__name__}()"
    return f"{field.name}=({call},)" if isinstance(value, tuple) else f"{field.name}={call}"


@dataclass(frozen=True, kw_only=True)
class Technique(Method):
    """A method that turns a model into another: ``technique(model, context) -> model``."""

    kind: ClassVar[str] = "technique"
    changes_outputs: ClassVar[bool] = False
    """Whether the result may hand back other shapes than the model did: a new head for a new task."""

    @abstractmethod
    def transform(self, model: nn.Module, context: Context) -> nn.Module:
        """Work on ``model``, a copy this technique owns, and return the result (the same object or a new one)."""

    def __call__(self, model: nn.Module, context: Context | None = None) -> nn.Module:
        """Copy ``model`` once, transform the copy and return it; the argument is never touched.

        The training mode of every module is handed back as it came. Raises ``NeedError`` before any
        work when the context lacks what the technique needs.
        """
        from espalier.core.context import Context
        from espalier.core.model import copy_model, keep_mode, unwrapped

        context, model = context or Context(), unwrapped(model)
        context.check(self)
        with context.entered(), keep_mode(model) as restore:
            if "original" not in context.models:
                context.models["original"] = model
            return restore(context.run(self, copy_model(model)))


def describe_error(error: BaseException) -> str:
    """One sentence for ``error``: its own words if espalier raised it, else type and message."""
    return str(error) if isinstance(error, EspalierError) else f"{type(error).__name__}: {error}"


def clone(method: Method) -> Method:
    """An independent copy of ``method`` (its mapping fields copied too)."""
    return copy.deepcopy(method)
