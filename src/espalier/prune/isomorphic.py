r"""One ranking for all groups of the same make.

Paper    Fang, Ma, Mi, Wang. Isomorphic Pruning for Vision Models. ECCV 2024. arXiv:2407.04616
Formula  groups that reach the same kinds of layers in the same dimensions are ranked together, others apart
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from espalier.core.selection import Selection
from espalier.graph.channels import Group
from espalier.prune.scopes import Global


@dataclass(frozen=True, kw_only=True)
class Isomorphic(Global):
    """For structural patterns; weights are ranked by the class of their layer."""

    id: ClassVar[str] = "isomorphic"

    def together(self, group: Group) -> Any:
        """What two groups must share to be ranked together."""
        return group.kind, group.signature

    def apart(self, selection: Selection) -> tuple[tuple[str, ...], ...]:
        """One set per class of layer."""
        sets: dict[str, list[str]] = {}
        for slot in selection:
            sets.setdefault(type(slot.module).__name__.removeprefix("Parametrized"), []).append(slot.name)
        return tuple(tuple(names) for names in sets.values())
