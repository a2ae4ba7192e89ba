"""Weights stored in 16 bits and widened to fp32 where they are read: half the bytes, and the arithmetic stays fp32.

An ONNX file gets the rounded tensor and a Cast, OpenVINO's files the same tensor and a Convert. OpenVINO's own
``save_model(compress_to_fp16=True)`` is not used: it turns a weight of 1e5 into 65504 without a word, rounds scalars as
well, and knows no bf16.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from espalier.core.errors import ModelError, NumericError, UsageError, did_you_mean
from espalier.core.model import evaluating
from espalier.deploy.check import ROUNDED_DB, Call, Check, difference, resized, rounds, sqnr
from espalier.deploy.installed import need
from espalier.deploy.onnx_writer import save_onnx
from espalier.deploy.runtimes import Session
from espalier.deploy.signature import tensors_in

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
WEIGHTS = ("fp32", *DTYPES)
SMALLEST = 256
"""Elements from which a tensor is stored in 16 bits: below, the Cast (130 bytes in ONNX, 440 as a Convert in OpenVINO's
XML) would weigh about as much as is saved."""
QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
COMPUTES = {
    "onnxruntime": "onnxruntime computes in fp32",
    "openvino": "OpenVINO computes in fp32, or opened with precision='bf16', in bf16 where the processor has it",
}


@dataclass(frozen=True)
class Storage:
    """How the weights of a file are stored, and what that changes.

    ``tensors``, ``elements``: those in 16 bits, of ``total`` elements in floating point. ``fp32_bytes``: length of the
    same file in fp32. ``sqnr``: of the outputs against the fp32 model on the example, in dB; None where no example was
    run, infinity where they are equal. ``zeroed``: per tensor, how many weights became zero. ``kept``: tensors of
    ``SMALLEST`` elements or more that stay fp32, with the reason.
    """

    weights: str
    tensors: int
    elements: int
    total: int
    fp32_bytes: int = 0
    sqnr: float | None = None
    zeroed: Mapping[str, int] = field(default_factory=dict)
    kept: Mapping[str, str] = field(default_factory=dict)

    def said(self, length: int, runtimes: Sequence[str]) -> tuple[str, ...]:
        """In sentences, for a file of ``length`` bytes that ran in ``runtimes``."""
        stored = (
            f"{self.weights} is how the weights are stored: {self.elements:,} of {self.total:,} numbers, "
            f"{self.fp32_bytes:,} bytes in fp32 and {length:,} here"
        )
        computed = "; ".join(COMPUTES[name] for name in runtimes if name in COMPUTES)
        slow = "they are widened to fp32 where they are read, so the file is smaller, not faster"
        said = [stored, f"{slow}: {computed}" if computed else slow]
        if self.sqnr == math.inf:
            said.append("outputs on the example are equal to those of the fp32 model")
        elif self.sqnr is not None and math.isfinite(self.sqnr):
            said.append(f"outputs on the example: {self.sqnr:.1f} dB SQNR to the fp32 model, by rounding the weights")
        if self.zeroed:
            lost, hint = sum(self.zeroed.values()), "; bf16 keeps them" if self.weights == "fp16" else ""
            said.append(
                f"{'1 weight is' if lost == 1 else f'{lost:,} weights are'} too small for {self.weights} and now zero "
                f"({_listed({name: f'{count:,}' for name, count in self.zeroed.items()})}){hint}"
            )
        if self.kept:
            said.append(f"in fp32 stay {_listed(self.kept)}")
        return tuple(said)


def _listed(named: Mapping[str, str], shown: int = 5) -> str:
    rest = f" and {len(named) - shown} more" if len(named) > shown else ""
    return ", ".join(f"{name}: {what}" for name, what in tuple(named.items())[:shown]) + rest


def check_weights(weights: str) -> None:
    """Raise ``UsageError`` for a storage that does not exist."""
    if weights not in WEIGHTS:
        hint = " Int8 files are written by deploy.to_int8 (--to int8)." if "int" in str(weights) else ""
        raise UsageError(f"weights cannot be stored as {weights!r}.{did_you_mean(str(weights), WEIGHTS)}{hint}")


class Rounding:
    """Tensors are rounded one after the other; counts what happens to them."""

    def __init__(self, weights: str) -> None:
        self.weights = weights
        self.tensors = self.elements = self.total = 0
        self.zeroed: Counter[str] = Counter()
        self.kept: dict[str, str] = {}

    def __call__(self, name: str, tensor: Tensor, why_not: str = "") -> Tensor | None:
        """``tensor`` in 16 bits, ties to even; None where it stays as it is.

        ``why_not``: the reason, where the caller has one. Raises ``NumericError`` where fp16 has no such number.
        """
        if not tensor.is_floating_point():
            return None
        self.total += tensor.numel()
        if tensor.dtype != torch.float32 or tensor.numel() < SMALLEST:
            return None
        narrow = tensor.to(DTYPES[self.weights])
        wide = narrow.float()
        beyond = wide.isinf() & tensor.isfinite()
        if not why_not and beyond.any():
            if self.weights == "fp16":
                worst, count = float(tensor[beyond].abs().max()), int(beyond.sum())
                raise NumericError(
                    f"{name} holds {count:,} number{'s' * (count > 1)} beyond the 65504 that fp16 ends at, the largest "
                    f"{worst:.6g}: no file was written. Store the weights as bf16, which has the range of fp32."
                )
            why_not = "numbers at the end of fp32's range"  # masks are made of them
        if not why_not and not torch.equal(wide, tensor) and torch.equal(tensor, tensor.round()):
            why_not = "whole numbers that 16 bits would round"  # positions and counts are no weights
        if why_not:
            self.kept[name] = why_not
            return None
        self.tensors += 1
        self.elements += tensor.numel()
        if lost := int(((wide == 0) & (tensor != 0)).sum()):
            self.zeroed[name] = lost
        return narrow

    def result(self) -> Storage:
        """What was done. Raises ``ModelError`` where no tensor was rounded."""
        if not self.tensors:
            kept = f" In fp32 stay {_listed(self.kept)}." if self.kept else ""
            raise ModelError(
                f"no floating-point weight of {SMALLEST} elements or more can be stored in {self.weights}: the file "
                f"would not be smaller.{kept} Export it in fp32."
            )
        return Storage(self.weights, self.tensors, self.elements, self.total, zeroed=dict(self.zeroed), kept=self.kept)


def write_16bit(source: Path, path: Path, reference: Path, weights: str, *, external: bool | None = None) -> Storage:
    """Write ``source``, an fp32 ONNX file, again to ``path`` with weights in 16 bits, and to ``reference``.

    In ``path`` each rounded tensor is read through a Cast; ``reference`` holds the same numbers in fp32. Integers, what
    a quantizer reads, and tensors of fewer than ``SMALLEST`` elements stay as they are.
    """
    need("the ONNX export", "onnx", "onnxscript")
    import onnx_ir as ir
    from onnx_ir.tensor_adapters import TorchTensor

    model = ir.load(source)
    ir.external_data.load_to_model(model)
    graph = model.graph
    rounding = Rounding(weights)
    found: list[tuple[ir.Value, Tensor]] = []
    for name, value in graph.initializers.items():
        if value.const_value is None or value.const_value.dtype != ir.DataType.FLOAT:
            continue
        quantized = any(node.op_type in QUANTIZERS for node, _ in value.uses())
        why_not = "a quantizer reads it" if quantized else "it is an output" if value.is_graph_output() else ""
        narrow = rounding(name, torch.from_numpy(np.array(value.const_value.numpy())), why_not)
        if narrow is not None:
            value.const_value = TorchTensor(narrow.float(), name=name)
            found.append((value, narrow))
    storage = rounding.result()
    save_onnx(model, reference, external=external)
    casts = []
    for value, narrow in found:
        cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT}, name=f"{value.name}/Cast")
        out = cast.outputs[0]
        out.name, out.shape, out.dtype = f"{value.name}/fp32", value.shape, ir.DataType.FLOAT
        for node, index in tuple(value.uses()):
            if node is not cast:
                node.replace_input_with(index, out)
        value.const_value, value.dtype = TorchTensor(narrow, name=value.name), TorchTensor(narrow).dtype
        casts.append(cast)
    graph.insert_before(graph[0], casts)
    save_onnx(model, path, external=external)
    return storage


def round_state(model: nn.Module, weights: str) -> Storage:
    """Put the parameters and buffers of ``model`` in 16 bits by the same rule; tied ones stay tied."""
    rounding = Rounding(weights)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        narrow = rounding(name, tensor.detach())
        if narrow is not None:
            tensor.data = narrow
    return rounding.result()


def compare(
    storage: Storage, model: nn.Module, reference: Session, session: Session, call: Call,
    batches: Sequence[int | None], tolerance: float,
) -> tuple[Storage, list[Check]]:  # fmt: skip
    """Run the 16-bit file beside its fp32 form with rounded weights, on ``call`` and resized to the other ``batches``.

    Also measures the SQNR of its outputs to those of ``model`` on ``call``; of several runtimes the least counts.
    Raises ``ModelError`` naming an output that differs by more than ``tolerance``, of models that round their
    activations by less than ``ROUNDED_DB`` as well.
    """
    checks = []
    for place, batch in enumerate(batches):
        args, kwargs = call if place == 0 or batch is None else resized(call, batch)
        wanted, got = (tensors_in(each.module()(*args, **kwargs)) for each in (reference, session))
        worst = 0.0
        for name, a, b in zip(session.signature.outputs, got, wanted, strict=True):
            gap = difference(a, b)
            worst = max(worst, gap)
            if gap > tolerance and not (gap < math.inf and rounds(model) and sqnr([b], [a]) >= ROUNDED_DB):
                raise ModelError(
                    f"the file with {storage.weights} weights disagrees with its fp32 form with rounded weights in "
                    f"{session.runtime}: output {name!r} differs by {gap:.2g} of its largest value at batch {batch}; "
                    f"{tolerance:.2g} is allowed. No file was written. Export it in fp32."
                )
        checks.append(Check(session.runtime, batch, worst))
        if place == 0:
            with evaluating(model):
                true = tensors_in(model(*args, **kwargs))
            pairs = [(t, g) for t, g in zip(true, got, strict=True) if t.is_floating_point()]
            if pairs:
                db = sqnr([t for t, _ in pairs], [g for _, g in pairs])
                storage = replace(storage, sqnr=db if storage.sqnr is None else min(storage.sqnr, db))
    return storage, checks
