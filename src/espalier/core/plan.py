"""Plan: a change of structure as data. Printable, diffable, JSON both ways, replayed on a freshly built model.

A plan is a list of edits from a closed set; ``Plan.apply`` replays it. A module in a plan is a *spec*: a JSON tree
over a closed list of ``torch.nn`` classes, rebuilt here and nowhere else.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_type_hints

import torch
from torch import nn

from espalier.core.errors import (
    Corrupt,
    EspalierWarning,
    LimitExceeded,
    ModelError,
    UnknownNameError,
    did_you_mean,
)
from espalier.core.forms import Form
from espalier.core.method import fits
from espalier.core.parametrize import Slot, bake, require_phase, slots

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

SPEC_CLASSES: dict[str, type[nn.Module]] = {
    cls.__name__: cls
    for cls in (
        nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
        nn.Embedding, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm,
        nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.LeakyReLU, nn.Softmax,
        nn.Identity, nn.Flatten, nn.Dropout, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d,
    )
}  # fmt: skip
"""What a spec may name beside ``Sequential``."""


MAX_ELEMENTS, MAX_DEPTH = 2**31, 64
"""How many elements the parameters and buffers of one spec may have, and how deep it may nest."""


def build(spec: Mapping[str, Any]) -> nn.Module:
    """The module of a spec: ``{"class": "Linear", "args": {...}}``, ``{"class": "Sequential", "children": [...]}``.

    Raises ``Corrupt`` for anything else, ``LimitExceeded`` before memory is taken for more than ``MAX_ELEMENTS``.
    """
    with torch.device("meta"):
        outline = _build(spec, MAX_DEPTH)
    elements = sum(tensor.numel() for tensor in (*outline.parameters(), *outline.buffers()))
    if elements > MAX_ELEMENTS:
        raise LimitExceeded(f"a plan builds a module of {elements} elements; at most {MAX_ELEMENTS} are allowed.")
    return _build(spec, MAX_DEPTH)


def _build(spec: Any, depth: int) -> nn.Module:
    if not isinstance(spec, Mapping) or not depth:
        raise Corrupt(f"a plan holds no module spec, or one nested deeper than {MAX_DEPTH}: {type(spec).__name__}.")
    name, children, given = spec.get("class"), spec.get("children", ()), spec.get("args", {})
    if name == "Sequential" and isinstance(children, (list, tuple)):
        return nn.Sequential(*(_build(child, depth - 1) for child in children))
    if not isinstance(name, str) or name not in SPEC_CLASSES:
        raise Corrupt(
            f"a plan names the module class {name!r}.{did_you_mean(str(name), [*SPEC_CLASSES, 'Sequential'])}"
        )
    if not isinstance(given, Mapping) or "device" in given:
        raise Corrupt(f"a plan builds {name} with {given!r}; arguments are a mapping and name no device.")
    arguments = {key: tuple(v) if isinstance(v, list) else v for key, v in given.items()}
    try:
        return SPEC_CLASSES[name](**arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise Corrupt(f"a plan builds {name} with {arguments}, which it refuses: {error}") from error


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


def _module(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        known = [name for name, _ in model.named_modules() if name]
        raise UnknownNameError(f"the plan names the module {path!r}.{did_you_mean(path, known)}") from error


def _set_module(model: nn.Module, path: str, module: nn.Module) -> None:
    if _module(model, path) is model:
        raise ModelError("the plan replaces the whole model; it may replace only modules inside it.")
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


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
            owner = _module(model, path)
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
                other = form.take(self.dim, index)
                for name, buffer in other._buffers.items():
                    form._buffers[name] = buffer
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


def _cut_along(slot: Slot) -> bool:
    """Whether what is trained is cut as the weight is; a form with a table of its own keeps it whole."""
    return slot.form is None or type(slot.form).take_latent is Form.take_latent


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


@dataclass(frozen=True, kw_only=True)
class Replace(Edit):
    """Put the module that ``spec`` describes at ``path``."""

    kind: ClassVar[str] = "replace"
    path: str
    spec: dict[str, Any]

    def apply(self, model: nn.Module) -> None:
        """Replace; the new module takes the mode of the old one."""
        module = build(self.spec).train(_module(model, self.path).training)
        _set_module(model, self.path, module)


@dataclass(frozen=True, kw_only=True)
class Remove(Edit):
    """Put an identity at ``path``."""

    kind: ClassVar[str] = "remove"
    path: str

    def apply(self, model: nn.Module) -> None:
        """Remove."""
        _set_module(model, self.path, nn.Identity())


@dataclass(frozen=True, kw_only=True)
class Fold(Edit):
    """Fold the batch norm at ``norm`` into the convolution or linear layer at ``into`` that feeds it alone."""

    kind: ClassVar[str] = "fold"
    norm: str
    into: str

    def apply(self, model: nn.Module) -> None:
        """w <- w * g / sqrt(v + eps); b <- (b - m) * g / sqrt(v + eps) + beta; the norm becomes an identity."""
        norm, layer = _module(model, self.norm), _module(model, self.into)
        if not isinstance(norm, BATCH_NORMS) or norm.running_mean is None or norm.running_var is None:
            raise ModelError(f"{self.norm} is no batch norm with running statistics; it cannot be folded.")
        slot = slots(model).get(f"{self.into}.weight")
        if slot is None or not isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            raise ModelError(f"{self.into} is no linear or convolution layer; a batch norm cannot be folded into it.")
        if norm.num_features != slot.shape[0] or len(slot.owners) > 1:
            raise ModelError(
                f"{self.norm} ({norm.num_features} channels) cannot be folded into {self.into}: its weight "
                f"{tuple(slot.shape)} {'is shared by ' + ', '.join(slot.names) if len(slot.owners) > 1 else 'differs'}."
            )
        require_phase(slot, ("dense", "mask"), f"folding {self.norm}")
        with torch.no_grad():
            scale, shift = scale_and_shift(norm)
            slot.latent.mul_(scale.reshape(-1, *[1] * (slot.latent.ndim - 1)))
            bias = shift if layer.bias is None else shift + layer.bias * scale
            layer.bias = nn.Parameter(bias, requires_grad=slot.latent.requires_grad)
        _set_module(model, self.norm, nn.Identity())


@dataclass(frozen=True, kw_only=True)
class Merge(Edit):
    """Make one layer of the linear layer or convolution at ``first`` and the one at ``second`` that alone reads it."""

    kind: ClassVar[str] = "merge"
    first: str
    second: str

    def apply(self, model: nn.Module) -> None:
        """The product of both takes the place of ``second``, an identity that of ``first``; exact up to rounding."""
        one, two = _module(model, self.first), _module(model, self.second)
        reason = unmergeable(one, two)
        if reason:
            raise ModelError(f"{self.first} and {self.second} cannot be merged: {reason}.")
        known = slots(model)
        for path in (self.first, self.second):
            slot = known[f"{path}.weight"]
            if len(slot.owners) > 1:
                raise ModelError(f"{path} shares its weight ({', '.join(slot.names)}) and cannot be merged.")
            require_phase(slot, ("dense",), f"merging {path}")
        merged = merge(one, two).train(two.training)
        merged.requires_grad_(two.weight.requires_grad)
        _set_module(model, self.second, merged)
        _set_module(model, self.first, nn.Identity())


def unmergeable(one: nn.Module, two: nn.Module) -> str:
    """Why two layers in a row are not one; empty if they are."""
    if isinstance(one, nn.Linear) and isinstance(two, nn.Linear):
        return ""
    if not (isinstance(one, nn.Conv2d) and isinstance(two, nn.Conv2d)):
        return "only two linear layers or two 2-D convolutions can be"
    if one.groups != 1 or two.groups != 1:
        return "grouped convolutions are left alone"
    pointwise = two.kernel_size == (1, 1)
    if isinstance(two.padding, str) or any(two.padding):
        return "the second pads what the first gives, which is no padding of the first one's input"
    if not pointwise and (one.stride != (1, 1) or one.dilation != (1, 1) or two.dilation != (1, 1)):
        return "a stride or dilation before a kernel larger than 1 x 1 would need a sparse kernel"
    if isinstance(one.padding, str) or one.padding_mode != "zeros":
        return "its padding is not a number of zeros"
    return ""


def merge(one: Any, two: Any) -> Any:
    """One layer that computes ``two(one(x))``; see :func:`unmergeable`.

    Linear: W = W2 W1, b = W2 b1 + b2. Convolutions: the kernels convolved, k = k1 + k2 - 1; b = b2 + sum W2 b1.
    """
    with torch.no_grad():
        w1, w2 = one.weight.double(), two.weight.double()
        b1 = one.bias.double() if one.bias is not None else w1.new_zeros(w1.shape[0])
        biased = one.bias is not None or two.bias is not None
        if isinstance(one, nn.Linear):
            layer: Any = nn.Linear(one.in_features, two.out_features, bias=biased)
            weight, shift = w2 @ w1, w2 @ b1
        else:
            k1, k2 = one.kernel_size, two.kernel_size
            size = (k1[0] + k2[0] - 1, k1[1] + k2[1] - 1)
            stride = tuple(a * b for a, b in zip(one.stride, two.stride, strict=True))
            layer = nn.Conv2d(
                one.in_channels, two.out_channels, size, stride, one.padding, one.dilation, bias=biased
            )  # fmt: skip
            full = (k2[0] - 1, k2[1] - 1)
            weight = torch.conv2d(w1.transpose(0, 1), w2.flip(2, 3), padding=full).transpose(0, 1)
            shift = w2.sum((2, 3)) @ b1
        layer.to(one.weight.device, one.weight.dtype)
        layer.weight.copy_(weight)
        if biased:
            layer.bias.copy_(shift if two.bias is None else shift + two.bias.double())
    return layer


def scale_and_shift(norm: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch norm in eval mode as ``scale * x + shift`` per channel, computed in float64, shape (channels,)."""
    mean, var = norm.running_mean.double(), norm.running_var.double()
    weight = norm.weight.double() if norm.weight is not None else torch.ones_like(mean)
    bias = norm.bias.double() if norm.bias is not None else torch.zeros_like(mean)
    scale = weight / torch.sqrt(var + norm.eps)
    dtype = norm.running_mean.dtype
    return scale.to(dtype), (bias - mean * scale).to(dtype)


@dataclass(frozen=True, kw_only=True)
class Normalise(Edit):
    """Turn every batch norm matching ``path`` into the same function with mean 0 and variance 1 - eps.

    What is left to store is a scale and a shift per channel. Norms without weights or statistics stay as they are.
    """

    kind: ClassVar[str] = "normalise"
    path: str = "*"

    def apply(self, model: nn.Module) -> None:
        """Rewrite weight and bias; the function in eval mode is the same to rounding."""
        norms = self.norms(model)
        owners = {id(norm) for _, norm in norms}
        for slot in slots(model).values() if norms else ():
            # what a form computes cannot be written to: the old scale would stay beside the new statistics
            if slot.form is not None and any(id(module) in owners for _, module, _ in slot.owners):
                bake(slot)
        for _, norm in norms:
            with torch.no_grad():
                scale, shift = scale_and_shift(norm)
                norm.weight.copy_(scale)
                norm.bias.copy_(shift)
            self.reset(norm)

    def norms(self, model: nn.Module) -> list[tuple[str, Any]]:
        """The batch norms this edit works on."""
        return [
            (path, module)
            for path, module in model.named_modules()
            if isinstance(module, BATCH_NORMS)
            and module.affine
            and module.track_running_stats
            and fnmatch.fnmatchcase(path, self.path)
        ]

    @staticmethod
    def reset(norm: Any) -> None:
        """Set the statistics to mean 0, variance 1 - eps, no batch seen."""
        norm.running_mean.zero_()
        norm.running_var.fill_(1 - norm.eps)
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.zero_()

    def statistics(self, model: nn.Module) -> set[str]:
        """Names of the buffers that need no storing once the edit is applied."""
        kept = ("running_mean", "running_var", "num_batches_tracked")
        return {f"{path}.{name}" if path else name for path, _ in self.norms(model) for name in kept}


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
        module = _module(model, self.path)
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


EDITS: dict[str, type[Edit]] = {
    cls.kind: cls for cls in (Keep, Replace, Remove, Fold, Merge, Normalise, Tie, SetAttribute)
}
"""Kinds of edits by name; rooms to the right add theirs with :func:`register_edit`."""


def register_edit(cls: type[Edit]) -> type[Edit]:
    """Let plans hold a further kind of edit."""
    EDITS[cls.kind] = cls
    return cls


_HISTORY = "_espalier_plan"


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
        history = applied(model) + self
        known = slots(model)
        if optimizer is not None:
            self._warn_of_lost_state(known, optimizer)
        for edit in self.edits:
            if isinstance(edit, Keep):  # the parameters stay the same objects
                slot = known.get(edit.tensor)
                shape = slot.latent.shape if slot is not None else torch.Size()
                edit.apply_among(known, model)
                if optimizer is not None and slot is not None and _cut_along(slot):
                    edit.carry(optimizer, slot.latent, shape)
                continue
            model = edit.apply(model) or model
            if isinstance(edit, SetAttribute):
                continue
            before, known = known, slots(model)
            if optimizer is not None:
                _carry(optimizer, before, known)
        if self.edits:
            model.__dict__[_HISTORY] = history
        return model

    def _warn_of_lost_state(self, known: Mapping[str, Slot], optimizer: torch.optim.Optimizer) -> None:
        """One warning for all state that :meth:`Keep.carry` will drop; cuts leave every other dimension as it is."""
        lost: dict[str, str] = {}
        for edit in self.edits:
            slot = known.get(edit.tensor) if isinstance(edit, Keep) else None
            if not isinstance(edit, Keep) or slot is None or not _cut_along(slot):
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
