"""What every method of this room does that makes a weight of fewer numbers: choose, project, attach, fine-tune."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from espalier.core.context import Context
from espalier.core.errors import NumericError
from espalier.core.fields import Epochs, Fraction
from espalier.core.parametrize import Slot, attach, require_phase
from espalier.core.selection import select
from espalier.core.structures import Structure
from espalier.core.structures.form import StructuredWeight
from espalier.train import Training

S = TypeVar("S", bound=Structure)


@dataclass(frozen=True, kw_only=True)
class Sharing(Training):
    """Each weight of ``layers`` becomes the nearest one of a structure; with ``epochs`` its numbers are fine-tuned.

    ``keep``: share of each weight that is left as numbers, at most. ``densify``: give up masks and codes of earlier
    steps. Nothing is left out unless ``layers`` does so: most users would leave out the output layer, and the first
    one, which are small and lose most. Weights of recurrent layers, attention and embeddings are matrices like others.
    """

    keeps_zero_rows: ClassVar[bool] = False
    """Whether a row of zeros stays one, as padding must."""
    epochs: Epochs = 0
    keep: Fraction = 0.25
    layers: tuple[str, ...] = ("*",)
    densify: bool = False

    @abstractmethod
    def structure(self, slot: Slot, context: Context) -> Structure | str:
        """What the weight becomes, or why it is left alone."""

    @abstractmethod
    def project(self, structure: Any, weight: Tensor, context: Context) -> dict[str, Tensor]:
        """The numbers, by part, whose weight is nearest to ``weight`` (float64, on the CPU)."""

    def transform(self, model: nn.Module, context: Context) -> nn.Module:
        """Project, attach, fine-tune."""
        chosen = list(select(model, self.layers, who=self.name))
        for slot in chosen:
            require_phase(slot, ("dense",), self.name, densify=self.densify)
        for done, slot in enumerate(chosen, 1):
            self._share(slot, context)
            context.progress("layers", done, len(chosen))
        self.train(model, context)
        return model

    def _share(self, slot: Slot, context: Context) -> None:
        structure = obstacle(slot, self.keeps_zero_rows) or self.structure(slot, context)
        if isinstance(structure, str):
            context.skip(slot.name, structure)
            return
        weight = finite(slot, self.name)
        if structure.count >= weight.numel():
            context.skip(slot.name, f"{structure.count} numbers are no fewer than its {weight.numel()} weights")
            return
        with torch.no_grad():
            parts = self.project(structure, weight, context)
        flat = torch.cat([parts[name].reshape(-1) for name in structure.part_shapes()]).to(slot.latent)
        attach(slot, StructuredWeight(structure, flat))
        error = float((slot.value().cpu().double() - weight).norm() / weight.norm().clamp_min(1e-300))
        context.record.details.setdefault("layers", {})[slot.name] = {
            "structure": structure.kind, "numbers": structure.count, "weights": weight.numel(), "relative_error": error,
        }  # fmt: skip

    def largest(self, made: Callable[[int], S], highest: int, slot: Slot, context: Context) -> S:
        """``made(n)`` for the largest n up to ``highest`` that keeps so few numbers; ``made(1)`` where none does."""
        allowed = self.keep * slot.latent.numel()
        rules = map(made, range(highest, 0, -1))
        found = next((rule for rule in rules if rule.count <= allowed), None) or made(1)
        self.tell(slot, found, context)
        return found

    def tell(self, slot: Slot, structure: Structure, context: Context) -> None:
        """Note where a structure has more numbers than asked for."""
        weights = slot.latent.numel()
        if self.keep * weights < structure.count < weights:
            context.note(
                f"{slot.name}: the smallest {structure.kind} weight keeps {structure.count} numbers of {weights}, more "
                f"than the share of {self.keep:.4g}."
            )


def obstacle(slot: Slot, keeps_zero_rows: bool) -> str:
    """Why a weight cannot be made from fewer numbers; empty where it can."""
    for _, module, _ in slot.owners:
        if not isinstance(module, nn.Embedding | nn.EmbeddingBag):
            continue
        if module.max_norm:
            return "its table has max_norm, which changes it in place"
        if module.padding_idx is not None and not keeps_zero_rows:
            return f"its row {module.padding_idx} is padding, which would not stay as it is"
    return ""


def finite(slot: Slot, who: str) -> Tensor:
    """The weight in float64 on the CPU. Raises ``NumericError`` for NaN and infinity."""
    weight = slot.value().cpu().double()
    if not bool(torch.isfinite(weight).all()):
        raise NumericError(f"{slot.name} holds NaN or infinity; {who} has nothing to come near to.")
    return weight
