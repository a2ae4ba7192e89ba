"""Grids that stand in the graph already, from training: found, read, and weights among them computed."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from espalier.core.errors import ModelError
from espalier.deploy.int8.grid import LIMITS, Grid
from espalier.deploy.int8.markers import DOMAIN, OPERATOR
from espalier.deploy.int8.network import (
    activations,
    attribute,
    constant,
    cut_bounds,
    initializer,
    insert,
    only_reader,
    readers,
    remove,
    replace_uses,
)
from espalier.deploy.int8.profile import CARRY, RuntimeProfile
from espalier.deploy.int8.weights import Fixed


def mark_pairs(graph: ir.Graph) -> None:
    """QuantizeLinear and DequantizeLinear that the exporter itself wrote become the one operator that marks a grid."""
    for node in tuple(graph):
        if node.op_type != "QuantizeLinear" or (then := only_reader(node.outputs[0])) is None:
            continue
        scale = constant(node.inputs[1])
        zero = constant(node.inputs[2]) if len(node.inputs) > 2 else np.zeros((), np.uint8)
        if then.op_type != "DequantizeLinear" or scale is None or zero is None or str(zero.dtype) not in LIMITS:
            continue
        low, high = LIMITS[str(zero.dtype)]
        attributes: dict[str, int] = {"low": low, "high": high}
        if scale.ndim:
            attributes["axis"] = attribute(node, "axis", 1)
        zeros = initializer(graph, f"{node.name}/zero_point", zero.astype(np.int32))
        out = insert(node, OPERATOR, [node.inputs[0], node.inputs[1], zeros], f"{node.name}/marked", attributes,
                     like=then.outputs[0], before=True)  # fmt: skip
        marker = out.producer()
        if marker is not None:
            marker.domain = DOMAIN
        replace_uses(then.outputs[0], out)
        remove(then)
        remove(node)


def fixed_weight(graph: ir.Graph, node: ir.Node) -> Fixed | None:
    """Compute a marker of a constant weight; its codes, or None for a marker of an activation."""
    weight, scale, zero = (constant(value) for value in node.inputs[:3])
    if weight is None or scale is None or zero is None:
        return None
    low, high, axis = (attribute(node, name, None) for name in ("low", "high", "axis"))
    view = tuple(-1 if place == axis else 1 for place in range(weight.ndim)) if scale.ndim and axis is not None else ()
    scales, zeros = scale.reshape(view or scale.shape), zero.reshape(view or zero.shape)
    codes = np.clip(np.rint(weight / scales) + zeros, low, high).astype(np.int32) - zeros
    given = node.inputs[0]
    name = str(given.name if given is not None else node.name)
    if given is not None and only_reader(given) is node:
        graph.initializers.pop(name, None)
    value = initializer(graph, name, (codes * scales).astype(np.float32))
    replace_uses(node.outputs[0], value)
    remove(node)
    return Fixed(name, codes, scale, axis if scale.ndim else None, int(high - low).bit_length())


def settle(graph: ir.Graph, profile: RuntimeProfile) -> None:
    """Bring every trained grid to the layer whose result it rounds; the numbers stay what they were in training."""
    for _ in range(2):  # a grid that was raised meets the cuts and the readers of another tensor
        for node in tuple(graph):
            if is_marker(node):
                _absorb_cuts(node)
        _share_grids(graph, profile.needs_result)
        for node in reversed(tuple(graph)):
            if is_marker(node):
                _raise(node, keep=profile.carried)


def _raise(node: ir.Node, *, keep: bool) -> None:
    """Round before a concatenation or what only moves numbers, not behind it, where nothing else reads that.

    Rounding is element by element and monotone, so it commutes with both and with max pooling. A runtime would round
    there in any case, and on another grid a second time. ``keep``: the grid also stays where it was.
    """
    given = node.inputs[0]
    made = given.producer() if given is not None and only_reader(given) is node else None
    if made is None or made.domain or made.op_type not in CARRY | {"Concat"}:
        return
    sources = [value for value in made.inputs if value is not None] if made.op_type == "Concat" else [made.inputs[0]]
    if any(value is None or value not in activations(made) for value in sources):
        return
    sources = [value for value in dict.fromkeys(sources) if not _is_on(value, node)]
    for number, value in enumerate(sources):
        name = str(node.name) if not number else f"{node.name}/{number}"
        if keep or made.op_type == "Concat":
            name += f"/{made.op_type}"
        out = insert(made, OPERATOR, [value, *node.inputs[1:]], name,
                     {key: found.value for key, found in node.attributes.items()}, like=value, before=True)  # fmt: skip
        raised = out.producer()
        if raised is not None:
            raised.domain = DOMAIN
            for index, source in enumerate(made.inputs):
                if source is value:
                    made.replace_input_with(index, out)
            _raise(raised, keep=keep)
    if not keep and made.op_type != "Concat" and given is not None:
        replace_uses(node.outputs[0], given)
        remove(node)


def _is_on(value: ir.Value | None, marker: ir.Node) -> bool:
    made = value.producer() if value is not None else None
    return made is not None and is_marker(made) and _same_grid(made, marker)


def _absorb_cuts(node: ir.Node) -> None:
    """Narrow the codes of a marker by the Relu or Clip before it, if nothing else reads that, and go around it.

    Rounding is monotone, so Q(min(max(x, a), b)) = min(max(Q(x), Q(a)), Q(b)): the numbers stay the same.
    """
    while (given := node.inputs[0]) is not None and only_reader(given) is node:
        cut = given.producer()
        bounds = cut_bounds(cut) if cut is not None and cut.op_type in ("Relu", "Clip") else None
        if cut is None or bounds is None:
            return
        grid = trained_grid(node)
        with np.errstate(over="ignore"):
            ends = [np.rint(np.float64(end) / grid.scale) + grid.zero_point for end in bounds]
        first, last = (int(np.clip(end, grid.low, grid.high)) for end in ends)
        if first >= last:
            return
        node.attributes["low"], node.attributes["high"] = ir.AttrInt64("low", first), ir.AttrInt64("high", last)
        node.replace_input_with(0, cut.inputs[0])
        remove(cut)


def _share_grids(graph: ir.Graph, needs_result: frozenset[str]) -> None:
    """One tensor, one grid: equal markers of a tensor become one.

    Where the layer that makes the tensor must give it on a grid (``needs_result``) and a marker has all 256 codes,
    the other readers read it on that grid as well: they lose no more than in any int8 file.
    """
    for node in tuple(graph):
        for value in node.outputs:
            markers = [reader for reader in readers(value) if is_marker(reader)]
            for number, marker in enumerate(markers):
                twin = next((m for m in markers[:number] if _same_grid(m, marker)), None)
                if twin is not None:
                    replace_uses(marker.outputs[0], twin.outputs[0])
                    remove(marker)
            full = [m for m in markers if m.graph is not None and m.outputs[0].uses() and _codes(m) == 256]
            if full and _maker(value) in needs_result and not value.is_graph_output():
                widest = max(full, key=lambda m: trained_grid(m).scale)
                replace_uses(value, widest.outputs[0], [r for r in readers(value) if r is not widest])


def _maker(value: ir.Value) -> str:
    """The operator that makes ``value``, before what cuts or moves its numbers; empty for an input."""
    made = value.producer()
    while made is not None and made.op_type in CARRY | {"Relu", "Clip"} and made.inputs[0] is not None:
        made = made.inputs[0].producer()
    return made.op_type if made is not None else ""


def _same_grid(one: ir.Node, other: ir.Node) -> bool:
    grids = [trained_grid(node) for node in (one, other) if constant(node.inputs[1]) is not None]
    return len(grids) == 2 and grids[0] == grids[1]


def _codes(node: ir.Node) -> int:
    return int(attribute(node, "high", 255)) - int(attribute(node, "low", 0)) + 1


def is_marker(node: ir.Node | None) -> bool:
    """Whether a node carries a trained grid."""
    return node is not None and node.domain == DOMAIN and node.op_type == OPERATOR


def trained_grid(node: ir.Node) -> Grid:
    """The grid a marker carries. Raises ``ModelError`` for one per channel, computed, or of more than 8 bits."""
    scale, zero = constant(node.inputs[1]), constant(node.inputs[2])
    low, high = int(attribute(node, "low", 0)), int(attribute(node, "high", 255))
    if scale is None or zero is None:
        raise ModelError(f"the scale of the activation {node.name!r} is computed in the model; int8 needs a constant.")
    if scale.size != 1:
        raise ModelError(
            f"the activation {node.name!r} is quantized per channel; runtimes compute with one scale per activation. "
            "Train it with one scale, or export in fp32."
        )
    if high - low > 255:
        raise ModelError(
            f"the activation {node.name!r} has the codes {low} to {high}; an int8 file holds at most 256 of them. "
            "Train it with 8 bits or fewer, or export in fp32."
        )
    return Grid(float(scale.reshape(())), int(zero.reshape(())), low, high, "int8" if low < 0 else "uint8", True)
