"""What a layer sees, and what it answered before anything was swapped: the pairs that a block is fitted to."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn

from espalier.compact.regression import Pairs
from espalier.core.context import Context
from espalier.core.errors import NumericError
from espalier.core.model import evaluating
from espalier.train.looking import batches, looking

MEMORY = 2**26
"""How many numbers of a layer's inputs and outputs are held."""


class _Enough(Exception):
    """The layer was called as often as on the first batch."""


def seen(model: nn.Module, before: nn.Module, path: str, context: Context, count: int) -> Pairs | None:
    """Inputs of the layer at ``path`` in ``model``, its outputs in ``before``, on ``count`` training batches.

    None where it is never called as a module. Of large ones a random part is kept: ``MEMORY`` numbers in all. Behind
    the layer a forward is broken off, except on the first batch. Raises ``NumericError`` for NaN or infinity.
    """
    layer, twin = model.get_submodule(path), before.get_submodule(path)
    generator = context.generator(f"inputs of {path}")
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    kept: list[tuple[Tensor, Tensor]] = []
    calls: int | None = None

    def take(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.append((args[0] if args else kwargs["input"]).detach().clone())  # what follows may work in place
        if len(inputs) == calls:
            raise _Enough

    def give(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
        outputs.append(output.detach().clone())
        if len(outputs) == calls:
            raise _Enough

    with ExitStack() as stack:
        stack.callback(layer.register_forward_pre_hook(take, with_kwargs=True).remove)
        stack.callback(twin.register_forward_hook(give).remove)
        stack.enter_context(looking(model, context, grad=False))
        stack.enter_context(evaluating(before))
        for batch in batches(model, context, count, f"inputs of {path}"):
            for network in (model, before):
                with suppress(_Enough):
                    context.data.predict(network, batch)
            calls = len(inputs) if calls is None else calls
            if not calls:
                return None
            for x, y in zip(inputs, outputs, strict=False):
                kept += _part(*_samples(layer, x, y), MEMORY // count // len(inputs), generator)
            inputs.clear()
            outputs.clear()
    alike = [(x, y) for x, y in kept if x.shape[1:] == kept[0][0].shape[1:]]
    if not alike:
        return None
    pairs = Pairs(torch.cat([x for x, _ in alike]), torch.cat([y for _, y in alike]))
    if not bool(pairs.x.isfinite().all()) or not bool(pairs.y.isfinite().all()):
        raise NumericError(f"the inputs or outputs of {path} hold NaN or infinity; no block can be fitted to them.")
    return pairs


def _samples(layer: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Samples first: rows for a linear layer, images for a convolution."""
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    return (x, y) if x.ndim == layer.weight.ndim else (x[None], y[None])


def _part(x: Tensor, y: Tensor, numbers: int, generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """A random part of the samples that holds so many ``numbers`` at most, one sample at least; on the CPU."""
    if not len(x) or len(x) != len(y):
        return []
    count = max(1, numbers // (x[0].numel() + y[0].numel()))
    if count < len(x):
        chosen = torch.randperm(len(x), generator=generator)[:count].to(x.device)
        x, y = x[chosen], y[chosen]
    return [(x.cpu(), y.cpu())]
