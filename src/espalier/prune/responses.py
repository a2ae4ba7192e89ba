"""The responses of output units, streamed over a few training batches.

A unit is an output channel of a convolution or an output feature of a linear layer. Its response is looked at after
the batch norm and the element-wise activations that follow the layer, as long as every value on the way has exactly
one consumer; else directly at the layer. The model itself is run and watched from outside (a mode sees the functions
it calls), so that hooks, forms, dicts and untraceable models count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

from espalier.core.context import Context
from espalier.core.parametrize import Slot
from espalier.core.selection import Selection
from espalier.prune.masks import outputs_first
from espalier.prune.parts import Scores
from espalier.train.looking import Against, batches, connected, derivative, finite, looking, scalar

Each = Callable[[str, Tensor, Tensor | None], None]
"""``each(weight's name, activation, gradient)``, both (batch, units, *positions); gradient None where none is asked."""

FOLLOWED = frozenset({
    "batch_norm", "relu", "relu6", "leaky_relu", "elu", "celu", "selu", "gelu", "silu", "mish", "hardswish",
    "hardsigmoid", "hardtanh", "softplus", "logsigmoid", "log_sigmoid", "prelu", "rrelu", "threshold",
    "hardshrink", "softshrink", "tanhshrink", "softsign", "sigmoid", "tanh", "clamp", "clamp_min", "dropout",
    "dropout1d", "dropout2d", "dropout3d", "feature_dropout", "alpha_dropout",
})  # fmt: skip
_KEY = "_espalier_link"
_LAYERS = (nn.Linear, nn.Bilinear, _ConvNd)


@dataclass
class _Link:
    """One value on the way from a layer: how many steps after it, and how often it was used."""

    name: str
    call: int
    depth: int
    used: int = 0


def unit_layers(slot: Slot) -> list[nn.Module]:
    """The layers whose output units are the rows of the weight (several where it is tied).

    None for recurrent layers and attention's own projections; the rows of an embedding are words.
    """
    found = [module for _, module, attribute in slot.owners if attribute == "weight" and isinstance(module, _LAYERS)]
    return list({id(module): module for module in found}.values())


def unit_rows(slot: Slot) -> Tensor:
    """The effective weight as (output units, incoming weights)."""
    weight = outputs_first(slot, slot.value())
    return weight.reshape(weight.shape[0], -1)


def stream(
    model: nn.Module,
    selection: Selection,
    context: Context,
    each: Each,
    *,
    count: int,
    label: str,
    against: Against | None = None,
) -> None:
    """Run ``count`` training batches and tell ``each`` the responses of every layer's units, call by call.

    ``against``: also their gradients of this scalar. Layers whose output is not seen are recorded as skipped.
    """
    layers = {slot.name: unit_layers(slot) for slot in selection}
    follower = _Follower({id(module): name for name, modules in layers.items() for module in modules}, each)
    with looking(model, context, grad=against is not None), follower.attached(model):
        for batch in batches(model, context, count, label):
            forward = partial(context.data.predict, model, batch)
            if not follower.known:
                with torch.no_grad():
                    follower.explore(forward)
            output = follower.run(forward, against is not None)
            if against is not None and follower.kept:
                value = scalar(output, batch, context, against)
                connected(value)
                follower.deliver(value)
    for name, modules in layers.items():
        if not modules:
            context.skip(name, "its output units are not visible: it is the weight of no linear or convolutional layer")
        elif name not in follower.seen:
            context.skip(name, "its output units are not visible: the layer's forward is not called")


def averages(
    model: nn.Module,
    selection: Selection,
    context: Context,
    measure: Callable[[Tensor, Tensor], Tensor],
    *,
    count: int,
    label: str,
    against: Against | None = None,
    wide: bool = False,
) -> Scores:
    """The mean over samples of ``measure(activation, gradient) -> (samples, units, ...)``; zeros stand for no gradient.

    Float64 sums, so that the order of the batches does not show; float32 is returned unless ``wide``.
    """
    sums: dict[str, Tensor] = {}
    seen: dict[str, int] = {}

    def add(name: str, activation: Tensor, gradient: Tensor | None) -> None:
        measured = measure(activation, torch.zeros(()) if gradient is None else gradient).double()
        total = measured.sum(0)
        sums[name] = sums[name] + total if name in sums else total
        seen[name] = seen.get(name, 0) + len(measured)

    stream(model, selection, context, add, count=count, label=label, against=against)
    means = {slot.name: sums[slot.name] / seen[slot.name] for slot in selection if slot.name in sums}
    return means if wide else {name: mean.float() for name, mean in means.items()}


class _Follower(TorchFunctionMode):
    """Marks each layer's output, follows the mark through what follows, takes the value at the end of the chain."""

    def __init__(self, layers: dict[int, str], each: Each) -> None:
        super().__init__()
        self.layers, self.each = layers, each
        self.known: dict[tuple[str, int], int] = {}
        self.links: dict[tuple[str, int], list[_Link]] | None = None
        self.calls: dict[str, int] = {}
        self.kept: list[tuple[str, nn.Module, Tensor]] = []
        self.modules: dict[str, nn.Module] = {}
        self.seen: set[str] = set()
        self.gradient = self.busy = False

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        """Forward hooks on the layers for the length of the block."""
        with ExitStack() as stack:
            for module in model.modules():
                if id(module) in self.layers:
                    stack.callback(module.register_forward_hook(self._mark).remove)
            yield

    def explore(self, forward: Callable[[], Any]) -> None:
        """One run that finds out how far each layer's output can be followed."""
        self.links = {}
        self._forward(forward)
        for key, links in self.links.items():
            depth = 0
            while any(link.depth == depth + 1 for link in links) and _uses(links, depth) == 1:
                depth += 1
            self.known[key] = depth
        self.links = None

    def run(self, forward: Callable[[], Any], gradient: bool) -> Any:
        """One run in which the values are taken; returns the model's output."""
        self.gradient = gradient
        self.kept.clear()
        return self._forward(forward)

    def deliver(self, value: Tensor) -> None:
        """Tell the values kept by the last run, with their gradients of ``value``."""
        grads = derivative(value, [tensor for _, _, tensor in self.kept])
        with torch.no_grad():
            for (name, module, tensor), grad in zip(self.kept, grads, strict=True):
                self.each(name, _shaped(module, tensor.detach()), _shaped(module, finite(name, grad)))
        self.kept.clear()

    def _forward(self, forward: Callable[[], Any]) -> Any:
        self.calls.clear()
        with self:
            return forward()

    def _mark(self, module: nn.Module, _: Any, output: Any) -> Any:
        if self.busy or not isinstance(output, Tensor):
            return output
        name = self.layers[id(module)]
        call = self.calls.get(name, 0)
        self.calls[name] = call + 1
        self.modules[name] = module
        return self._arrive(_Link(name, call, 0), output)

    def _arrive(self, link: _Link, tensor: Tensor) -> Tensor:
        vars(tensor)[_KEY] = link
        key = link.name, link.call
        if self.links is not None:
            self.links.setdefault(key, []).append(link)
        elif self.known.get(key, 0) == link.depth:
            return self._take(link.name, tensor)
        return tensor

    def _take(self, name: str, tensor: Tensor) -> Tensor:
        vars(tensor).pop(_KEY, None)
        self.seen.add(name)
        module = self.modules[name]
        self.busy = True
        try:
            if self.gradient:
                self.kept.append((name, module, tensor if tensor.requires_grad else tensor.requires_grad_()))
            else:
                self.each(name, _shaped(module, tensor.detach()), None)
            return tensor.clone()  # what works in place further on must not change what was told or kept
        finally:
            self.busy = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [] if self.busy else [x for x in _pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        carried = [(x, vars(x)[_KEY]) for x in given if _KEY in vars(x)]
        result = func(*args, **kwargs)
        op = getattr(func, "__name__", "").strip("_")
        if not carried or not (op == "setitem" or _holds_tensor(result)):
            return result
        for tensor, link in carried:
            link.used += 1
            if tensor is result or op == "setitem":
                vars(tensor).pop(_KEY, None)  # worked on in place: no longer that value
        source, link = carried[0]
        alone = len(carried) == 1 and bool(args) and source is args[0] and isinstance(result, Tensor)
        if op in FOLLOWED and alone and result.shape == source.shape:
            return self._arrive(_Link(link.name, link.call, link.depth + 1), result)
        return result


def _uses(links: list[_Link], depth: int) -> int:
    return sum(link.used for link in links if link.depth == depth)


def _holds_tensor(result: Any) -> bool:
    return isinstance(result, Tensor) or (
        isinstance(result, tuple | list) and any(isinstance(item, Tensor) for item in result)
    )


def _shaped(module: nn.Module, tensor: Tensor) -> Tensor:
    """A layer's output, batched or not, as (batch, units, *positions)."""
    spatial = module.weight.ndim - 2 if isinstance(module, _ConvNd) else 0
    if tensor.ndim == spatial + 1:
        tensor = tensor.unsqueeze(0)
    return tensor if spatial else tensor.movedim(-1, 1)
