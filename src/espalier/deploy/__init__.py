"""Models for other runtimes, in ONNX, OpenVINO, ExecuTorch and safetensors files, each run and compared."""

from __future__ import annotations

from espalier.deploy import runtimes
from espalier.deploy.check import Check, check, difference
from espalier.deploy.executorch_writer import to_executorch
from espalier.deploy.export import Exported, to_onnx, to_openvino, to_safetensors
from espalier.deploy.int8 import Int8Exported, to_int8
from espalier.deploy.runtimes import Deployed, Session, available, open  # noqa: A004 - read as deploy.open
from espalier.deploy.signature import Signature

__all__ = [
    "Check",
    "Deployed",
    "Exported",
    "Int8Exported",
    "Session",
    "Signature",
    "available",
    "check",
    "difference",
    "open",
    "runtimes",
    "to_executorch",
    "to_int8",
    "to_onnx",
    "to_openvino",
    "to_safetensors",
]
