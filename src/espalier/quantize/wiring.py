"""What feeds what in a traced network: the questions that folding, smoothing and equalising ask."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from espalier.core.context import Context
from espalier.core.norms import BATCH_NORMS, Fold
from espalier.core.parametrize import Slot, slots
from espalier.graph import Graph, Node, Value, Weight, infer
from espalier.graph.graph import leaves, references
from espalier.train.norm_folding import feeding, refusal, traced

CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
LAYERS = ("linear", *CONVOLUTIONS)
POINTWISE = ("relu", "leaky_relu", "prelu", "dropout")
"""Elementwise functions with f(s x) = s f(x) for every s > 0."""

_POOLS = (
    "max_pool1d", "max_pool2d", "max_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
    "adaptive_max_pool1d", "adaptive_max_pool2d",
)  # fmt: skip
_PADDED_POOLS = ("avg_pool1d", "avg_pool2d", "avg_pool3d")


@dataclass(frozen=True)
class Layer:
    """One call of a linear layer or convolution whose weight nothing else uses. ``bias``: None where it has none."""

    number: int
    node: Node
    slot: Slot
    bias: Slot | None

    @property
    def path(self) -> str:
        """Path of the module."""
        return self.slot.path

    @property
    def groups(self) -> int:
        """Groups of a convolution, else 1."""
        groups = self.node.args.get("groups", 1)
        assert isinstance(groups, int)  # noqa: S101 - the operator's signature
        return groups

    @property
    def inputs(self) -> int:
        """Input channels."""
        return self.slot.shape[1] * self.groups

    @property
    def fixed(self) -> str:
        """What forbids to rescale weight and bias; empty where nothing does."""
        if self.slot.phase == "codes":
            return f"the values of {self.slot.name} are fixed by an earlier step"
        if self.bias is not None and self.bias.phase != "dense":
            return f"{self.bias.name} carries a form"
        return ""

    def scale_outputs(self, scale: Tensor) -> None:
        """Multiply the output channels, (channels,), the bias with them."""
        with torch.no_grad():
            self.slot.latent.mul_(scale.to(self.slot.latent).reshape(-1, *[1] * (self.slot.latent.ndim - 1)))
            if self.bias is not None:
                self.bias.latent.mul_(scale.to(self.bias.latent))

    def scale_inputs(self, scale: Tensor) -> None:
        """Multiply what the layer has for each channel that comes in; flattened positions of a channel go together."""
        with torch.no_grad():
            by_channel = self.by_input(self.slot.latent, len(scale))
            shape = (self.groups, 1, len(scale) // self.groups, *[1] * (by_channel.ndim - 3))
            by_channel.mul_(scale.to(by_channel).reshape(shape))

    def input_range(self, channels: int) -> Tensor:
        """The largest magnitude the weight has for each of the ``channels`` that come in."""
        found = self.by_input(self.slot.value(), channels).abs()
        return found.amax([n for n in range(found.ndim) if n not in (0, 2)]).reshape(-1)

    def output_range(self) -> Tensor:
        """The largest magnitude of each output channel."""
        return self.slot.value().abs().flatten(1).amax(1)

    def by_input(self, weight: Tensor, channels: int) -> Tensor:
        """The weight as a view (groups, outputs of each, input channels of each, positions...)."""
        groups = self.groups
        if weight.ndim == 2:
            return weight.view(1, len(weight), channels, -1)
        return weight.view(groups, len(weight) // groups, channels // groups, *weight.shape[2:])


class Wiring:
    """A network traced on the task's example."""

    def __init__(self, model: nn.Module, context: Context) -> None:
        self.model, self.known = model, slots(model)
        self.graph: Graph = traced(model, context)
        self.shapes: list[Any] = infer(self.graph)
        self.first = len(self.graph.inputs)
        self.results = {leaf.index for leaf in leaves(self.graph.output) if isinstance(leaf, Value)}
        self.readers: dict[int, list[int]] = {}
        self.uses: Counter[str] = Counter()
        for number, node in enumerate(self.graph.nodes):
            for arg in references(node):
                if isinstance(arg, Value):
                    self.readers.setdefault(arg.index, []).append(number)
                else:
                    self.uses[arg.name] += 1

    def shape(self, number: int) -> tuple[int, ...]:
        """Shape of what node ``number`` gives; () where that is no single tensor."""
        value = self.shapes[self.first + number]
        return tuple(value.shape) if isinstance(value, Tensor) else ()

    def source(self, node: Node, key: str = "input") -> int | None:
        """Number of the node that gives the argument ``key``; None for an input of the network."""
        arg = node.args.get(key, node.args.get("self"))
        return arg.index - self.first if isinstance(arg, Value) and arg.index >= self.first else None

    def reader(self, number: int) -> int | None:
        """The one node that reads what node ``number`` gives; None where there are none or several."""
        value = self.first + number
        found = self.readers.get(value, [])
        return found[0] if len(found) == 1 and value not in self.results else None

    def slot(self, arg: Any) -> Slot | None:
        """The parameter an argument names, where this is the only place that uses it."""
        if not isinstance(arg, Weight) or self.uses[arg.name] != 1:
            return None
        found = self.known.get(arg.name)
        return found if found is not None and len({id(owner) for _, owner, _ in found.owners}) == 1 else None

    def layer(self, number: int) -> Layer | None:
        """The linear layer or convolution that node ``number`` calls; None where its tensors have other uses."""
        node = self.graph.nodes[number]
        if node.op not in LAYERS:
            return None
        slot, bias = self.slot(node.args.get("weight")), self.slot(node.args.get("bias"))
        if slot is None or (bias is None and node.args.get("bias") is not None):
            return None
        return Layer(number, node, slot, bias)

    def layers(self) -> Iterator[Layer]:
        """All of them in the order they run."""
        for number in range(len(self.graph.nodes)):
            layer = self.layer(number)
            if layer is not None:
                yield layer

    def after(self, layer: Layer, *, clipped: bool = False) -> tuple[list[int], Layer] | None:
        """The layer that alone reads ``layer``, channel by channel, and the nodes between: f(s x) = s f(x) for s > 0.

        ``clipped``: a ReLU6 between is taken for a ReLU.
        """
        between: list[int] = []
        number = self.reader(layer.number)
        before = layer.number
        while number is not None:
            following = self.layer(number)
            if following is not None:
                return (between, following) if self._fits(layer, before, following) else None
            if not self._keeps_channels(number, layer, before) and not (clipped and self.is_relu6(number)):
                return None
            between.append(number)
            before, number = number, self.reader(number)
        return None

    def is_relu6(self, number: int) -> bool:
        """Whether the node clips at 0 and 6."""
        node = self.graph.nodes[number]
        limits = node.args.get("min_val", -1.0), node.args.get("max_val", 1.0)
        return node.op == "relu6" or (node.op == "hardtanh" and limits == (0.0, 6.0))

    def _fits(self, layer: Layer, before: int, following: Layer) -> bool:
        """Whether the output channels of ``layer`` are the input channels of ``following``, in order."""
        channels = layer.slot.shape[0]
        if following.node.op != "linear":
            return layer.node.op != "linear" and following.inputs == channels
        last = layer.node.op == "linear" or len(self.shape(before)) == 2
        return last and following.inputs % channels == 0

    def _keeps_channels(self, number: int, layer: Layer, before: int) -> bool:
        node, shape, now = self.graph.nodes[number], self.shape(before), self.shape(number)
        convolution = layer.node.op != "linear"
        if node.op in POINTWISE:
            return self._slopes(node, shape, convolution)
        if not convolution or len(shape) < 3:
            return False
        if node.op in (*_POOLS, *_PADDED_POOLS) and len(now) == len(shape):
            return True
        if node.op in ("flatten", "reshape", "squeeze"):
            return len(now) == 2 and now[0] == shape[0]
        if node.op == "mean":
            dims = node.args.get("dim")
            return isinstance(dims, tuple) and all(isinstance(d, int) and d % len(shape) >= 2 for d in dims)
        return False

    def _slopes(self, node: Node, shape: tuple[int, ...], convolution: bool) -> bool:
        """A PReLU with a slope for each channel counts channels in dimension 1, which a linear layer has last."""
        weight = node.args.get("weight")
        slopes = self.graph.tensors[weight.name].shape if isinstance(weight, Weight) else ()
        return node.op != "prelu" or slopes in ((), (1,)) or convolution or len(shape) == 2

    def folds(self) -> list[Fold]:
        """The edits that fold each batch norm into the layer that feeds it alone."""
        found = feeding(self.model, self.graph).items()
        return [Fold(norm=norm, into=into) for norm, into in found if not refusal(self.model, norm, into)]

    def norm(self, number: int) -> tuple[str, Any] | None:
        """Path and module of the batch norm with statistics that node ``number`` calls, and only that node."""
        node = self.graph.nodes[number]
        mean = node.args.get("running_mean")
        if node.op != "batch_norm" or not isinstance(mean, Weight) or self.uses[mean.name] != 1:
            return None
        path = mean.name.rpartition(".")[0]
        module = self.model.get_submodule(path)
        known = isinstance(module, BATCH_NORMS) and module.running_mean is not None and module.running_var is not None
        return (path, module) if known and path else None


def moments(norm: Any) -> tuple[Tensor, Tensor]:
    """beta and |gamma| of a batch norm: mean and standard deviation of what it gives, per channel."""
    like = norm.running_mean
    gamma = norm.weight.detach().abs() if norm.weight is not None else torch.ones_like(like)
    beta = norm.bias.detach() if norm.bias is not None else torch.zeros_like(like)
    return beta.clone(), gamma.clone()
