"""Mean and variance of each channel over many batches, exactly."""

from __future__ import annotations

from torch import Tensor, nn

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
"""Layers with running statistics."""


class Moments:
    """Count, mean and summed squared deviation per channel, merged batch by batch in float64 (Chan et al. 1979)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | None = None
        self.squares: Tensor | None = None

    def add(self, values: Tensor) -> None:
        """Merge ``values`` ``(n, channels, ...)``."""
        flat = values.detach().double().transpose(0, 1).flatten(1)
        count, mean = flat.shape[1], flat.mean(dim=1)
        squares = (flat - mean.unsqueeze(1)).square().sum(dim=1)
        if self.mean is None or self.squares is None:
            self.count, self.mean, self.squares = count, mean, squares
            return
        total, apart = self.count + count, mean - self.mean
        self.squares = self.squares + squares + apart.square() * (self.count * count / total)
        self.mean = self.mean + apart * (count / total)
        self.count = total

    def put_into(self, norm: nn.Module) -> bool:
        """Make them the running statistics of ``norm``, the variance unbiased; False where they are of one value."""
        if self.mean is None or self.squares is None or self.count < 2:
            return False
        norm.running_mean.copy_(self.mean)  # type: ignore[operator]
        norm.running_var.copy_(self.squares / (self.count - 1))  # type: ignore[operator]
        return True
