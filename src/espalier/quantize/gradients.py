"""Quantized gradients in training: of the weights before the optimizer, and of the layers' outputs on the way back."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from espalier.core.callback import Callback, Loop
from espalier.core.parametrize import slots
from espalier.quantize.parts import default_bits
from espalier.quantize.places import LAYERS

if TYPE_CHECKING:
    from espalier.quantize.quantize import Quantize


class Gradients(Callback):
    """Stands at the layers' outputs within ``with``; quantizes the gradients of weights before every step.

    The last layer's errors are quantized too; biases and norms keep their gradients, as in DoReFa-Net.
    """

    def __init__(self, method: Quantize, model: nn.Module) -> None:
        self.method, self.model = method, model
        self.gradient_bits, self.error_bits = (
            bits or default_bits(part.widths if part is not None else (8,))
            for bits, part in ((method.gradient_bits, method.gradients), (method.error_bits, method.errors))
        )
        self.handles: list[Any] = []
        self.generator = torch.Generator()

    def __enter__(self) -> Gradients:
        if self.method.errors is not None:
            for module in self.model.modules():
                if isinstance(module, LAYERS):
                    self.handles.append(module.register_forward_hook(self._watch))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def on_epoch_start(self, loop: Loop) -> None:
        self.generator = loop.generator

    def _watch(self, module: nn.Module, _: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) and not isinstance(output, PackedSequence) else output
        packed = first if isinstance(first, PackedSequence) else None
        values = packed.data if packed is not None else first
        if isinstance(values, Tensor) and values.requires_grad and torch.is_grad_enabled():
            hook = self._error if packed is None else partial(self._packed_error, packed.batch_sizes)
            values.register_hook(partial(hook, sample_dim(module, values)))  # type: ignore[no-untyped-call]

    def _error(self, dim: int | None, gradient: Tensor) -> Tensor:
        assert self.method.errors is not None  # noqa: S101 - only then hooked
        moved = gradient if dim is None else gradient.movedim(dim, 0)
        found = self.method.errors.quantize(
            moved, self.error_bits, self.generator, samples=dim is not None
        )  # fmt: skip
        return found if dim is None else found.movedim(0, dim)

    def _packed_error(self, sizes: Tensor, _: int | None, gradient: Tensor) -> Tensor:
        """The sequences of a packed batch one by one: a sample's errors are those of all its steps."""
        padded, _lengths = pad_packed_sequence(PackedSequence(gradient, sizes), batch_first=True)
        found = self._error(0, padded)
        return torch.cat([found[:count, step] for step, count in enumerate(sizes.tolist())])

    def before_step(self, loop: Loop) -> None:
        quantizer = self.method.gradients
        if quantizer is None:
            return
        for slot in slots(loop.model).values():
            grad = slot.latent.grad
            if grad is not None and grad.ndim >= 2:
                slot.latent.grad = quantizer.quantize(grad, self.gradient_bits, self.generator, samples=False)


def sample_dim(module: nn.Module, output: Tensor) -> int | None:
    """The dimension of a layer's output that counts samples; None where it is the output of a single one."""
    if isinstance(module, nn.RNNBase):
        return None if output.ndim == 2 else 0 if module.batch_first else 1
    if isinstance(module, _ConvNd):
        return 0 if output.ndim == len(module.kernel_size) + 2 else None
    return 0 if output.ndim > 1 else None
