"""Int8 files: QuantizeLinear and DequantizeLinear from our own scales, under the rules of a runtime."""

from __future__ import annotations

from espalier.deploy.int8.export import to_int8
from espalier.deploy.int8.observers import MinMax, Observer, ObserverFactory
from espalier.deploy.int8.processor import Processor, this_processor
from espalier.deploy.int8.profile import PROFILES, RuntimeProfile, profile_of
from espalier.deploy.int8.result import Agreement, Coverage, Int8Exported

__all__ = [
    "PROFILES",
    "Agreement",
    "Coverage",
    "Int8Exported",
    "MinMax",
    "Observer",
    "ObserverFactory",
    "Processor",
    "RuntimeProfile",
    "profile_of",
    "this_processor",
    "to_int8",
]
