"""A graph compiled for the runner: which module or function computes each node, and when values die."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from espalier.graph.check import resolve
from espalier.graph.graph import Arg, Graph, Node, Value, Weight, leaves, references
from espalier.graph.modules import activation, build_dropout, build_module, candidate_paths, configuration
from espalier.graph.operators import TABLE, operator_of
from espalier.graph.operators.schema import call

DROPOUTS = "_dropout"
_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")


@dataclass(frozen=True)
class Fetch:
    """A tensor or module looked up by path at each call, so that a replaced one is found."""

    path: str
    get: Callable[[Any], Any]


@dataclass(frozen=True)
class ByMode:
    """An argument that differs between training and evaluation."""

    training: Any
    evaluation: Any


@dataclass(frozen=True)
class Step:
    """One node ready to run, and the values nobody needs afterwards."""

    function: Callable[..., Any] | Fetch
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    dead: tuple[int, ...]
    creates: bool


def fetch(path: str) -> Fetch:
    """A look-up of ``path`` (dotted) below the root module."""
    return Fetch(path, attrgetter(path))


def layers(graph: Graph, values: Sequence[Any]) -> tuple[dict[str, nn.Module], dict[int, str]]:
    """Real torch modules by path, and which node calls which; ``values`` are the inferred ones."""
    names: dict[str, list[str]] = {name: [name] for name in graph.tensors}
    for alias, name in graph.aliases.items():
        names[name].append(alias)
    tensors = {name: torch.empty(spec.shape, device="meta") for name, spec in graph.tensors.items()}
    modules: dict[str, nn.Module] = {}
    calls: dict[int, str] = {}
    claimed: dict[str, tuple[Any, ...]] = {}
    for number, node in enumerate(graph.nodes):
        module, path = _dropout(node, number, values)
        candidates = candidate_paths(node, names)
        if candidates:
            source = node.args[activation(node)]
            rank = values[source.index].dim() if isinstance(source, Value) else 0
            wanted = configuration(node, rank)
            path = next((p for p in candidates if p not in claimed), None) or next(
                (p for p in candidates if claimed[p] == wanted), None
            )
            if path is not None and path not in claimed:
                module = build_module(node, resolve(TABLE[node.op], node, values, tensors))
                claimed[path] = wanted if module is not None else ()
                path = path if module is not None else None
        if path is not None:
            calls[number] = path
            if module is not None:
                modules[path] = module
    return modules, calls


def _dropout(node: Node, number: int, values: Sequence[Any]) -> tuple[nn.Module | None, str | None]:
    source = node.args.get("input")
    rank = values[source.index].dim() if node.op.endswith("dropout") and isinstance(source, Value) else -1
    module = build_dropout(node, rank)
    return module, None if module is None else f"{DROPOUTS}.{number}"


def steps(graph: Graph, calls: Mapping[int, str]) -> tuple[Step, ...]:
    """The nodes of ``graph`` as calls of the modules named in ``calls`` or of table functions."""
    offset = len(graph.inputs)
    last: dict[int, int] = {offset + number: number for number in range(len(graph.nodes))}
    for number, node in enumerate(graph.nodes):
        last |= {arg.index: number for arg in references(node) if isinstance(arg, Value)}
    kept = {leaf.index for leaf in leaves(graph.output) if isinstance(leaf, Value)}
    dead: dict[int, list[int]] = {}
    for index, number in last.items():
        if index not in kept:
            dead.setdefault(number, []).append(index)
    return tuple(_step(node, calls.get(number), tuple(dead.get(number, ()))) for number, node in enumerate(graph.nodes))


def _step(node: Node, module: str | None, dead: tuple[int, ...]) -> Step:
    if module is not None:
        return Step(fetch(module), (_prepared(node.args[activation(node)]),), (), dead, creates=False)
    operator = operator_of(node)
    given = {name: _prepared(arg) for name, arg in _by_mode(node).items()}
    positional, keywords = call(operator, given)
    return Step(operator.run, tuple(positional), tuple(keywords.items()), dead, operator.creates)


def _by_mode(node: Node) -> dict[str, Any]:
    """Arguments with those that follow train/eval mode marked; a graph is traced in eval mode."""
    args: dict[str, Any] = dict(node.args)
    if node.op == "attention" and args.get("dropout_p"):
        args["dropout_p"] = ByMode(args["dropout_p"], 0.0)
    elif (node.op in _RECURRENT and args.get("dropout")) or (node.op.endswith("dropout") and not args.get("train")):
        args["train"] = ByMode(training=True, evaluation=False)
    elif node.op == "batch_norm" and args.get("running_mean") is not None and not args.get("training"):
        args["training"] = ByMode(training=True, evaluation=False)
    return args


def _prepared(arg: Arg | ByMode) -> Any:
    if isinstance(arg, Weight):
        return fetch(arg.name)
    return tuple(_prepared(item) for item in arg) if isinstance(arg, tuple) else arg
