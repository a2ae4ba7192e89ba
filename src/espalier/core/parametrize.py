"""The one place that knows how ``torch.nn.utils.parametrize`` behaves.

Its habits: the module's class becomes ``ParametrizedX`` (``isinstance`` still holds), state-dict keys move to
``parametrizations.NAME.original``, pickling is refused, tied weights come apart, recurrent layers keep a private
list of their weights, and a deep copy shares the injected class, so that a property removed from the copy is gone
from the source as well. So a module gets a class of its own before it changes, a form is attached to a *parameter*
at every owner at once, and every name outside this file is the name the plain model has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize as torch_parametrize

from espalier.core.errors import ModelError, PhaseError
from espalier.core.forms import FORMS, Form, Phase, dense_representation
from espalier.core.model import copy_model
from espalier.core.representation import Representation
from espalier.core.structures.form import StructuredWeight  # noqa: F401 - checkpoints name it


@dataclass
class Slot:
    """One parameter of the plain model: its first name, all owners, and its form if it has one."""

    name: str
    latent: nn.Parameter
    form: Form | None
    owners: list[tuple[str, nn.Module, str]] = field(default_factory=list)

    @property
    def module(self) -> nn.Module:
        """The first module that owns the parameter."""
        return self.owners[0][1]

    @property
    def path(self) -> str:
        """Path of that module."""
        return self.owners[0][0]

    @property
    def names(self) -> list[str]:
        """Every name the plain model gives the parameter."""
        return [f"{path}.{attribute}" if path else attribute for path, _, attribute in self.owners]

    @property
    def phase(self) -> Phase:
        """``dense``, ``mask`` or ``codes``: what is fixed about this weight."""
        return self.form.phase if self.form is not None else "dense"

    @property
    def shape(self) -> torch.Size:
        """Shape of the effective weight."""
        return self.value().shape

    def value(self) -> Tensor:
        """The effective weight, detached."""
        with torch.no_grad():
            return (self.form.in_use(self.latent) if self.form is not None else self.latent).detach()


def _plain_order(module: nn.Module) -> list[str]:
    """The parameters' names in the plain module's order, which attaching and baking would otherwise change."""
    if torch_parametrize.is_parametrized(module):
        return list(module.parametrizations.plain_order)  # type: ignore[union-attr, arg-type]
    return list(module._parameters)


def _own_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, Form | None]]:
    found: dict[str, tuple[nn.Parameter, Form | None]] = {}
    for name, parameter in module._parameters.items():
        if parameter is not None:
            found[name] = parameter, None
    if torch_parametrize.is_parametrized(module):
        for name, chain in module.parametrizations.items():  # type: ignore[union-attr, operator]
            forms = list(chain)
            if len(forms) != 1 or not isinstance(forms[0], Form):
                raise ModelError(
                    f"{type(module).__name__}.{name} carries a parametrization that is not espalier's "
                    f"({', '.join(type(form).__name__ for form in forms)}). Bake it in first: "
                    "torch.nn.utils.parametrize.remove_parametrizations(module, name)."
                )
            found[name] = chain.original, forms[0]
    for name in _plain_order(module):
        if name in found:
            yield name, *found[name]


def _is_machinery(path: str) -> bool:
    return "parametrizations" in path.split(".")


def slots(model: nn.Module) -> dict[str, Slot]:
    """Every parameter once, by the first name the plain model gives it, in the plain model's order."""
    found: dict[tuple[int, int], Slot] = {}  # two weights may share centroids (latent) without being tied
    for path, module in model.named_modules(remove_duplicate=False):
        if _is_machinery(path):
            continue
        for attribute, parameter, form in _own_parameters(module):
            name = f"{path}.{attribute}" if path else attribute
            slot = found.setdefault((id(parameter), id(form)), Slot(name, parameter, form))
            slot.owners.append((path, module, attribute))
    return {slot.name: slot for slot in found.values()}


def _distinct_owners(slot: Slot) -> list[tuple[nn.Module, str]]:
    seen: dict[tuple[int, str], tuple[nn.Module, str]] = {}
    for _, module, attribute in slot.owners:
        seen.setdefault((id(module), attribute), (module, attribute))
    return list(seen.values())


def _chains(module: nn.Module) -> Any:
    """torch's chains of parametrizations of a module, by parameter name."""
    return module.parametrizations


def _own_class(module: nn.Module) -> None:
    """Give a parametrized module its own injected class: deep copies share it, and properties live on it."""
    if torch_parametrize.is_parametrized(module):
        shared = type(module)
        own = {key: value for key, value in vars(shared).items() if key not in ("__dict__", "__weakref__")}
        module.__class__ = type(shared.__name__, shared.__bases__, own)


def attach(slot: Slot, form: Form, latent: nn.Parameter | None = None) -> None:
    """Give the parameter a form at every owner; an earlier form is replaced (its effective weight is the start).

    ``latent``: use another slot's latent tensor (a codebook shared by a group of layers). The caller has checked the
    phase with :func:`require_phase`.
    """
    if slot.form is not None:
        bake(slot)
    (first, attribute), *others = _distinct_owners(slot)
    orders = [(module, _plain_order(module)) for module, _ in ((first, attribute), *others)]
    for module, _ in orders:
        _own_class(module)
    torch_parametrize.register_parametrization(first, attribute, form, unsafe=True)
    chain = _chains(first)[attribute]
    if latent is None:
        latent = chain.original
    chain.original = latent
    for module, name in others:
        module._parameters[name] = nn.Parameter(torch.empty(0, device=latent.device, dtype=latent.dtype))
        torch_parametrize.register_parametrization(module, name, nn.Identity(), unsafe=True)
        chain = _chains(module)[name]
        chain.original = latent
        chain[0] = form
    for module, order in orders:
        _chains(module).plain_order = order
        if isinstance(module, nn.RNNBase) and _refresh_flat_weights not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_refresh_flat_weights)
            module.register_forward_hook(_forget_flat_weights)
    slot.latent, slot.form = latent, form


def bake(slot: Slot) -> None:
    """Replace the form by a plain parameter holding the effective weight; owners stay tied."""
    if slot.form is None:
        return
    value, grad = slot.value().clone(), slot.latent.requires_grad
    parameter = nn.Parameter(value, requires_grad=grad)
    for module, attribute in _distinct_owners(slot):
        order = _plain_order(module)
        _own_class(module)
        _chains(module)[attribute].original = nn.Parameter(torch.empty(0))
        _chains(module)[attribute][0] = nn.Identity()
        torch_parametrize.remove_parametrizations(module, attribute, leave_parametrized=True)
        module._parameters[attribute] = parameter
        for name in order:
            if name in module._parameters:
                module._parameters[name] = module._parameters.pop(name)
        if isinstance(module, nn.RNNBase):
            _refresh_flat_weights(module, ())
            if not torch_parametrize.is_parametrized(module):
                for hooks in (module._forward_pre_hooks, module._forward_hooks):
                    for key, hook in list(hooks.items()):
                        if hook in (_refresh_flat_weights, _forget_flat_weights):
                            del hooks[key]
    slot.latent, slot.form = parameter, None


def _refresh_flat_weights(module: nn.Module, _: Any) -> None:
    """Recurrent layers run on a private list of weights: fill it with the effective ones before every forward."""
    weights = [getattr(module, name) for name in module._flat_weights_names]  # type: ignore[union-attr]
    module.__dict__["_flat_weights"] = weights


def _forget_flat_weights(module: nn.Module, _: Any, __: Any) -> None:
    """The effective weights carry a graph; a module that holds on to them cannot be copied."""
    module.__dict__["_flat_weights"] = []


def plain(model: nn.Module) -> nn.Module:
    """A copy of ``model`` with every form baked in: ordinary classes, ordinary parameters, same function."""
    model = copy_model(model)
    for slot in slots(model).values():
        bake(slot)
    return model


def require_phase(slot: Slot, allowed: tuple[Phase, ...], who: str, *, densify: bool = False) -> None:
    """Refuse a step that would change what a mask or codes have fixed, unless ``densify`` gives it up on purpose."""
    if slot.phase in allowed:
        return
    if densify:
        bake(slot)
        return
    fixed = {"mask": "pruned positions are fixed", "codes": "values are made from codes or few numbers"}[slot.phase]
    raise PhaseError(
        f"{who} would change {slot.name}, whose {fixed} by an earlier step. Put {who} before that step, "
        "or pass densify=true to give up what the earlier step fixed."
    )


def freeze(model: nn.Module) -> tuple[dict[str, Representation], dict[str, str]]:
    """Every tensor of the plain model's state: ``name -> Representation`` and aliases ``tied name -> name``."""
    by_name = {name: slot for slot in slots(model).values() for name in slot.names}
    tensors: dict[str, Representation] = {}
    aliases: dict[str, str] = {}
    first_buffer: dict[int, str] = {}
    for name, tensor, is_parameter in _plain_state(model):
        if is_parameter:
            slot = by_name[name]
            if name != slot.name:
                aliases[name] = slot.name
            else:
                tensors[name] = slot.form.freeze(slot.latent) if slot.form else dense_representation(tensor)
        elif id(tensor) in first_buffer:
            aliases[name] = first_buffer[id(tensor)]
        else:
            first_buffer[id(tensor)] = name
            tensors[name] = dense_representation(tensor)
    return tensors, aliases


def _plain_state(model: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """(name in the plain state dict, tensor, is a parameter), persistent buffers only."""
    for path, module in model.named_modules(remove_duplicate=False):
        if _is_machinery(path):
            continue
        prefix = f"{path}." if path else ""
        for attribute, parameter, _ in _own_parameters(module):
            yield prefix + attribute, parameter, True
        for attribute, buffer in module._buffers.items():
            if buffer is not None and attribute not in module._non_persistent_buffers_set:
                yield prefix + attribute, buffer, False


def form_specs(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Parameter name -> ``{"kind", ...}``: with the state dict, all a checkpoint needs to rebuild the forms."""
    specs: dict[str, dict[str, Any]] = {}
    leaders: dict[int, str] = {}
    for name, slot in slots(model).items():
        if slot.form is not None:
            leader = leaders.setdefault(id(slot.latent), name)
            group = {} if leader == name else {"latent": leader}
            specs[name] = {"kind": slot.form.kind, "k": slot.latent.numel(), **group, **slot.form.spec()}
    return specs


def restore_forms(model: nn.Module, specs: Mapping[str, dict[str, Any]]) -> None:
    """Attach blank forms to a plain model as recorded by :func:`form_specs`; fill with ``load_state_dict`` next."""
    available = slots(model)
    for name, spec in specs.items():
        if name not in available or spec.get("kind") not in FORMS:
            raise ModelError(
                f"the checkpoint gives {name!r} the form {spec.get('kind')!r}; this model has no such weight."
            )
        leader = available[spec["latent"]].latent if "latent" in spec else None
        attach(available[name], FORMS[spec["kind"]].blank(dict(spec), available[name].value()), leader)
