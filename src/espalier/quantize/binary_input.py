r"""Binary activations: the sign of each input, with the gradient of the hard tanh.

Paper    Hubara, Courbariaux, Soudry, El-Yaniv, Bengio. Binarized Neural Networks. NeurIPS 2016. arXiv:1602.02830
Formula  a = sign(x), sign(0) = +1;   dL/dx = dL/da 1[|x| <= 1]
Departs  The sign is taken at the input of the layer, whatever comes before; the paper has batch norm there and no
         ReLU. An input that is never negative, as behind a ReLU, is left alone: every sign would be +1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from espalier.core.inputs import ActivationQuantizer, Input, Observed
from espalier.quantize.grid import straight_through


def binary_input(x: Tensor) -> Tensor:
    """+1 where ``x`` >= 0, else -1, in its dtype; backward the identity where |x| <= 1, else 0."""
    found = torch.where(x >= 0, 1.0, -1.0).to(x.dtype)
    return straight_through(x, found, x.abs() <= 1) if x.requires_grad else found


def never_negative(observed: Observed) -> str | None:
    """The reason not to take signs, where there is only one."""
    if observed.low < 0:
        return None
    return "it is never negative (ReLU before it?), so its sign says nothing; signs need batch norm, then the layer"


@dataclass(frozen=True, kw_only=True)
class BinaryInput(ActivationQuantizer):
    """Inputs as +1 and -1."""

    id: ClassVar[str] = "binary-input"
    widths: ClassVar[tuple[int, ...]] = (1,)

    def refuses(self, layer: nn.Module, observed: Observed) -> str | None:
        return never_negative(observed)

    def quantize(self, x: Tensor, a: Input) -> Tensor:
        return binary_input(x)
