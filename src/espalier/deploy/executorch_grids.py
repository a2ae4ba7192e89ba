"""Grids of a model as the pairs of operators that XNNPACK takes for int8: our scales, our codes.

In an exported program a grid of inputs is a call of ``torch.fake_quantize_*``, and weights are the floats that their
codes stand for. Here the first become quantize and dequantize, and the second int8 codes that are dequantized. XNNPACK
computes a layer in int8 only where its result is on a grid as well. It gets that of the layer which reads it, also from
behind a max pool or a reshape: rounding commutes with what only moves or compares numbers. Results that nobody has
put on a grid, such as those of the last layer, get one from the range that calibration sees.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from espalier.core.errors import NumericError
from espalier.deploy.int8.weights import Fixed

_ATEN = torch.ops.aten
LAYERS = (_ATEN.conv1d.default, _ATEN.conv2d.default, _ATEN.linear.default)
_CUTS = (_ATEN.relu.default, _ATEN.relu_.default, _ATEN.relu6.default, _ATEN.relu6_.default,
         _ATEN.hardtanh.default, _ATEN.hardtanh_.default)  # fmt: skip
_MOVES = (_ATEN.flatten.using_ints, _ATEN.reshape.default, _ATEN.view.default, _ATEN.permute.default,
          _ATEN.transpose.int, _ATEN.squeeze.dims, _ATEN.squeeze.dim, _ATEN.unsqueeze.default, _ATEN.dropout.default,
          _ATEN.contiguous.default)  # fmt: skip
_POOLS = (_ATEN.max_pool2d.default,)
_SUMS = (_ATEN.add.Tensor, _ATEN.add_.Tensor)
_PER_TENSOR = (_ATEN.fake_quantize_per_tensor_affine.default, _ATEN.fake_quantize_per_tensor_affine.tensor_qparams)
_PER_CHANNEL = (_ATEN.fake_quantize_per_channel_affine.default,)
_LOW, _HIGH = -128, 127


@dataclass(frozen=True)
class Grid:
    """Values ``(code - zero) * scale`` for int8 codes ``low..high``."""

    scale: float
    zero: int
    low: int = _LOW
    high: int = _HIGH


@dataclass(frozen=True)
class Rewritten:
    """``left``: which of ``of_layers`` cannot be int8, and why; ``observed`` results got a grid by calibration."""

    module: fx.GraphModule
    of_layers: int
    left: Mapping[str, str]
    observed: int


def has_grids(graph: fx.Graph) -> bool:
    """Whether an exported graph rounds anything by ``torch.fake_quantize_*``."""
    return any(node.target in (*_PER_TENSOR, *_PER_CHANNEL) for node in graph.nodes)


def rewritten(
    module: fx.GraphModule, fixed: Mapping[str, Fixed], calls: Sequence[Sequence[Tensor]], prefix: str
) -> Rewritten:
    """``module``, an exported program's own, with its grids as XNNPACK reads them; it is changed.

    ``fixed``: codes of weights by the model's names, which begin with ``prefix`` in the module; ``calls``: inputs to
    calibrate on.
    """
    work = _Work(module)
    _plain_clamps(work)
    _merge_equal(work)
    layers = [node for node in module.graph.nodes if node.target in LAYERS]
    left = {}
    for layer in layers:
        name = str(getattr(layer.args[1], "target", layer.name)).removeprefix(prefix)
        reason = _given_codes(work, layer, fixed.get(name))
        if reason:
            left[name.removesuffix(".weight")] = reason
    observed = _give_grids(work, [_end(layer) for layer in layers if has_codes(layer)], calls)
    _round_after_pools(work)
    observed += _give_grids(work, _sums(work), calls)
    _round_after_pools(work)
    _write_out(work)
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()
    return Rewritten(module, len(layers), left, observed)


class _Work:
    """A module under rewriting: constants in it, grids of its nodes, new buffers."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module, self.graph = module, module.graph
        self._count = 0

    def constant(self, thing: Any) -> Any:
        """The value of a node that depends on no input, as a tensor or number; None of any other."""
        if not isinstance(thing, fx.Node):
            return thing
        if thing.op == "get_attr":
            return operator.attrgetter(str(thing.target))(self.module)
        if thing.op != "call_function" or thing.all_input_nodes == []:
            return None
        parts = {node: self.constant(node) for node in thing.all_input_nodes}
        if any(value is None for value in parts.values()):
            return None
        args, kwargs = fx.node.map_arg((thing.args, thing.kwargs), lambda node: parts[node])
        with torch.no_grad():
            return thing.target(*args, **kwargs)  # type: ignore[operator]

    def grid(self, node: Any) -> Grid | None:
        """The int8 grid that ``node`` rounds to; None for anything else."""
        if not isinstance(node, fx.Node) or node.target not in _PER_TENSOR:
            return None
        scale, zero = self.constant(node.args[1]), self.constant(node.args[2])
        low, high = (int(str(end)) for end in node.args[3:5])
        if scale is None or zero is None or high - low > _HIGH - _LOW:
            return None
        shift = 0 if low >= _LOW and high <= _HIGH else _LOW - low
        grid = Grid(float(scale), int(zero) + shift, low + shift, high + shift)
        return grid if grid.scale > 0 and grid.low <= grid.zero <= grid.high else None

    def buffer(self, value: Tensor) -> fx.Node:
        """A node that reads ``value``, to be called where nodes are being inserted."""
        name = f"espalier_{self._count}"
        self._count += 1
        self.module.register_buffer(name, value)
        return self.graph.get_attr(name)


def _plain_clamps(work: _Work) -> None:
    """Bounds that are computed from constants become numbers."""
    for node in tuple(work.graph.nodes):
        if node.target == _ATEN.clamp.Tensor:
            ends = [work.constant(end) for end in (*node.args[1:], None, None)[:2]]
            if all(isinstance(end, Tensor) and end.numel() == 1 for end in ends):
                node.target = _ATEN.clamp.default
                node.args = (node.args[0], *map(float, ends))


def _merge_equal(work: _Work) -> None:
    """One tensor rounded twice to one grid is rounded once."""
    seen: dict[tuple[Any, Grid], fx.Node] = {}
    for node in tuple(work.graph.nodes):
        grid = work.grid(node)
        if grid is None:
            continue
        first = seen.setdefault((node.args[0], grid), node)
        if first is not node:
            node.replace_all_uses_with(first)
            work.graph.erase_node(node)


def _given_codes(work: _Work, node: fx.Node, kept: Fixed | None) -> str:
    """Give a layer its weight as codes, with the batch norm behind it in scales and bias; or say why that cannot be."""
    weight = node.args[1]
    if not isinstance(weight, fx.Node) or weight.op != "get_attr" or kept is None:
        return "weight without integer codes"
    if work.grid(node.args[0]) is None:
        return "input without an 8-bit grid"
    if kept.axis not in (None, 0):
        return "weight with scales along another axis than the outputs"
    codes = kept.codes.astype(np.int32)
    scale = np.broadcast_to(kept.scale.reshape(-1), (codes.shape[0],)).astype(np.float64)
    bias = work.constant(node.args[2]) if len(node.args) > 2 else None
    shift = np.zeros(codes.shape[0]) if bias is None else bias.detach().double().numpy()
    norm = _norm_behind(node)
    if norm is not None:
        gain, offset = _gain_and_offset(work, norm)
        scale, shift = scale * gain, shift * gain + offset
        negative = scale < 0
        codes[negative], scale = -codes[negative], np.abs(scale)
    if codes.min() < _LOW or codes.max() > _HIGH:
        return "weight with asymmetric codes"
    if not (scale > 0).all():
        return "weight with a channel of scale zero"
    with work.graph.inserting_before(node):
        parts = (work.buffer(torch.from_numpy(codes.astype(np.int8))),
                 work.buffer(torch.from_numpy(scale.astype(np.float32))),
                 work.buffer(torch.zeros(len(scale), dtype=torch.int64)))  # fmt: skip
        read = work.graph.call_function(_pairs().dequantize_per_channel.default, (*parts, 0, _LOW, _HIGH, torch.int8))
        added = work.buffer(torch.from_numpy(shift.astype(np.float32)))
    node.args = (node.args[0], read, added, *node.args[3:])
    if norm is not None:
        norm.replace_all_uses_with(node)
        work.graph.erase_node(norm)
    return ""


def has_codes(node: fx.Node) -> bool:
    """Whether a node's second argument, the weight of a layer, is read from int8 codes."""
    weight = node.args[1] if len(node.args) > 1 else None
    return isinstance(weight, fx.Node) and "dequantize_per_channel" in str(weight.target)


def _pairs() -> Any:
    """The operators that say int8; executorch brings them when it is imported."""
    return torch.ops.quantized_decomposed


def _norm_behind(node: fx.Node) -> fx.Node | None:
    reader = _only_reader(node)
    if reader is None or reader.target != _ATEN.batch_norm.default or reader.args[5]:
        return None
    return reader if node.target != _ATEN.linear.default or _rank(node) == 2 else None


def _rank(node: fx.Node) -> int:
    return int(node.meta["val"].ndim)


def _gain_and_offset(work: _Work, norm: fx.Node) -> tuple[Any, Any]:
    """A batch norm in eval mode as y = gain x + offset."""
    gamma, beta, mean, variance = (
        absent if (value := work.constant(part)) is None else value.detach().double().numpy()
        for part, absent in zip(norm.args[1:5], (1.0, 0.0, 0.0, 1.0), strict=True)
    )
    gain = gamma / np.sqrt(variance + float(str(norm.args[7])))
    return gain, beta - mean * gain


def _end(node: fx.Node) -> fx.Node:
    """``node``, or what cuts its result right behind it and runs as one with it."""
    reader = _only_reader(node)
    return reader if reader is not None and reader.target in _CUTS else node


def _only_reader(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _round_after_pools(work: _Work) -> None:
    """The largest of numbers on a grid is on it: said to XNNPACK, which then compares codes."""
    for node in tuple(work.graph.nodes):
        grid = work.grid(node.args[0]) if node.target in _POOLS else None
        if grid is not None and any(work.grid(reader) != grid for reader in node.users):
            _round_after(work, node, grid)


def _sums(work: _Work) -> list[fx.Node]:
    """The ends of sums whose two sides are on grids, or are such ends themselves."""
    ends: list[fx.Node] = []
    for node in work.graph.nodes:
        plain = node.target in _SUMS and not node.kwargs and len(node.args) > 1
        if plain and all(part in ends or work.grid(part) is not None for part in node.args[:2]):
            ends.append(_end(node))
    return ends


def _give_grids(work: _Work, ends: Sequence[fx.Node], calls: Sequence[Sequence[Tensor]]) -> int:
    """Have each of ``ends`` read on one grid; returns how many had to be calibrated."""
    unknown = []
    for end in ends:
        reader = _only_reader(end)
        if reader is not None and work.grid(reader) is not None:
            continue
        found = _grid_behind(work, end) or _grid_of_readers(work, end)
        if found is not None:
            _round_after(work, end, found)
        else:
            unknown.append(end)
    ranges = _Ranges(work.module, unknown)
    for call in calls if unknown else ():
        ranges.run(*call)
    for end in unknown:
        _round_after(work, end, _grid_over(*ranges.seen[end]))
    return len(unknown)


def _grid_behind(work: _Work, node: fx.Node) -> Grid | None:
    """The grid of what is read after steps that only move, compare or cut numbers."""
    reader = _only_reader(node)
    while reader is not None and reader.target in (*_MOVES, *_POOLS, _ATEN.clamp.default, _ATEN.clamp.Tensor):
        reader = _only_reader(reader)
    return work.grid(reader)


def _grid_of_readers(work: _Work, node: fx.Node) -> Grid | None:
    """The widest grid of the readers that has all 256 codes: the other readers read on it as well."""
    found = [grid for reader in node.users if (grid := work.grid(reader)) is not None]
    full = [grid for grid in found if (grid.low, grid.high) == (_LOW, _HIGH)]
    return max(full, key=lambda grid: grid.scale) if full else None


def _grid_over(low: float, high: float) -> Grid:
    if not (np.isfinite(low) and np.isfinite(high)):
        raise NumericError("a layer's result is not finite on the calibration data; check the data and the model.")
    low, high = min(low, 0.0), max(high, 0.0)
    scale = float(np.float32(max(high - low, 1e-12) / (_HIGH - _LOW)))
    return Grid(scale, int(np.clip(round(_LOW - low / scale), _LOW, _HIGH)))


def _round_after(work: _Work, node: fx.Node, grid: Grid) -> None:
    """All that reads ``node`` reads it rounded; readers that round to the same grid are no longer needed."""
    readers = list(node.users)
    with work.graph.inserting_after(node):
        rounded = work.graph.call_function(_PER_TENSOR[0], (node, grid.scale, grid.zero, grid.low, grid.high))
    for reader in readers:
        if work.grid(reader) == grid:
            reader.replace_all_uses_with(rounded)
            work.graph.erase_node(reader)
        else:
            reader.replace_input_with(node, rounded)


def _write_out(work: _Work) -> None:
    """Roundings to int8 as quantize and, for each reader, dequantize; others as arithmetic."""
    for node in tuple(work.graph.nodes):
        if node.target not in (*_PER_TENSOR, *_PER_CHANNEL):
            continue
        grid = work.grid(node)
        if grid is None:
            _as_arithmetic(work, node)
            continue
        numbers = (grid.scale, grid.zero, _LOW, _HIGH, torch.int8)
        with work.graph.inserting_before(node):
            call = work.graph.call_function
            code = call(_pairs().quantize_per_tensor.default, (node.args[0], *numbers))
            if (grid.low, grid.high) != (_LOW, _HIGH):  # cut behind, so that the layer before is read on a grid
                ends = ((end - grid.zero) * grid.scale for end in (grid.low, grid.high))
                back = call(_pairs().dequantize_per_tensor.default, (code, *numbers))
                code = call(_pairs().quantize_per_tensor.default, (call(_ATEN.clamp.default, (back, *ends)), *numbers))
        for reader in tuple(node.users):
            with work.graph.inserting_before(reader):
                back = work.graph.call_function(_pairs().dequantize_per_tensor.default, (code, *numbers))
            reader.replace_input_with(node, back)
        work.graph.erase_node(node)


def _as_arithmetic(work: _Work, node: fx.Node) -> None:
    """(clamp(round(x / scale) + zero, low, high) - zero) * scale, for grids that int8 cannot hold."""
    given, scale, zero, *rest = node.args
    low, high = rest[-2:]
    channel = int(str(rest[0])) if node.target in _PER_CHANNEL else None
    with work.graph.inserting_before(node):
        call = work.graph.call_function
        if channel is not None:
            shape = [-1 if axis == channel % _rank(node) else 1 for axis in range(_rank(node))]
            scale, zero = (call(_ATEN.reshape.default, (part, shape)) for part in (scale, zero))
        scaled = call(_ATEN.round.default, (call(_ATEN.div.Tensor, (given, scale)),))
        code = call(_ATEN.clamp.default, (call(_ATEN.add.Tensor, (scaled, zero)), low, high))
        found = call(_ATEN.mul.Tensor, (call(_ATEN.sub.Tensor, (code, zero)), scale))
    node.replace_all_uses_with(found)
    work.graph.erase_node(node)


class _Ranges(fx.Interpreter):
    """Runs a module and keeps the smallest and the largest value of some nodes."""

    def __init__(self, module: fx.GraphModule, nodes: Sequence[fx.Node]) -> None:
        super().__init__(module)
        self.seen = dict.fromkeys(nodes, (0.0, 0.0))

    def run_node(self, n: fx.Node) -> Any:
        found = super().run_node(n)
        if n in self.seen:
            low, high = self.seen[n]
            self.seen[n] = min(float(found.min()), low), max(float(found.max()), high)  # NaN first: it stays
        return found
