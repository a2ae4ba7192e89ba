"""QuantizeLinear and DequantizeLinear written into the graph: around activations, behind int8 weights and biases."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from espalier.core.errors import ModelError
from espalier.deploy.int8.grid import Grid, from_range, placed
from espalier.deploy.int8.network import (
    constant,
    cut_bounds,
    initializer,
    insert,
    only_reader,
    readers,
    remove,
    replace_uses,
)
from espalier.deploy.int8.places import Places, layer_name
from espalier.deploy.int8.prepare import output_axis
from espalier.deploy.int8.profile import CARRY, RuntimeProfile
from espalier.deploy.int8.trained import is_marker, trained_grid
from espalier.deploy.int8.weights import Codes, Fixed, encode
from espalier.deploy.runtimes import Array

LARGEST_BIAS = 2**30
"""Largest bias in steps of its scale: half of int32, so that the sum of products has room."""


@dataclass
class Written:
    """``codes`` of each product's weight, ``grids`` by tensor name, and ``notes`` for people."""

    codes: dict[ir.Node, Codes] = field(default_factory=dict)
    grids: dict[str, Grid] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def write_qdq(
    model: ir.Model, places: Places, grids: Mapping[ir.Value, Grid], profile: RuntimeProfile, fixed: list[Fixed]
) -> Written:
    """Change ``model`` into the QDQ graph. ``grids``: by leader; ``fixed``: codes that training chose."""
    writer = _Writer(model.graph, places, grids, profile, fixed)
    writer.write()
    return writer.done


class _Writer:
    def __init__(
        self, graph: ir.Graph, places: Places, grids: Mapping[ir.Value, Grid], profile: RuntimeProfile,
        fixed: list[Fixed],
    ) -> None:  # fmt: skip
        self.graph, self.places, self.profile, self.fixed = graph, places, profile, fixed
        self.grids = {value: grids[places.leader[value]] for value in places.values}
        self.int8 = {*places.products, *places.follow}
        self.done = Written()
        self.unfit: list[str] = []
        self.written: Counter[ir.Value] = Counter()
        self.weights: dict[tuple[ir.Value, int], tuple[ir.Value, Codes]] = {}

    def write(self) -> None:
        self._drop_cuts()
        markers = {node: self._marker_grid(node) for node in self.graph if is_marker(node)}
        if self.unfit:
            named = ", ".join(self.unfit[:3]) + (f" and {len(self.unfit) - 3} more" if len(self.unfit) > 3 else "")
            self.done.notes.append(
                f"trained grids that do not fit {self.profile.container}"
                f"{' without zero point' if self.profile.symmetric else ''}: {named}; their ranges are quantized anew"
            )
        for node in self.places.products:
            self._product(node, markers)
        for value, grid in self.grids.items():
            if not self._carried(value):
                self._pair(value, grid, self._scope(value))
        for node, grid in markers.items():
            given = node.inputs[0]
            if given is not None and (made := given.producer()) is not None and made.op_type == "DequantizeLinear":
                self.done.notes.append(
                    f"{node.name}: its input is read elsewhere as well, where {self.profile.name} needs it in 8 bits; "
                    f"so it is rounded to 8 bits before the trained {grid.bits}"
                )
            if given is not None:
                out = self._quantized(node, given, grid, str(node.name))
                replace_uses(node.outputs[0], out)
                remove(node)

    def _drop_cuts(self) -> None:
        """Take out a Relu or Clip where the ends of the grid behind it cut at the same values or inside."""
        kept: dict[ir.Value, Grid] = {}
        for value, grid in self.grids.items():
            given = _needless(value, grid) if self._scope(value) is None else None
            if given is not None:
                name, node = value.name, value.producer()
                replace_uses(value, given)
                if node is not None:
                    remove(node)
                given.name = name
                self.places.leader[given] = self.places.leader[value]
            kept[given or value] = grid
        self.grids = kept

    def _scope(self, value: ir.Value) -> list[ir.Node] | None:
        """Who reads ``value`` on its grid: None for all, else the operators in int8 and those that pass it on."""
        producer = value.producer()
        if producer is not None and self._gives_int8(producer):
            return None
        among = [node for node in readers(value) if node in self.int8 or self._passes(node, value)]
        return None if len(among) == len(readers(value)) and not value.is_graph_output() else among

    def _gives_int8(self, producer: ir.Node) -> bool:
        while producer.op_type in ("Relu", "Clip") and producer.inputs[0] is not None:
            before = producer.inputs[0].producer()
            if before is None:
                return False
            producer = before
        if producer.op_type in CARRY:
            return producer.inputs[0] in self.grids
        return producer in self.int8 and (producer in self.places.results or producer in self.places.follow)

    def _passes(self, node: ir.Node, value: ir.Value) -> bool:
        return node.op_type in CARRY and node.inputs[0] is value and node.outputs[0] in self.grids

    def _carried(self, value: ir.Value) -> bool:
        """Whether ``value`` is on its grid already, behind an operator that only moved it there."""
        producer = value.producer()
        if self.profile.carried or producer is None or producer.op_type not in CARRY or not producer.inputs:
            return False
        source = producer.inputs[0]
        while source is not None and source not in self.grids:
            made = source.producer()
            source = made.inputs[0] if made is not None and made.op_type == "DequantizeLinear" else None
            if source is not None and (made := source.producer()) is not None and made.op_type == "QuantizeLinear":
                source = made.inputs[0]
        return source is not None and self.places.leader.get(source) is self.places.leader[value]

    def _pair(self, value: ir.Value, grid: Grid, among: list[ir.Node] | None) -> None:
        before = readers(value)
        out = self._quantized(value.producer() or self.graph, value, grid, str(value.name))
        replace_uses(value, out, before if among is None else among, outputs=among is None)

    def _quantized(self, place: ir.Node | ir.Graph, value: ir.Value, grid: Grid, name: str) -> ir.Value:
        """Q, a cut of the codes or values where the container is wider than the grid, and DQ; returns the result."""
        self.done.grids[name] = grid
        dtype = ir.DataType[grid.container.upper()]
        scale = initializer(self.graph, f"{name}/scale", np.array(grid.scale, np.float32))
        zero = initializer(self.graph, f"{name}/zero_point", np.array(grid.zero_point, grid.container))
        cut = not grid.fills_container and grid.trained
        if cut and not self.profile.clip_codes:
            ends = [initializer(self.graph, f"{name}/{end}", np.array(at, np.float32))
                    for end, at in zip(("low", "high"), grid.range, strict=True)]  # fmt: skip
            value = insert(place, "Clip", [value, *ends], f"{name}/Clip", like=value)
            place = value.producer() or place
        codes = insert(place, "QuantizeLinear", [value, scale, zero], f"{name}/QuantizeLinear", like=value, dtype=dtype)
        place = codes.producer() or place
        if cut and self.profile.clip_codes:
            ends = [initializer(self.graph, f"{name}/{end}", np.array(at, grid.container))
                    for end, at in zip(("low", "high"), (grid.low, grid.high), strict=True)]  # fmt: skip
            codes = insert(place, "Clip", [codes, *ends], f"{name}/Clip", like=codes)
            place = codes.producer() or place
        return insert(place, "DequantizeLinear", [codes, scale, zero], f"{name}/DequantizeLinear", like=value)

    def _marker_grid(self, node: ir.Node) -> Grid:
        trained = trained_grid(node)
        grid = placed(trained, self.profile)
        name = str(node.name)
        if grid is not None:
            return grid
        self.unfit.append(name)
        wider = from_range(*trained.range, self.profile, name)
        low, high = (int(np.rint(end / wider.scale)) + wider.zero_point for end in trained.range)
        return replace(wider, low=max(low, wider.low), high=min(high, wider.high), trained=True)

    def _product(self, node: ir.Node, markers: Mapping[ir.Node, Grid]) -> None:
        """The weight of a product as int8, its bias as int32 where the profile wants that."""
        weight = constant(node.inputs[1])
        old = node.inputs[1]
        if weight is None or old is None:
            return
        axis = output_axis(node)
        given = node.inputs[0]
        grid = self._grid_of(given, markers) if given is not None else None
        bias = constant(node.inputs[2]) if len(node.inputs) > 2 else None
        as_int32 = self.profile.int32_bias and bias is not None and grid is not None
        at_least = None
        if as_int32 and bias is not None and grid is not None:
            at_least = np.abs(bias.astype(np.float64)) / (grid.scale * LARGEST_BIAS)
        key = (old, axis)
        if key not in self.weights or at_least is not None:
            self.weights[key] = self._weight(old, weight, axis, layer_name(node), at_least)
        value, codes = self.weights[key]
        node.replace_input_with(1, value)
        self.done.codes[node] = codes
        if codes.note:
            self.done.notes.append(f"{layer_name(node)}: {codes.note}")
        if as_int32 and bias is not None and grid is not None:
            node.replace_input_with(2, self._bias(str(node.name), bias, grid, codes))
        if not tuple(old.uses()) and old.name in self.graph.initializers:
            del self.graph.initializers[str(old.name)]

    def _grid_of(self, value: ir.Value, markers: Mapping[ir.Node, Grid]) -> Grid | None:
        """The grid a product reads its input on: its own, or the one above what only moved it."""
        while value not in self.grids:
            producer = value.producer()
            if producer is None:
                return None
            if producer in markers:
                return markers[producer]
            if producer.op_type not in CARRY or producer.inputs[0] is None:
                return None
            value = producer.inputs[0]
        return self.grids[value]

    def _weight(
        self, old: ir.Value, weight: Array, axis: int, layer: str, at_least: Array | None
    ) -> tuple[ir.Value, Codes]:
        codes = encode(weight, axis, self.profile.weight_bits, self.fixed, layer, at_least=at_least)
        self.written[old] += 1  # a tied weight is written for each layer whose bias needs a scale of its own
        name = str(old.name) + (f"/{self.written[old]}" if self.written[old] > 1 else "")
        q = initializer(self.graph, f"{name}/codes", codes.codes)
        scale = initializer(self.graph, f"{name}/scale", codes.scale)
        zero = initializer(self.graph, f"{name}/zero_point", np.zeros(codes.scale.shape, np.int8))
        out = insert(self.graph, "DequantizeLinear", [q, scale, zero], f"{name}/DequantizeLinear", {"axis": axis})
        out.shape, out.type = old.shape, old.type
        return out, codes

    def _bias(self, name: str, bias: Array, grid: Grid, codes: Codes) -> ir.Value:
        """int32 with the scale of the products, s_x s_w (Jacob et al. 2018, equation 11)."""
        scale = (np.float32(grid.scale) * codes.scale).astype(np.float32)
        if not (scale > 0).all():
            raise ModelError(f"the scale of the bias of {name!r} underflows; leave it out: keep_fp32=[{name!r}].")
        steps = np.rint(bias.astype(np.float64) / scale).astype(np.int32)
        q = initializer(self.graph, f"{name}/bias/codes", steps)
        s = initializer(self.graph, f"{name}/bias/scale", scale)
        zero = initializer(self.graph, f"{name}/bias/zero_point", np.zeros(scale.shape, np.int32))
        out = insert(self.graph, "DequantizeLinear", [q, s, zero], f"{name}/bias/DequantizeLinear", {"axis": 0})
        out.shape, out.type = ir.Shape(bias.shape), ir.TensorType(ir.DataType.FLOAT)
        return out


def _needless(value: ir.Value, grid: Grid) -> ir.Value | None:
    """What ``value`` was before a Relu or Clip that ``grid`` makes needless; None where there is none."""
    node = value.producer()
    if node is None or node.op_type not in ("Relu", "Clip") or node.inputs[0] is None:
        return None
    given, bounds = node.inputs[0], cut_bounds(node)
    if bounds is None or only_reader(given) is not node or (value.is_graph_output() and given.producer() is None):
        return None
    half = grid.scale / 2
    inside = grid.range[0] >= bounds[0] - half and grid.range[1] <= bounds[1] + half
    return given if inside else None
