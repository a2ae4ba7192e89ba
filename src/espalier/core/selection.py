"""Selection: which parameters a technique works on. By name pattern, type or position; a value with a count."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from espalier.core.errors import EspalierWarning, UnknownNameError, did_you_mean
from espalier.core.parametrize import Slot, slots

LAYER_TYPES: dict[str, type[nn.Module]] = {
    cls.__name__: cls
    for cls in (
        nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
        nn.Embedding, nn.RNN, nn.LSTM, nn.GRU, nn.MultiheadAttention, nn.Bilinear,
        nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm,
    )
}  # fmt: skip
"""What ``type:NAME`` may say; subclasses match too. Any other class matches by its class name."""


def matches(pattern: str, slot: Slot, position: int) -> bool:
    """Whether a parameter answers to ``type:Conv2d``, ``#0`` (position, ``#-1`` the last) or a name with ``*``."""
    if pattern.startswith("type:"):
        name = pattern[5:]
        known = LAYER_TYPES.get(name)
        classes = [cls.__name__ for cls in type(slot.module).__mro__]
        return isinstance(slot.module, known) if known else name in classes
    if pattern.startswith("#"):
        return str(position) == pattern[1:]
    names = {part for name in slot.names for part in (name, name.rpartition(".")[0])}
    return pattern in names or any(fnmatch.fnmatchcase(name, pattern) for name in names)


@dataclass(frozen=True)
class Selection:
    """The chosen parameters, by name and in model order."""

    slots: tuple[Slot, ...]

    @property
    def count(self) -> int:
        """How many parameters were chosen."""
        return len(self.slots)

    @property
    def names(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(slot.name for slot in self.slots)

    def __iter__(self) -> Iterator[Slot]:
        return iter(self.slots)

    def where(self, keep: Callable[[Slot], bool]) -> Selection:
        """The chosen parameters for which ``keep`` holds."""
        return Selection(tuple(slot for slot in self.slots if keep(slot)))


def weights(model: nn.Module) -> Selection:
    """Every floating-point parameter with two dimensions or more: what compression works on by default."""
    return Selection(
        tuple(slot for slot in slots(model).values() if slot.latent.is_floating_point() and len(slot.shape) >= 2)
    )


def select(model: nn.Module, patterns: tuple[str, ...], *, who: str = "the selection") -> Selection:
    """The weights that answer to any of ``patterns``; all of them for ``("*",)``.

    A pattern that matches nothing raises ``UnknownNameError`` with close names; the default warns.
    """
    everything = weights(model)
    if patterns == ("*",):
        if not everything.count:
            warnings.warn(
                f"{who}: {type(model).__name__} has no weight of two dimensions or more.", EspalierWarning, stacklevel=2
            )
        return everything
    chosen: dict[str, Slot] = {}
    for pattern in patterns:
        found = _matching(everything, pattern)
        if not found:
            raise UnknownNameError(f"{who}: no weight answers to {pattern!r}.{_hint(pattern, everything)}")
        chosen.update((slot.name, slot) for slot in found)
    return everything.where(lambda slot: slot.name in chosen)


def by_pattern(
    model: nn.Module, selection: Selection, table: Mapping[str, Any], default: Any, *, who: str
) -> dict[str, Any]:
    """Parameter name -> value of the last pattern in ``table`` that it answers to, else ``default``."""
    everything = weights(model)
    values = dict.fromkeys(selection.names, default)
    for pattern, value in table.items():
        found = _matching(everything, pattern)
        if not found:
            raise UnknownNameError(f"{who}: no weight answers to {pattern!r}.{_hint(pattern, everything)}")
        values.update((slot.name, value) for slot in found if slot.name in values)
    return values


def _matching(everything: Selection, pattern: str) -> list[Slot]:
    count = everything.count
    if pattern.startswith("#-") and pattern[2:].isdigit():
        pattern = f"#{count - int(pattern[2:])}"
    return [slot for position, slot in enumerate(everything) if matches(pattern, slot, position)]


def _hint(pattern: str, everything: Selection) -> str:
    if pattern.startswith("#"):
        return f" There are {everything.count} weights: #0 is the first, #-1 the last."
    if pattern.startswith("type:"):
        return did_you_mean(
            pattern, {f"type:{type(slot.module).__name__.removeprefix('Parametrized')}" for slot in everything}
        )
    return did_you_mean(pattern, [name for slot in everything for name in (*slot.names, slot.path)])
