"""What an int8 export tells: how much is int8, how near the file is to the model, what was written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from espalier.deploy.onnx_writer import OPSET

TOLERANCE_DB = 25.0
"""Least SQNR of the runtime's outputs against our simulation: about 5 % of the signal. Kernels round sums of 8-bit
products their own way, which leaves 35 dB and more; a wrong scale or a saturating product leaves less than 15. Where
quantization itself leaves less than 28 dB, the same roundings are as loud: then the runtime must only stay within
3 dB of what the simulation loses."""


@dataclass(frozen=True)
class Coverage:
    """``layers`` of ``of_layers`` products in int8, with their ``parameters`` of ``of_parameters`` and ``macs``.

    MACs are of one sample. ``left``: each layer in fp32 and the reason. ``executed``: operators by kind as the runtime
    runs them after its own fusions, empty where the runtime is not here; ``in_float``: layers that are int8 in the file
    and that it computes in floating point all the same.
    """

    layers: int
    of_layers: int
    parameters: int
    of_parameters: int
    macs: int
    of_macs: int
    left: Mapping[str, str] = field(default_factory=dict)
    executed: Mapping[str, int] = field(default_factory=dict)
    in_float: tuple[str, ...] = ()

    @property
    def parameter_share(self) -> float:
        """0..1."""
        return self.parameters / self.of_parameters if self.of_parameters else 0.0

    @property
    def mac_share(self) -> float:
        """0..1."""
        return self.macs / self.of_macs if self.of_macs else 0.0

    def __str__(self) -> str:
        said = (
            f"{self.layers} of {self.of_layers} layers in int8: {self.parameter_share:.1%} of the parameters, "
            f"{self.mac_share:.1%} of the multiplications"
        )
        if self.executed:
            said += f"; the runtime computes {self.layers - len(self.in_float)} of them in int8"
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            said += f"; in fp32: {shown} ({reason})"
        return said

    def to_json(self) -> dict[str, Any]:
        """As plain data, with both shares."""
        return {**asdict(self), "parameter_share": self.parameter_share, "mac_share": self.mac_share}


@dataclass(frozen=True)
class Agreement:
    """SQNR in dB, over all floating-point outputs and ``batches`` calibration batches.

    ``simulation``: the file in its runtime against the same file without any fusion; None where the runtime is not
    here. ``model``: against the torch model as given. ``reference``: against the fp32 model it came from, where one
    was given.
    """

    runtime: str
    batches: int
    model: float
    simulation: float | None = None
    reference: float | None = None


@dataclass(frozen=True)
class Int8Exported:
    """What was written, what of it is int8, and how far it is from the model; measured on the file.

    ``files``: every file with its length in bytes. ``bits``: weight bits of each int8 layer. ``processor``: a sentence.
    """

    path: Path
    kind: str
    runtime: str
    files: Mapping[str, int]
    coverage: Coverage
    agreement: Agreement
    free_batch: bool
    bits: Mapping[str, int]
    processor: str
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    opset: int = OPSET
    notes: tuple[str, ...] = field(default=())

    @property
    def bytes(self) -> int:
        """Length of all files together."""
        return sum(self.files.values())

    @property
    def sqnr(self) -> float:
        """dB of the file's outputs against the model."""
        return self.agreement.model

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {**asdict(self), "path": str(self.path), "bytes": self.bytes, "coverage": self.coverage.to_json()}
