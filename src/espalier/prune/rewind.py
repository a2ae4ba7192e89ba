r"""Rewinding: after each round of pruning the weights, or only the learning rate, go back to an earlier time.

Paper    Frankle, Carbin. The Lottery Ticket Hypothesis. ICLR 2019. arXiv:1803.03635; Frankle et al. Stabilizing the
         Lottery Ticket Hypothesis. 2019. arXiv:1903.01611 (to epoch k); Renda, Frankle, Carbin. Comparing Rewinding
         and Fine-tuning in Neural Network Pruning. ICLR 2020. arXiv:2003.02389 (learning rate)
Formula  after round r: w <- m_r * w_k;   lr: the schedule of each round runs from its beginning
Departs  A round lasts until the next jump of the sparsity schedule; jumps up to epoch k rewind nothing. Buffers, such
         as the statistics of batch norms, go back with the weights, and the optimizer forgets what it gathered.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from espalier.core.callback import Loop
from espalier.core.parametrize import slots


class Snapshot:
    """Every parameter's latent tensor, and every buffer but those of the forms, as they were at ``epoch``."""

    def __init__(self, epoch: int) -> None:
        self.epoch, self.values = epoch, dict[str, Tensor]()

    def watch(self, loop: Loop) -> None:
        """Take the values when their time has come."""
        if not self.values and loop.epoch == self.epoch:
            self.values = {name: tensor.detach().clone() for name, tensor in _state(loop.model).items()}

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Put the values back and let the optimizer forget what it gathered."""
        if not self.values:
            return
        with torch.no_grad():
            for name, tensor in _state(model).items():
                tensor.copy_(self.values[name])
        optimizer.state.clear()

    def state_dict(self) -> dict[str, Any]:
        """The values."""
        return dict(self.values)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the values back."""
        self.values = dict(state)


def _state(model: nn.Module) -> dict[str, Tensor]:
    """What training moves: masks and codes, the buffers of the forms, stay where the rounds have brought them."""
    lasting = model.state_dict(keep_vars=True).keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in lasting}
    return {name: slot.latent for name, slot in slots(model).items()} | {
        name: buffer for name, buffer in buffers.items() if "parametrizations" not in name.split(".")
    }
