"""The forms of quantized gradients and the bits each can do: what weight gradients and errors share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from espalier.core.fields import Positive
from espalier.quantize.dorefa_gradient import dorefa_gradient
from espalier.quantize.parts import GradientQuantizer
from espalier.quantize.sign_gradient import sign_gradient
from espalier.quantize.terngrad import terngrad

WIDTHS: Mapping[str, tuple[int, ...]] = {
    "auto": tuple(range(1, 17)),
    "dorefa": tuple(range(1, 17)),
    "terngrad": (2,),
    "sign": (1,),
    "wage": tuple(range(2, 17)),
}


@dataclass(frozen=True, kw_only=True)
class FormedGradient(GradientQuantizer):
    """``form``: how; ``auto`` goes by the bits: ``one_bit`` for 1, TernGrad for 2, else DoReFa.

    ``clip``: TernGrad's bound in standard deviations. ``scaled``: signs keep the mean size.
    """

    one_bit: ClassVar[str] = "sign"
    form: Literal["auto", "dorefa", "terngrad", "sign", "wage"] = "auto"
    clip: Positive | None = 2.5
    scaled: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "widths", WIDTHS[self.form])  # this form's, where the class says what any form can do

    def chosen(self, bits: int) -> str:
        """The form that is used for ``bits`` bits."""
        return self.form if self.form != "auto" else {1: self.one_bit, 2: "terngrad"}.get(bits, "dorefa")

    def quantize(self, gradient: Tensor, bits: int, generator: torch.Generator, *, samples: bool) -> Tensor:
        if not gradient.numel():
            return gradient
        match self.chosen(bits):
            case "sign":
                return sign_gradient(gradient, samples=samples, scaled=self.scaled)
            case "terngrad":
                return terngrad(gradient, generator, samples=samples, clip=self.clip)
            case "wage":
                return self.wage(gradient, bits, generator, samples=samples)
            case _:
                return dorefa_gradient(gradient, bits, generator, samples=samples)

    @abstractmethod
    def wage(self, gradient: Tensor, bits: int, generator: torch.Generator, *, samples: bool) -> Tensor:
        """WAGE's own rule, which differs for errors and for gradients of weights."""
