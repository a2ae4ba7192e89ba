"""What the gradient quantizers share: the parts that are scaled on their own, and the noise."""

from __future__ import annotations

import torch
from torch import Tensor


def rows(gradient: Tensor, *, samples: bool) -> Tensor:
    """``gradient`` in float32 or more, (samples, n): one row for each sample, or one in all."""
    wide = gradient if gradient.dtype == torch.float64 else gradient.float()
    return wide.reshape(len(wide), -1) if samples and wide.ndim > 1 else wide.reshape(1, -1)


def noise(flat: Tensor, generator: torch.Generator) -> Tensor:
    """Numbers from [0, 1), drawn on the CPU, shaped like ``flat``."""
    return torch.rand(flat.shape, generator=generator, dtype=flat.dtype).to(flat.device)
