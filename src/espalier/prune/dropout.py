r"""Dropout that prunes: what training drops, or may drop, without harm is removed.

Paper    Gomez et al. 2019, arXiv:1905.13678 (targeted); Molchanov, Ashukha, Vetrov 2017, arXiv:1701.05369
         (variational): see the rules
Formula  w' = w with the noise of ``rule`` for a share ``until`` of the steps;   then what the rule names is zero
Departs  The last share of the run trains what is left without noise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from espalier.core.context import Context
from espalier.core.selection import Selection
from espalier.prune.dropout_rule import DropoutRule
from espalier.prune.sparsifier import Sparsifier, SparsifyingTraining
from espalier.prune.targeted_dropout import TargetedDropout


@dataclass(frozen=True, kw_only=True)
class Dropout(SparsifyingTraining):
    """Trains with the noise of ``rule`` on the weights, then fixes its zeros."""

    id: ClassVar[str] = "dropout"
    rule: DropoutRule = field(default_factory=TargetedDropout)

    @property
    def outputs(self) -> bool:
        return self.rule.outputs

    def start(self, model: nn.Module, selection: Selection, context: Context) -> Sparsifier:
        return self.rule.start(model, selection, context)
