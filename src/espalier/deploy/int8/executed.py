"""What a runtime really runs: its own graph after fusions, asked for and matched with the layers of the file."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from espalier.deploy.installed import need, quiet

ONNX_INT8 = frozenset({
    "QLinearConv", "QLinearMatMul", "QGemm", "MatMulInteger", "MatMulIntegerToFloat", "ConvInteger",
    "DynamicQuantizeMatMul",
})  # fmt: skip
"""onnxruntime's operators that multiply 8-bit numbers."""


@dataclass
class Executed:
    """``kinds``: operators by kind; ``int8``: names of the file's operators that were computed in 8 bits."""

    kinds: Counter[str] = field(default_factory=Counter)
    int8: set[str] = field(default_factory=set)

    def split(self, names: Iterable[str]) -> tuple[list[str], list[str]]:
        """Of the products ``names``: those in int8 and those in floating point."""
        low = [name for name in names if name in self.int8]
        return low, [name for name in names if name not in self.int8]


def in_onnxruntime(file: Path, folder: Path) -> Executed:
    """What onnxruntime makes of ``file``; ``folder`` is scratch space."""
    ort, onnx = need("counting what onnxruntime runs", "onnxruntime", "onnx")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    out = folder / "optimized.onnx"
    options.optimized_model_filepath = str(out)
    with quiet():
        ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        nodes = list(onnx.load(str(out), load_external_data=False).graph.node)
    for written in folder.glob(f"{out.name}*"):
        written.unlink()
    found = Executed(Counter(str(node.op_type) for node in nodes))
    found.int8 = {re.sub(r"_token_\d+$", "", str(node.name)) for node in nodes if node.op_type in ONNX_INT8}
    return found


def in_openvino(file: Path, folder: Path) -> Executed:  # noqa: ARG001 - one signature for all runtimes
    """What OpenVINO compiles of ``file``: kinds with their precision, such as ``Convolution u8``."""
    found = Executed()
    for said in _operations(file):
        kind, precision = _text(said, "layerType"), _text(said, "runtimePrecision")
        if kind in ("Input", "Output", "Const", ""):
            continue
        found.kinds[f"{kind} {precision}"] += 1
        if precision in ("i8", "u8"):
            names = _text(said, "originalLayersNames").split(",")
            found.int8 |= {re.sub(r"/WithoutBiases(/.*)?$", "", name) for name in names}
    return found


def _operations(file: Path) -> Iterator[Mapping[str, Any]]:
    (ov,) = need("counting what OpenVINO runs", "openvino")
    with quiet():
        core = ov.Core()
        config = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": "1", "INFERENCE_PRECISION_HINT": "f32"}
        compiled = core.compile_model(core.read_model(str(file)), "CPU", config)
        for operation in compiled.get_runtime_model().get_ops():
            yield operation.get_rt_info()


def _text(said: Mapping[str, Any], key: str) -> str:
    return str(said[key].astype(str)) if key in said else ""


ASK: Mapping[str, Callable[[Path, Path], Executed]] = {"onnxruntime": in_onnxruntime, "openvino": in_openvino}
"""Runtime -> what it runs of a file."""
