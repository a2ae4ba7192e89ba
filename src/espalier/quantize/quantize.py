r"""Quantization: any weight quantizer with any activation, gradient and error quantizer, at once or while training.

Paper    Krishnamoorthi. Quantizing deep convolutional networks for efficient inference. arXiv:1806.08342 (the two ways,
         after and during training); Bengio et al. 2013, arXiv:1308.3432 (the straight-through estimator)
Formula  y = Q_w(w) * Q_a(x);   dL/dw, dL/dx through Q by each method's own backward rule;   g <- Q_g(g), e <- Q_e(e)
Departs  The quantized values are computed in floating point while training; files hold codes, and export makes
         integer kernels of them where a runtime has such.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from espalier.core.callback import Callback
from espalier.core.context import Context
from espalier.core.fields import Batches, Bits, Epochs
from espalier.core.forms import Mask
from espalier.core.inputs import ActivationQuantizer, Observed, QuantizeInput, quantized_input
from espalier.core.parametrize import Slot, attach
from espalier.core.plan import Plan
from espalier.core.quantized import QuantizedWeight, WeightQuantizer
from espalier.quantize.affine import Affine, AffineInput
from espalier.quantize.calibrate import observe
from espalier.quantize.coverage import coverage
from espalier.quantize.gradients import Gradients
from espalier.quantize.parts import GradientQuantizer, LayerSolver, Scheme, Stage, default_bits
from espalier.quantize.places import Place, chosen, input_layers, output_axis
from espalier.train import Training
from espalier.train.batch_norm import reestimate
from espalier.train.layers import in_order
from espalier.train.quantizers import quantized
from espalier.train.restarted import Restarted

END_BITS = 8


@dataclass(frozen=True, kw_only=True)
class Quantize(Training):
    """Quantize the weights of ``layers``, their inputs, and what flows back; with ``epochs`` the network trains so.

    ``bits``, ``activation_bits``: one number, or pattern -> number; by default, as for ``gradient_bits`` and
    ``error_bits``, the method's own (8 where it can).
    ``ends``: what the first and the last layer get: that many bits at least, ``same`` as the others, or ``float``.
    ``schemes`` divide the epochs. ``batches``: training batches of the calibration. ``densify``: codes and clusters of
    an earlier step may be given up; pruned positions stay zero and shared values stay shared in any case.
    """

    id: ClassVar[str] = "quantize"
    epochs: Epochs = 0
    weights: WeightQuantizer | None = field(default_factory=Affine)
    activations: ActivationQuantizer | None = None
    gradients: GradientQuantizer | None = None
    errors: GradientQuantizer | None = None
    bits: Bits | dict[str, Bits] | None = None
    activation_bits: Bits | dict[str, Bits] | None = None
    gradient_bits: Bits | None = None
    error_bits: Bits | None = None
    ends: Bits | Literal["same", "float"] = END_BITS
    schemes: tuple[Scheme, ...] = ()
    layers: tuple[str, ...] = ("*",)
    batches: Batches = 8
    densify: bool = False

    @property
    def needs(self) -> frozenset[str]:
        """Training data where inputs are calibrated, weights solved for, or anything trained."""
        return super().needs | ({"train"} if self.activations is not None else frozenset())

    def conflicts(self) -> list[str]:
        return [*super().conflicts(), *_widths(self), *_training(self)]

    def transform(self, model: nn.Module, context: Context) -> nn.Module:
        """Calibrate, attach, train stage by stage, and say what is covered."""
        places = self.places(model, context, self.name)
        observed = self.observed(model, places, context)
        stages = self.stages()
        for number, stage in enumerate(stages):
            weights = self._weights(places, stage, context)
            if isinstance(self.weights, LayerSolver):
                _solve(model, weights, context)
            model = self._inputs(model, observed, places, stage, context)
            self._fit(model, context, stage, len(stages), number)
        for slot, form in quantized(model):
            with torch.no_grad():
                form.method.finish(form.view(slot.latent), context)
        if self.reestimate:  # after the last weight has its place
            reestimate(model, context)
        if self.weights is not None or self.activations is not None:
            context.record.details["coverage"] = coverage(model, places, context)
        if observed:
            context.note(
                "torch computes quantized inputs in floating point, so its latency says nothing about integer kernels: "
                "espalier export --to int8 writes and times a file that has them."
            )
        return model

    def stages(self) -> tuple[Stage, ...]:
        """The trainings the schemes make of this step, in order."""
        stages: tuple[Stage, ...] = (Stage("fit"),)
        for scheme in self.schemes:
            stages = scheme.stages(stages, self)
        return stages

    def places(self, model: nn.Module, context: Context, who: str) -> list[Place]:
        """The weights of ``layers``, each with the bits asked for it and its layer's input."""
        return chosen(
            model, self.layers, self.bits, context, who,
            densify=self.densify, input_bits=self.activation_bits, stay=self.weights is None,
        )  # fmt: skip

    # --- weights -------------------------------------------------------------------------------------------------

    def weight_bits(self, place: Place) -> tuple[WeightQuantizer, int] | None:
        """The method and the bits of one weight; None where it stays in floating point.

        Ends whose bits the method cannot do get the uniform grid.
        """
        method = self.weights
        if method is None:
            return None
        bits = place.bits if place.bits is not None else default_bits(method.widths)
        if place.end and self.ends == "float":
            return None
        if place.end and isinstance(self.ends, int) and bits < self.ends:
            bits = self.ends
            method = method if bits in method.widths else Affine()
        return method, bits

    def _weights(self, places: Iterable[Place], stage: Stage, context: Context) -> list[Slot]:
        done = []
        for place in places:
            slot, found = place.slot, self.weight_bits(place)
            if found is None:
                if self.weights is not None:
                    context.skip(slot.name, "it is the first or the last layer's, and ends=float")
                continue
            method, bits = found
            reason = method.refuses(slot)
            if reason is not None:
                context.skip(slot.name, reason)
                continue
            bits = next((b for b in sorted(method.widths) if b >= max(bits, stage.width)), bits)
            put(slot, method, bits)
            done.append(slot)
        return done

    # --- inputs --------------------------------------------------------------------------------------------------

    def observed(
        self, model: nn.Module, places: list[Place], context: Context
    ) -> dict[str, tuple[nn.Module, Place, Observed]]:
        """Path -> the layer, its weight's place and what calibration saw come in, where inputs are to be quantized."""
        if self.activations is None:
            return {}
        layers = input_layers(places, context)
        seen = observe(model, {path: layer for path, (layer, _) in layers.items()}, context, self.batches)
        found = {}
        for path, (layer, place) in layers.items():
            if path not in seen:
                context.skip(f"input of {path}", "the layer was not called on the calibration data")
            elif place.end and self.ends == "float":
                context.skip(f"input of {path}", "it is the first or the last layer's, and ends=float")
            elif seen[path].low == seen[path].high == 0:
                context.skip(f"input of {path}", "its range is dead: every value seen was zero")
            elif (reason := self.input_bits(place)[0].refuses(layer, seen[path])) is not None:
                context.skip(f"input of {path}", reason)
            else:
                found[path] = layer, place, seen[path]
        return found

    def input_bits(self, place: Place) -> tuple[ActivationQuantizer, int]:
        """The method and the bits of what goes into the layer of one weight."""
        method = self.activations
        assert method is not None  # noqa: S101 - asked by the caller
        bits = place.input_bits if place.input_bits is not None else default_bits(method.widths)
        if place.end and isinstance(self.ends, int):
            bits = max(bits, self.ends)
            method = method if bits in method.widths and method.at_ends else AffineInput()
        return method, bits

    def _inputs(
        self, model: nn.Module, observed: Mapping[str, tuple[nn.Module, Place, Observed]], places: list[Place],
        stage: Stage, context: Context,
    ) -> nn.Module:  # fmt: skip
        if not stage.activations:
            return model
        for path, (layer, place, seen) in observed.items():
            method, bits = self.input_bits(place)
            bits = next((b for b in sorted(method.widths) if b >= max(bits, stage.width)), bits)
            there = quantized_input(layer)
            if there is not None and there.bits == bits and there.method == method:
                continue
            model = Plan((QuantizeInput.of(path, method, bits, signed=seen.low < 0),)).apply(model)
            fill(layer, seen)
        return model

    # --- training ------------------------------------------------------------------------------------------------

    def _fit(self, model: nn.Module, context: Context, stage: Stage, of: int, number: int) -> None:
        share = self.epochs // of + int(number < self.epochs % of)
        if not share:
            return
        callbacks: list[Callback] = []
        with ExitStack() as stack:
            if self.gradients is not None or self.errors is not None:
                callbacks.append(stack.enter_context(Gradients(self, model)))
            callbacks += [
                made for guide in stage.guides if (made := guide.callback(model, context)) is not None
            ]  # fmt: skip
            self._paced(model, share).train(model, context, callbacks=callbacks, name=stage.name)

    def _paced(self, model: nn.Module, epochs: int) -> Quantize:
        """This step for one stage: its epochs, and the restarts that methods ask for, each at the next whole epoch."""
        shares = {at for _, form in quantized(model) for at in form.method.restarts(form.bits)}
        stage = self.replace(epochs=epochs, schemes=(), reestimate=False)
        if shares:
            restarts = sorted({math.ceil(at * epochs - 1e-9) / epochs for at in shares})
            stage = stage.replace(lr_schedule=Restarted(inner=self.lr_schedule, at=tuple(restarts)))
        return stage


def put(slot: Slot, method: WeightQuantizer, bits: int) -> None:
    """Give a weight the form of ``method`` in ``bits`` bits; a quantizer it has goes, what that kept is kept on.

    The same method in other bits goes on from the latent tensor, another one from the effective values.
    """
    old, latent = slot.form, slot.latent.detach().clone()
    if isinstance(old, QuantizedWeight) and old.method == method and old.bits == bits:
        return
    inner = old.inner if isinstance(old, QuantizedWeight) else old
    assert inner is None or isinstance(inner, Mask) or inner.flat  # noqa: S101 - places refuses all others
    goes_on = isinstance(old, QuantizedWeight) and old.method == method and not method.stacked
    if goes_on or (inner is not None and inner.flat and old is inner):
        start = latent
    elif inner is not None and inner.flat and isinstance(old, QuantizedWeight):
        with torch.no_grad():
            start = old.method.quantize(old.eval().view(latent))
    else:
        start = slot.value()
    form = QuantizedWeight(method, start, bits, axis=output_axis(slot), inner=inner, name=slot.name)
    trained = slot.latent.requires_grad
    attach(slot, form)
    for parameter in (slot.latent, *form.state.parameters()):
        parameter.requires_grad_(trained)


def fill(layer: nn.Module, seen: Observed) -> None:
    """Fill the state of the layer's input quantizer from what calibration saw."""
    quantizer = quantized_input(layer)
    assert quantizer is not None  # noqa: S101 - just put there
    state = quantizer.method.start(seen, quantizer.bits, signed=quantizer.signed)
    with torch.no_grad():
        for name, tensor in state.items():
            quantizer.state[name].copy_(tensor)


def _solve(model: nn.Module, slots: list[Slot], context: Context) -> None:
    """Solve layer after layer, in the order they run."""
    ordered = in_order(model, slots, context)
    for number, slot in enumerate(ordered):
        form = slot.form
        assert isinstance(form, QuantizedWeight)  # noqa: S101 - just put there
        context.progress("layers", number, len(ordered))
        if not isinstance(form.method, LayerSolver) or (form.inner is not None and form.inner.flat):
            continue
        solved = form.method.solve(model, slot, form.bits, form.axis, context)
        with torch.no_grad():
            slot.latent.copy_(solved)


def _widths(method: Quantize) -> list[str]:
    """Bits that a method cannot do, and bits of what is not quantized."""
    found = []
    name_of = {
        "bits": "weights",
        "activation_bits": "activations",
        "gradient_bits": "gradients",
        "error_bits": "errors",
    }
    for name, bits, part in (
        ("bits", method.bits, method.weights),
        ("activation_bits", method.activation_bits, method.activations),
        ("gradient_bits", method.gradient_bits, method.gradients),
        ("error_bits", method.error_bits, method.errors),
    ):
        if bits is None:
            continue
        if part is None:
            found.append(f"{name} has no say without {name_of[name]}: say by which method, or leave {name} unset")
            continue
        asked = bits.values() if isinstance(bits, Mapping) else (bits,)
        wrong = sorted({b for b in asked if b not in part.widths})
        if wrong:
            can = ", ".join(map(str, part.widths))
            found.append(f"{name}={wrong[0]}: {part.id} can do {can}")
    return found


def _training(method: Quantize) -> list[str]:
    """What makes sense in a training only, and a step that does nothing."""
    found = []
    parts: tuple[Any, ...] = (method.weights, method.activations, method.gradients, method.errors)
    if all(part is None for part in parts):
        found.append("nothing is to be quantized: give weights, activations, gradients or errors")
    if not method.epochs and (method.gradients is not None or method.errors is not None):
        found.append("gradients and errors exist in training only: give epochs")
    if method.reestimate and not method.epochs:
        found.append("reestimate needs epochs; without any add the step train.batch-norm")
    if method.weights is not None and method.activations is not None:
        reason = method.weights.refuses_inputs(method.activations)
        found += [] if reason is None else [reason]
    if method.schemes and not method.epochs:
        found.append("schemes divide a training: give epochs")
    if method.schemes and method.epochs and len(method.stages()) > method.epochs:
        found.append(f"the schemes make {len(method.stages())} stages; give as many epochs at least")
    return found
