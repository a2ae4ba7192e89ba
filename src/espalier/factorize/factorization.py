"""What all factorisations share: choose layers and ranks, put rows of layers in their place, fine-tune in rounds."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from espalier.core.context import Context
from espalier.core.edits import Replace
from espalier.core.fields import Count, Epochs
from espalier.core.parametrize import Slot, attach
from espalier.core.plan import Plan
from espalier.core.selection import select
from espalier.core.structures import LowRank
from espalier.core.structures.form import StructuredWeight
from espalier.factorize.budget import Budget
from espalier.factorize.layer import Layer, layers_of, row_around
from espalier.factorize.rank import RankChoice
from espalier.factorize.split import Pair, Ranks, Split, flat, relative_error
from espalier.train import Training


@dataclass(frozen=True, kw_only=True)
class Factorization(Training):
    """Split ``layers`` at the ranks that ``rank`` gives; no layer ever becomes larger.

    ``per_round``: so many layers at a time, ``epochs`` of fine-tuning after each round; 0 takes all at once. First come
    those with the largest ``order="saving"`` or the least ``order="error"``. A convolution may compute more than before
    only with ``grow_macs``. A weight that its module reads itself (recurrent layers, attention, tied weights) is kept
    as its factors where the method makes two of a matrix. ``others="svd"``: matrices that the method does not split
    are split by their singular values, at ranks of the same rule. ``densify`` gives up a mask or codes of an earlier
    step.
    """

    weights: ClassVar[bool] = False
    """Whether the method also splits a weight whose module must stay."""

    epochs: Epochs = 0
    rank: RankChoice = field(default_factory=Budget)
    layers: tuple[str, ...] = ("*",)
    per_round: Count = 0
    order: Literal["saving", "error"] = "saving"
    grow_macs: bool = False
    others: Literal["leave", "svd"] = "leave"
    densify: bool = False

    @abstractmethod
    def split(self, layer: Layer, seen: Any, context: Context) -> Split | str:
        """How the method splits ``layer``, or the reason why it does not. ``seen``: what :meth:`look` found."""

    def look(self, model: nn.Module, layers: Sequence[Layer], context: Context) -> Any:
        """What the method must know of the data before it splits."""

    def transform(self, model: nn.Module, context: Context) -> nn.Module:
        """Choose the ranks, then split and fine-tune round by round."""
        layers = self.prepare(model, context)
        splits = self.splits(model, layers, context)
        chosen = {
            split.name: ranks
            for split, ranks in zip(splits, self.rank.choose(splits, model, context), strict=True)
            if ranks is not None
        }
        waiting = sorted((split for split in splits if split.name in chosen), key=lambda s: self._turn(s, chosen))
        rounds, rows = 0, context.record.details.setdefault("factors", [])
        while waiting:
            now = waiting[: self.per_round] if self.per_round else waiting
            for split in now:
                rows.append(self.put(model, split, chosen[split.name], context))
                context.progress("factors", len(rows), len(chosen))
            left = [split.layer for split in waiting[len(now) :]]
            rounds += 1
            self.tune(model, context, rounds)
            waiting = self.splits(model, left, context) if left and self.epochs else waiting[len(now) :]
        return model

    def prepare(self, model: nn.Module, context: Context) -> list[Layer]:
        """The layers to split; those of an earlier row, whose factors have no lower rank, only if they are named."""
        chosen = []
        for slot in select(model, self.layers, who=self.name):
            if self.layers == ("*",) and (row := row_around(model, slot)):
                context.skip(slot.name, f"it is in the row that an earlier step put in the place of {row}")
            elif self.layers == ("*",) and not self.densify and _is_low_rank(slot):
                context.skip(slot.name, "an earlier step keeps it as factors")
            else:
                chosen.append(slot)
        return layers_of(model, chosen, context, who=self.name, densify=self.densify)

    def tune(self, model: nn.Module, context: Context, number: int) -> None:
        """Fine-tune after a round."""
        self.train(model, context, name=f"round-{number}")

    def splits(self, model: nn.Module, layers: Sequence[Layer], context: Context) -> list[Split]:
        """The split of each layer on its weights as they are now; what the method does not split is said."""
        fresh = [Layer(layer.slot, layer.obstacle, layer.size) for layer in layers]
        seen = self.look(model, [layer for layer in fresh if self._takes(layer)], context)
        found = []
        for layer in fresh:
            split = self._split(layer, seen, context)
            if isinstance(split, str):
                context.skip(layer.name, split)
            else:
                found.append(split)
        return found

    def _takes(self, layer: Layer) -> bool:
        return self.weights or not layer.obstacle

    def _split(self, layer: Layer, seen: Any, context: Context) -> Split | str:
        """As the method splits it, else, if so asked for, by its singular values."""
        found: Split | str
        if self._takes(layer):
            found = self.split(layer, seen, context)
        else:
            found = f"{layer.obstacle}, and {self.name} gives layers only"
        if isinstance(found, str) and self.others == "svd" and layer.places == 1:
            return Pair(layer, flat(layer), grow_macs=self.grow_macs)
        return found

    def _turn(self, split: Split, chosen: dict[str, Ranks]) -> float:
        ranks = chosen[split.name]
        if self.order == "error":
            return relative_error(split, ranks)
        return split.cost(ranks).parameters - split.layer.dense.parameters

    def put(self, model: nn.Module, split: Split, ranks: Ranks, context: Context) -> dict[str, Any]:
        """Put the row, or the factors, in the place of the layer; plain data for the record."""
        layer, factors = split.layer, split.factors(ranks, context)
        cost = split.cost(ranks)
        row: dict[str, Any] = {
            "name": layer.name,
            "ranks": list(ranks),
            "parameters": [layer.dense.parameters, cost.parameters],
            "macs": [layer.dense.macs, cost.macs],
            "as": "factors of the weight" if layer.obstacle else "layers",
            **factors.facts,
        }
        if layer.dense.macs and cost.macs > layer.dense.macs:
            context.note(f"{layer.name}: smaller, but {cost.macs} multiplications where there were {layer.dense.macs}.")
        if factors.approximation is not None:
            tensor = layer.tensor
            row["error"] = float((factors.approximation - tensor).norm() / tensor.norm().clamp(min=1e-30))
        if layer.obstacle:
            assert isinstance(split, Pair)  # noqa: S101 - _split() lets no other by
            row["why"] = layer.obstacle
            self._keep_factors(layer, ranks[0], factors.weights)
        else:
            specs = split.specs(ranks)
            fill_row(model, layer, specs, factors.weights, factors.biases, context)
        return row

    @staticmethod
    def _keep_factors(layer: Layer, rank: int, weights: Sequence[Tensor]) -> None:
        right, left = weights
        structure = LowRank(shape=tuple(layer.slot.shape), rank=rank)
        attach(layer.slot, StructuredWeight(structure, torch.cat([left.reshape(-1), right.reshape(-1)])))


def _is_low_rank(slot: Slot) -> bool:
    return isinstance(slot.form, StructuredWeight) and isinstance(slot.form.structure, LowRank)


def fill_row(
    model: nn.Module, layer: Layer, specs: Sequence[dict[str, Any]], weights: Sequence[Tensor],
    biases: dict[int, Tensor], context: Context,
) -> None:  # fmt: skip
    """Replace the layer by a row of ``specs`` and give it its values; ``biases`` by place among those with weights."""
    device, path = layer.slot.latent.device, layer.slot.path
    with context.forked(path):  # the values that the new layers begin with are never used
        Plan((Replace(path=path, spec={"class": "Sequential", "children": list(specs)}),)).apply(model)
    row = model.get_submodule(path).to(device)
    filled: list[Any] = [module for module in row.children() if any(True for _ in module.parameters())]
    with torch.no_grad():
        for number, (module, weight) in enumerate(zip(filled, weights, strict=True)):
            if isinstance(module, nn.Embedding):
                module.weight.copy_(weight.reshape(module.weight.shape[::-1]).T)
            else:
                module.weight.copy_(weight.reshape(module.weight.shape))
            if number in biases:
                module.bias.copy_(biases[number])
