"""A module that learns beside the model: an optimizer of the same kind, at the same point of the schedule."""

from __future__ import annotations

from typing import Any

from torch import nn

from espalier.core.callback import Loop
from espalier.train import Training


class Learner:
    """``module``, its optimizer, and what a resume needs of both. Its gradients are clipped on their own."""

    def __init__(self, module: nn.Module, method: Training) -> None:
        self.module, self.method = module, method
        self.optimizer = method.optimizer.over(module, method.lr)

    def step(self, loop: Loop) -> None:
        """One step along the gradients that are there, which are forgotten then."""
        group = loop.optimizer.param_groups[0]
        for own in self.optimizer.param_groups:
            own["lr"] = self.method.lr * group["lr"] / group["initial_lr"]
        if self.method.clip is not None:
            nn.utils.clip_grad_norm_(self.module.parameters(), self.method.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """Values and optimizer."""
        return {"module": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
