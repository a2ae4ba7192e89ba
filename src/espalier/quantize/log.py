r"""LogQuant: the exponent is rounded, so that products become shifts.

Paper    Miyashita, Lee, Murmann. Convolutional Neural Networks using Logarithmic Data Representation. 2016.
         arXiv:1603.01025
Formula  LogQuant(x) = 0 for x = 0, else sign(x) B^e,   e = clip(round(log_B |x|), FSR - 2^b, FSR),   B = 2 or sqrt(2);
         what reaches the lower end is 0, the upper end stands for FSR - 1
Departs  FSR is taken once, from the weights when the step starts or from the calibration: ``max`` puts
         round(log_B max|x|) + 1, so that the largest value is not clipped; ``error`` seeks that of least squared error
         at or below it, which 2 and 3 bits need. With a sign one of the b bits is the sign. Gradients pass straight
         through, for inputs only where they are not clipped; the paper also rounds gradients, which is a part of its
         own here (gradients, errors).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from espalier.core.inputs import ActivationQuantizer, Input, Observed
from espalier.core.quantized import Weight, WeightQuantizer
from espalier.quantize.grid import TINY, straight_through
from espalier.quantize.level_sets import kept_values, look_up, with_signs

Base = Literal["2", "sqrt2"]
Fsr = Literal["max", "error"]
SOUGHT = 6  # octaves below the largest value


def log_levels(last: int, bits: int, base: Base, *, signed: bool) -> tuple[Tensor, Tensor]:
    """``(levels, thresholds)``, rising: zero and 2^b - 1 powers of the base, ``last`` (FSR - 1) the highest.

    ``signed``: zero and 2^(b-1) - 1 powers of each sign. What float32 cannot hold is zero.
    """
    count = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    exponents = torch.arange(last - count + 1, last + 1, dtype=torch.float64)
    per_octave = octave(base)
    levels = F.pad(torch.exp2(exponents / per_octave), (1, 0))
    between = torch.exp2((exponents - 0.5) / per_octave)
    if signed:
        levels, between = with_signs(levels), torch.cat([-between.flip(0), between])
    return levels.float(), between.float()


def octave(base: Base) -> int:
    """Powers of the base in a doubling."""
    return 1 if base == "2" else 2


def fitting(values: Tensor, bits: int, base: Base, fsr: Fsr, *, signed: bool) -> tuple[Tensor, Tensor]:
    """``(levels, thresholds)`` for ``values`` (1-D float32), all zero or not."""
    largest = float(values.abs().max())
    top = round(octave(base) * math.log2(largest)) if largest > TINY else 0
    tried = [
        log_levels(last, bits, base, signed=signed)
        for last in range(top, top - (SOUGHT * octave(base) if fsr == "error" else 0) - 1, -1)
    ]
    found = min(tried, key=lambda pair: float((look_up(values, *(t.to(values.device) for t in pair)) - values).norm()))
    return found[0].to(values.device), found[1].to(values.device)


@dataclass(frozen=True, kw_only=True)
class Log(WeightQuantizer):
    """Weights as signed powers of ``base``; ``sqrt2`` has two levels in each octave, and half the range."""

    id: ClassVar[str] = "log"
    widths: ClassVar[tuple[int, ...]] = tuple(range(2, 9))
    base: Base = "2"
    fsr: Fsr = "max"

    def start(self, weight: Tensor, bits: int, axis: int | None, kept: Tensor | None) -> dict[str, Tensor]:
        levels, thresholds = fitting(kept_values(weight, kept), bits, self.base, self.fsr, signed=True)
        return {"levels": levels, "thresholds": thresholds}

    def quantize(self, w: Weight) -> Tensor:
        return straight_through(w.latent, look_up(w.latent.detach(), w.state["levels"], w.state["thresholds"]))


@dataclass(frozen=True, kw_only=True)
class LogInput(ActivationQuantizer):
    """Inputs as powers of ``base``, unsigned where calibration saw no value below zero."""

    id: ClassVar[str] = "log-input"
    widths: ClassVar[tuple[int, ...]] = tuple(range(2, 9))
    base: Base = "2"
    fsr: Fsr = "max"

    def start(self, observed: Observed, bits: int, *, signed: bool) -> dict[str, Tensor]:
        values = torch.cat([observed.sample.float().reshape(-1), observed.extremes.float().reshape(-1)])
        levels, thresholds = fitting(values if signed else values.relu(), bits, self.base, self.fsr, signed=signed)
        return {"levels": levels, "thresholds": thresholds}

    def quantize(self, x: Tensor, a: Input) -> Tensor:
        found = look_up(x, a.state["levels"], a.state["thresholds"])
        if not a.training:
            return found
        end = a.state["levels"][-1] * (2**0.5 if self.base == "2" else 2**0.25)
        return straight_through(x, found, (x.detach() <= end) & (x.detach() >= (-end if a.signed else 0)))
