"""The training form of a structured weight: the latent tensor is the flat list of the numbers it is made from."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from espalier.core.forms import Form, dense_representation, dtype_name, register_form
from espalier.core.quantized import tabled
from espalier.core.representation import Representation
from espalier.core.structures.stored import Structured
from espalier.core.structures.structure import Structure, structure_of


@register_form
class StructuredWeight(Form):
    """``structure.dense(structure.split(latent))``; gradients reach the numbers through it.

    In training the weight is computed by the faster rule, which may differ in the last bit.
    """

    kind = "structured"
    phase = "codes"
    flat = True

    def __init__(self, structure: Structure, numbers: Tensor | None = None) -> None:
        """``numbers``: (count,), to start from."""
        super().__init__()
        self.structure = structure
        self._initial = numbers

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The numbers to start from; asked once, when the form is attached."""
        initial, self._initial = self._initial, None
        return weight.new_zeros(self.structure.count) if initial is None else initial.to(weight)

    def forward(self, latent: Tensor) -> Tensor:
        rule = self.structure.fast if self.training else self.structure.dense
        made: Tensor = rule(self.structure.split(latent))
        return made.to(latent.dtype)

    def in_use(self, latent: Tensor) -> Tensor:
        made: Tensor = self.structure.dense(self.structure.split(latent))
        return made.to(latent.dtype)

    def freeze(self, latent: Tensor) -> Representation:
        parts = {name: _smaller(part) for name, part in self.structure.split(latent.detach()).items()}
        return Structured(
            shape=self.structure.shape, dtype=dtype_name(latent.dtype), structure=self.structure, parts=parts
        )

    @property
    def cuts_latent(self) -> bool:
        return False

    def spec(self) -> dict[str, Any]:
        return {"structure": self.structure.kind, "options": self.structure.options()}

    @classmethod
    def blank(cls, spec: dict[str, Any], weight: Tensor) -> StructuredWeight:
        return cls(structure_of(spec["structure"], tuple(weight.shape), spec["options"]))


def _smaller(numbers: Tensor) -> Representation:
    """The numbers as they are, or as a table where they share few values."""
    plain, table = dense_representation(numbers), tabled(numbers)
    return table if table.bits() < plain.bits() else plain
