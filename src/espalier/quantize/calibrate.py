"""What the inputs of layers look like: watched over a few training batches, in the memory of a sample."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from espalier.core.context import Context
from espalier.core.errors import NumericError
from espalier.core.inputs import Observed
from espalier.train.looking import batches, looking

if TYPE_CHECKING:
    from espalier.quantize.parts import Observer

SAMPLE = 2**18
PER_BATCH = 2**15


class _Watch:
    """A sample of one layer's inputs: every batch gives equally many values, drawn with a generator of its own."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.parts: list[Tensor] = []
        self.extremes: list[Tensor] = []

    def add(self, values: Tensor) -> None:
        values = values.detach().float().reshape(-1)
        if not values.numel():
            return
        self.extremes.append(torch.stack(values.aminmax()).cpu())
        if values.numel() > PER_BATCH:
            chosen = torch.randint(values.numel(), (PER_BATCH,), generator=self.generator)
            values = values[chosen.to(values.device)]
        self.parts.append(values.cpu())

    def seen(self) -> Observed:
        sample = torch.cat(self.parts)
        if len(sample) > SAMPLE:
            sample = sample[torch.randperm(len(sample), generator=self.generator)[:SAMPLE]]
        return Observed(sample, torch.stack(self.extremes))


class Streaming:
    """One activation watched by ``observer``: what ``espalier.deploy.to_int8(observer=...)`` makes for each."""

    def __init__(self, observer: Observer) -> None:
        self.observer, self.watch = observer, _Watch(torch.Generator().manual_seed(0))

    def update(self, array: npt.NDArray[Any]) -> None:
        """Look at one batch, of any shape."""
        self.watch.add(torch.from_numpy(array))

    def range(self) -> tuple[float, float]:
        """The smallest and the largest value that 8 bits should tell apart."""
        seen = self.watch.seen()
        low, high = self.observer.range(seen.sample[None], seen.extremes[None], 8, symmetric=False)
        return float(low), float(high)


def observe(model: nn.Module, layers: Mapping[str, nn.Module], context: Context, count: int) -> dict[str, Observed]:
    """Path -> what came into the layer over ``count`` training batches; layers that were not called are left out.

    Raises ``NumericError`` naming a layer whose inputs hold NaN or infinity, ``DataError`` without a batch.
    """
    watches = {path: _Watch(context.generator(f"inputs of {path}")) for path in layers}
    with ExitStack() as stack:
        for path, layer in layers.items():
            hook = partial(_look, watches[path])
            stack.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        stack.enter_context(looking(model, context, grad=False))
        for batch in batches(model, context, count, "calibration"):
            context.data.predict(model, batch)
    found = {path: watch.seen() for path, watch in watches.items() if watch.parts}
    for path, observed in found.items():
        if not bool(torch.isfinite(observed.extremes).all()):
            raise NumericError(
                f"the calibration data make NaN or infinity at the input of {path}. Check the training data "
                "(normalised? finite?) and the weights before this layer."
            )
    return found


def _look(watch: _Watch, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    value = args[0] if args else next(iter(kwargs.values()), None)
    value = value.data if isinstance(value, PackedSequence) else value
    if isinstance(value, Tensor) and value.is_floating_point():
        watch.add(value)
