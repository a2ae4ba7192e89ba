r"""Parts of a filter: kernels, rows, columns and stripes of convolutions.

Paper    Meng, Cheng, Li, Luo, Guo, Lu, Sun. Pruning Filter in Filter. NeurIPS 2020. arXiv:2009.14410 (stripe)
Formula  filter f of shape (in, height, width);   kernel: f[i];   stripe: f[:, y, x];   row: f[:, y, :];
         column: f[:, :, x]
Departs  Ranked by any criterion, the paper learns a skeleton of stripes; masks only. Row and column are defined like
         the stripe: through all inputs of one filter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from espalier.core.parametrize import Slot
from espalier.prune.grouping import convolution
from espalier.prune.parts import Pattern, Reduction
from espalier.prune.weights import reduce

Part = Literal["kernel", "row", "column", "stripe"]


def inside(part: Part, ndim: int) -> tuple[int, ...]:
    """The dimensions of a weight ``(out, in, *kernel)`` that lie inside one group."""
    if part == "kernel":
        return tuple(range(2, ndim))
    return {"stripe": (1,), "row": (1, 3), "column": (1, 2)}[part]


@dataclass(frozen=True, kw_only=True)
class KernelParts(Pattern):
    """One ``part`` of every filter is a group."""

    id: ClassVar[str] = "kernel-parts"
    part: Part = "stripe"

    def unfit(self, slot: Slot) -> str | None:
        """Why the slot has no kernels, whatever its shape; None where it has."""
        return None if convolution(slot) else "it has no kernel: kernel parts belong to convolutions"

    def refuses(self, shape: torch.Size) -> str | None:
        if len(shape) < 3:
            return "it has no kernel: kernel parts belong to convolutions"
        if self.part in ("row", "column") and len(shape) != 4:
            return f"its kernel has {len(shape) - 2} dimensions; a {self.part} needs two"
        if self.part != "kernel" and shape.numel() == shape[0] * shape[1]:
            return f"its kernel is a single position, so a {self.part} would be the whole filter"
        return None

    def pool(self, scores: Tensor, reduction: Reduction) -> Tensor:
        return reduce(scores, inside(self.part, scores.ndim), reduction)

    def spread(self, removed: Tensor, shape: torch.Size) -> Tensor:
        for dim in inside(self.part, len(shape)):
            removed = removed.unsqueeze(dim)
        return removed.expand(shape).clone()
