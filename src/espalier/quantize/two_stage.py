r"""Two-stage optimisation: first the weights are quantized and trained, then the activations as well.

Paper    Zhuang, Shen, Tan, Liu, Reid. Towards Effective Low-bitwidth Convolutional Neural Networks. CVPR 2018.
         arXiv:1711.00205, section 3.2
Formula  stage 1: train Q_w(w) with activations in floating point;   stage 2: train Q_w(w), Q_a(x) from there
Departs  The epochs are shared out evenly between the stages. After ``progressive``, the weights of a later width train
         under the activations of the width before, from which the network comes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from espalier.core.errors import UsageError
from espalier.quantize.parts import Scheme, Stage

if TYPE_CHECKING:
    from espalier.quantize.quantize import Quantize


@dataclass(frozen=True, kw_only=True)
class TwoStage(Scheme):
    """Weights first. After ``progressive`` in the list of schemes, every width has its two stages."""

    id: ClassVar[str] = "two-stage"

    def stages(self, before: Sequence[Stage], method: Quantize) -> tuple[Stage, ...]:
        """Each stage twice, first without activations. Raises ``UsageError`` where only one of both is quantized."""
        if method.weights is None or method.activations is None:
            raise UsageError("two-stage quantizes weights first and then activations: give both, or leave it out.")
        found: list[Stage] = []
        for stage in before:
            if stage.activations:
                found += (
                    stage.replace(name=f"{stage.name}-weights", activations=False),
                    stage.replace(name=f"{stage.name}-activations"),
                )
            else:
                found.append(stage)
        return tuple(found)
