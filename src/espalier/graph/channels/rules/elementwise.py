# ruff: noqa: ARG001 - every rule has one signature
"""Operators that work element by element: dimensions of the same extent are the same channels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from espalier.graph.channels.atoms import Labels
from espalier.graph.channels.flow import Flow, all_labels
from espalier.graph.channels.rules.rule import Rule
from espalier.graph.operators import elementwise as table


def pointwise(flow: Flow, a: Mapping[str, Any], out: Any) -> Labels:
    """All tensors meet, broadcast as torch does."""
    return flow.broadcast(list(all_labels(a)), out.shape)


def per_channel(flow: Flow, a: Mapping[str, Any], out: Any) -> Labels:
    """Dimension 1 meets every vector argument (scale and shift, PReLU)."""
    x: Labels = a.get("input", a.get("self"))
    for name in ("weight", "bias"):
        vector = a.get(name)
        if isinstance(vector, Labels) and vector.shape[0] > 1:
            flow.tie(x.ids[1] if len(x.shape) > 1 else x.ids[0], vector.ids[0])
    return x


def glu(flow: Flow, a: Mapping[str, Any], out: Any) -> Labels:
    """Each channel of the first half goes with its gate in the second."""
    x: Labels = a["self"]
    dim = a["dim"] % len(x.shape)
    ids, half = x.ids[dim], x.shape[dim] // 2
    if ids is None:
        return Labels.fixed(out.shape)
    flow.tie(ids[:half], ids[half:])
    kept = x.replaced(dim, ids[:half] if half > 1 else None)
    if half == 1:
        flow.pin(ids)
    return Labels(tuple(out.shape), kept.ids)


RULES: dict[str, Rule] = {
    **{operator.name: pointwise for operator in table.OPERATORS},
    "scale_shift": per_channel,
    "prelu": per_channel,
    "glu": glu,
}
