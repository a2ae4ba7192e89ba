"""What quantizers do while the model trains: one callback that speaks to every weight and input."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from espalier.core.callback import Callback, Loop
from espalier.core.inputs import ActivationQuantizer, quantized_inputs
from espalier.core.parametrize import Slot, slots
from espalier.core.quantized import QuantizedWeight, Weight, WeightQuantizer


def quantized(model: nn.Module) -> list[tuple[Slot, QuantizedWeight]]:
    """Every quantized weight of a model with its form."""
    return [(slot, slot.form) for slot in slots(model).values() if isinstance(slot.form, QuantizedWeight)]


def does(method: Any, hook: str) -> bool:
    """Whether a quantizer has its own ``hook``."""
    base = WeightQuantizer if isinstance(method, WeightQuantizer) else ActivationQuantizer
    return getattr(type(method), hook) is not getattr(base, hook)


class QuantizerHooks(Callback):
    """Calls the hooks that the quantizers of ``model`` have; within ``with`` it also stands at the layers' outputs."""

    def __init__(self, model: nn.Module) -> None:
        self.weights = quantized(model)
        self.inputs = list(quantized_inputs(model).values())
        self.stack = ExitStack()

    def __bool__(self) -> bool:
        """Whether there is any quantizer to speak to."""
        return bool(self.weights or self.inputs)

    def __enter__(self) -> QuantizerHooks:
        for slot, form in self.weights:
            if does(form.method, "respond"):
                for _, module, _ in slot.owners:
                    self.stack.callback(module.register_forward_hook(_responder(slot, form)).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def _those(self, hook: str) -> Iterable[tuple[Slot, QuantizedWeight, Weight]]:
        for slot, form in self.weights:
            if does(form.method, hook):
                yield slot, form, form.view(slot.latent)

    def on_start(self, loop: Loop) -> None:
        for _, form in self.weights:
            form.trained = True
        with torch.no_grad():
            for _, form, w in self._those("on_start"):
                form.method.on_start(w, loop)

    def loss(self, loop: Loop, batch: Any, output: Any, loss: Tensor) -> Tensor:
        terms = [form.method.penalty(w) for _, form, w in self._those("penalty")]
        terms += [q.method.penalty(q.view()) for q in self.inputs if q.active and does(q.method, "penalty")]
        found = [term for term in terms if term is not None]
        return loss + torch.stack(found).sum() if found else loss

    def before_step(self, loop: Loop) -> None:
        with torch.no_grad():
            for _, form, w in self._those("before_step"):
                form.method.before_step(w, loop)

    def after_step(self, loop: Loop) -> None:
        with torch.no_grad():
            for _, form, w in self._those("after_step"):
                form.method.after_step(w, loop)
            for q in self.inputs:
                if q.active and does(q.method, "after_step"):
                    q.method.after_step(q.view(), loop)

    def on_epoch(self, loop: Loop) -> None:
        with torch.no_grad():
            for _, form, w in self._those("on_epoch"):
                form.method.on_epoch(w, loop)


def _responder(slot: Slot, form: QuantizedWeight) -> Callable[..., Any]:
    def respond(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        if not module.training or not isinstance(output, Tensor):
            return output
        return form.method.respond(form.view(slot.latent), module, inputs, output)

    return respond
