"""What a layer sees, and what it answered before anything was swapped: the pairs that a block is fitted to."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from typing import Any

from torch import Tensor, nn

from espalier.compact.regression import Pairs
from espalier.core.context import Context
from espalier.core.model import evaluating
from espalier.train.looking import batches, looking
from espalier.train.pairs import Kept, joined, part, samples

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
    kept: Kept = []
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
                kept += part(*samples(layer, x, y), MEMORY // count // len(inputs), generator)
            inputs.clear()
            outputs.clear()
    pairs = joined(kept, path)
    return None if pairs is None else Pairs(*pairs)
