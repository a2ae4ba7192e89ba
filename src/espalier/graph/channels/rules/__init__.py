"""How channels pass through each operator: the channel column of the operator table, by operator name.

A rule gets the flow, the arguments (labels in the place of tensors) and the result as meta tensors; it ties and pins
atoms and returns the labels of the result. An operator without a rule is a boundary: what reaches it stays whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from espalier.graph.channels.rules import contraction, elementwise, reduction, shaping
from espalier.graph.channels.rules.rule import Rule

RULES: Mapping[str, Rule] = MappingProxyType(
    {**elementwise.RULES, **shaping.RULES, **reduction.RULES, **contraction.RULES}
)

__all__ = ["RULES", "Rule"]
