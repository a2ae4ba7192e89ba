"""Plan: a change of structure as data. Printable, diffable, JSON both ways, replayed on a freshly built model.

A plan is a list of edits from a closed set; ``Plan.apply`` replays it.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

import torch
from torch import nn

from espalier.core.crop import Crop
from espalier.core.edits import Edit, Remove, Replace, SetAttribute, Tie
from espalier.core.errors import Corrupt, EspalierWarning
from espalier.core.insert import Insert
from espalier.core.keep import Keep, cut_along, forget_misfits
from espalier.core.merge import Merge
from espalier.core.method import fits
from espalier.core.norms import Fold, Normalise
from espalier.core.parametrize import Slot, slots

EDITS: dict[str, type[Edit]] = {
    cls.kind: cls for cls in (Keep, Replace, Remove, Insert, Fold, Merge, Normalise, Tie, Crop, SetAttribute)
}
"""Kinds of edits by name; rooms to the right add theirs with :func:`register_edit`."""


def register_edit(cls: type[Edit]) -> type[Edit]:
    """Let plans hold a further kind of edit."""
    EDITS[cls.kind] = cls
    return cls


_HISTORY, _BASE = "_espalier_plan", "_espalier_base"


@dataclass(frozen=True)
class Plan:
    """Edits in order."""

    edits: tuple[Edit, ...] = ()

    def apply(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> nn.Module:
        """Replay the edits on ``model`` in place and return it, or the module an edit put in its place.

        ``optimizer``: its state follows the parameters (momentum is cut as they are); those that are gone leave it,
        new ones join its first group. State that cannot be cut is dropped for its parameter, with a warning that
        comes before anything is changed. The edits are remembered: see :func:`applied`.
        """
        history, start = applied(model) + self, base(model)
        known = slots(model)
        if optimizer is not None:
            self._warn_of_lost_state(known, optimizer)
        for edit in self.edits:
            if isinstance(edit, Keep):  # the parameters stay the same objects
                slot = known.get(edit.tensor)
                shape = slot.latent.shape if slot is not None else torch.Size()
                edit.apply_among(known, model)
                if optimizer is not None and slot is not None and cut_along(slot):
                    edit.carry(optimizer, slot.latent, shape)
                if optimizer is not None and slot is not None:
                    forget_misfits(slot, optimizer)
                continue
            model = edit.apply(model) or model
            if isinstance(edit, SetAttribute):
                continue
            before, known = known, slots(model)
            if optimizer is not None:
                _carry(optimizer, before, known)
        if self.edits:
            model.__dict__[_HISTORY] = history
        return rebase(model, start)

    def _warn_of_lost_state(self, known: Mapping[str, Slot], optimizer: torch.optim.Optimizer) -> None:
        """One warning for all state that :meth:`Keep.carry` will drop; cuts leave every other dimension as it is."""
        lost: dict[str, str] = {}
        for edit in self.edits:
            slot = known.get(edit.tensor) if isinstance(edit, Keep) else None
            if not isinstance(edit, Keep) or slot is None or not cut_along(slot):
                continue
            if not -slot.latent.ndim <= edit.dim < slot.latent.ndim:
                continue  # applying it refuses that
            ways = edit.ways(optimizer, slot.latent, slot.latent.shape)
            keys = [str(key) for key, way in ways.items() if way == "lost"]
            if keys:
                lost[edit.tensor] = ", ".join(keys)
        if lost:
            shown = "; ".join(f"{name}: {keys}" for name, keys in list(lost.items())[:5])
            more = f" and {len(lost) - 5} more parameters" if len(lost) > 5 else ""
            warnings.warn(
                f"{type(optimizer).__name__} keeps state that cannot be cut along with its parameter ({shown}{more}); "
                "its state of these parameters is dropped and starts afresh. State of the parameter's own sizes, or 1, "
                "follows a cut: SGD and AdamW keep theirs.",
                EspalierWarning,
                stacklevel=3,
            )

    def __add__(self, other: Plan) -> Plan:
        return Plan(self.edits + other.edits)

    def __str__(self) -> str:
        return "\n".join(edit.summary() for edit in self.edits)

    def to_json(self) -> list[dict[str, Any]]:
        """Plain data."""
        return [edit.to_json() for edit in self.edits]

    @classmethod
    def from_json(cls, data: Any) -> Plan:
        """Read untrusted plain data; raises ``Corrupt`` for anything that is no plan."""
        if not isinstance(data, list) or not all(isinstance(item, Mapping) for item in data):
            raise Corrupt(f"a plan is a list of edits; got {type(data).__name__}.")
        edits = []
        for item in data:
            edit = EDITS.get(str(item.get("edit")))
            given = edit.arguments(item) if edit is not None else {}
            hints = {f.name: get_type_hints(edit)[f.name] for f in dataclasses.fields(edit)} if edit is not None else {}
            if edit is None or set(given) != set(hints) or not all(fits(hints[name], v) for name, v in given.items()):
                raise Corrupt(
                    f"a plan holds the edit {str(dict(item))[:300]}; allowed kinds: {', '.join(EDITS)}, with all "
                    "their fields."
                )
            edits.append(edit(**given))
        return cls(tuple(edits))


def applied(model: nn.Module) -> Plan:
    """Every edit that made ``model`` from the one its owner built, in order; copies remember it."""
    history = model.__dict__.get(_HISTORY)
    return history if isinstance(history, Plan) else Plan()


def base(model: nn.Module) -> str:
    """The name of the model that :func:`applied` starts from: ``original``, or that of a student."""
    return str(model.__dict__.get(_BASE, "original"))


def rebase(model: nn.Module, name: str) -> nn.Module:
    """Say that ``model`` is made from the model called ``name`` (see ``Context.models``); copies remember it."""
    model.__dict__[_BASE] = name
    return model


def _carry(optimizer: torch.optim.Optimizer, before: Mapping[str, Slot], after: Mapping[str, Slot]) -> None:
    """Bring an optimizer from the parameters before an edit to those of the same names after it."""
    names = {id(slot.latent): name for name, slot in before.items()}
    for group in optimizer.param_groups:
        kept = []
        for parameter in group["params"]:
            name = names.get(id(parameter))
            state = optimizer.state.pop(parameter, None)
            now = parameter if name is None else after[name].latent if name in after else None
            if now is not None:
                kept.append(now)
                if state:
                    optimizer.state[now] = state
        group["params"] = kept
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, slot in after.items():
        if name not in before and slot.latent.requires_grad and id(slot.latent) not in held:
            optimizer.param_groups[0]["params"].append(slot.latent)
