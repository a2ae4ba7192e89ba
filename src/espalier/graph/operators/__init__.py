"""The closed operator set: one table, one row per operator.

Columns: code in files, name, the aten overloads it stands for, argument signature, what runs it (and, on
meta tensors, infers its shape), guard, multiply-accumulates. A new column - how channels pass through an
operator, say - is one more field of :class:`Operator`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from espalier.core.errors import ModelError, did_you_mean
from espalier.graph.graph import Node
from espalier.graph.operators import algebra, elementwise, reduction, shaping
from espalier.graph.operators.foreign import foreign
from espalier.graph.operators.schema import Operator

TABLE: Mapping[str, Operator] = MappingProxyType(
    {op.name: op for op in (*algebra.OPERATORS, *reduction.OPERATORS, *elementwise.OPERATORS, *shaping.OPERATORS)}
)
BY_CODE: Mapping[int, Operator] = MappingProxyType({op.code: op for op in TABLE.values()})
BY_ATEN: Mapping[str, Operator] = MappingProxyType({target: op for op in TABLE.values() for target in op.aten})


def operator_named(name: str) -> Operator:
    """The table row called ``name``. Raises ModelError when there is none."""
    if name not in TABLE:
        raise ModelError(f"Unknown operator {name!r}.{did_you_mean(name, TABLE)}")
    return TABLE[name]


def operator_of(node: Node) -> Operator:
    """What computes ``node``: its row of the table, or the overload it carries. Raises ModelError for neither."""
    return operator_named(node.op) if node.overload is None else foreign(node.overload)


__all__ = ["BY_ATEN", "BY_CODE", "TABLE", "Operator", "operator_named", "operator_of"]
