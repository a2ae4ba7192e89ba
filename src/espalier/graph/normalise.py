"""From an exported program to the closed operator set.

No-ops disappear, in-place operators become values, sizes that follow from the batch become ``-1`` or a
``size`` node, tensors get their state-dict names back, and what nothing refers to is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind

from espalier.graph.exported import (
    NOTHING,
    Builder,
    Unsupported,
    arguments_of,
    bind,
    first_unsupported,
    foreign_arguments,
    module_path_of,
    target_of,
)
from espalier.graph.graph import Graph, Value, Weight, leaves, references
from espalier.graph.inplace import is_lost, write_back
from espalier.graph.operators import BY_ATEN
from espalier.graph.operators.foreign import outside, pure, shown
from espalier.graph.rewrites import FILL, REWRITES
from espalier.graph.signature import STATE, Leaf, call_tree, input_of, output_tree, plain_leaf, state_of
from espalier.graph.trees import describe, fill


def normalise(
    program: ExportedProgram,
    model: nn.Module,
    example: Sequence[Any],
    *,
    names: tuple[str, ...],
    foreign: bool = False,
) -> Graph:
    """The graph of ``program``; ``example`` are the leaves of the traced call.

    Operators outside the table are refused, or with ``foreign`` kept as nodes that no file can hold.
    Raises ModelError for those refused and for models that write into their own buffers.
    """
    specs, aliases, constants, rename = state_of(program, model)
    signature = program.graph_signature
    placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    user = [spec for spec in signature.input_specs if spec.kind == InputKind.USER_INPUT]
    inputs = [placeholders[s.arg.name] for s in user if not isinstance(s.arg, ConstantArgument)]
    builder = Builder(model, len(inputs), foreign)
    builder.environment.update({node: Value(k) for k, node in enumerate(inputs)})
    for spec in signature.input_specs:
        if spec.kind in STATE and spec.arg.name in placeholders:
            builder.environment[placeholders[spec.arg.name]] = Weight(rename[str(spec.target)])
    for node in program.graph.nodes:
        if node.op == "call_function":
            builder.path = module_path_of(node)
            builder.environment[node] = _convert(builder, node)
        elif node.op == "get_attr":
            builder.environment[node] = Unsupported(f"the subgraph or attribute {node.target}")
    output = output_tree(program, builder)
    graph = Graph(
        inputs=tuple(input_of(node) for node in inputs),
        call=call_tree(program, user, example),
        names=names,
        nodes=tuple(builder.nodes),
        output=output,
        tensors=specs,
        aliases=aliases,
        constants=constants,
    )
    return _without_dead(graph)


def _convert(builder: Builder, node: fx.Node) -> Any:
    """What one exported node becomes: a value, its argument's value for a no-op, or Unsupported."""
    full, name, writes = target_of(node)
    if full == "_operator.getitem":
        source, index = builder.read(node.args[0]), node.args[1]
        if isinstance(source, tuple | Unsupported):
            return source[int(index)] if isinstance(source, tuple) else source  # type: ignore[arg-type]
        return builder.emit("item", {"values": source, "index": int(index)})  # type: ignore[arg-type]
    given = bind(builder, node)
    missing = first_unsupported(given.values())
    if missing is not None:
        if is_lost(builder, node):
            raise outside(missing.target)
        return missing
    value = _value_of(builder, node, full, name, given)
    if writes and name not in NOTHING and not isinstance(value, Unsupported):
        write_back(builder, node, value)
    return value


def _value_of(builder: Builder, node: fx.Node, full: str, name: str, given: dict[str, Any]) -> Any:
    if name in NOTHING:
        return next(iter(given.values()))
    if any(isinstance(item, torch.dtype) for item in given.values()):  # complex, which no row of the table makes
        return _outside(builder, node)
    if full in REWRITES:
        rewritten = REWRITES[full](builder, node, given)
        if rewritten is not None:
            return rewritten
    operator = BY_ATEN.get(full)
    if operator is None:
        return _outside(builder, node)
    arguments = arguments_of(operator, given)
    fixed = FILL[operator.name](builder, node, arguments) if operator.name in FILL else arguments
    if isinstance(fixed, Value | Weight):
        return fixed
    return builder.emit(operator.name, fixed)


def _outside(builder: Builder, node: fx.Node) -> Any:
    """What becomes of an operator the table lacks."""
    what = shown(str(node.target), builder.path)
    overload = pure(node.target) if builder.foreign else None
    if overload is not None:
        return builder.emit_foreign(overload, foreign_arguments(builder, node))
    if is_lost(builder, node):
        raise outside(what)
    return Unsupported(what)


def _without_dead(graph: Graph) -> Graph:
    """Drop nodes nothing refers to and renumber the rest."""
    offset = len(graph.inputs)
    alive: set[int] = {leaf.index for leaf in leaves(graph.output) if isinstance(leaf, Value)}
    for number in range(len(graph.nodes) - 1, -1, -1):
        if offset + number in alive:
            alive |= {arg.index for arg in references(graph.nodes[number]) if isinstance(arg, Value)}
    kept = [number for number in range(len(graph.nodes)) if offset + number in alive]
    new = {index: index for index in range(offset)} | {offset + old: offset + k for k, old in enumerate(kept)}

    def renumber(arg: Any) -> Any:
        if isinstance(arg, Value):
            return Value(new[arg.index])
        return tuple(renumber(item) for item in arg) if isinstance(arg, tuple) else arg

    nodes = [graph.nodes[old] for old in kept]
    renumbered = tuple(replace(n, args={name: renumber(arg) for name, arg in n.args.items()}) for n in nodes)
    output = describe(fill(graph.output, lambda leaf: Leaf(renumber(leaf))), plain_leaf)
    result = replace(graph, nodes=renumbered, output=output)
    constants = {name: t for name, t in graph.constants.items() if name in result.used()}
    tensors = {name: s for name, s in graph.tensors.items() if s.role != "constant" or name in constants}
    return replace(result, tensors=tensors, constants=constants)
