r"""Ranks by one budget for all layers: what loses least per parameter, or multiplication, saved goes first.

Paper    Kim, Khan, Kyung. Efficient Neural Network Compression. CVPR 2019. arXiv:1811.12781
Formula  max prod_l e_l(r_l), e the share of the squared norm that is kept,  with  sum_l C_l(r_l) <= keep * sum_l C_l:
         of all layers the next step down of the least -d(log e) / dC goes, on the lower convex hull of each layer's
         points (C, -log e), the layer as it is among them
Departs  The paper searches among sampled configurations of ranks, and measures how accuracy follows from e. Of a layer
         with several ranks e is the product over its unfoldings. No layer gives up more than ``least`` allows, or a
         table whose rows have much in common would be given up for the rest. The last step goes only as far down as
         the budget asks.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from espalier.core.context import Context
from espalier.core.fields import Fraction
from espalier.factorize.rank import RankChoice, worthwhile
from espalier.factorize.split import Ranks, Split, path

FREE = 1e-9
"""What is lost for nothing: ranks that the weight does not have."""
TINY = 1e-30
"""What counts as kept where nothing is."""
Point = tuple[float, float, Ranks | None]
"""What a layer costs, what it loses, and at which ranks; None for the layer as it is."""


def hull(points: Sequence[Point]) -> list[int]:
    """Places of the points (falling cost, rising loss) on the lower convex hull, the first and the last among them."""
    kept: list[int] = []
    for place, (cost, loss, _) in enumerate(points):
        while len(kept) > 1:
            (c0, l0, _), (c1, l1, _) = points[kept[-2]], points[kept[-1]]
            if (l1 - l0) * (c0 - cost) < (loss - l0) * (c0 - c1):
                break
            kept.pop()
        kept.append(place)
    return kept


def allot(layers: Sequence[Sequence[Point]], budget: float) -> list[int]:
    """The place each layer comes to: down the hulls, the cheapest step first, until all cost ``budget`` at most."""
    hulls = [hull(points) for points in layers]
    places = [0] * len(layers)
    total = sum(points[0][0] for points in layers)
    queue: list[tuple[float, int, int]] = []

    def offer(layer: int, step: int) -> None:
        if step + 1 < len(hulls[layer]):
            (c0, l0, _), (c1, l1, _) = (layers[layer][hulls[layer][s]] for s in (step, step + 1))
            heapq.heappush(queue, ((l1 - l0) / (c0 - c1), layer, step))

    for layer in range(len(layers)):
        offer(layer, 0)
    while total > budget and queue:
        _, layer, step = heapq.heappop(queue)
        points, goal = layers[layer], hulls[layer][step + 1]
        spare = budget - total + points[places[layer]][0]
        stop = next((p for p in range(places[layer] + 1, goal + 1) if points[p][0] <= spare), goal)
        total += points[stop][0] - points[places[layer]][0]
        places[layer] = stop
        offer(layer, step + 1)
    for layer, points in enumerate(layers):
        while places[layer] + 1 < len(points) and points[places[layer] + 1][1] <= points[places[layer]][1] + FREE:
            places[layer] += 1
    return places


def log_kept(split: Split, ranks: Ranks) -> float:
    """Logarithm of the share of the squared norm that is kept: the product over the unfoldings, times ``1 - floor``."""
    kept = [1 - split.floor, *(float(share[:rank].sum()) for share, rank in zip(split.losses, ranks, strict=True))]
    return sum(math.log(max(share, TINY)) for share in kept)


@dataclass(frozen=True, kw_only=True)
class Budget(RankChoice):
    """``keep``: share of the parameters (``of="macs"``: of the multiplications) that all chosen layers keep together.

    ``least``: share of ``keep`` that each layer keeps of its own, unless less loses nothing. ``error``: ``relative``
    counts what each layer loses against its own norm, ``absolute`` the squared norm that is lost as it is: of the
    weight, of the weight times the scales of its inputs, or of the outputs, whatever the method splits.
    """

    id: ClassVar[str] = "budget"
    keep: Fraction = 0.5
    of: Literal["parameters", "macs"] = "parameters"
    error: Literal["relative", "absolute"] = "relative"
    least: Fraction = 0.5

    def choose(self, splits: Sequence[Split], model: nn.Module, context: Context) -> list[Ranks | None]:
        """All layers together."""
        budget = self.keep * sum(getattr(split.layer.dense, self.of) for split in splits)
        layers = []
        for done, split in enumerate(splits, 1):
            layers.append(self._points(split, context))
            context.progress("ranks", done, len(splits))
        places = allot(layers, budget)
        reached = sum(points[place][0] for points, place in zip(layers, places, strict=True))
        if reached > budget:
            context.note(f"the lowest ranks keep {reached:.0f} {self.of} in all, more than the {budget:.0f} asked for.")
        found = [points[place][2] for points, place in zip(layers, places, strict=True)]
        for split, ranks, points in zip(splits, found, layers, strict=True):
            if ranks is None and len(points) > 1:
                context.skip(split.name, "the budget is met without it")
        return found

    def _points(self, split: Split, context: Context) -> list[Point]:
        """The layer as it is, then ever lower ranks, each cheaper than the one before."""
        points: list[Point] = [(getattr(split.layer.dense, self.of), 0.0, None)]
        if not worthwhile(split, context):
            return points
        scale = float(split.unfoldings[0].values.double().square().sum()) if self.error == "absolute" else 1.0
        least = self.least * self.keep * points[0][0]
        for step in path(split):
            cost = getattr(step.cost, self.of)
            if cost >= points[-1][0] or not split.gains(step.ranks):
                continue
            loss = step.error * scale if self.error == "absolute" else -log_kept(split, step.ranks)
            if cost < least and len(points) > 1 and loss > points[-1][1] + FREE:
                break
            points.append((cost, loss, step.ranks))
        if len(points) == 1:
            context.skip(split.name, "no rank lowers its multiplications")
        return points
