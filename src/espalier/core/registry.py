"""The explicit registry: verb -> id -> class. Rooms register their tuple of classes; nothing is discovered."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import Any

from espalier.core.errors import UnknownNameError, UsageError, did_you_mean
from espalier.core.method import Field, Method, Technique, fields_of

_METHODS: dict[str, dict[str, type[Method]]] = {}


def register(verb: str, classes: tuple[type[Method], ...]) -> tuple[type[Method], ...]:
    """Enter ``classes`` under ``verb``; a violation of the contract names class, file and field."""
    table = _METHODS.setdefault(verb, {})
    for cls in classes:
        where = f"{cls.__name__} in {inspect.getsourcefile(cls)}"
        parameters = vars(cls).get("__dataclass_params__")  # its own: a parent's would hide its fields
        if parameters is None or not parameters.frozen:
            raise UsageError(f"{where} must be a frozen dataclass.")
        if not cls.id or not cls.kind:
            raise UsageError(f"{where} needs the class attributes id and kind; got id={cls.id!r}, kind={cls.kind!r}.")
        if table.get(cls.id, cls) is not cls:
            raise UsageError(f"{where}: the name {verb}.{cls.id} is taken by {table[cls.id].__name__}.")
        for field in fields_of(cls):
            if field.default is dataclasses.MISSING:
                raise UsageError(f"{where}: field {field.name!r} needs a default; a method must run as it stands.")
        card = cls.card()
        if not card.summary or not card.paper:
            raise UsageError(
                f"{where}: the file header needs a first line and 'Paper' ('Paper  none' where there is none)."
            )
        cls.verb = verb
        table[cls.id] = cls
    return classes


def register_plugins() -> None:
    """Enter third-party methods: entry points of group ``espalier.methods``, each a tuple of classes, named by verb."""
    for point in entry_points(group="espalier.methods"):
        register(point.name, tuple(point.load()))


def methods() -> Iterator[type[Method]]:
    """Every registered class, ordered by verb and id."""
    for verb in sorted(_METHODS):
        yield from (_METHODS[verb][name] for name in sorted(_METHODS[verb]))


def lookup(name: str) -> type[Method]:
    """The class called ``verb.id``, or ``id`` where only one verb has it. Raises ``UnknownNameError``."""
    verb, _, rest = name.partition(".")
    if rest:
        found = [cls for cls in methods() if cls.verb == verb and cls.id == rest]
    else:
        found = [cls for cls in methods() if cls.id == name]
    if len(found) == 1:
        return found[0]
    if found:
        raise UnknownNameError(f"method {name!r} is ambiguous: {', '.join(f'{c.verb}.{c.id}' for c in found)}.")
    known = [f"{cls.verb}.{cls.id}" for cls in methods()] + [cls.id for cls in methods()]
    raise UnknownNameError(f"no method is called {name!r}.{did_you_mean(name, known)}")


def technique(name: str) -> type[Technique]:
    """The technique called ``name``; a part's name is refused with what it is a part of."""
    cls = lookup(name)
    if not issubclass(cls, Technique):
        owners = sorted({f"{t.verb}.{t.id}" for t in methods() if issubclass(t, Technique) and _holds(t, cls)})
        hint = f" Use it as a field of {' or '.join(owners)}." if owners else ""
        raise UnknownNameError(f"{cls.verb}.{cls.id} is a {cls.kind}, not a step of a recipe.{hint}")
    return cls


def _holds(owner: type[Method], part: type[Method]) -> bool:
    return any(base is not None and issubclass(part, base) for base in map(part_type, fields_of(owner)))


def part_type(field: Field) -> type[Method] | None:
    """The part class a field holds (alone, optional, or in a tuple), or None for a plain field."""
    import typing

    stack: list[Any] = [field.annotation]
    while stack:
        item = stack.pop()
        if isinstance(item, type) and issubclass(item, Method):
            return item
        stack += typing.get_args(item)
    return None


def part(base: type[Method], name: str) -> type[Method]:
    """The registered class of type ``base`` called ``id`` or ``verb.id``."""
    allowed = {cls.id: cls for cls in methods() if issubclass(cls, base)}
    found = allowed.get(name.rpartition(".")[2])
    if found is None or ("." in name and f"{found.verb}.{found.id}" != name):
        raise UnknownNameError(f"no {base.kind or base.__name__} is called {name!r}.{did_you_mean(name, allowed)}")
    return found
