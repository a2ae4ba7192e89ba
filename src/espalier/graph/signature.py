"""The outside of an exported program: its tensors, inputs, call and results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, InputSpec

from espalier.core.errors import ModelError
from espalier.graph.exported import Builder, Unsupported, is_free
from espalier.graph.graph import CONSTANT_PREFIX, Branch, Input, Role, TensorSpec, Tree, Value, Weight
from espalier.graph.operators.foreign import outside
from espalier.graph.operators.schema import dtype_name
from espalier.graph.trees import describe

STATE = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


def state_of(
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
        if spec.kind in STATE and target not in rename:
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


def input_of(node: fx.Node) -> Input:
    """Shape and dtype of an input; symbolic sizes are the batch."""
    value = node.meta["val"]
    shape = tuple(None if is_free(n) else int(n) for n in value.shape)
    return Input(shape, dtype_name(value.dtype))


def call_tree(program: ExportedProgram, user: Sequence[InputSpec], example: Sequence[Any]) -> Branch:
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


def output_tree(program: ExportedProgram, builder: Builder) -> Tree:
    """The results in their containers. Raises ModelError when something unsupported reaches them."""
    node = next(n for n in program.graph.nodes if n.op == "output")
    flat = [Leaf(builder.read(item)) for item in node.args[0]]
    specs = program.graph_signature.output_specs
    results = [leaf for leaf, spec in zip(flat, specs, strict=True) if spec.kind.name == "USER_OUTPUT"]
    return describe(torch.utils._pytree.tree_unflatten(results, program.call_spec.out_spec), plain_leaf)


@dataclass(frozen=True)
class Leaf:
    """Keeps an output's reference opaque while torch rebuilds the containers around it."""

    item: Any


def plain_leaf(leaf: Any) -> Tree:
    """A result's leaf as the graph keeps it. Raises ModelError for what no file can hold."""
    item = leaf.item if isinstance(leaf, Leaf) else leaf
    if isinstance(item, Unsupported):
        raise outside(item.target)
    if isinstance(item, Value | Weight | bool | int | float | str | None):
        return item
    raise ModelError(
        f"The model returns a {type(item).__name__}; tensors, plain values, tuples, lists and dicts are allowed."
    )
