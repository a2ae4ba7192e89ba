"""Units that go are replaced by their mean: what reads them gets the constant added to its bias.

A unit whose output hardly varies is a constant; zero in its place would shift the next layer. Of linear layers and
ungrouped convolutions that have a bias; where padding adds zeros, the border is off. A batch norm after a layer without
a bias absorbs the constant when its statistics are estimated anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from espalier.core.context import Context
from espalier.core.parametrize import slots
from espalier.train.looking import batches, looking

SEEN = 8
"""Training batches the means are taken over."""


def constant(weight: Tensor, mean: Tensor, gone: Tensor) -> Tensor:
    """(out, in, ...) weight, (in,) means, (k,) inputs that go -> (out,): what those inputs add to the output."""
    return weight[:, gone].flatten(2).sum(2) @ mean[gone] if weight.ndim > 2 else weight[:, gone] @ mean[gone]


def fold_means(model: nn.Module, kept: Mapping[str, Mapping[int, NDArray[np.int64]]], context: Context) -> list[str]:
    """Shift the biases of ``model``, in place, by the mean of the inputs that are not ``kept``; the biases' names.

    ``kept``: tensor name -> dimension -> indices that stay.
    """
    known = slots(model)
    readers: dict[str, nn.Module] = {}
    for name, dims in kept.items():
        slot = known.get(name)
        if slot is None or 1 not in dims or not isinstance(slot.module, (nn.Linear, _ConvNd)):
            continue
        bias = known.get(f"{slot.path}.bias" if slot.path else "bias")
        grouped = isinstance(slot.module, _ConvNd) and slot.module.groups > 1
        if bias is not None and bias.form is None and not grouped and not isinstance(slot.module, _ConvTransposeNd):
            readers[name] = slot.module
    sums: dict[str, Tensor] = {}
    calls: dict[str, int] = dict.fromkeys(readers, 0)

    def look(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].detach()
        axis = x.ndim - 1 if isinstance(module, nn.Linear) else x.ndim - len(module.kernel_size) - 1  # type: ignore[arg-type]
        mean = x.double().mean([n for n in range(x.ndim) if n != axis])
        sums[name] = sums.get(name, torch.zeros_like(mean)) + mean
        calls[name] += 1

    handles = [module.register_forward_pre_hook(partial(look, name)) for name, module in readers.items()]
    try:
        with looking(model, context, grad=False):
            for batch in batches(model, context, SEEN, "means"):
                context.data.predict(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    folded = []
    for name in readers:
        if calls[name]:
            slot = known[name]
            stays = torch.from_numpy(np.asarray(kept[name][1])).to(slot.latent.device)
            gone = torch.ones(slot.latent.shape[1], dtype=torch.bool, device=slot.latent.device).index_fill_(
                0, stays, 0
            )
            bias = known[f"{slot.path}.bias" if slot.path else "bias"]
            shift = constant(slot.value().double(), sums[name] / calls[name], gone.nonzero().reshape(-1))
            with torch.no_grad():
                bias.latent.add_(shift.to(bias.latent.dtype))
            folded.append(bias.name)
    return folded
