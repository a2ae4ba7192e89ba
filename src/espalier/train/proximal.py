"""Proximal steps: a penalty without a derivative at zero is applied after the optimizer's step, and gives exact zeros.

The step size follows the optimizer, so that a strength means the same with each: the optimum of loss + penalty is a
fixed point. Gradient descent moves along -lr / (1 - momentum) g in the long run; Adam moves each weight by its own
lr / (sqrt(v) + eps), and the proximal step is taken in that metric (Yun, Lozano, Yang. ProxGen. NeurIPS 2021). That
step has no bound for a weight that has had no gradient yet, such as an embedding of a token not seen so far, and would
erase it: sqrt(v) is taken to be a tenth of its mean over the weights that have had one, where it is less.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FLOOR = 0.1
"""Share of the mean of sqrt(v), below which no weight's own is taken to be."""


def soft_threshold(weight: Tensor, threshold: Tensor | float) -> Tensor:
    """The proximal map of ``threshold * |w|``: ``sign(w) max(|w| - threshold, 0)``, any shape."""
    return weight.sign() * (weight.abs() - threshold).clamp_min(0)


def step_sizes(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Tensor | float:
    """How far one unit of gradient moves each entry of ``parameter``: a number, or a tensor of its shape.

    The learning rate for a tensor that has had no gradient at all.
    """
    for group in optimizer.param_groups:
        if any(parameter is member for member in group["params"]):
            state: dict[str, Any] = optimizer.state.get(parameter, {})
            if "exp_avg_sq" in state:
                root = (state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))).sqrt()
                floor = FLOOR * root.sum() / (root > 0).sum().clamp_min(1)
                return torch.where(floor > 0, group["lr"] / (root.clamp_min(floor) + group["eps"]), group["lr"])
            return float(group["lr"]) / max(1 - float(group.get("momentum") or 0), 1e-3)
    return 0.0
