r"""Wanda: weights that are small, or that meet small inputs, go.

Paper    Sun, Liu, Bair, Kolter. A Simple and Effective Pruning Approach for Large Language Models. ICLR 2024.
         arXiv:2306.11695
Formula  S_ij = |W_ij| ||X_j||_2,   X_j: feature j of all inputs (samples, positions);   compared in each output row i
Departs  The scores are raw: the comparison inside a row is scope row's business. Convolutions: X_j is what an input
         channel and kernel position see while the kernel moves, padding included (a transposed one: the input channel,
         whatever its padding cuts off). Embeddings: how often a word occurs. Weights whose inputs are not visible
         (recurrent layers, attention's own projections, biases) rank by magnitude among themselves; their norm is the
         root mean square of those that are visible, a guess, so that scope global does not take them first for want
         of a norm. All inputs come from the dense model; the paper goes block by block over pruned ones.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from espalier.core.context import Context
from espalier.core.fields import Batches
from espalier.core.parametrize import Slot
from espalier.core.selection import Selection
from espalier.prune.parts import Criterion, Scores
from espalier.train.looking import batches, looking

UNSEEN = "its inputs are not visible: ranked by magnitude, against other layers as if its inputs were average ones"
_UNFOLD: dict[int, Any] = {1: conv1d_weight, 2: conv2d_weight, 3: conv3d_weight}


def wanda(weight: Tensor, squared_norms: Tensor) -> Tensor:
    """|W| ||X||, ``squared_norms`` broadcast against the weight."""
    return weight.abs() * squared_norms.sqrt().to(weight.dtype)


def typical(squared_norms: list[Tensor]) -> Tensor:
    """The squared norm, a scalar, that stands for what was not seen: the mean over layers; 1 where none was seen."""
    means = [squares.double().mean().cpu() for squares in squared_norms]
    mean = torch.stack(means).mean() if means else torch.zeros(())
    return mean if mean > 0 else torch.ones(())


def unfolded_squares(x: Tensor, module: _ConvNd) -> Tensor:
    """Squared norms (channels, *kernel) of what each weight of a convolution meets in ``x`` (batch, channels, *size).

    The sum over output positions of the squares under each kernel position: a weight gradient for a gradient of ones.
    """
    if module.padding_mode == "zeros":
        x = F.pad(x, module._reversed_padding_repeated_twice)
    else:
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
    squares, channels, steps = x.double().square(), x.shape[1], zip(module.kernel_size, module.dilation, strict=True)
    reach = [step * (size - 1) + 1 for size, step in steps]
    out = [(n - r) // s + 1 for n, r, s in zip(x.shape[2:], reach, module.stride, strict=True)]
    ones = squares.new_ones(()).expand(x.shape[0], channels, *out).contiguous()
    shape = (channels, 1, *module.kernel_size)
    unfold = _UNFOLD[len(out)]
    found: Tensor = unfold(squares, shape, ones, stride=module.stride, dilation=module.dilation, groups=channels)
    return found.squeeze(1)


def input_squares(module: nn.Module, x: Tensor) -> Tensor:
    """Squared input norms of one call, in a shape that broadcasts against the layer's weight."""
    x = x.detach()
    if isinstance(module, nn.Embedding):
        return torch.bincount(x.reshape(-1), minlength=module.num_embeddings).double().unsqueeze(1)
    if isinstance(module, nn.Linear):
        return x.reshape(-1, x.shape[-1]).double().square().sum(0)
    assert isinstance(module, _ConvNd)  # noqa: S101 - the layers hooked below
    x = x.unsqueeze(0) if x.ndim == len(module.kernel_size) + 1 else x
    if isinstance(module, _ConvTransposeNd):
        return x.transpose(0, 1).flatten(1).double().square().sum(1).reshape(-1, 1, *[1] * len(module.kernel_size))
    norms = unfolded_squares(x, module)
    norms = norms.reshape(module.groups, -1, *norms.shape[1:])
    return norms.repeat_interleave(module.out_channels // module.groups, 0)


@dataclass(frozen=True, kw_only=True)
class Wanda(Criterion):
    """Score = |weight| x norm of its input over ``batches`` training batches; made for scope row."""

    id: ClassVar[str] = "wanda"
    batches: Batches = 8

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"train"})

    def scores(self, model: nn.Module, selection: Selection, context: Context) -> Scores:
        squares: dict[str, Tensor] = {}

        def see(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found = input_squares(module, args[0] if args else kwargs["input"])
            squares[name] = squares[name] + found if name in squares else found

        with ExitStack() as stack:
            for slot in selection:
                for module in _layers(slot):
                    hook = module.register_forward_pre_hook(partial(see, slot.name), with_kwargs=True)
                    stack.callback(hook.remove)
            stack.enter_context(looking(model, context, grad=False))
            for batch in batches(model, context, self.batches, "input norms"):
                context.data.predict(model, batch)
        for slot in selection:
            if slot.name not in squares:
                context.skip(slot.name, UNSEEN)
        guess = typical(list(squares.values()))
        return {
            slot.name: wanda(slot.value(), squares.get(slot.name, guess).to(slot.latent.device)) for slot in selection
        }


def _layers(slot: Slot) -> list[nn.Module]:
    """The layers that apply the weight to an input, alike in the meaning of its dimensions."""
    found = [m for _, m, name in slot.owners if name == "weight" and isinstance(m, nn.Linear | nn.Embedding | _ConvNd)]
    alike = [module for module in found if isinstance(module, nn.Embedding) == isinstance(found[0], nn.Embedding)]
    return list({id(module): module for module in alike}.values())
