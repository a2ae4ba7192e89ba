"""From an exported program to the closed operator set.

No-ops disappear, in-place operators become values, sizes that follow from the batch become ``-1`` or a
``size`` node, tensors get their state-dict names back, and what nothing refers to is dropped.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, InputSpec

from espalier.core.errors import ModelError
from espalier.graph.graph import (
    CONSTANT_PREFIX,
    Arg,
    Branch,
    Graph,
    Input,
    Node,
    Role,
    TensorSpec,
    Tree,
    Value,
    Weight,
    leaves,
    references,
)
from espalier.graph.operators import BY_ATEN, TABLE
from espalier.graph.operators.schema import Operator, dtype_name
from espalier.graph.rewrites import FILL, REWRITES
from espalier.graph.trees import describe, fill

_NOTHING = frozenset(
    ("contiguous", "clone", "detach", "alias", "lift", "lift_fresh", "lift_fresh_copy", "positive", "requires_grad")
)
_SCATTER = {"select": "select_scatter", "slice": "slice_scatter"}
_VIEWS = frozenset(
    {"reshape", "flatten", "unflatten", "permute", "transpose", "movedim", "squeeze", "unsqueeze", "expand", "unfold"}
    | {"expand_as", "reshape_as", "diagonal", "split", "split_with_sizes", "chunk", "unbind", "narrow"}
)


@dataclass(frozen=True)
class Unsupported:
    """Stands where a value would be whose operator is not in the table; an error once something needs it."""

    target: str


@dataclass
class Builder:
    """State of one normalisation: nodes so far and what each exported node became."""

    model: nn.Module
    inputs: int
    nodes: list[Node] = field(default_factory=list)
    environment: dict[fx.Node, Any] = field(default_factory=dict)
    unsupported: set[str] = field(default_factory=set)
    path: str = ""

    def emit(self, op: str, args: Mapping[str, Arg]) -> Value:
        """Append a node and return its value."""
        self.nodes.append(Node(op, dict(args), self.path))
        return Value(self.inputs + len(self.nodes) - 1)

    def read(self, item: Any) -> Any:
        """An exported argument in our terms; values that could not be built come back as Unsupported."""
        if isinstance(item, fx.Node):
            return self.environment.get(item, Unsupported(str(item.target)))
        if isinstance(item, list | tuple):
            return tuple(self.read(x) for x in item)
        if isinstance(item, torch.dtype):
            return dtype_name(item)
        if isinstance(item, torch.SymInt):
            return int(item)
        return item


def normalise(
    program: ExportedProgram,
    model: nn.Module,
    example: Sequence[Any],
    *,
    names: tuple[str, ...],
) -> Graph:
    """The graph of ``program``; ``example`` are the leaves of the traced call.

    Raises ModelError for operators outside the table and for models that write into their own buffers.
    """
    specs, aliases, constants, rename = _tensors(program, model)
    signature = program.graph_signature
    placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    user = [spec for spec in signature.input_specs if spec.kind == InputKind.USER_INPUT]
    inputs = [placeholders[s.arg.name] for s in user if not isinstance(s.arg, ConstantArgument)]
    builder = Builder(model, len(inputs))
    builder.environment.update({node: Value(k) for k, node in enumerate(inputs)})
    for spec in signature.input_specs:
        if spec.kind in _STATE and spec.arg.name in placeholders:
            builder.environment[placeholders[spec.arg.name]] = Weight(rename[str(spec.target)])
    for node in program.graph.nodes:
        if node.op == "call_function":
            builder.path = _module_path(node)
            builder.environment[node] = _convert(builder, node)
        elif node.op == "get_attr":
            builder.environment[node] = Unsupported(f"subgraph or attribute {node.target}")
    output = _output(program, builder)
    graph = Graph(
        inputs=tuple(_input(node) for node in inputs),
        call=_call(program, user, example),
        names=names,
        nodes=tuple(builder.nodes),
        output=output,
        tensors=specs,
        aliases=aliases,
        constants=constants,
    )
    return _without_dead(graph)


_STATE = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


def _tensors(
    program: ExportedProgram, model: nn.Module
) -> tuple[dict[str, TensorSpec], dict[str, str], dict[str, Tensor], dict[str, str]]:
    """Specs, tied names, constants, and export's name of each tensor -> ours."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    specs: dict[str, TensorSpec] = {}
    aliases: dict[str, str] = {}
    owner: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            continue
        if id(tensor) in owner:
            aliases[name] = owner[id(tensor)]
            continue
        owner[id(tensor)] = name
        role: Role = ("parameter" if tensor.requires_grad else "frozen") if name in parameters else "buffer"
        specs[name] = TensorSpec(tuple(tensor.shape), dtype_name(tensor.dtype), role)
    rename = {name: aliases.get(name, name) for name in (*specs, *aliases)}
    constants: dict[str, Tensor] = {}
    for spec in program.graph_signature.input_specs:
        target = str(spec.target)
        if spec.kind in _STATE and target not in rename:
            value = program.constants.get(target, program.state_dict.get(target))
            if not isinstance(value, Tensor):
                raise ModelError(
                    f"The model holds {target!r} of type {type(value).__name__}; only tensors can be stored."
                )
            name = f"{CONSTANT_PREFIX}{len(constants)}"
            rename[target] = name
            constants[name] = value.detach().clone()
            specs[name] = TensorSpec(tuple(value.shape), dtype_name(value.dtype), "constant")
    return specs, aliases, constants, rename


def _input(node: fx.Node) -> Input:
    value = node.meta["val"]
    shape = tuple(None if isinstance(n, torch.SymInt) else int(n) for n in value.shape)
    return Input(shape, dtype_name(value.dtype))


def _call(program: ExportedProgram, user: Sequence[InputSpec], example: Sequence[Any]) -> Branch:
    """The call tree: a reference per tensor in order, constants as they were."""
    flat: list[Tree] = []
    count = 0
    for spec, value in zip(user, example, strict=True):
        if isinstance(spec.arg, ConstantArgument):
            if not isinstance(value, bool | int | float | str | None):
                raise ModelError(
                    f"The model was called with a {type(value).__name__}; tensors and plain values are allowed."
                )
            flat.append(value)
        else:
            flat.append(Value(count))
            count += 1
    arguments = torch.utils._pytree.tree_unflatten(flat, program.call_spec.in_spec)
    tree = describe(arguments, lambda leaf: leaf)
    if not isinstance(tree, Branch):
        raise ModelError("torch.export gave a call that is no tuple.")
    return tree


def _output(program: ExportedProgram, builder: Builder) -> Tree:
    node = next(n for n in program.graph.nodes if n.op == "output")
    flat = [_Leaf(builder.read(item)) for item in node.args[0]]
    specs = program.graph_signature.output_specs
    results = [leaf for leaf, spec in zip(flat, specs, strict=True) if spec.kind.name == "USER_OUTPUT"]
    mutated = [str(spec.target) for spec in specs if spec.kind.name == "BUFFER_MUTATION"]
    if mutated:
        raise ModelError(
            f"The model writes into its buffers {mutated} in eval mode; a graph cannot. Make it a pure function."
        )
    return describe(torch.utils._pytree.tree_unflatten(results, program.call_spec.out_spec), _plain)


@dataclass(frozen=True)
class _Leaf:
    """Keeps an output's reference opaque while torch rebuilds the containers around it."""

    item: Any


def _plain(leaf: Any) -> Tree:
    item = leaf.item if isinstance(leaf, _Leaf) else leaf
    if isinstance(item, Unsupported):
        raise ModelError(_refusal({item.target}))
    if isinstance(item, Value | Weight | bool | int | float | str | None):
        return item
    raise ModelError(
        f"The model returns a {type(item).__name__}; tensors, plain values, tuples, lists and dicts are allowed."
    )


def _module_path(node: fx.Node) -> str:
    stack = list(node.meta.get("nn_module_stack", {}).values())
    path = str(stack[-1][0]) if stack else ""
    return "" if path.startswith("_empty") else path.split("@")[0]


def _target(node: fx.Node) -> tuple[str, str, bool]:
    """Full target (``add.Tensor``), plain name (``add``), whether it writes into its first argument."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        full = str(target).removeprefix("aten.")
        plain, _, overload = full.partition(".")
        writes = target._schema.is_mutable and plain.endswith("_") and not plain.endswith("__")
        name = plain[:-1] if writes else plain
        return f"{name}.{overload}", name, writes
    name = getattr(target, "__name__", str(target))
    return f"_operator.{name}", name, False


def _convert(builder: Builder, node: fx.Node) -> Any:
    """What one exported node becomes: a value, its argument's value for a no-op, or Unsupported."""
    full, name, writes = _target(node)
    if full == "_operator.getitem":
        source, index = builder.read(node.args[0]), node.args[1]
        if isinstance(source, tuple | Unsupported):
            return source[int(index)] if isinstance(source, tuple) else source  # type: ignore[arg-type]
        return builder.emit("item", {"values": source, "index": int(index)})  # type: ignore[arg-type]
    given = _bind(builder, node)
    missing = _first_unsupported(given.values())
    if missing is not None:
        return missing
    value = _value_of(builder, node, full, name, given)
    if writes and name not in _NOTHING and not isinstance(value, Unsupported):
        _write_back(builder, node, value)
    return value


def _value_of(builder: Builder, node: fx.Node, full: str, name: str, given: dict[str, Any]) -> Any:
    if name in _NOTHING:
        return next(iter(given.values()))
    if full in REWRITES:
        rewritten = REWRITES[full](builder, node, given)
        if rewritten is not None:
            return rewritten
    operator = BY_ATEN.get(full)
    if operator is None:
        return Unsupported(full)
    arguments = _arguments(operator, given)
    fixed = FILL[operator.name](builder, node, arguments) if operator.name in FILL else arguments
    if isinstance(fixed, Value | Weight):
        return fixed
    return builder.emit(operator.name, _without_defaults(operator, fixed))


def _bind(builder: Builder, node: fx.Node) -> dict[str, Any]:
    """Arguments of an exported call by torch's names, torch's defaults filled in."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return dict(zip("abcdefgh", (builder.read(a) for a in node.args), strict=False))
    given: dict[str, Any] = {}
    for number, argument in enumerate(node.target._schema.arguments):
        if number < len(node.args):
            given[argument.name] = builder.read(node.args[number])
        elif argument.name in node.kwargs:
            given[argument.name] = builder.read(node.kwargs[argument.name])
        elif argument.has_default_value():
            given[argument.name] = builder.read(argument.default_value)
    return given


def _first_unsupported(items: Any) -> Unsupported | None:
    for item in items:
        found = item if isinstance(item, Unsupported) else _first_unsupported(item) if isinstance(item, tuple) else None
        if found is not None:
            return found
    return None


_LIST_KINDS = "NIUPGF"


def _arguments(operator: Operator, given: Mapping[str, Any]) -> dict[str, Arg]:
    """``given`` under our names and in the kinds of the table; arguments the table lacks are dropped."""
    known = {parameter.name: parameter for parameter in operator.parameters}
    arguments: dict[str, Arg] = {}
    for theirs, value in given.items():
        name = operator.rename.get(theirs, theirs)
        if name not in known:
            continue
        kind = known[name].kind
        if kind in _LIST_KINDS and type(value) in (int, float, Value):
            default = known[name].default
            value = (value,) * (len(default) if isinstance(default, tuple) and default else 1)
        if kind in "fF" and value is not None:
            value = tuple(float(v) for v in value) if kind == "F" else float(value)
        arguments[name] = value
    return arguments


def _without_defaults(operator: Operator, arguments: Mapping[str, Arg]) -> dict[str, Arg]:
    def same(a: Arg, b: Arg) -> bool:
        return a == b and type(a) is type(b)

    return {
        p.name: arguments[p.name]
        for p in operator.parameters
        if p.name in arguments and (p.required or not same(arguments[p.name], p.default))
    }


def _write_back(builder: Builder, node: fx.Node, value: Any) -> None:
    """After an in-place operator: later readers of the written tensor and of what it is a view of see ``value``."""
    chain = [node.args[0]]
    while isinstance(chain[-1], fx.Node) and (base := _viewed(chain[-1])) is not None:
        chain.append(base)
    nodes = [item for item in chain if isinstance(item, fx.Node)]
    root = builder.environment[nodes[-1]]
    if isinstance(root, Weight) and nodes[-1].op == "placeholder":
        raise ModelError(f"The model writes into its tensor {root.name!r}. Make it a pure function.")
    builder.environment[nodes[0]] = value
    later = _after(node)
    apart = set().union(*(_family(sibling) for item in nodes for sibling in _siblings(item)))
    touched = _family(nodes[-1]) - _family(node) - apart - later - {nodes[0]}
    readers = {member for member in touched if any(user in later for user in member.users)}
    if not readers:
        return
    if readers - set(nodes):
        raise ModelError(_WRITE.format("memory that a view still reads"))
    for view, base in itertools.pairwise(nodes):
        value = _scattered(builder, view, base, value)
        builder.environment[base] = value


_WRITE = "The model writes in place through {}. Write x = f(x) instead of changing x."


def _scattered(builder: Builder, view: fx.Node, base: fx.Node, value: Any) -> Any:
    """``base`` after its part ``view`` became ``value``."""
    full, name, writes = _target(view)
    if name in _NOTHING or writes:
        return value
    operator = BY_ATEN.get(full)
    if operator is None or operator.name not in _SCATTER:
        raise ModelError(_WRITE.format(f"{name}(...)"))
    arguments = _arguments(operator, _bind(builder, view))
    fixed = FILL[operator.name](builder, view, arguments) if operator.name in FILL else arguments
    if isinstance(fixed, Value | Weight):
        return value
    scatter = TABLE[_SCATTER[operator.name]]
    kept = {key: item for key, item in fixed.items() if key != "self"}
    return builder.emit(
        scatter.name, _without_defaults(scatter, {"self": builder.environment[base], "src": value, **kept})
    )


def _siblings(node: fx.Node) -> list[fx.Node]:
    """The other pieces of the split ``node`` is a piece of: they share no memory with it."""
    if node.op != "call_function" or _target(node)[0] != "_operator.getitem" or not isinstance(node.args[0], fx.Node):
        return []
    return [user for user in node.args[0].users if user.args[1:] != node.args[1:]]


def _viewed(node: fx.Node) -> fx.Node | None:
    """The node whose memory ``node`` shares, if any."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    full, name, writes = _target(node)
    if full == "_operator.getitem" or writes or name in ("contiguous", "detach", "alias", "detach_"):
        return node.args[0]
    operator = BY_ATEN.get(full)
    shares = operator is not None and (operator.name in _SCATTER or operator.name in _VIEWS)
    return node.args[0] if shares else None


def _family(root: fx.Node) -> set[fx.Node]:
    """``root`` and every node that shares its memory through views."""
    found, stack = {root}, [root]
    while stack:
        for user in stack.pop().users:
            if user not in found and _viewed(user) in found:
                found.add(user)
                stack.append(user)
    return found


def _after(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    while node.next.op != "root":
        node = node.next
        found.add(node)
    return found


def _refusal(targets: set[str]) -> str:
    return (
        f"The model uses {', '.join(sorted(targets))}, which the graph's closed operator set does not have. "
        "Rewrite that part with standard layers, or keep the file without its architecture."
    )


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
    output = describe(fill(graph.output, lambda leaf: _Leaf(renumber(leaf))), _plain)
    result = replace(graph, nodes=renumbered, output=output)
    constants = {name: t for name, t in graph.constants.items() if name in result.used()}
    tensors = {name: s for name, s in graph.tensors.items() if s.role != "constant" or name in constants}
    return replace(result, tensors=tensors, constants=constants)
