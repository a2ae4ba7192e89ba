"""The inputs of layers in other widths: put in for a while, and how sensitive the loss is to them.

The activations' part of Dong et al. HAWQ-V2. NeurIPS 2020. arXiv:1911.03852: the trace of the second derivatives in an
activation, by Hutchinson's products with random signs, times the square of what rounding changes in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from espalier.core.context import Context
from espalier.core.inputs import QuantizedInput, put_quantizer, quantized_input
from espalier.core.model import device_of
from espalier.quantize.places import Place
from espalier.quantize.quantize import Quantize
from espalier.train.looking import Against, batches, connected, derivative, finite, looking, scalar


@dataclass(frozen=True)
class InputTrial:
    """What goes into the layers of one weight in ``bits`` bits: path of the layer -> its quantizer.

    ``asked``: of the step, which gives its ends more.
    """

    asked: int
    bits: int
    quantizers: Mapping[str, QuantizedInput]


def input_trials(
    model: nn.Module, places: list[Place], step: Quantize, widths: Sequence[int], context: Context
) -> dict[str, list[InputTrial]]:
    """Weight name -> the widths its inputs can have, as ``step`` would calibrate them; none where it leaves them."""
    observed = step.observed(model, places, context)
    found: dict[str, dict[int, InputTrial]] = {}
    for asked in widths:
        made: dict[str, tuple[int, dict[str, QuantizedInput]]] = {}
        for path, (_, place, seen) in observed.items():
            method, bits = step.input_bits(replace(place, input_bits=asked))
            quantizer = QuantizedInput(method, bits, seen, signed=seen.low < 0).to(device_of(model)).eval()
            made.setdefault(place.slot.name, (bits, {}))[1][path] = quantizer
        for name, (bits, quantizers) in made.items():
            found.setdefault(name, {}).setdefault(bits, InputTrial(asked, bits, quantizers))
    return {name: list(trials.values()) for name, trials in found.items()}


@contextmanager
def quantizing(model: nn.Module, trial: InputTrial | None) -> Iterator[None]:
    """Within the block the inputs of ``trial`` are quantized; the quantizers that were there are put back."""
    with ExitStack() as undo:
        for path, quantizer in (trial.quantizers if trial is not None else {}).items():
            layer = model.get_submodule(path)
            undo.callback(put_quantizer, layer, quantized_input(layer))
            put_quantizer(layer, quantizer)
        yield


@dataclass
class _Sums:
    """Over the batches, for what goes into one layer: v' H v, the squared error of each width, and the entries."""

    product: float = 0.0
    errors: dict[int, float] = field(default_factory=dict)
    entries: int = 0

    def look(self, x: Tensor, widths: Mapping[int, QuantizedInput]) -> None:
        """Add the errors of one input."""
        self.entries += x.numel()
        with torch.no_grad():
            for bits, quantizer in widths.items():
                error = (quantizer(x) - x).double().square().sum()
                self.errors[bits] = self.errors.get(bits, 0.0) + float(error)

    def error(self, bits: int) -> float:
        """The mean squared error; 0 where nothing came in."""
        return self.errors.get(bits, 0.0) / max(1, self.entries)


@dataclass(frozen=True)
class InputSensitivity:
    """``trace(H_a)`` of the inputs of one weight's layers, and bits -> |trace(H_a)| mean (Q_b(a) - a)^2."""

    trace: float
    values: Mapping[int, float]


def input_sensitivities(
    model: nn.Module, trials: Mapping[str, Sequence[InputTrial]], context: Context, *, count: int, probes: int,
    against: Against,
) -> dict[str, InputSensitivity]:  # fmt: skip
    """Weight name -> how sensitive the scalar is to its layers' inputs in the bits of each trial.

    H_a: second derivatives of one sample's loss in what goes into the layer, and into no other that reads the same
    tensor; with n entries a sample this is mean trace x ||Q_b(a) - a||^2. The trace and the error are each averaged
    over ``count`` batches. Raises ``ModelError`` where nothing depends on the inputs, ``NumericError`` for NaN.
    """
    widths = {
        path: {t.bits: t.quantizers[path] for t in each} for each in trials.values() for path in each[0].quantizers
    }
    sums = {path: _Sums() for path in widths}
    generator, done = context.generator("probes of inputs"), 0
    branches: list[tuple[str, Tensor]] = []
    with ExitStack() as stack:
        for path in widths:
            hook = partial(_branch, path, branches)
            stack.callback(model.get_submodule(path).register_forward_pre_hook(hook).remove)
        stack.enter_context(looking(model, context))
        for batch in batches(model, context, count, "second derivatives in inputs"):
            branches.clear()
            value = scalar(context.data.predict(model, batch), batch, context, against)
            connected(value)
            grads = derivative(value, [branch for _, branch in branches], create_graph=True)
            for (path, branch), grad in zip(branches, grads, strict=True):
                for _ in range(probes):
                    v = (torch.randint(2, branch.shape, generator=generator) * 2 - 1).to(branch.device, branch.dtype)
                    (product,) = derivative((grad * v).sum(), [branch], retain_graph=True)
                    sums[path].product += float((v * finite(f"the input of {path}", product)).sum())
                sums[path].look(branch.detach(), widths[path])
            done += probes
    traces = {path: one.product / done for path, one in sums.items()}
    return {
        name: InputSensitivity(
            sum(traces[path] for path in each[0].quantizers),
            {t.bits: sum(abs(traces[path]) * sums[path].error(t.bits) for path in t.quantizers) for t in each},
        )
        for name, each in trials.items()
    }


def _branch(path: str, found: list[tuple[str, Tensor]], _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Give the layer a copy of its input to differentiate by: other layers may read the same tensor."""
    packed = args[0] if args and isinstance(args[0], PackedSequence) else None
    x = packed.data if packed is not None else args[0] if args else None
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return None
    branch = x.clone()
    if not branch.requires_grad:
        branch.requires_grad_()
    found.append((path, branch))
    return (branch if packed is None else packed._replace(data=branch), *args[1:])
