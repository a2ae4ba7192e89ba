"""Some indices of a tensor kept and the others dropped, in the parameter, its training form and its optimizer state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from espalier.core.edits import Edit, module_at
from espalier.core.errors import Corrupt, LimitExceeded, ModelError, UnknownNameError, did_you_mean
from espalier.core.parametrize import Slot, slots


@dataclass(frozen=True, kw_only=True)
class Keep(Edit):
    """Drop every index of a parameter or buffer along ``dim`` but those in ``index``.

    The parameter stays the same object, at every owner, and keeps its training form; in JSON the indices are runs
    such as ``"0-3,7"``.
    """

    kind: ClassVar[str] = "keep"
    tensor: str
    dim: int
    index: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        return {"edit": self.kind, "tensor": self.tensor, "dim": self.dim, "index": runs_of(self.index)}

    @classmethod
    def arguments(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        given = super().arguments(data)
        if isinstance(given.get("index"), str):
            given["index"] = indices_of(given["index"])
        return given

    def summary(self) -> str:
        return f"{self.tensor}: keep {len(self.index)} along dimension {self.dim}"

    def apply(self, model: nn.Module) -> None:
        """Take the kept slices of the parameter (or buffer)."""
        self.apply_among(slots(model), model)

    def apply_among(self, known: Mapping[str, Slot], model: nn.Module) -> None:
        """The same with the model's slots at hand: walking a model once per edit would cost more than all edits."""
        found = known.get(self.tensor)
        path, _, attribute = self.tensor.rpartition(".")
        if found is None:
            owner = module_at(model, path)
            buffer = owner._buffers.get(attribute)
            if buffer is None:
                raise UnknownNameError(f"the plan names {self.tensor!r}.{did_you_mean(self.tensor, known)}")
            owner._buffers[attribute] = self.take(buffer)
            return
        latent, form = found.latent, found.form
        self._check(found.shape)
        with torch.no_grad():
            if form is None:
                smaller = self.take(latent)
            else:
                index = torch.tensor(self.index, dtype=torch.long, device=latent.device)
                smaller = form.take_latent(latent.detach(), self.dim, index)
                form.become(form.take(self.dim, index))
            latent.grad = None
            latent.data = smaller

    def carry(self, optimizer: torch.optim.Optimizer, parameter: nn.Parameter, shape: torch.Size) -> None:
        """Cut what the optimizer remembers of the parameter, which had ``shape``; what cannot be cut is forgotten."""
        ways = self.ways(optimizer, parameter, shape)
        if "lost" in ways.values():
            del optimizer.state[
                parameter
            ]  # all of it: optimizers start afresh where nothing is there, not where half is
            return
        for key, way in ways.items():
            if way == "cut":
                optimizer.state[parameter][key] = self.take(optimizer.state[parameter][key])

    def ways(self, optimizer: torch.optim.Optimizer, parameter: nn.Parameter, shape: torch.Size) -> dict[str, Way]:
        """What happens to each entry of the optimizer's state of a parameter of ``shape`` when it is cut."""
        state = optimizer.state.get(parameter) or {}
        return {key: _way(value, shape, self.dim) for key, value in state.items()}

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """The kept slices of a tensor of the parameter's shape."""
        self._check(tensor.shape)
        index = torch.tensor(self.index, dtype=torch.long, device=tensor.device)
        return tensor.detach().index_select(self.dim, index)

    def _check(self, shape: torch.Size) -> None:
        size = shape[self.dim] if -len(shape) <= self.dim < len(shape) else 0
        if not all(0 <= index < size for index in self.index):
            raise ModelError(f"the plan keeps indices of dimension {self.dim} that {self.tensor} {tuple(shape)} lacks.")


Way = Literal["cut", "whole", "lost"]


def _way(value: Any, shape: torch.Size, dim: int) -> Way:
    """What a cut of a parameter of ``shape`` along ``dim`` means for an entry of its optimizer state.

    Momenta have the parameter's sizes; factored ones (Adafactor) have 1 where they hold a mean over the dimension;
    counters are single numbers. Anything else is of a form that only its optimizer knows.
    """
    if not isinstance(value, torch.Tensor):
        return "whole" if value is None or isinstance(value, (bool, int, float, str)) else "lost"
    if value.ndim != len(shape):
        return "whole" if value.numel() == 1 else "lost"
    if any(size not in (1, whole) for size, whole in zip(value.shape, shape, strict=True)):
        return "lost"
    return "cut" if value.shape[dim] == shape[dim] else "whole"


def cut_along(slot: Slot) -> bool:
    """Whether what is trained is cut as the weight is; a form with a table of its own keeps it whole."""
    return slot.form is None or slot.form.cuts_latent


def forget_misfits(slot: Slot, optimizer: torch.optim.Optimizer) -> None:
    """Forget what the optimizer remembers of a form's own parameters that were cut: they are few and settle soon."""
    for parameter in slot.form.parameters() if slot.form is not None else ():
        state = optimizer.state.get(parameter) or {}
        if any(isinstance(v, torch.Tensor) and v.ndim and v.shape != parameter.shape for v in state.values()):
            del optimizer.state[parameter]


def runs_of(index: Sequence[int]) -> str:
    """``(0, 1, 2, 5)`` -> ``"0-2,5"``."""
    runs: list[list[int]] = []
    for i in index:
        if runs and i == runs[-1][1] + 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def indices_of(runs: str) -> tuple[int, ...]:
    """Inverse of :func:`runs_of`. Raises ``Corrupt`` for text that is none, ``LimitExceeded`` for too many indices."""
    found: list[int] = []
    for run in runs.split(",") if runs else ():
        first, dash, last = run.partition("-")
        if not (first.isdecimal() and (last.isdecimal() if dash else not last)) or len(run) > 21:
            raise Corrupt(f"a plan keeps the indices {runs[:60]!r}; runs such as '0-3,7' are allowed.")
        end = int(last if dash else first) + 1
        if end - int(first) + len(found) > MAX_INDICES:
            raise LimitExceeded(f"a plan keeps more than {MAX_INDICES} indices of one dimension.")
        found += range(int(first), end)
    return tuple(found)


MAX_INDICES = 2**24
"""How many indices of one dimension a plan may name."""
