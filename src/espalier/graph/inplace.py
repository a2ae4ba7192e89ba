"""Writing in place: who sees the new values, given that a graph has values only."""

from __future__ import annotations

import itertools
from typing import Any

from torch import fx

from espalier.core.errors import ModelError
from espalier.graph.exported import NOTHING, Builder, Unsupported, arguments_of, bind, target_of
from espalier.graph.graph import Value, Weight
from espalier.graph.operators import BY_ATEN, TABLE
from espalier.graph.operators.foreign import overwrites, shares_memory
from espalier.graph.rewrites import FILL, REWRITES

_SCATTER = {"select": "select_scatter", "slice": "slice_scatter"}
_VIEWS = frozenset(
    {"reshape", "flatten", "unflatten", "permute", "transpose", "movedim", "squeeze", "unsqueeze", "expand", "unfold"}
    | {"expand_as", "reshape_as", "diagonal", "split", "split_with_sizes", "chunk", "unbind", "narrow"}
)


def write_back(builder: Builder, node: fx.Node, value: Any) -> None:
    """After an in-place operator: later readers of the written tensor and of what it is a view of see ``value``."""
    nodes = _chain(node)
    root = builder.environment[nodes[-1]]
    if isinstance(root, Weight) and nodes[-1].op == "placeholder":
        raise ModelError(f"The model writes into its tensor {root.name!r}. Make it a pure function.")
    builder.environment[nodes[0]] = value
    later = _after(node)
    apart = set().union(*(_family(sibling) for item in nodes for sibling in _siblings(item)))
    touched = _family(nodes[-1]) - _family(node) - apart - later - {nodes[0]}
    readers = {member for member in touched if any(user in later for user in member.users)}
    if not readers:
        return
    if readers - set(nodes):
        raise ModelError(_WRITE.format("memory that a view still reads"))
    for view, base in itertools.pairwise(nodes):
        value = _scattered(builder, view, base, value)
        builder.environment[base] = value


def is_lost(builder: Builder, node: fx.Node) -> bool:
    """Whether what ``node`` writes, which could not be built, would be missed by a later reader of the same memory.

    Memory that could not be built itself is an error to its readers already.
    """
    if not overwrites(node.target):
        return False
    nodes = _chain(node) if target_of(node)[2] else []
    return not nodes or not isinstance(builder.read(nodes[-1]), Unsupported)


def _chain(node: fx.Node) -> list[fx.Node]:
    """What an in-place operator writes into, what that is a view of, and so on."""
    chain = [node.args[0]]
    while isinstance(chain[-1], fx.Node) and (base := _viewed(chain[-1])) is not None:
        chain.append(base)
    return [item for item in chain if isinstance(item, fx.Node)]


_WRITE = "The model writes in place through {}. Write x = f(x) instead of changing x."


def _scattered(builder: Builder, view: fx.Node, base: fx.Node, value: Any) -> Any:
    """``base`` after its part ``view`` became ``value``."""
    full, name, writes = target_of(view)
    if name in NOTHING or writes:
        return value
    operator = BY_ATEN.get(full)
    if operator is None or operator.name not in _SCATTER:
        raise ModelError(_WRITE.format(f"{name}(...)"))
    arguments = arguments_of(operator, bind(builder, view))
    fixed = FILL[operator.name](builder, view, arguments) if operator.name in FILL else arguments
    if isinstance(fixed, Value | Weight):
        return value
    scatter = TABLE[_SCATTER[operator.name]]
    kept = {key: item for key, item in fixed.items() if key != "self"}
    return builder.emit(scatter.name, {"self": builder.environment[base], "src": value, **kept})


def _siblings(node: fx.Node) -> list[fx.Node]:
    """The other pieces of the split ``node`` is a piece of: they share no memory with it."""
    if node.op != "call_function" or target_of(node)[0] != "_operator.getitem" or not isinstance(node.args[0], fx.Node):
        return []
    return [user for user in node.args[0].users if user.args[1:] != node.args[1:]]


def _viewed(node: fx.Node) -> fx.Node | None:
    """The node whose memory ``node`` shares, if any."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    full, name, writes = target_of(node)
    if full == "_operator.getitem" or writes or name in ("contiguous", "detach", "alias", "detach_"):
        return node.args[0]
    operator = BY_ATEN.get(full)
    if operator is None:
        shares = full not in REWRITES and shares_memory(node.target)  # a foreign view
    else:
        shares = operator.name in _SCATTER or operator.name in _VIEWS
    return node.args[0] if shares else None


def _family(root: fx.Node) -> set[fx.Node]:
    """``root`` and every node that shares its memory through views."""
    found, stack = {root}, [root]
    while stack:
        for user in stack.pop().users:
            if user not in found and _viewed(user) in found:
                found.add(user)
                stack.append(user)
    return found


def _after(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    while node.next.op != "root":
        node = node.next
        found.add(node)
    return found
