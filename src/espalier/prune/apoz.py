r"""APoZ: the units that are silent most of the time go.

Paper    Hu, Peng, Tai, Tang. Network Trimming: A Data-Driven Neuron Pruning Approach towards Efficient Deep
         Architectures. 2016. arXiv:1607.03250
Formula  APoZ_u = share of the samples and positions with a_u = 0;   s_u = 1 - APoZ_u
Departs  Low scores go first, so the score is the complement. ``tolerance`` counts |a| <= tolerance as zero, for
         activations that never are (the paper has ReLU: 0). The share removed is given; the paper takes
         the units whose APoZ lies more than a standard deviation above the layer's mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from espalier.core.context import Context
from espalier.core.fields import Batches, Tolerance
from espalier.core.selection import Selection
from espalier.prune.parts import Criterion, Scores
from espalier.prune.responses import averages


def share_active(activation: Tensor, tolerance: float = 0.0) -> Tensor:
    """(samples, units, *positions) -> (samples, units): share of the positions with |a| > tolerance."""
    active = (activation.abs() > tolerance).double()
    return active.flatten(2).mean(2) if active.ndim > 2 else active


@dataclass(frozen=True, kw_only=True)
class AveragePercentageOfZeros(Criterion):
    """Score of an output unit = 1 - its average percentage of zeros over ``batches`` training batches."""

    id: ClassVar[str] = "apoz"
    of = "units"
    tolerance: Tolerance = 0.0
    batches: Batches = 8

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"train"})

    def scores(self, model: nn.Module, selection: Selection, context: Context) -> Scores:
        return averages(
            model,
            selection,
            context,
            lambda a, _: share_active(a, self.tolerance),
            count=self.batches,
            label="activations",
        )
