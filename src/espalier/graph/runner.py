"""A trainable module that computes a graph.

``state_dict()`` has the original's names; layers are real torch modules where their tensors follow the
standard layout, so that selection by type, train and eval mode work as on the original; the rest are torch
functions. Layers and tensors are looked up by path at each call: one replaced from outside is the one that runs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from espalier.core.errors import EspalierError, ModelError, UsageError
from espalier.graph.check import DEFAULT_LIMITS, Limits, infer
from espalier.graph.graph import Branch, Graph, Input, Value
from espalier.graph.program import ByMode, Fetch, Step, layers, steps
from espalier.graph.trees import fill, gather


class Runner(nn.Module):
    """Computes ``graph`` with copies of ``tensors`` (name -> tensor of the spec's shape, constants included).

    Called exactly as the traced model was. ``frozen`` names further parameters that take no gradient.
    Raises UsageError for missing or wrongly shaped tensors, ModelError for a graph no module can hold and,
    when called, for a call that differs from the traced one.
    """

    def __init__(
        self,
        graph: Graph,
        tensors: Mapping[str, Tensor],
        *,
        frozen: Collection[str] = (),
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        super().__init__()
        values = infer(graph, limits=limits)
        _check_tensors(graph, tensors)
        self._graph = graph
        try:
            modules, calls = layers(graph, values)
            _install(self, graph, tensors, modules, frozen)
        except EspalierError:
            raise
        except (ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:
            raise ModelError(f"No module can be built from this graph: {error}") from error
        self._steps = steps(graph, calls)

    @property
    def graph(self) -> Graph:
        """The graph this module computes."""
        return self._graph

    def rewrite(self, graph: Graph, constants: Mapping[str, Tensor]) -> None:
        """Compute ``graph`` from now on: the same nodes and modules over tensors whose sizes have changed.

        ``constants``: its ``_constant.N``. The caller has brought the tensors, and the sizes modules keep, to the new
        shapes. Raises UsageError where tensors do not fit, ModelError for a graph with other nodes.
        """
        if [node.path for node in graph.nodes] != [node.path for node in self._graph.nodes]:
            raise ModelError("A runner can be rewritten to a graph with the same nodes only; build a new one.")
        for name, tensor in constants.items():
            path, _, last = name.rpartition(".")
            self.get_submodule(path)._buffers[last] = tensor.detach().clone()
        _check_tensors(graph, {name: attrgetter(name)(self) for name in graph.tensors})
        _, calls = layers(graph, infer(graph))
        self._graph, self._steps = graph, steps(graph, calls)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the graph by name, constants included, tied tensors once; detached, not copied."""
        return {name: attrgetter(name)(self).detach() for name in self._graph.tensors}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs for ``args`` and ``kwargs``, in the containers the traced model returned."""
        inputs = inputs_of(self._graph, args, kwargs)
        values: dict[int, Any] = dict(enumerate(inputs))
        device = inputs[0].device if inputs else next((p.device for p in self.parameters()), None)
        for number, step in enumerate(self._steps, len(inputs)):
            values[number] = self._run(step, values, device)
            for index in step.dead:
                values.pop(index, None)
        return fill(
            self._graph.output,
            lambda leaf: values[leaf.index] if isinstance(leaf, Value) else attrgetter(leaf.name)(self),
        )

    def _run(self, step: Step, values: Mapping[int, Any], device: torch.device | None) -> Any:
        arguments = [self._read(arg, values) for arg in step.args]
        if isinstance(step.function, Fetch):
            return step.function.get(self)(*arguments)
        keywords = {name: self._read(arg, values) for name, arg in step.kwargs}
        if step.creates:
            keywords["device"] = device
        return step.function(*arguments, **keywords)

    def _read(self, arg: Any, values: Mapping[int, Any]) -> Any:
        kind = type(arg)
        if kind is Value:
            return values[arg.index]
        if kind is Fetch:
            return arg.get(self)
        if kind is tuple:
            return tuple([self._read(item, values) for item in arg])
        if kind is ByMode:
            return arg.training if self.training else arg.evaluation
        return arg

    def extra_repr(self) -> str:
        """Size of the graph, for ``print(model)``."""
        return f"{len(self._graph.nodes)} nodes, {len(self._graph.inputs)} inputs"


def _check_tensors(graph: Graph, tensors: Mapping[str, Tensor]) -> None:
    wrong = [
        f"{name} {'is missing' if name not in tensors else f'has shape {tuple(tensors[name].shape)}'}"
        f" (needed: {spec.shape} {spec.dtype})"
        for name, spec in graph.tensors.items()
        if name not in tensors or tuple(tensors[name].shape) != spec.shape
    ]
    if wrong:
        shown = "; ".join(wrong[:5]) + (f"; and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        raise UsageError(f"The tensors do not fit the graph: {shown}.")


def _install(
    root: nn.Module,
    graph: Graph,
    tensors: Mapping[str, Tensor],
    modules: Mapping[str, nn.Module],
    frozen: Collection[str],
) -> None:
    """Put every tensor and module below ``root``, in the order of the names; tied names share one tensor."""
    placed: dict[str, Tensor] = {}
    for name, spec in graph.tensors.items():
        tensor = tensors[name].detach().clone()
        if spec.role in ("parameter", "frozen"):
            placed[name] = nn.Parameter(tensor, requires_grad=spec.role == "parameter" and name not in frozen)
        else:
            placed[name] = tensor
    for name, source in {**{n: n for n in graph.tensors}, **graph.aliases}.items():
        path, _, last = name.rpartition(".")
        owner = _owner(root, path, modules)
        owner._parameters.pop(last, None)
        owner._buffers.pop(last, None)
        tensor = placed[source]
        if isinstance(tensor, nn.Parameter):
            owner.register_parameter(last, tensor)
        else:
            owner.register_buffer(last, tensor, persistent=graph.tensors[source].role != "constant")
    for path, module in modules.items():
        _owner(root, path, modules)
        for last, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:  # the counter of a batch norm whose file dropped it
                module._buffers[last] = None


def _owner(root: nn.Module, path: str, modules: Mapping[str, nn.Module]) -> nn.Module:
    """The module at ``path``, made where it is not there yet."""
    current, done = root, ""
    for part in path.split(".") if path else ():
        done = f"{done}.{part}" if done else part
        if part not in current._modules:
            current.add_module(part, modules.get(done, nn.Module()))
        child = current._modules[part]
        if child is None:
            raise ModelError(f"{done} is taken.")
        current = child
    return current


def inputs_of(graph: Graph, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The input tensors of a call in the graph's order, checked against its specs."""
    positional, keywords = graph.call.children
    if not (isinstance(positional, Branch) and isinstance(keywords, Branch)):
        raise ModelError("The call of a graph is (positional arguments, keyword arguments).")
    given = dict(kwargs)
    names = (*graph.names, *(str(key) for key in keywords.keys))
    if len(args) > len(names):
        raise ModelError(f"The model got {len(args)} arguments; it takes {len(names)}: {', '.join(names)}.")
    for name, value in zip(names, args, strict=False):
        if name in given:
            raise ModelError(f"The model got its argument {name!r} twice.")
        given[name] = value
    found: dict[int, Tensor] = {}
    for name, tree in zip(names, (*positional.children, *keywords.children), strict=True):
        if name in given:
            gather(tree, given.pop(name), found, f"The argument {name!r}")
        elif isinstance(tree, Branch | Value):
            raise ModelError(f"The model needs its argument {name!r}.")
    unknown = sorted(name for name, value in given.items() if value is not None)
    if unknown:
        raise ModelError(f"The model does not take {unknown}; it was traced with {', '.join(names) or 'nothing'}.")
    inputs = [found[index] for index in range(len(graph.inputs))]
    _check_inputs(graph.inputs, inputs)
    return inputs


def _check_inputs(specs: tuple[Input, ...], inputs: list[Tensor]) -> None:
    """Shapes must be the traced ones except for the batch: sizes inside the graph follow from them."""
    for number, (spec, x) in enumerate(zip(specs, inputs, strict=True)):
        shape = x.shape
        if len(shape) != len(spec.shape) or any(n not in (None, m) for n, m in zip(spec.shape, shape, strict=True)):
            wanted = ", ".join("batch" if n is None else str(n) for n in spec.shape)
            raise ModelError(f"Input {number} has shape {tuple(shape)}; this graph was traced for ({wanted}).")
