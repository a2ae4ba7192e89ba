"""What flows into and out of layers on training batches: sums for many layers in one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from espalier.core.context import Context
from espalier.core.errors import NumericError
from espalier.core.metric import first_tensor
from espalier.factorize.layer import Layer
from espalier.factorize.stages import CONVS
from espalier.train.layers import owners
from espalier.train.looking import batches, looking


@dataclass
class Inputs:
    """Sums over all places and samples, one entry per input: of |x| and of x^2 (float64)."""

    magnitude: Tensor
    square: Tensor
    count: int = 0


@dataclass
class Outputs:
    """Sums over places and samples of y (outputs,) and y y^T (outputs, outputs), float64; some samples as they are."""

    total: Tensor
    outer: Tensor
    count: int = 0
    samples: list[Tensor] = field(default_factory=list)

    @property
    def mean(self) -> Tensor:
        """(outputs,)."""
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """(outputs, outputs)."""
        return self.outer / self.count - torch.outer(self.mean, self.mean)


def features_last(module: nn.Module, x: Tensor) -> Tensor:
    """``x`` of a linear layer or convolution as (places and samples, features)."""
    if isinstance(module, CONVS):
        x = x.movedim(-len(module.kernel_size) - 1, -1)
    return x.detach().flatten(0, -2)


def watched(layer: Layer) -> bool:
    """Whether all modules that use the weight are linear layers or convolutions: what comes in and out can be seen."""
    return all(isinstance(module, (nn.Linear, *CONVS)) for module in owners(layer.slot))


def inputs_of(model: nn.Module, layers: Sequence[Layer], context: Context, count: int) -> dict[str, Inputs]:
    """Name of the weight -> what came in over ``count`` batches; without layers that were not called."""
    found: dict[str, Inputs] = {}

    def note(layer: Layer, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = features_last(module, args[0] if args else kwargs["input"]).double()
        mine = found.setdefault(layer.name, Inputs(x.new_zeros(x.shape[1]), x.new_zeros(x.shape[1])))
        mine.magnitude += x.abs().sum(0)
        mine.square += x.square().sum(0)
        mine.count += len(x)

    _watch(model, layers, context, count, pre=note)
    for name, inputs in found.items():
        _check(name, "inputs", inputs.square)
    return found


def outputs_of(
    model: nn.Module, layers: Sequence[Layer], context: Context, count: int, samples: int
) -> dict[str, Outputs]:
    """Name of the weight -> what came out over ``count`` batches, with ``samples`` of it, drawn evenly from each."""
    found: dict[str, Outputs] = {}
    generator = context.generator("samples")

    def note(layer: Layer, module: nn.Module, _: Any, output: Any) -> None:
        y = features_last(module, first_tensor(output))
        wide, width = y.double(), y.shape[1]
        mine = found.setdefault(layer.name, Outputs(wide.new_zeros(width), wide.new_zeros(width, width)))
        mine.total += wide.sum(0)
        mine.outer += wide.T @ wide
        mine.count += len(y)
        if samples:
            places = torch.randperm(len(y), generator=generator)[: -(-samples // count)]
            mine.samples.append(y[places.to(y.device)])

    _watch(model, layers, context, count, post=note)
    for name, outputs in found.items():
        _check(name, "outputs", outputs.total)
    return found


def _watch(
    model: nn.Module,
    layers: Sequence[Layer],
    context: Context,
    count: int,
    pre: Callable[..., None] | None = None,
    post: Callable[..., None] | None = None,
) -> None:
    with ExitStack() as stack:
        for layer in layers:
            for module in owners(layer.slot):
                if pre is not None:
                    hook = partial(pre, layer)
                    stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
                if post is not None:
                    stack.callback(module.register_forward_hook(partial(post, layer)).remove)
        stack.enter_context(looking(model, context, grad=False))
        for batch in batches(model, context, count, "statistics of the layers"):
            context.data.predict(model, batch)


def _check(name: str, what: str, sums: Tensor) -> None:
    if not bool(sums.isfinite().all()):
        raise NumericError(f"the {what} of {name} hold NaN or infinity on the training data; nothing can be fitted.")
