"""The mean diagonal second derivative of each layer's weights, from products with random signs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from espalier.core.context import Context
from espalier.core.forms import Mask
from espalier.core.parametrize import Slot
from espalier.core.selection import Selection
from espalier.quantize.trials import free_values
from espalier.train.looking import Against, batches, connected, derivative, finite, leaves, looking, scalar


def mean_traces(
    model: nn.Module, slots: Sequence[Slot], context: Context, *, count: int, probes: int, against: Against
) -> dict[str, float]:
    """Weight name -> trace(H_l) / n_l = E[v' H_l v] / n_l, v_i = +-1 (Hutchinson); the mean over ``count`` batches.

    H_l: second derivatives in the n_l kept weights of one layer. Each layer's block alone is multiplied, so that other
    layers add no noise. Raises ``ModelError`` where nothing depends on the weights, ``NumericError`` for NaN.
    """
    kept = {slot.name: slot.form.mask if isinstance(slot.form, Mask) else None for slot in slots}
    sums = {slot.name: 0.0 for slot in slots}
    generator, done = context.generator("probes"), 0
    with looking(model, context), leaves(Selection(tuple(slots))) as weights:
        for batch in batches(model, context, count, "second derivatives"):
            value = scalar(context.data.predict(model, batch), batch, context, against)
            connected(value)
            grads = derivative(value, list(weights.values()), create_graph=True)
            for _ in range(probes):
                for (name, weight), grad in zip(weights.items(), grads, strict=True):
                    v = (torch.randint(2, weight.shape, generator=generator) * 2 - 1).to(weight.device, weight.dtype)
                    mask = kept[name]
                    v = v if mask is None else torch.where(mask, v, 0)
                    (product,) = derivative((grad * v).sum(), [weight], retain_graph=True)
                    sums[name] += float((v * finite(name, product)).sum())
                done += 1
    return {slot.name: sums[slot.name] / done / max(1, free_values(slot)) for slot in slots}
