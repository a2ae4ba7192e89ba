"""What signs can do on this processor: convolutions by XNOR and popcount beside fp32 and int8.

python benchmarks/popcount.py [--quick] [--again] [--note "pinned to two cores by taskset"]

Convolutions of ResNet-18 at batch 1, with 1 and 2 threads. All ways take the same fp32 input and give fp32: quantizing,
packing and scaling are timed with the product. They are called in turn in one process, so each finds the caches as the
others left them. A row is one layer with one number of threads; rows that are there already are kept unless --again.

popcount          espalier.deploy.popcount: signs of inputs and weights, exact; one scale per output
torch             conv2d in fp32
onnxruntime       Conv in fp32
onnxruntime int8  QuantizeLinear, QLinearConv (uint8 inputs, int8 weights, a scale per output), DequantizeLinear
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "2")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # a thread that spins after its turn would be charged to the next
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402 - the thread counts above must be set first
import torch  # noqa: E402
from benchmarks.common import RESULTS, save  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from espalier.deploy import popcount, runtimes  # noqa: E402
from espalier.deploy.installed import need  # noqa: E402
from espalier.measure import latency  # noqa: E402

Array = np.ndarray[Any, Any]
Call = Callable[[], Any]


@dataclass(frozen=True)
class Layer:
    """A convolution without bias. ``size``: of the square input."""

    inputs: int
    outputs: int
    size: int
    kernel: int
    stride: int

    @property
    def padding(self) -> int:
        return self.kernel // 2

    @property
    def macs(self) -> int:
        side = (self.size + 2 * self.padding - self.kernel) // self.stride + 1
        return self.inputs * self.outputs * self.kernel**2 * side**2

    def __str__(self) -> str:
        stride = f" stride {self.stride}" if self.stride > 1 else ""
        return f"{self.kernel}x{self.kernel}{stride}, {self.inputs} to {self.outputs} channels, {self.size}x{self.size}"


QUICK = (Layer(64, 64, 56, 3, 1), Layer(128, 128, 28, 3, 1), Layer(256, 256, 14, 3, 1), Layer(512, 512, 7, 3, 1))
FULL = (
    *QUICK, Layer(64, 128, 56, 3, 2), Layer(128, 256, 28, 3, 2), Layer(256, 512, 14, 3, 2),
    Layer(64, 128, 56, 1, 2), Layer(128, 256, 28, 1, 2), Layer(256, 512, 14, 1, 2),
)  # fmt: skip


class Run(nn.Module):
    """A call without arguments, so that everything is timed by the same loop."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call

    def forward(self) -> Any:
        return self.call()


def written(layer: Layer, weight: Array, x: Array, path: Path, *, int8: bool) -> Path:
    """An ONNX file of the layer in fp32, or in int8 with scales that fit ``weight`` and ``x``."""
    from onnx import TensorProto, helper, numpy_helper, save_model

    conv = {"kernel_shape": [layer.kernel] * 2, "strides": [layer.stride] * 2, "pads": [layer.padding] * 4}
    tensors: dict[str, Array] = {"w": weight}
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"], **conv)]
    if int8:
        steps = np.abs(weight).max((1, 2, 3)) / 127
        result = F.conv2d(*map(torch.from_numpy, (x, weight)), stride=layer.stride, padding=layer.padding)
        tensors = {
            "w": np.round(weight / steps[:, None, None, None]).astype(np.int8), "ws": steps.astype(np.float32),
            "wz": np.zeros(layer.outputs, np.int8), "xs": np.float32(np.abs(x).max() / 127), "xz": np.uint8(128),
            "ys": np.float32(float(result.abs().max()) / 127), "yz": np.uint8(128),
        }  # fmt: skip
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
            helper.make_node("QLinearConv", ["xq", "xs", "xz", "w", "ws", "wz", "ys", "yz"], ["yq"], **conv),
            helper.make_node("DequantizeLinear", ["yq", "ys", "yz"], ["y"]),
        ]
    stored = [numpy_helper.from_array(np.asarray(tensor), name) for name, tensor in tensors.items()]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "layer", ends[:1], ends[1:], stored)
    save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(path))
    return path


def calls(layer: Layer, threads: int, folder: Path) -> tuple[dict[str, Call], dict[str, Any]]:
    """The four ways by name, and what is known of them without a clock."""
    generator = np.random.default_rng(0)
    x = generator.standard_normal((1, layer.inputs, layer.size, layer.size), np.float32)
    weight = generator.standard_normal((layer.outputs, layer.inputs, layer.kernel, layer.kernel), np.float32)
    packed = popcount.pack(weight, np.abs(weight).mean((1, 2, 3)))
    stride, padding = (layer.stride,) * 2, (layer.padding,) * 2
    signs = (torch.from_numpy(np.where(values >= 0, 1, -1).astype(np.float32)) for values in (x, weight))
    wanted = F.conv2d(*signs, stride=stride, padding=padding).numpy()
    found = popcount.conv2d(x, popcount.pack(weight), stride, padding, threads=threads)
    given, filters = torch.from_numpy(x), torch.from_numpy(weight)
    sessions = {
        name: runtimes.open(
            written(layer, weight, x, folder / f"{name.replace(' ', '_')}.onnx", int8=name.endswith("int8")),
            "onnxruntime", threads=threads,
        )
        for name in ("onnxruntime", "onnxruntime int8")
    }  # fmt: skip
    exact = sessions["onnxruntime"].run([x])[0]
    error = np.square(sessions["onnxruntime int8"].run([x])[0] - exact).mean() / np.square(exact).mean()
    made: dict[str, Call] = {
        "popcount": lambda: popcount.conv2d(x, packed, stride, padding, threads=threads),
        "torch": lambda: F.conv2d(given, filters, stride=stride, padding=padding),
        "onnxruntime": lambda: sessions["onnxruntime"].run([x]),
        "onnxruntime int8": lambda: sessions["onnxruntime int8"].run([x]),
    }
    known = {
        "exact": bool(np.array_equal(found, wanted)), "int8_sqnr_db": round(float(-10 * np.log10(error)), 1),
        "weight_bytes": {"fp32": weight.nbytes, "int8": weight.size, "popcount": packed.nbytes},
    }  # fmt: skip
    return made, known


def row_of(layer: Layer, threads: int, options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        made, known = calls(layer, threads, Path(folder))
        timed = latency(
            {name: Run(call) for name, call in made.items()}, lambda run: run(), threads=threads, warmup=10,
            repeats=300 if options.quick else 2000, seconds=10 if options.quick else 60,
        )  # fmt: skip
    mine = timed["popcount"].median_ms
    measured: dict[str, Any] = {
        "ms": {name: round(t.median_ms, 4) for name, t in timed.items()},
        "p10_p90_ms": {name: [round(t.p10_ms, 4), round(t.p90_ms, 4)] for name, t in timed.items()},
        "times_faster_than": {name: round(t.median_ms / mine, 2) for name, t in timed.items() if name != "popcount"},
        "runs": timed["popcount"].runs, "macs": layer.macs, **known,
    }  # fmt: skip
    setting = {
        "threads": threads, "batch": 1, "quick": options.quick, "runtimes": runtimes.available(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(), "load_before": round(os.getloadavg()[0], 1),
        "cores_allowed": len(os.sched_getaffinity(0)), "note": options.note,
    }  # fmt: skip
    return {
        "id": "popcount", "row": f"{layer}, {threads} threads", "claimed": {}, "measured": measured,
        "setting": setting, "seed": 0,
    }  # fmt: skip


def missing(name: str, options: argparse.Namespace) -> Iterator[tuple[Layer, int]]:
    """The rows that are still to be made."""
    path = RESULTS / f"{name}.json"
    there = {row["row"] for row in json.loads(path.read_text())} if path.exists() and not options.again else set()
    for layer in QUICK if options.quick else FULL:
        for threads in (1, 2):
            if threads <= popcount.most_threads() and f"{layer}, {threads} threads" not in there:
                yield layer, threads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the four 3x3 layers, few repeats")
    parser.add_argument("--again", action="store_true", help="measure rows that are there already")
    parser.add_argument("--note", default="", help="what a reader must know about the machine, such as its other work")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    need("the comparison", "onnx", "onnxruntime")
    name = "popcount" + ("_quick" if options.quick else "")
    for layer, threads in missing(name, options):
        row = row_of(layer, threads, options)
        save(name, [row])
        print(f"{row['row']:56}", row["measured"]["ms"], row["measured"]["times_faster_than"], flush=True)


if __name__ == "__main__":
    main()
