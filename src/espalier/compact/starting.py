"""A block's activations and batch norms made to let everything through, as its start from a trained weight assumes.

What flows through the block is followed as ``scale * z + shift`` per channel, z being what the linear block would have
there. In front of an activation scale and shift are chosen so that what was seen of z stays where the activation is an
identity; the next layer takes them back. Beside the border, where zeros are put around z, the function is the same.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from espalier.compact.parts import LAYERS
from espalier.core.blocks import Add, Branches, ChannelShuffle

State = tuple[Tensor, Tensor]
"""Scale and shift, (channels,) each."""


def settle(block: nn.Module, x: Tensor) -> None:
    """Set scales, shifts and statistics in ``block`` by its inputs ``x`` (batch, channels, ...), in place."""
    if any(isinstance(part, (nn.ReLU, nn.ReLU6, _BatchNorm)) for part in block.modules()):
        with torch.no_grad():
            unit = (x.new_ones(x.shape[1]), x.new_zeros(x.shape[1]))
            _follow(block, x, unit)


def _follow(module: nn.Module, h: Tensor, state: State) -> tuple[Tensor, State]:
    if isinstance(module, Branches):
        parts = [h] * len(module) if module.sizes is None else list(torch.split(h, list(module.sizes), 1))
        states = [state] * len(module)
        if module.sizes is not None:
            states = list(zip(*(torch.split(item, list(module.sizes)) for item in state), strict=True))
        done = [_follow(child, part, own) for child, part, own in zip(module, parts, states, strict=True)]
        scale, shift = (torch.cat([found[1][n] for found in done]) for n in (0, 1))
        return torch.cat([found[0] for found in done], 1), (scale, shift)
    if isinstance(module, Add):
        done = [_follow(child, h, state) for child in module]
        return torch.stack([found[0] for found in done]).sum(0), done[-1][1]  # all have taken scale and shift back
    if isinstance(module, nn.Sequential):
        before: nn.Module | None = None
        for child in module:
            if isinstance(child, (nn.ReLU, nn.ReLU6)) and before is not None:
                h, state = _let_through(before, child, h, state)
            h, state = _follow(child, h, state)
            before = child
        return h, state
    if isinstance(module, _BatchNorm):
        state = _identity(module, h, state)
    elif isinstance(module, LAYERS):
        state = _take_back(module, state)
    elif isinstance(module, ChannelShuffle):
        scale, shift = (module(item[None, :, None])[0, :, 0] for item in state)
        state = scale, shift
    return module(h), state


def _take_back(layer: nn.Module, state: State) -> State:
    """The layer undoes the scale in its weight and the shift in its bias; without one the shift goes on."""
    scale, shift = state
    weight: Tensor = layer.weight  # type: ignore[assignment]
    groups = getattr(layer, "groups", 1)
    rows = weight.view(groups, -1, *weight.shape[1:])  # (groups, out, in, ...)
    tail = (1,) * (weight.ndim - 2)
    rows /= scale.view(groups, 1, -1, *tail)
    through = (rows.flatten(3).sum(3) if tail else rows) * shift.view(groups, 1, -1)
    response = through.sum(2).flatten()
    if isinstance(layer.bias, Tensor):
        layer.bias -= response
        response = torch.zeros_like(response)
    return torch.ones_like(response), response


def _identity(norm: _BatchNorm, h: Tensor, state: State) -> State:
    """The batch norm takes the statistics of ``h`` and gives z."""
    scale, shift = state
    rest = [dim for dim in range(h.ndim) if dim != 1]
    var, mean = torch.var_mean(h, rest, correction=0)
    norm.running_mean.copy_(mean)  # type: ignore[union-attr]
    norm.running_var.copy_(var)  # type: ignore[union-attr]
    norm.weight.copy_((var + norm.eps).sqrt() / scale)
    norm.bias.copy_((mean - shift) / scale)
    return torch.ones_like(scale), torch.zeros_like(shift)


def _let_through(layer: nn.Module, activation: nn.Module, h: Tensor, state: State) -> tuple[Tensor, State]:
    """The layer before an activation scales and shifts its outputs into the range in which that is an identity."""
    rest = [dim for dim in range(h.ndim) if dim != 1]
    low, high = h.amin(rest), h.amax(rest)
    factor = torch.ones_like(low)
    if isinstance(activation, nn.ReLU6):
        factor = (6 / (high - low).clamp_min(1e-12)).clamp_max(1.0)
    add = (-low * factor).clamp_min(0)
    if isinstance(activation, nn.ReLU6):
        add = torch.minimum(add, 6 - high * factor)
    weight: Tensor = layer.weight  # type: ignore[assignment]
    bias: Tensor = layer.bias  # type: ignore[assignment]
    weight *= factor.view(-1, *(1,) * (weight.ndim - 1))
    bias.mul_(factor).add_(add)
    shape = (1, -1, *(1,) * (h.ndim - 2))
    return h * factor.view(shape) + add.view(shape), (state[0] * factor, state[1] * factor + add)
