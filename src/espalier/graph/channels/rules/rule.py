"""The type of a channel rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from espalier.graph.channels.flow import Flow

Rule = Callable[["Flow", Mapping[str, Any], Any], Any]
"""``rule(flow, arguments, result)``: result as meta tensors in, as labels out."""
