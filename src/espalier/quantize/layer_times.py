"""How long each layer takes alone, in fp32 and in int8: the table that a budget in milliseconds is divided by.

The way of Yao, Dong, Zheng, Gholami et al. HAWQ-V3. ICML 2021. arXiv:2011.10680 (section 3.4): one kernel at a time is
measured on the machine, and the network is taken for the sum of its kernels. On x86 the kernels are fp32 and int8.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from espalier.core.context import Context
from espalier.core.errors import ModelError, NumericError
from espalier.core.model import copy_model, evaluating
from espalier.core.parametrize import plain
from espalier.core.task import capture_call
from espalier.deploy import open as open_file
from espalier.deploy import to_int8, to_onnx
from espalier.deploy.check import Call, resized
from espalier.measure.speed import latency
from espalier.quantize.layer_options import KERNEL_BITS
from espalier.train.looking import batches, looking

SECONDS = 2.0
"""Of timing at most for one kind of layer."""
RUNS = 100


@dataclass(frozen=True)
class LayerTime:
    """Milliseconds in fp32 and in int8, with the rounding of input and result; ``why``: it has no int8 form.

    What any call of the runtime takes is not in them: a network is one call.
    """

    fp32: float
    int8: float = float("inf")
    why: str = ""

    def of(self, bits: int) -> float:
        """Of a weight in so many bits: the int8 kernel up to 8, else fp32."""
        return self.int8 if bits <= KERNEL_BITS else self.fp32


@dataclass(frozen=True)
class Finished:
    """Milliseconds of the whole network in fp32 and in int8; ``keep_fp32``: what the int8 file leaves in fp32."""

    fp32: float
    int8: float
    keep_fp32: tuple[str, ...]


@dataclass
class Timer:
    """Writes files for ``runtime`` and times them, in turn, with ``threads`` threads, at batch 1."""

    runtime: str
    threads: int
    known: dict[tuple[Any, ...], LayerTime] = field(default_factory=dict)

    def whole(self, model: nn.Module, context: Context) -> float:
        """Milliseconds of ``model`` in fp32. Raises ``NeedError`` where the runtime is not installed."""
        bare = plain(copy_model(model)).cpu().eval()
        call = one_call(bare, context)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "fp32.onnx"
            to_onnx(bare, call[0] or call[1], file, runtime=self.runtime)
            return self.timed({"fp32": file}, call)["fp32"]

    def layers(self, model: nn.Module, paths: Collection[str], context: Context) -> dict[str, LayerTime]:
        """Path -> times of that layer of ``model``, all its calls together; equal ones on equal inputs timed once.

        Layers that are not called with one tensor are left out.
        """
        bare = plain(copy_model(model)).cpu().eval()
        call = self.call
        inputs = _inputs(bare, paths, one_call(bare, context))
        found = {}
        for number, (path, given) in enumerate(inputs.items()):
            context.progress("layers timed", number, len(inputs))
            each = [self._layer(bare.get_submodule(path), x) for x in given]
            why = next((time.why for time in each if time.why), "")
            found[path] = LayerTime(
                sum(max(0.0, time.fp32 - call) for time in each), sum(max(0.0, time.int8 - call) for time in each), why
            )
        return found

    def finished(
        self, original: nn.Module, quantized: nn.Module, paths: Collection[str], context: Context, count: int
    ) -> Finished:
        """Time ``original`` in fp32 beside ``quantized`` in int8, where only the layers ``paths`` have int8 weights.

        What else the export would make int8 is what a first file of one batch has: its names are those it knows.
        """
        bare = plain(copy_model(original)).cpu().eval()
        call = one_call(bare, context)
        example = call[0] or call[1]
        with tempfile.TemporaryDirectory() as folder, looking(quantized, context, grad=False):
            files = {"fp32": Path(folder) / "fp32.onnx", "int8": Path(folder) / "int8.onnx"}
            to_onnx(bare, example, files["fp32"], runtime=self.runtime)
            data = [
                args or kwargs
                for batch in batches(quantized, context, count, "calibration")
                for args, kwargs in (capture_call(context.data, quantized, batch),)
            ]
            first = to_int8(quantized, example, data[:1], files["int8"], runtime=self.runtime)
            left = tuple(name for name in first.bits if name not in paths)
            to_int8(quantized, example, data, files["int8"], runtime=self.runtime, keep_fp32=left)
            found = self.timed(files, call)
        return Finished(found["fp32"], found["int8"], left)

    @cached_property
    def call(self) -> float:
        """Milliseconds of a call that computes next to nothing."""
        x = torch.zeros(1, 1)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "call.onnx"
            to_onnx(nn.ReLU(), (x,), file, runtime=self.runtime)
            return self.timed({"call": file}, ((x,), {}))["call"]

    def _layer(self, layer: nn.Module, x: Tensor) -> LayerTime:
        key = (type(layer), repr(layer), tuple(x.shape))
        if key not in self.known:
            self.known[key] = self._measured(layer, x)
        return self.known[key]

    def _measured(self, layer: nn.Module, x: Tensor) -> LayerTime:
        with tempfile.TemporaryDirectory() as folder:
            files = {"fp32": Path(folder) / "fp32.onnx", "int8": Path(folder) / "int8.onnx"}
            to_onnx(layer, (x,), files["fp32"], runtime=self.runtime)
            try:
                to_int8(layer, (x,), [(x,)], files["int8"], runtime=self.runtime)
            except (ModelError, NumericError) as error:
                return LayerTime(self.timed({"fp32": files["fp32"]}, ((x,), {}))["fp32"], why=str(error))
            found = self.timed(files, ((x,), {}))
            return LayerTime(found["fp32"], found["int8"])

    def timed(self, files: Mapping[str, Path], call: Call) -> dict[str, float]:
        """The median milliseconds of each file on one call."""
        args, kwargs = call
        opened = {name: open_file(file, self.runtime, threads=self.threads).module() for name, file in files.items()}
        rows = latency(
            opened, lambda m: m(*args, **kwargs), threads=self.threads, repeats=RUNS, batch=1, seconds=SECONDS
        )
        return {name: row.median_ms for name, row in rows.items()}


def one_call(model: nn.Module, context: Context) -> Call:
    """The task's example at batch 1."""
    return resized(capture_call(context.data, model, context.data.example()), 1)


def _inputs(model: nn.Module, paths: Collection[str], call: Call) -> dict[str, list[Tensor]]:
    """Path -> what comes into the layer, one tensor a call; layers that are not called so are left out."""
    found: dict[str, list[Tensor]] = {}

    def look(path: str, _: nn.Module, args: tuple[Any, ...]) -> None:
        if len(args) == 1 and isinstance(args[0], Tensor):
            found.setdefault(path, []).append(args[0].detach().clone())

    with ExitStack() as stack, evaluating(model), torch.no_grad():
        for path in paths:
            stack.callback(model.get_submodule(path).register_forward_pre_hook(partial(look, path)).remove)
        model(*call[0], **call[1])
    return {path: found[path] for path in paths if path in found}
