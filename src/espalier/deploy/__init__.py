"""Models for other runtimes: ONNX, OpenVINO and safetensors files, each run and compared after it was written."""

from __future__ import annotations

from espalier.deploy import runtimes
from espalier.deploy.check import Check, check, difference
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
    "to_int8",
    "to_onnx",
    "to_openvino",
    "to_safetensors",
]
