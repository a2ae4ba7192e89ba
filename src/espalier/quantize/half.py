r"""Short floating-point formats: fp16, bf16, and fp8 with one scale for the tensor.

Paper    Micikevicius et al. FP8 Formats for Deep Learning. arXiv:2209.05433 (e4m3, e5m2); Micikevicius et al. 2018,
         arXiv:1710.03740 (fp16, with a copy in full precision that is trained); Kalamkar et al. 2019, arXiv:1905.12322
         (bf16)
Formula  w^ = cast(w), to nearest, ties to even;   fp8: w^ = s cast(w / s),   s = max|w| / 448 (e4m3) or 57344 (e5m2)
Departs  What the format cannot hold becomes its largest value, not infinity. The scale of weights follows them at every
         step, that of inputs stays as calibrated. Products and sums are computed in the model's own dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from espalier.core.forms import dense_representation, dtype_name, to_numpy
from espalier.core.inputs import ActivationQuantizer, Input, Observed
from espalier.core.quantized import Weight, WeightQuantizer, tabled
from espalier.core.representation import Dense, Masked, Representation
from espalier.quantize.grid import TINY, straight_through

Format = Literal["fp16", "bf16", "e4m3", "e5m2"]

FORMATS: dict[str, torch.dtype] = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
}


def width(kind: Format) -> int:
    """The bits of a format."""
    return FORMATS[kind].itemsize * 8


def cast(values: Tensor, kind: Format) -> Tensor:
    """``values`` rounded to the format, in their own dtype; too large ones become the largest. 0 has no sign."""
    top = torch.finfo(FORMATS[kind]).max
    return values.float().clamp(-top, top).to(FORMATS[kind]).float().to(values.dtype) + 0.0


def scale_for(largest: Tensor, kind: Format) -> Tensor:
    """The float32 scale by which ``largest`` becomes the largest value of an fp8 format; 1 for the others."""
    if width(kind) == 16:
        return torch.ones_like(largest, dtype=torch.float32)
    scale = largest.float() / torch.finfo(FORMATS[kind]).max
    return torch.where(scale > TINY, scale, 1.0)


def scaled_cast(values: Tensor, scale: Tensor, kind: Format) -> Tensor:
    """``scale * cast(values / scale)`` in float32, then in the dtype of ``values``."""
    if width(kind) == 16:
        return cast(values, kind)
    return (cast(values.float() / scale, kind) * scale).to(values.dtype)


def levels(kind: Format) -> tuple[Tensor, Tensor]:
    """All finite values of an fp8 format in rising order, and where one ends and the next begins (float32).

    ``levels[bucketize(x, bounds)]`` is ``cast(x)``: a value halfway goes to the even neighbour.
    """
    values = torch.arange(256, dtype=torch.uint8).view(FORMATS[kind]).float()
    values = torch.tensor(sorted(set(values[values.isfinite()].tolist())))
    bounds = (values[1:] + values[:-1]) / 2
    upwards = cast(bounds, kind) == values[1:]
    return values, torch.where(upwards, torch.nextafter(bounds, torch.tensor(-torch.inf)), bounds)


@dataclass(frozen=True, kw_only=True)
class Half(WeightQuantizer):
    """Weights in ``format``: 16 bits for fp16 and bf16, 8 for e4m3 and e5m2."""

    id: ClassVar[str] = "half"
    widths: ClassVar[tuple[int, ...]] = (8, 16)
    format: Format = "fp16"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "widths", (width(self.format),))  # a format has one width

    def quantize(self, w: Weight) -> Tensor:
        latent = w.latent.detach()
        seen = latent if w.kept is None else torch.where(w.kept, latent, 0)
        return straight_through(w.latent, scaled_cast(latent, scale_for(seen.abs().max(), self.format), self.format))

    def freeze(self, w: Weight, values: Tensor) -> Representation:
        if width(self.format) == 8:
            return tabled(values)
        stored = dtype_name(FORMATS[self.format])
        if w.kept is None:
            return dense_representation(values).narrowed(stored)
        inner: Dense = dense_representation(values[w.kept]).narrowed(stored)
        return Masked(shape=tuple(values.shape), dtype=dtype_name(values.dtype), mask=to_numpy(w.kept), inner=inner)


@dataclass(frozen=True, kw_only=True)
class HalfInput(ActivationQuantizer):
    """Inputs through ``format`` and back."""

    id: ClassVar[str] = "half-input"
    widths: ClassVar[tuple[int, ...]] = (8, 16)
    format: Format = "fp16"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "widths", (width(self.format),))

    def start(self, observed: Observed, bits: int, *, signed: bool) -> dict[str, Tensor]:
        if bits == 16:
            return {}
        values, bounds = levels(self.format)
        largest = torch.tensor(max(-observed.low, observed.high, 0.0))
        return {"scale": scale_for(largest, self.format), "levels": values, "bounds": bounds}

    def quantize(self, x: Tensor, a: Input) -> Tensor:
        if a.training:
            scale = a.state["scale"] if a.bits == 8 else torch.ones(())
            inside = x.detach().float().abs() <= torch.finfo(FORMATS[self.format]).max * scale
            return straight_through(x, scaled_cast(x.detach(), scale, self.format), inside)
        if a.bits == 8:
            scale, table, bounds = (a.state[name] for name in ("scale", "levels", "bounds"))
            return (table[torch.bucketize(x.float() / scale, bounds)] * scale).to(x.dtype)
        top = torch.finfo(FORMATS[self.format]).max
        return torch.clamp(x, -top, top).to(FORMATS[self.format]).to(x.dtype)
