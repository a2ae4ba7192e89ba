r"""BS-Fixed: two constants per layer in place of 0 and 1 or -1 and +1, chosen by the sign of the weight.

Paper    none; the constants of least squared error are those of Otsu. A threshold selection method from gray-level
         histograms. IEEE Transactions on Systems, Man and Cybernetics 9(1), 1979
Formula  w^ = C1 where w < t, else C2;   dL/dC1 = sum of dL/dw^ over w < t, dL/dC2 = sum over w >= t, dL/dw = dL/dw^;
         start: t = 0, C1 = <w | w < 0>, C2 = <w | w >= 0>
Departs  ``init=otsu`` starts from the t that splits the weights with least squared error and the means of both sides,
         and t stays; ``init=glorot`` from t = 0 and -+sqrt(1.5 / (n_in + n_out)). The constants are learned by the
         optimizer of the weights in units of their mean magnitude at the start, so that a learning rate does to them
         what it would from 1: in front of a batch norm their gradient is the larger the smaller they are.
         ``constants=frozen`` learns them for the first share ``warmup`` of each training and then fixes them, while
         weights go on changing sides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from espalier.core.callback import Loop
from espalier.core.fields import Fraction
from espalier.core.quantized import Weight, WeightQuantizer
from espalier.quantize.binary import glorot


def otsu(values: Tensor) -> float:
    """The threshold between two classes of ``values`` (1-D, not empty) with the least squared error to their means.

    Halfway between the neighbours it parts; the value itself where all are equal.
    """
    ordered = values.double().sort().values
    count = len(ordered)
    below = torch.arange(1, count, device=ordered.device)
    left = ordered.cumsum(0)[:-1]
    gain = left.square() / below + (ordered.sum() - left).square() / (count - below)
    gain = torch.where(ordered[1:] > ordered[:-1], gain, -1)
    if not len(gain) or float(gain.max()) < 0:
        return float(ordered[0])
    cut = int(gain.argmax())
    return float((ordered[cut] + ordered[cut + 1]) / 2)


def means(values: Tensor, threshold: float) -> tuple[float, float]:
    """The means of ``values`` (1-D) below and from ``threshold`` on; an empty side mirrors the other one."""
    low, high = values[values < threshold], values[values >= threshold]
    if not len(low):
        high_mean = float(high.mean()) if len(high) else 0.0
        return -high_mean, high_mean
    return float(low.mean()), float(high.mean()) if len(high) else -float(low.mean())


@dataclass(frozen=True, kw_only=True)
class BSFixed(WeightQuantizer):
    """``constants``: learned to the end, or frozen after the share ``warmup`` of the steps."""

    id: ClassVar[str] = "bs-fixed"
    widths: ClassVar[tuple[int, ...]] = (1,)
    constants: Literal["trained", "frozen"] = "trained"
    init: Literal["sign", "otsu", "glorot"] = "sign"
    warmup: Fraction = 0.1

    def start(self, weight: Tensor, bits: int, axis: int | None, kept: Tensor | None) -> dict[str, Tensor]:
        values = (weight.reshape(-1) if kept is None else weight[kept]).double()
        threshold = otsu(values) if self.init == "otsu" and len(values) else 0.0
        size = glorot(weight.shape)
        low, high = (-size, size) if self.init == "glorot" else means(values, threshold)
        unit = (abs(low) + abs(high)) / 2 or 1.0
        named = {"c1": low / unit, "c2": high / unit, "unit": unit, "threshold": threshold}
        tensors = {name: torch.tensor(v, dtype=torch.float32, device=weight.device) for name, v in named.items()}
        return {name: nn.Parameter(tensor) if name in ("c1", "c2") else tensor for name, tensor in tensors.items()}

    def quantize(self, w: Weight) -> Tensor:
        upper = w.latent.detach() >= w.state["threshold"]
        unit = w.state["unit"]
        chosen = torch.where(upper, w.state["c2"] * unit, w.state["c1"] * unit).to(w.latent.dtype)
        return chosen + (w.latent - w.latent.detach())

    def before_step(self, w: Weight, loop: Loop) -> None:
        if self.constants == "frozen" and loop.step >= self.warmup * loop.steps:
            w.state["c1"].grad = w.state["c2"].grad = None
