"""Refuse a graph that is not well formed, and infer every shape under a cap before anything runs.

Structure and argument types are checked first; then every node runs on meta tensors, which hold no data.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from espalier.core.errors import EspalierError, LimitExceeded, ModelError
from espalier.graph.graph import Arg, Branch, Graph, Node, Tree, Value, Weight, leaves, references
from espalier.graph.operators import operator_of
from espalier.graph.operators.foreign import shown
from espalier.graph.operators.schema import DTYPES, MAX_LIST, Operator, call, check_arguments, torch_dtype

MAX_RANK = 16
_NAME_LENGTH = 512


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How large a graph may be: nodes; elements of one value, of all values; depth of call trees; bytes."""

    nodes: int = 100_000
    elements: int = 2**31
    total_elements: int = 2**36
    depth: int = 32
    bytes: int = 2**24


DEFAULT_LIMITS = Limits()


def infer(graph: Graph, *, batch: int = 2, limits: Limits = DEFAULT_LIMITS) -> list[Any]:
    """Every value of ``graph`` for ``batch`` samples: meta tensors, sizes (int) or tuples of meta tensors.

    Raises ModelError for a graph that is not well formed, LimitExceeded for one larger than ``limits``.
    """
    _check_structure(graph, limits)
    tensors = {name: _blank(spec.shape, spec.dtype, limits) for name, spec in graph.tensors.items()}
    values: list[Any] = [
        _blank(tuple(batch if n is None else n for n in item.shape), item.dtype, limits) for item in graph.inputs
    ]
    total = sum(v.numel() for v in values)
    closed = not graph.foreign
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice about speed and padding is for whoever runs the graph
        for number, node in enumerate(graph.nodes):
            where = f"Node {number} ({node.op})"
            value = _infer_node(node, values, tensors, where)
            total += _measure(value, limits, where, closed)
            if total > limits.total_elements:
                raise LimitExceeded(f"{where}: the values hold more than {limits.total_elements} elements in all.")
            values.append(value)
    _check_results(graph, values)
    return values


def resolve(operator: Operator, node: Node, values: Sequence[Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The given arguments of ``node`` with references replaced by what they stand for."""

    def look_up(arg: Arg) -> Any:
        if isinstance(arg, Value):
            return values[arg.index]
        if isinstance(arg, Weight):
            return tensors[arg.name]
        return tuple(look_up(item) for item in arg) if isinstance(arg, tuple) else arg

    return {p.name: look_up(node.args[p.name]) for p in operator.parameters if p.name in node.args}


def with_defaults(operator: Operator, given: Mapping[str, Any]) -> dict[str, Any]:
    """``given`` arguments completed by the defaults of the table."""
    return {p.name: given.get(p.name, p.default) for p in operator.parameters}


_REFUSALS: tuple[type[Exception], ...] = (
    ArithmeticError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
    AttributeError,
    AssertionError,
)


def _infer_node(node: Node, values: Sequence[Any], tensors: Mapping[str, Any], where: str) -> Any:
    operator = operator_of(node)
    given = resolve(operator, node, values, tensors)
    complete = with_defaults(operator, given)
    _check_kinds(operator, complete, where)
    refusals = _REFUSALS if node.overload is None else (Exception,)  # a foreign operator is anyone's code
    try:
        refusal = operator.guard(complete) if operator.guard else None
        if refusal:
            raise LimitExceeded(f"{where}: {refusal}.")
        if operator.shape:
            return operator.shape(complete)
        positional, keywords = call(operator, given)
        if operator.creates:
            keywords["device"] = torch.device("meta")
        result = operator.run(*positional, **keywords)
    except EspalierError:
        raise
    except refusals as error:
        reason = str(error).split("\n")[0][:300]
        if node.overload is not None:
            raise ModelError(
                f"The model uses {shown(node.op, node.path)}, whose results have no shape until it is run: "
                f"{reason.rstrip('.')}. Give it one by torch.library.register_fake or rewrite that part."
            ) from error
        raise ModelError(f"{where} cannot take its arguments: {reason}") from error
    return tuple(result) if isinstance(result, list | tuple) else result


_INTEGERS = frozenset("nN#")


def _check_kinds(operator: Operator, values: Mapping[str, Any], where: str) -> None:
    """References must lead to the kind of value the signature asks for (tensor, size or tuple)."""
    for parameter in operator.parameters:
        value = values[parameter.name]
        items = value if isinstance(value, tuple) and parameter.kind in "LNIUPF" else (value,)
        for item in items:
            is_tensor, is_tuple = isinstance(item, Tensor), isinstance(item, tuple)
            wrong = (
                (parameter.kind in ("T", "L") and item is not None and not is_tensor)
                or (parameter.kind in _INTEGERS and (is_tensor or is_tuple))
                or (parameter.kind == "O" and is_tuple)
                or (parameter.kind == "V" and not is_tuple)
            )
            if wrong:
                raise ModelError(
                    f"{where}: {parameter.name} refers to a {type(item).__name__}, not kind {parameter.kind!r}."
                )


def _measure(value: Any, limits: Limits, where: str, closed: bool) -> int:
    """Elements of one inferred value, refused beyond the limits or when it is no tensor, size or tuple.

    ``closed``: only dtypes that files know; foreign operators also give others, complex numbers above all.
    """
    if isinstance(value, tuple):
        if len(value) > MAX_LIST:
            raise LimitExceeded(f"{where} gives {len(value)} tensors; at most {MAX_LIST} are allowed.")
        return sum(_measure(item, limits, where, closed) for item in value)
    if type(value) is int:
        if abs(value) > limits.elements:
            raise LimitExceeded(f"{where} gives the size {value}; at most {limits.elements} is allowed.")
        return 1
    if not isinstance(value, Tensor) or value.device.type != "meta":
        raise ModelError(f"{where} gives a {type(value).__name__}, not a tensor.")
    if value.dim() > MAX_RANK or (closed and str(value.dtype).removeprefix("torch.") not in DTYPES):
        raise ModelError(f"{where} gives a tensor of rank {value.dim()} and dtype {value.dtype}.")
    if value.numel() > limits.elements:
        raise LimitExceeded(f"{where} gives {value.numel()} elements; at most {limits.elements} are allowed.")
    return value.numel()


def _blank(shape: tuple[int, ...], dtype: str, limits: Limits) -> Tensor:
    numel = 1
    for size in shape:
        numel *= size
    if len(shape) > MAX_RANK or any(type(n) is not int or n < 0 for n in shape) or dtype not in DTYPES:
        raise ModelError(f"No tensor has shape {shape} and dtype {dtype!r}.")
    if numel > limits.elements or any(n > limits.elements for n in shape):
        raise LimitExceeded(f"A tensor of shape {shape} has {numel} elements; at most {limits.elements} are allowed.")
    return torch.empty(shape, dtype=torch_dtype(dtype), device="meta")


def _check_structure(graph: Graph, limits: Limits) -> None:
    if len(graph.nodes) > limits.nodes:
        raise LimitExceeded(f"The graph has {len(graph.nodes)} nodes; at most {limits.nodes} are allowed.")
    for name in graph.tensors:
        if not name or len(name) > _NAME_LENGTH or "\0" in name or "" in name.split("."):
            raise ModelError(f"{name[:80]!r} cannot name a tensor.")
    for alias, name in graph.aliases.items():
        if name not in graph.tensors or alias in graph.tensors:
            raise ModelError(f"The tied tensor {alias!r} refers to {name!r}, which is not there.")
    for number, node in enumerate(graph.nodes):
        check_arguments(operator_of(node), node)
        for arg in references(node):
            _check_reference(arg, graph, len(graph.inputs) + number, f"Node {number} ({node.op})")
    for leaf in leaves(graph.output):
        if isinstance(leaf, Value | Weight):
            _check_reference(leaf, graph, len(graph.inputs) + len(graph.nodes), "The output")
    _check_call(graph, limits)


def _check_reference(arg: Value | Weight, graph: Graph, ready: int, where: str) -> None:
    if isinstance(arg, Weight) and arg.name not in graph.tensors:
        raise ModelError(f"{where} refers to the tensor {arg.name!r}, which is not there.")
    if isinstance(arg, Value) and not 0 <= arg.index < ready:
        raise ModelError(f"{where} refers to value {arg.index}; only {ready} are computed before it.")


def _check_call(graph: Graph, limits: Limits) -> None:
    parts = graph.call.children
    positional, keywords = parts if len(parts) == 2 else (None, None)
    good = (
        graph.call.kind == "tuple"
        and isinstance(positional, Branch)
        and isinstance(keywords, Branch)
        and (positional.kind, keywords.kind) == ("tuple", "dict")
        and len(graph.names) == len(positional.children)
        and all(isinstance(key, str) for key in keywords.keys)
        and not set(graph.names) & set(keywords.keys)
    )
    if not good:
        raise ModelError("The call of a graph is (positional arguments, keyword arguments), each with its name.")
    seen = [leaf for leaf in leaves(graph.call) if isinstance(leaf, Value | Weight)]
    if seen != [Value(index) for index in range(len(graph.inputs))]:
        raise ModelError("The call of a graph must name every input tensor once and in order.")
    for tree in (graph.call, graph.output):
        _check_tree(tree, limits.depth)
    if any(item.shape.count(None) > 1 for item in graph.inputs):
        raise ModelError("An input has more than one batch dimension.")


def _check_tree(tree: Tree, depth: int) -> None:
    if depth < 0:
        raise LimitExceeded("The arguments or results of the graph are nested too deeply.")
    if not isinstance(tree, Branch):
        return
    keyed = tree.kind in ("dict", "namedtuple")
    if len(set(tree.keys)) != len(tree.keys) or len(tree.keys) != (len(tree.children) if keyed else 0):
        raise ModelError(f"A {tree.kind} with keys {tree.keys} and {len(tree.children)} entries.")
    if tree.kind == "namedtuple" and not all(
        isinstance(key, str) and key.isidentifier() and not key.startswith("_") for key in tree.keys
    ):
        raise ModelError(f"{tree.keys} cannot be the fields of a named tuple.")
    for child in tree.children:
        _check_tree(child, depth - 1)


def _check_results(graph: Graph, values: Sequence[Any]) -> None:
    for leaf in leaves(graph.output):
        if isinstance(leaf, Value) and isinstance(values[leaf.index], tuple):
            raise ModelError(f"The output refers to value {leaf.index}, which is several tensors.")
