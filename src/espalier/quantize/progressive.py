r"""Progressive quantization: from many bits to few, each training begins where the one before ended.

Paper    Zhuang, Shen, Tan, Liu, Reid. Towards Effective Low-bitwidth Convolutional Neural Networks. CVPR 2018.
         arXiv:1711.00205, section 3.3
Formula  for K in K_1 > K_2 > ... > k: train with K bits for weights and activations from the network before
Departs  The epochs are shared out evenly between the stages. 32 bits are the network that comes in. Each stage starts
         from the latent weights; scales and other state of a method begin anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from espalier.core.errors import UsageError
from espalier.core.fields import Bits
from espalier.quantize.parts import Scheme, Stage, default_bits

if TYPE_CHECKING:
    from espalier.quantize.quantize import Quantize


@dataclass(frozen=True, kw_only=True)
class Progressive(Scheme):
    """``bits``: the widths on the way, falling; those that change nothing for the bits asked for are left out.

    Put it before ``two-stage`` in the list of schemes: weights then never go back to more bits.
    """

    id: ClassVar[str] = "progressive"
    bits: tuple[Bits, ...] = (16, 8, 4, 2)

    def conflicts(self) -> list[str]:
        falling = all(high > low for high, low in zip(self.bits, self.bits[1:], strict=False))
        return [] if self.bits and falling else [f"bits={self.bits} must fall, as in (16, 8, 4, 2)"]

    def stages(self, before: Sequence[Stage], method: Quantize) -> tuple[Stage, ...]:
        """Each stage once for every width, the last as it was. Raises ``UsageError`` where no width makes a stage."""
        targets = asked(method)
        found: list[Stage] = []
        for stage in before:
            last = reached(targets, stage.width)
            wanted = {reached(targets, width): width for width in self.bits if width > stage.width}
            wanted.pop(last, None)
            found += (stage.replace(name=f"{stage.name}-{width}", width=width) for width in wanted.values())
            found.append(stage)
        if len(found) == len(before):
            raise UsageError(
                f"progressive: {', '.join(map(str, self.bits))} bits make no stage before the bits asked for, or the "
                "methods cannot do them. Give it more bits, ask for fewer, or leave it out."
            )
        return tuple(found)


Target = tuple[tuple[int, ...], int]


def asked(method: Quantize) -> list[Target]:
    """The widths a part can do with the bits asked of it, for weights and activations."""
    found: list[Target] = []
    for part, bits in ((method.weights, method.bits), (method.activations, method.activation_bits)):
        if part is None:
            continue
        own = default_bits(part.widths)
        table = {*bits.values(), own} if isinstance(bits, Mapping) else {own if bits is None else bits}
        found += ((part.widths, width) for width in sorted(table))
    return found


def reached(targets: Sequence[Target], width: int) -> tuple[int, ...]:
    """The bits of each target in a stage of ``width`` bits: the next its part can do, else what was asked."""
    return tuple(next((b for b in sorted(can) if b >= max(bits, width)), bits) for can, bits in targets)
