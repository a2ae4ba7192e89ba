"""Batch norms folded into the layers before them, where a layer's output is read by its norm alone."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

from espalier.core.context import Context
from espalier.core.model import device_of
from espalier.core.norms import BATCH_NORMS, Fold
from espalier.core.parametrize import plain, slots
from espalier.core.plan import Plan
from espalier.core.task import capture_call, to_device
from espalier.graph import Graph, Node, Value, Weight, infer, trace
from espalier.graph.graph import leaves, references
from espalier.train.calls import layers_named
from espalier.train.layers import owners

FOLDED_INTO = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def fold_norms(model: nn.Module, layers: tuple[str, ...], context: Context, who: str) -> nn.Module:
    """``model`` with every norm behind one of ``layers`` (patterns) folded; those that cannot be are skipped."""
    chosen = layers_named(model, layers, FOLDED_INTO, context, who)
    norms = {path: module for path, module in model.named_modules() if isinstance(module, BATCH_NORMS)}
    found = feeding(model, traced(model, context)) if norms else {}
    plan = []
    for path in norms:
        into = found.get(path, "")
        reason = refusal(model, path, into) if into else "no linear layer or convolution feeds it alone"
        if into and into not in chosen:
            reason = f"{into} is not among the chosen layers"
        if reason:
            context.skip(path or "(model)", reason)
        else:
            plan.append(Fold(norm=path, into=into))
    if not norms:
        context.skip("(model)", "it has no batch-norm layer")
    context.record.details["folded"] = [edit.norm for edit in plan]
    return Plan(tuple(plan)).apply(model)


def traced(model: nn.Module, context: Context) -> Graph:
    """The graph of ``model`` on the task's example, operators that no file can hold among its nodes."""
    bare = plain(model)
    args, kwargs = capture_call(context.data, bare, to_device(context.data.example(), device_of(bare)))
    return trace(bare, args, kwargs, foreign=True)


def feeding(model: nn.Module, graph: Graph) -> dict[str, str]:
    """Path of each batch norm with statistics -> the layer whose output it reads, channel by channel, and alone."""
    readers = Counter(arg.index for node in graph.nodes for arg in references(node) if isinstance(arg, Value))
    readers.update(leaf.index for leaf in leaves(graph.output) if isinstance(leaf, Value))
    uses = Counter(arg.name for node in graph.nodes for arg in references(node) if isinstance(arg, Weight))
    shapes = infer(graph)
    found = {}
    for node in graph.nodes:
        source, norm = node.args.get("input"), _owner(node, "running_mean", uses)
        if node.op != "batch_norm" or not norm or not isinstance(source, Value) or readers[source.index] > 1:
            continue
        before = _made(graph, source)
        layer = _owner(before, "weight", uses) if before is not None else ""
        flat = before is not None and (before.op != "linear" or shapes[source.index].ndim == 2)
        if layer and flat and isinstance(model.get_submodule(layer), FOLDED_INTO):
            found[norm] = layer
    return found


def _made(graph: Graph, value: Value) -> Node | None:
    number = value.index - len(graph.inputs)
    node = graph.nodes[number] if number >= 0 else None
    return node if node is not None and node.op in ("linear", "conv1d", "conv2d", "conv3d") else None


def _owner(node: Node, key: str, uses: Counter[str]) -> str:
    """Path of the module whose tensor the node alone uses as ``key``; empty where there is none."""
    arg = node.args.get(key)
    return arg.name.rpartition(".")[0] if isinstance(arg, Weight) and uses[arg.name] == 1 else ""


def refusal(model: nn.Module, path: str, layer: str) -> str:
    """Why the batch norm at ``path`` cannot be folded into ``layer``; empty where it can."""
    norm: Any = model.get_submodule(path)
    known = {name: slot for slot in slots(model).values() for name in slot.names}
    weight, bias = known[f"{layer}.weight"], known.get(f"{layer}.bias")
    if norm.running_mean is None or norm.running_var is None:
        return "it has no running statistics"
    if weight.phase == "codes":
        return f"the values of {weight.name} are fixed by an earlier step; fold before it"
    if bias is not None and (bias.phase != "dense" or len(owners(bias)) > 1):
        return f"{bias.name} is shared or carries a form"
    if len(owners(weight)) > 1:
        return f"{weight.name} is shared with {weight.names[1]}"
    return ""
