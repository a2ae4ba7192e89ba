r"""meProp: only the largest gradients of each layer's output are propagated back.

Paper    Sun, Ren, Ma, Wang. meProp: Sparsified Back Propagation for Accelerated Deep Learning with Reduced Overfitting.
         ICML 2017. arXiv:1706.06197; simplify: Sun, Ren, Ma, Wei, Li, Wang. Training Simplification and Model
         Simplification for Deep Learning. 2017. arXiv:1711.06528 (meSimp)
Formula  y = W x:   dL/dy <- dL/dy where |dL/dy| is among the k = ceil(keep * n) largest of the n of a sample, else 0;
         dL/dW = dL/dy x^T,   dL/dx = W^T dL/dy;   unified: the top k of sum over the batch |dL/dy|;
         simplify: units that were among the top k less often than this are masked after each epoch
Departs  k is a share of the outputs instead of a number. A convolution's sample is its whole feature map; a linear
         layer's, every position of a sequence. The multiply-adds saved are counted, not measured: torch's dense kernels
         compute with the zeros. Frequencies are per epoch; the last epoch of several masks nothing, it repairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from espalier.core.callback import Callback, Loop
from espalier.core.context import Context
from espalier.core.fields import Epochs, Fraction
from espalier.core.forms import Mask
from espalier.core.parametrize import Slot, attach, bake, require_phase, slots
from espalier.core.ranking import smallest
from espalier.core.selection import Selection, select
from espalier.prune.masks import as_stored, outputs_first
from espalier.prune.responses import unit_layers
from espalier.train import Training


def top(gradient: Tensor, keep: float, *, unified: bool = False) -> Tensor:
    """Mask of what is propagated of ``gradient`` (samples, n): the ``ceil(keep * n)`` largest of every sample.

    ``unified``: the same entries for all samples, by the sum of the absolute values. Ties go to the lower position.
    """
    size = gradient.abs().sum(0, keepdim=True) if unified else gradient.abs()
    count = min(size.shape[1], max(1, math.ceil(keep * size.shape[1] - 1e-9)))
    order = size.argsort(dim=1, descending=True, stable=True)[:, :count]
    return torch.zeros_like(size, dtype=torch.bool).scatter_(1, order, value=True).expand_as(gradient)


@dataclass(frozen=True, kw_only=True)
class Backward(Training):
    """Trains ``layers`` with sparse gradients. ``keep``: the share of the outputs whose gradient is propagated.

    ``unified``: one choice per batch. ``simplify``: a unit is masked that was chosen in less than this share of the
    samples (or positions); 0 masks none. With the default ``layers`` the last layer's gradients are all propagated.
    """

    id: ClassVar[str] = "backward"
    epochs: Epochs = 5
    keep: Fraction = 0.1
    unified: bool = False
    simplify: Fraction = 0.0
    layers: tuple[str, ...] = ("*",)
    densify: bool = False

    def conflicts(self) -> list[str]:
        found = super().conflicts()
        if not self.epochs:
            found.append("epochs=0 trains nothing; this method changes training, give epochs above 0")
        if not self.keep:
            found.append("keep=0 propagates nothing; give a share above 0")
        return found

    def transform(self, model: nn.Module, context: Context) -> nn.Module:
        """Train with sparse gradients, counting; then leave masks where ``simplify`` asks for them."""
        selection = self._choose(model, context)
        sparse = _TopGradients(self, selection)
        with sparse:
            self.train(model, context, callbacks=(sparse,))
        sparse.finish(context)
        return model

    def _choose(self, model: nn.Module, context: Context) -> Selection:
        selection = select(model, self.layers, who=self.name)
        last = selection.names[-1:] if self.layers == ("*",) and selection.count > 1 else ()
        chosen = []
        for slot in selection:
            if slot.name in last:
                context.skip(slot.name, "its outputs are the model's; name it in layers to propagate less of them")
            elif not unit_layers(slot) or len(unit_layers(slot)) != len({id(m) for _, m, _ in slot.owners}):
                context.skip(slot.name, "not the weight of linear or convolutional layers alone")
            elif self.simplify and not slot.latent.requires_grad:
                context.skip(slot.name, "frozen")
            else:
                if self.simplify:
                    require_phase(slot, ("dense", "mask"), self.name, densify=self.densify)
                chosen.append(slot)
        for name, slot in slots(model).items():
            if name not in selection.names and slot.latent.ndim >= 2:
                context.skip(name, "not among the chosen layers")
        return Selection(tuple(chosen))


@dataclass
class _Tally:
    """What was seen at one layer: entries and multiply-adds, in all and propagated; choices of every unit."""

    entries: int = 0
    kept: int = 0
    work: float = 0.0
    work_kept: float = 0.0
    chosen: Tensor = field(default_factory=lambda: torch.zeros(0))
    rows: float = 0.0


class _TopGradients(Callback):
    """Hooks on the layers for the length of a training; ``with`` takes them off again."""

    def __init__(self, method: Backward, selection: Selection) -> None:
        self.method, self.selection = method, selection
        self.by_layer = {id(module): slot for slot in selection for module in unit_layers(slot)}
        self.tally = {slot.name: _Tally() for slot in selection}
        self.handles: list[Any] = []
        self.fresh = [slot for slot in selection if method.simplify and not isinstance(slot.form, Mask)]
        for slot in self.fresh:
            attach(slot, Mask(torch.ones_like(slot.latent, dtype=torch.bool)))

    def __enter__(self) -> _TopGradients:
        for slot in self.selection:
            for module in unit_layers(slot):
                self.handles.append(module.register_forward_hook(self._watch, prepend=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def _watch(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and output.requires_grad and torch.is_grad_enabled():
            below = any(isinstance(x, Tensor) and x.requires_grad for x in args)
            output.register_hook(self._sparsifier(module, 1 + below))  # type: ignore[no-untyped-call]

    def _sparsifier(self, module: nn.Module, products: int) -> Callable[[Tensor], Tensor]:
        """The hook that thins the gradient out; ``products``: how many products it enters (weight, input)."""
        slot = self.by_layer[id(module)]

        def thin(gradient: Tensor) -> Tensor:
            spatial = isinstance(module, _ConvNd)
            batched = gradient
            if spatial and gradient.ndim == slot.latent.ndim - 1:  # one image without a batch dimension
                batched = gradient.unsqueeze(0)
            rows = batched.flatten(1) if spatial else batched.reshape(-1, batched.shape[-1])
            units = batched.shape[1] if spatial else rows.shape[1]
            if self.method.simplify:  # units that are gone take nobody's place
                rows = torch.where(_alive(slot).repeat_interleave(rows.shape[1] // units), rows, 0)
            mask = top(rows, self.method.keep, unified=self.method.unified)
            self._count(slot, module, mask, units, products)
            return torch.where(mask, rows, 0).reshape(gradient.shape)

        return thin

    def _count(self, slot: Slot, module: nn.Module, mask: Tensor, units: int, products: int) -> None:
        tally = self.tally[slot.name]
        kept, weight = int(mask.sum()), slot.shape
        each: float = math.prod(weight[1:])
        if isinstance(module, _ConvTransposeNd):  # every position is reached from one kernel position in stride^d
            each = weight[0] * math.prod(weight[2:]) / module.groups / math.prod(module.stride)
        tally.entries += mask.numel()
        tally.kept += kept
        tally.work += products * each * mask.numel()
        tally.work_kept += products * each * kept
        chosen = mask.reshape(mask.shape[0], units, -1).sum((0, 2)).cpu().float()
        tally.chosen = tally.chosen + chosen if len(tally.chosen) else chosen
        tally.rows += mask.numel() / units

    def on_epoch(self, loop: Loop) -> None:
        if self.method.simplify and (loop.epoch + 1 < loop.epochs or loop.epochs == 1):
            for slot in self.selection:
                self._simplify(slot)
        for tally in self.tally.values():
            tally.chosen, tally.rows = torch.zeros(0), 0.0

    def _simplify(self, slot: Slot) -> None:
        tally = self.tally[slot.name]
        if not tally.rows:
            return
        often = (tally.chosen / tally.rows).to(slot.latent.device)
        alive = _alive(slot)
        often = often.masked_fill(~alive, -1)
        rare = smallest(often, min(int((often < self.method.simplify).sum()), len(often) - 1))
        first = outputs_first(slot, _mask(slot))
        gone = rare.reshape(-1, *[1] * (first.ndim - 1)).expand_as(first)
        _mask(slot).logical_and_(as_stored(slot, ~gone))

    def finish(self, context: Context) -> None:
        """Tell what was propagated; drop masks that hide nothing."""
        seen = {name: tally for name, tally in self.tally.items() if tally.entries}
        for name in self.tally.keys() - seen.keys():
            context.skip(name, "no gradient came to its output while training")
        record = context.record.details
        record["gradients kept"] = {name: tally.kept / tally.entries for name, tally in seen.items()}
        record["backward multiply-adds"] = sum(tally.work for tally in seen.values())
        record["backward multiply-adds saved"] = sum(tally.work - tally.work_kept for tally in seen.values())
        if self.method.simplify:
            record["sparsity"] = {slot.name: 1 - float(_mask(slot).float().mean()) for slot in self.selection}
        for slot in self.fresh:
            if bool(_mask(slot).all()):
                bake(slot)

    def state_dict(self) -> dict[str, Any]:
        return {name: vars(tally) for name, tally in self.tally.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tally = {name: _Tally(**kept) for name, kept in state.items()}


def _mask(slot: Slot) -> Tensor:
    assert isinstance(slot.form, Mask)  # noqa: S101 - attached in __init__
    return slot.form.mask


def _alive(slot: Slot) -> Tensor:
    """Which output units have any weight left, shape (units,)."""
    return outputs_first(slot, _mask(slot)).flatten(1).any(1)
