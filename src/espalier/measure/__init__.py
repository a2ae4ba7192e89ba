"""What a model costs and how good it is, measured: bytes, counts, MACs, time, memory, metric.

Names are imported on first use, so that plain-data users (``compare``) need no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from espalier.measure.comparison import Comparison, compare
    from espalier.measure.memory import PeakMemory, peak_memory
    from espalier.measure.pairing import Paired, paired
    from espalier.measure.size import file_bytes, fp32_safetensors_bytes
    from espalier.measure.speed import Latency, latency
    from espalier.measure.summary import Measurement, measure, measure_all
    from espalier.measure.zeros import Zeros, run_zeros

_HOMES = {
    "Comparison": "comparison",
    "Latency": "speed",
    "Measurement": "summary",
    "Paired": "pairing",
    "PeakMemory": "memory",
    "Zeros": "zeros",
    "compare": "comparison",
    "file_bytes": "size",
    "fp32_safetensors_bytes": "size",
    "latency": "speed",
    "measure": "summary",
    "measure_all": "summary",
    "paired": "pairing",
    "peak_memory": "memory",
    "run_zeros": "zeros",
}

__all__ = ["Comparison", "Latency", "Measurement", "Paired", "PeakMemory", "Zeros", "compare", "file_bytes",
           "fp32_safetensors_bytes", "latency", "measure", "measure_all", "paired", "peak_memory",
           "run_zeros"]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'espalier.measure' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(importlib.import_module(f"espalier.measure.{_HOMES[name]}"), name)
