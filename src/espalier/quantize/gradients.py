"""Quantized gradients in training: of the weights before the optimizer, and of the layers' outputs on the way back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from espalier.core.callback import Callback, Loop
from espalier.core.parametrize import slots
from espalier.quantize.places import LAYERS

if TYPE_CHECKING:
    from espalier.quantize.quantize import Quantize


class Gradients(Callback):
    """Stands at the layers' outputs within ``with``; quantizes the gradients of weights before every step.

    The last layer's errors are quantized too; biases and norms keep their gradients, as in DoReFa-Net.
    """

    def __init__(self, method: Quantize, model: nn.Module) -> None:
        self.method, self.model = method, model
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

    def _watch(self, _: nn.Module, __: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, Tensor) and first.requires_grad and torch.is_grad_enabled():
            first.register_hook(self._error)  # type: ignore[no-untyped-call]

    def _error(self, gradient: Tensor) -> Tensor:
        assert self.method.errors is not None  # noqa: S101 - only then hooked
        return self.method.errors.quantize(gradient, self.method.error_bits, self.generator, samples=True)

    def before_step(self, loop: Loop) -> None:
        quantizer = self.method.gradients
        if quantizer is None:
            return
        for slot in slots(loop.model).values():
            grad = slot.latent.grad
            if grad is not None and grad.ndim >= 2:
                slot.latent.grad = quantizer.quantize(grad, self.method.gradient_bits, self.generator, samples=False)
