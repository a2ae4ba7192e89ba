r"""AdamW: adaptive steps with decoupled weight decay.

Paper    Loshchilov, Hutter. Decoupled Weight Decay Regularization. ICLR 2019. arXiv:1711.05101
Formula  m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;  w <- (1 - lr weight_decay) w - lr m^ / (sqrt(v^) + 1e-8)
Departs  The decay is multiplied by the learning rate (torch's form), not by the schedule alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from espalier.core.fields import Momentum, Penalty
from espalier.train.optimizer import Optimizer, Parameters


@dataclass(frozen=True, kw_only=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay; ``m^``, ``v^`` are the moments corrected for their start at zero."""

    id: ClassVar[str] = "adamw"
    betas: tuple[Momentum, Momentum] = (0.9, 0.999)
    weight_decay: Penalty = 0.01

    def conflicts(self) -> list[str]:
        """A moment that forgets nothing never moves."""
        return ["betas must be below 1"] if max(self.betas) >= 1 else []

    def create(self, parameters: Parameters, lr: float, **backend: Any) -> torch.optim.Optimizer:
        """``torch.optim.AdamW``."""
        return torch.optim.AdamW(parameters, lr, betas=self.betas, weight_decay=self.weight_decay, **backend)
