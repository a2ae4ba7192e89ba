r"""Dropout: hidden units are left out at random while the model trains; put in, set, or lowered after pruning.

Paper    Srivastava, Hinton, Krizhevsky, Sutskever, Salakhutdinov. Dropout: A Simple Way to Prevent Neural Networks from
         Overfitting. JMLR 15, 2014; Han, Pool, Tran, Dally. Learning both Weights and Connections for Efficient Neural
         Networks. NeurIPS 2015. arXiv:1506.02626 (section 3.2)
Formula  z = W (r * y) / (1 - p) + b,   r_j 1 with probability 1 - p, else 0;
         rescale: p_r = p_o sqrt(C_r / C_o), C the connections of the layer before, now and in the original
Departs  What stays is scaled up in training, not the weights down in use; the mean is the same. Only layers that read
         hidden units get a dropout unless they are named; the paper also drops inputs.
"""

from __future__ import annotations

import fnmatch
import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from espalier.core.context import Context
from espalier.core.edits import Edit, Replace, SetAttribute
from espalier.core.errors import UnknownNameError, did_you_mean
from espalier.core.fields import Fraction
from espalier.core.insert import Insert, inserted
from espalier.core.method import Technique
from espalier.core.parametrize import slots
from espalier.core.plan import Plan, applied, register_edit
from espalier.train.calls import calls, layers_named, meets
from espalier.train.dropout_schedule import Dropping, dropouts

RATE = 0.5
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
CONNECTED = (
    nn.Linear, *CONVOLUTIONS, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.RNNBase,
    nn.MultiheadAttention, nn.Bilinear,
)  # fmt: skip
"""Layers with connections to count."""


def rescaled(rate: float, now: int, before: int) -> float:
    """Han et al., eq. 2: the rate for ``now`` of ``before`` connections."""
    return rate * math.sqrt(now / before)


@register_edit
@dataclass(frozen=True, kw_only=True)
class LowerRate(SetAttribute):
    """Set a rate that was lowered from ``first``, so that the next lowering starts there too."""

    kind: ClassVar[str] = "lower-rate"
    first: float


@dataclass(frozen=True, kw_only=True)
class Dropout(Technique):
    """``mode``: ``insert`` puts dropouts before layers, ``set`` gives those there are a rate, ``rescale`` lowers it.

    ``layers``: which layers get one (``*``: the linear ones that read hidden units), or patterns for the paths of the
    dropout layers to change. ``rate``: None is 0.5 to insert; to rescale, the rate there was before it was first
    lowered.
    """

    id: ClassVar[str] = "dropout"
    mode: Literal["insert", "set", "rescale"] = "insert"
    rate: Fraction | None = None
    layers: tuple[str, ...] = ("*",)

    @property
    def needs(self) -> frozenset[str]:
        """A batch that shows what runs after what."""
        return frozenset() if self.mode == "set" else frozenset({"train"})

    def conflicts(self) -> list[str]:
        """What is set must be said."""
        return ["mode=set needs a rate"] if self.mode == "set" and self.rate is None else []

    def transform(self, model: nn.Module, context: Context) -> nn.Module:
        """The model with its dropout changed; weights untouched."""
        change = {"insert": self._inserted, "set": self._set, "rescale": self._lowered}[self.mode]
        edits = change(model, context)
        context.record.details["dropout"] = [edit.summary() for edit in edits]
        return Plan(tuple(edits)).apply(model)

    def _inserted(self, model: nn.Module, context: Context) -> list[Edit]:
        named = self.layers != ("*",)
        chosen = layers_named(model, self.layers, (nn.Linear, *(CONVOLUTIONS if named else ())), context, self.name)
        there = dropouts(model)
        seen = calls(model, context, {**chosen, **{path: place.layer for path, place in there.items()}})
        dropped = [tensor for path in there for tensor in seen.outputs.get(path, [])]
        rate = RATE if self.rate is None else self.rate
        found: list[Edit] = []
        for path, layer in chosen.items():
            entering = seen.inputs.get(path, [])
            reason = ""
            if inserted(layer, "before") is not None or any(meets(x, dropped) for x in entering):
                reason = "a dropout stands before it; mode=set changes its rate"
            elif not entering:
                reason = "its forward is not called, so nothing can be put before it"
            elif not named and any(meets(x, seen.given) for x in entering):
                reason = "it reads the model's inputs; name it in layers to drop of these"
            if reason:
                context.skip(path or "(model)", reason)
            else:
                found.append(Insert(path=path, side="before", spec={"class": "Dropout", "args": {"p": float(rate)}}))
        if not chosen:
            context.skip("(model)", "it has no linear layer to put a dropout before")
        return found

    def _set(self, model: nn.Module, context: Context) -> list[Edit]:
        assert self.rate is not None  # noqa: S101 - see conflicts
        places = _named(dropouts(model), self.layers, self.name, context)
        made = [_change(path, place, self.rate, context) for path, place in places.items()]
        return [edit for edit in made if edit is not None]

    def _lowered(self, model: nn.Module, context: Context) -> list[Edit]:
        places = _named(dropouts(model), self.layers, self.name, context)
        layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, CONNECTED)}
        order = calls(model, context, {**layers, **{p: place.layer for p, place in places.items()}}).order
        now, original = _connections(model, pruned=True), context.models.get("original", model)
        full = {**_connections(model, pruned=False), **_connections(original, pruned=False)}
        found = []
        for path, place in places.items():
            ran = order[: order.index(path)] if path in order else []
            before = path if path in layers else next((p for p in reversed(ran) if p in layers), None)
            if before is None or not now.get(before):
                context.skip(path, "no layer with connections runs before it")
            elif now[before] >= full[before]:
                context.skip(path, f"{before} has all its connections")
            else:
                first = self._first(path, place, model)
                edit = _change(path, place, rescaled(first, now[before], full[before]), context, first)
                found += [] if edit is None else [edit]
        return found

    def _first(self, path: str, place: Dropping, model: nn.Module) -> float:
        """The rate to lower: that given, else that before the last unbroken row of lowerings, which the plan tells."""
        rate = place.rate
        for edit in applied(model).edits:
            if isinstance(edit, SetAttribute) and edit.path == path and edit.name == place.attribute:
                rate = edit.first if isinstance(edit, LowerRate) else place.rate
        return rate if self.rate is None else self.rate


def _named(
    places: dict[str, Dropping], patterns: tuple[str, ...], who: str, context: Context
) -> dict[str, Dropping]:  # fmt: skip
    if not places:
        context.skip("(model)", "it has no dropout layer; mode=insert puts some in")
    found = {}
    for pattern in patterns:
        chosen = {path: place for path, place in places.items() if fnmatch.fnmatchcase(path, pattern)}
        if not chosen and pattern != "*":
            raise UnknownNameError(f"{who}: no dropout layer answers to {pattern!r}.{did_you_mean(pattern, places)}")
        found.update(chosen)
    return found


def _change(path: str, place: Dropping, rate: float, context: Context, first: float | None = None) -> Edit | None:
    """The edit that gives a layer its rate, lowered from ``first``; None where it has it, or cannot be given it."""
    now = getattr(place.layer, place.attribute)
    if now == rate:
        context.skip(path, f"its rate is {rate:g} already")
        return None
    if type(now) is float and first is not None:
        return LowerRate(path=path, name=place.attribute, value=float(rate), first=float(first))
    if type(now) is float:
        return SetAttribute(path=path, name=place.attribute, value=float(rate))
    if type(place.layer) is nn.Dropout:  # built with a whole number, which a plan may not make a fraction
        return Replace(path=path, spec={"class": "Dropout", "args": {"p": float(rate), "inplace": place.layer.inplace}})
    context.skip(path, f"its rate is the whole number {now!r}; build it with {float(now)!r}")
    return None


def _connections(model: nn.Module, *, pruned: bool) -> dict[str, int]:
    """Path of each layer -> the entries of its weights, without those that are zero where ``pruned``."""
    found: dict[str, int] = {}
    for slot in slots(model).values():
        value = slot.value()
        if value.ndim >= 2:
            for path in {path for path, _, _ in slot.owners}:
                found[path] = found.get(path, 0) + (int(value.count_nonzero()) if pruned else value.numel())
    return found
