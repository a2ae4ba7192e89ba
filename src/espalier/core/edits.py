"""What an edit of a plan is, and the edits that replace, remove, tie and set."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from espalier.core.errors import ModelError, UnknownNameError, did_you_mean
from espalier.core.parametrize import require_phase, slots
from espalier.core.spec import build


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One change. ``kind`` names it in JSON; the fields are plain data."""

    kind: ClassVar[str]

    @abstractmethod
    def apply(self, model: nn.Module) -> nn.Module | None:
        """Change ``model`` in place, or hand back the module that takes its place."""

    def to_json(self) -> dict[str, Any]:
        """``{"edit": kind, ...fields}``."""
        return {"edit": self.kind, **dataclasses.asdict(self)}

    @classmethod
    def arguments(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        """The fields as they were, from untrusted JSON; what is still wrong is refused by :meth:`Plan.from_json`."""
        return {key: tuple(v) if isinstance(v, list) else v for key, v in data.items() if key != "edit"}

    def summary(self) -> str:
        """One line for people."""
        return ", ".join(f"{key}={value}" for key, value in self.to_json().items())


def module_at(model: nn.Module, path: str) -> nn.Module:
    """The module a plan names. Raises ``UnknownNameError`` where there is none."""
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        known = [name for name, _ in model.named_modules() if name]
        raise UnknownNameError(f"the plan names the module {path!r}.{did_you_mean(path, known)}") from error


def put_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put ``module`` at ``path``. Raises ``ModelError`` where that is the whole model."""
    if module_at(model, path) is model:
        raise ModelError("the plan replaces the whole model; it may replace only modules inside it.")
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


@dataclass(frozen=True, kw_only=True)
class Replace(Edit):
    """Put the module that ``spec`` describes at ``path``."""

    kind: ClassVar[str] = "replace"
    path: str
    spec: dict[str, Any]

    def apply(self, model: nn.Module) -> None:
        """Replace; the new module takes the mode of the old one."""
        module = build(self.spec).train(module_at(model, self.path).training)
        put_module(model, self.path, module)


@dataclass(frozen=True, kw_only=True)
class Remove(Edit):
    """Put an identity at ``path``."""

    kind: ClassVar[str] = "remove"
    path: str

    def apply(self, model: nn.Module) -> None:
        """Remove."""
        put_module(model, self.path, nn.Identity())


@dataclass(frozen=True, kw_only=True)
class Tie(Edit):
    """Make the parameter ``tensor`` the same object as ``to``."""

    kind: ClassVar[str] = "tie"
    tensor: str
    to: str

    def apply(self, model: nn.Module) -> None:
        """Tie."""
        known = slots(model)
        for name in (self.tensor, self.to):
            if name not in known:
                raise UnknownNameError(f"the plan names {name!r}.{did_you_mean(name, known)}")
        if known[self.tensor].shape != known[self.to].shape:
            raise ModelError(f"{self.tensor} and {self.to} differ in shape and cannot be tied.")
        for name in (self.tensor, self.to):
            require_phase(known[name], ("dense",), "tying")
        for _, module, attribute in known[self.tensor].owners:
            module._parameters[attribute] = known[self.to].latent


@dataclass(frozen=True, kw_only=True)
class SetAttribute(Edit):
    """Set a plain attribute (int, float, str, bool, or a list of these) of the module at ``path``."""

    kind: ClassVar[str] = "set"
    path: str
    name: str
    value: Any

    def apply(self, model: nn.Module) -> None:
        """Set; the attribute must be there already and hold plain data of the same type."""
        module = module_at(model, self.path)
        now = module.__dict__.get(self.name)
        if not isinstance(now, (int, float, str, tuple, list)):
            raise UnknownNameError(f"{self.path} has no plain attribute {self.name!r} that a plan may set.")
        value = (
            type(now)(self.value)
            if isinstance(now, (tuple, list)) and isinstance(self.value, (tuple, list))
            else self.value
        )
        if type(value) is not type(now):
            raise ModelError(f"the plan sets {self.path}.{self.name} to {value!r}; it holds a {type(now).__name__}.")
        setattr(module, self.name, value)
