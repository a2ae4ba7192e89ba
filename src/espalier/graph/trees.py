"""Call and result trees: match Python containers against them, and fill them again."""

from __future__ import annotations

import keyword
from collections import namedtuple
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from espalier.core.errors import ModelError
from espalier.graph.graph import Branch, Tree, Value, Weight


def describe(thing: Any, leaf: Callable[[Any], Tree]) -> Tree:
    """The tree of nested tuples, lists, dicts and named tuples ``thing``; ``leaf`` maps what is in them.

    Other mappings count as dicts. Raises ModelError for keys that are neither text nor integers.
    """
    if isinstance(thing, tuple) and hasattr(thing, "_fields"):
        fields = tuple(thing._fields)
        if not any(keyword.iskeyword(name) for name in fields):
            return Branch("namedtuple", tuple(describe(item, leaf) for item in thing), fields)
    if isinstance(thing, tuple):
        return Branch("tuple", tuple(describe(item, leaf) for item in thing))
    if isinstance(thing, list):
        return Branch("list", tuple(describe(item, leaf) for item in thing))
    if isinstance(thing, Mapping):
        if not all(type(key) in (str, int) for key in thing):
            raise ModelError(f"A dict with keys {list(thing)[:5]}; a graph allows text and integers.")
        return Branch("dict", tuple(describe(item, leaf) for item in thing.values()), tuple(thing))
    return leaf(thing)


def gather(tree: Tree, thing: Any, found: dict[int, Tensor], where: str = "the call") -> None:
    """Collect the tensors of ``thing`` by value number; raises ModelError where it differs from ``tree``."""
    if isinstance(tree, Value):
        if not isinstance(thing, Tensor):
            raise ModelError(f"{where} got a {type(thing).__name__}; a tensor is needed.")
        found[tree.index] = thing
    elif isinstance(tree, Branch):
        items = _items(tree, thing, where)
        for number, (child, item) in enumerate(zip(tree.children, items, strict=True)):
            gather(child, item, found, f"{where}[{tree.keys[number] if tree.keys else number!r}]")
    elif isinstance(thing, Tensor) or thing != tree or type(thing) is not type(tree):
        shown = "a tensor" if isinstance(thing, Tensor) else repr(thing)
        raise ModelError(
            f"{where} got {shown}; this graph was traced with {tree!r}. Trace it again with the new value."
        )


def _items(tree: Branch, thing: Any, where: str) -> list[Any]:
    if tree.kind == "dict":
        if not isinstance(thing, Mapping) or set(thing) != set(tree.keys):
            got = sorted(map(str, thing)) if isinstance(thing, Mapping) else type(thing).__name__
            raise ModelError(f"{where} got {got}; a dict with the keys {list(tree.keys)} is needed.")
        return [thing[key] for key in tree.keys]
    if not isinstance(thing, tuple | list) or len(thing) != len(tree.children):
        got = f"{len(thing)} entries" if isinstance(thing, tuple | list) else f"a {type(thing).__name__}"
        raise ModelError(f"{where} got {got}; a {tree.kind} of {len(tree.children)} is needed.")
    return list(thing)


def fill(tree: Tree, leaf: Callable[[Value | Weight], Any]) -> Any:
    """The Python containers ``tree`` describes, with ``leaf(reference)`` in the place of each reference."""
    if isinstance(tree, Value | Weight):
        return leaf(tree)
    if not isinstance(tree, Branch):
        return tree
    items = [fill(child, leaf) for child in tree.children]
    if tree.kind == "dict":
        return dict(zip(tree.keys, items, strict=True))
    if tree.kind == "namedtuple":
        return namedtuple("Output", [str(key) for key in tree.keys])(*items)
    return items if tree.kind == "list" else tuple(items)
