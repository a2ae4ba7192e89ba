"""One place knows the habits of torch's parametrizations: ties, copies, recurrent layers, classes, names."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from espalier.core.errors import ModelError, PhaseError
from espalier.core.forms import Form, Mask, Shared
from espalier.core.model import copy_model
from espalier.core.parametrize import (
    attach,
    bake,
    form_specs,
    freeze,
    plain,
    require_phase,
    restore_forms,
    slots,
)
from espalier.core.representation import Codebook, Dense, Masked
from espalier.testing import EXAMPLES, Example, bits, effective, fingerprint, frozen_copy, outputs

BY_NAME = {example.name: example for example in EXAMPLES}
every_example = pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: e.name)


def half(weight: torch.Tensor) -> Mask:
    return Mask(torch.arange(weight.numel()).reshape(weight.shape) % 2 == 0)


def grid(weight: torch.Tensor, k: int = 3) -> Shared:
    return Shared(torch.arange(weight.numel()).reshape(weight.shape) % k, torch.linspace(-0.5, 0.5, k), zero=False)


def attach_all(model: nn.Module, form: type[Form]) -> nn.Module:
    for slot in slots(model).values():
        if len(slot.shape) >= 2:
            attach(slot, (half if form is Mask else grid)(slot.value()))
    return model


@every_example
def test_slots_name_every_parameter_of_the_plain_model_once(example: Example) -> None:
    model = example.build()
    everything = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    found = slots(model)
    assert list(found) == [name for name, _ in model.named_parameters()]
    assert {name for slot in found.values() for name in slot.names} == everything
    attached = slots(attach_all(example.build(), Mask))
    assert list(attached) == list(found), "the order is the plain model's"
    assert {name: slot.names for name, slot in attached.items()} == {name: slot.names for name, slot in found.items()}
    assert {name: slot.shape for name, slot in attached.items()} == {name: slot.shape for name, slot in found.items()}


@every_example
@pytest.mark.parametrize("form", [Mask, Shared])
def test_bake_restores_classes_ties_and_function(example: Example, form: type[Form]) -> None:
    model, task = attach_all(example.build(), form), example.task()
    baked = plain(model)
    original = example.build()
    assert [type(m) for m in baked.modules()] == [type(m) for m in original.modules()]
    assert list(baked.state_dict()) == list(original.state_dict())
    assert {n: s.names for n, s in slots(baked).items()} == {n: s.names for n, s in slots(original).items()}
    assert {n: s.latent.requires_grad for n, s in slots(baked).items()} == {
        n: s.latent.requires_grad for n, s in slots(original).items()
    }
    assert bits(outputs(baked, task)) == bits(outputs(model, task))
    assert bits(effective(baked)) == bits(effective(model))
    assert not [key for m in baked.modules() for key in m._forward_pre_hooks]
    assert all(slot.form is not None for slot in slots(model).values() if len(slot.shape) >= 2), (
        "the argument is untouched"
    )


@every_example
@pytest.mark.parametrize("form", [Mask, Shared])
def test_copies_do_not_share_classes(example: Example, form: type[Form]) -> None:
    """A deep copy shares torch's injected class; baking one must not reach the other."""
    one, task = attach_all(example.build(), form), example.task()
    answers = bits(outputs(one, task))
    other = copy_model(one)
    for slot in slots(other).values():
        bake(slot)
    assert bits(outputs(one, task)) == answers
    assert bits(outputs(other, task)) == answers
    one = copy_model(one)
    gc.collect()
    assert bits(outputs(one, task)) == answers


@every_example
@pytest.mark.parametrize("form", [Mask, Shared])
def test_the_weight_in_force_trains_and_copies(example: Example, form: type[Form]) -> None:
    model, task = attach_all(example.build(), form), example.task()
    batch = next(iter(task.data("train")))
    for _ in range(2):
        model.train()
        model.zero_grad()
        task.training_loss(task.predict(model, batch), batch).backward()
        copy_model(model)  # no tensor with a graph is left in the model
    assert all(slot.latent.grad is not None for slot in slots(model).values() if slot.latent.requires_grad)
    assert bits(outputs(frozen_copy(model), task)) == bits(outputs(model, task))


def test_recurrent_layers_run_on_the_effective_weights() -> None:
    lstm = nn.LSTM(3, 4, num_layers=2, bidirectional=True)
    x = torch.randn(5, 2, 3)
    for slot in slots(lstm).values():
        if len(slot.shape) >= 2:
            attach(slot, half(slot.value()))
    reference = nn.LSTM(3, 4, num_layers=2, bidirectional=True)
    reference.load_state_dict(effective(lstm))
    assert torch.equal(lstm(x)[0], reference(x)[0])
    assert not torch.equal(plain(lstm)(x)[0], nn.LSTM(3, 4, num_layers=2, bidirectional=True)(x)[0])
    with torch.no_grad():
        slots(lstm)["weight_hh_l1_reverse"].latent.mul_(3)
        reference.weight_hh_l1_reverse.copy_(slots(lstm)["weight_hh_l1_reverse"].value())
    assert torch.equal(lstm(x)[0], reference(x)[0])


def test_baking_one_of_two_keeps_the_other() -> None:
    lstm = nn.LSTM(3, 4)
    first, second = (slots(lstm)[name] for name in ("weight_ih_l0", "weight_hh_l0"))
    attach(first, half(first.value()))
    attach(second, half(second.value()))
    bake(slots(lstm)["weight_ih_l0"])
    assert slots(lstm)["weight_hh_l0"].form is not None
    with torch.no_grad():
        slots(lstm)["weight_hh_l0"].latent.mul_(2)
    reference = nn.LSTM(3, 4)
    reference.load_state_dict(effective(lstm))
    x = torch.randn(5, 2, 3)
    assert torch.equal(lstm(x)[0], reference(x)[0])


def test_a_new_form_starts_from_the_weight_in_force() -> None:
    linear = nn.Linear(4, 3)
    slot = slots(linear)["weight"]
    attach(slot, half(slot.value()))
    masked = slot.value()
    attach(slot, Mask(torch.ones(3, 4, dtype=torch.bool)))
    assert bits(linear.weight) == bits(masked)
    assert bits(slot.latent) == bits(masked)


@pytest.mark.parametrize("name", ["tied", "twice"])
def test_owners_stay_one_parameter(name: str) -> None:
    model = attach_all(BY_NAME[name].build(), Mask)
    (slot,) = [s for s in slots(model).values() if len(s.owners) == 2 and len(s.shape) == 2]
    one, other = (getattr(module, attribute) for _, module, attribute in slot.owners)
    assert torch.equal(one, other)
    assert len({id(p) for p in model.parameters()}) == len(slots(model))
    with torch.no_grad():
        slot.latent.add_(1)
    one, other = (getattr(module, attribute) for _, module, attribute in slot.owners)
    assert torch.equal(one, other)
    _, aliases = freeze(model)
    assert aliases[slot.names[1]] == slot.names[0]


def test_two_layers_may_share_one_codebook() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    first, second = slots(model)["0.weight"], slots(model)["1.weight"]
    attach(first, grid(first.value()))
    attach(second, Shared(torch.zeros(4, 4, dtype=torch.int32), torch.zeros(3), zero=False), first.latent)
    found = slots(model)
    assert found["0.weight"].latent is found["1.weight"].latent
    assert found["0.weight"].names == ["0.weight"], "sharing a codebook is not being tied"
    with torch.no_grad():
        found["0.weight"].latent.add_(1)
    assert (model[1].weight == found["0.weight"].latent[0]).all()
    specs = form_specs(model)
    assert specs["1.weight"]["latent"] == "0.weight"
    bake(found["0.weight"])
    assert slots(model)["1.weight"].form is not None
    assert isinstance(model[0].weight, nn.Parameter)


def test_foreign_parametrizations_are_refused() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3)))
    with pytest.raises(
        ModelError, match=r"Linear.weight carries a parametrization that is not espalier's.*remove_param"
    ):
        slots(model)


def test_phases() -> None:
    linear = nn.Linear(4, 3)
    slot = slots(linear)["weight"]
    require_phase(slot, ("dense",), "pruning")
    attach(slot, half(slot.value()))
    require_phase(slot, ("dense", "mask"), "pruning")
    with pytest.raises(PhaseError, match="folding would change weight, whose pruned positions are fixed"):
        require_phase(slot, ("dense",), "folding")
    attach(slot, grid(slot.value()))
    with pytest.raises(PhaseError, match=r"values are made from codes or few numbers.*densify=true"):
        require_phase(slot, ("dense", "mask"), "pruning")
    before = slot.value()
    require_phase(slot, ("dense", "mask"), "pruning", densify=True)
    assert slot.phase == "dense"
    assert type(linear) is nn.Linear
    assert bits(linear.weight) == bits(before)


def test_freeze_covers_the_plain_state_and_nothing_else() -> None:
    model = BY_NAME["convolution"].build()
    model.register_buffer("scratch", torch.ones(2), persistent=False)
    model.register_buffer("kept", torch.ones(2, dtype=torch.int64))
    model.register_buffer("again", model.kept)
    attach(slots(model)["0.weight"], half(model[0].weight))
    attach(slots(model)["4.weight"], grid(model[4].weight))
    tensors, aliases = freeze(model)
    assert set(tensors) | set(aliases) == set(plain(model).state_dict())
    assert aliases == {"again": "kept"}
    assert {n: type(t) for n, t in tensors.items() if not isinstance(t, Dense)} == {
        "0.weight": Masked,
        "4.weight": Codebook,
    }
    assert tensors["1.num_batches_tracked"].shape == ()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("form", [Mask, Shared])
def test_other_dtypes_freeze_bit_for_bit(dtype: torch.dtype, form: type[Form]) -> None:
    example = BY_NAME["mlp"]
    model = attach_all(example.build().to(dtype), form)
    assert {slot.value().dtype for slot in slots(model).values()} == {dtype}
    assert bits(effective(frozen_copy(model))) == bits(effective(model))


@every_example
def test_a_checkpoint_rebuilds_the_forms(example: Example) -> None:
    model, task = example.build(), example.task()
    for number, slot in enumerate(s for s in slots(model).values() if len(s.shape) >= 2):
        attach(slot, (half, grid)[number % 2](slot.value()))
    fresh = example.build()
    restore_forms(fresh, form_specs(model))
    fresh.load_state_dict(model.state_dict())
    assert bits(fresh.state_dict()) == bits(model.state_dict())
    assert bits(outputs(fresh, task)) == bits(outputs(model, task))
    assert form_specs(fresh) == form_specs(model)


def test_a_checkpoint_restores_a_codebook_of_a_group() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    first, second = slots(model)["0.weight"], slots(model)["1.weight"]
    attach(first, grid(first.value()))
    attach(second, grid(second.value()), first.latent)
    fresh = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    restore_forms(fresh, form_specs(model))
    fresh.load_state_dict(model.state_dict())
    assert slots(fresh)["0.weight"].latent is slots(fresh)["1.weight"].latent
    assert bits(effective(fresh)) == bits(effective(model))


@pytest.mark.parametrize(
    "specs", [{"nothing.weight": {"kind": "mask"}}, {"weight": {"kind": "pickle"}}, {"weight": {}}]
)
def test_a_foreign_checkpoint_is_refused(specs: dict[str, dict[str, str]]) -> None:
    with pytest.raises(ModelError, match="this model has no such weight"):
        restore_forms(nn.Linear(2, 2), specs)


def test_plain_leaves_its_argument_alone() -> None:
    model = attach_all(BY_NAME["recurrent"].build(), Mask)
    before = fingerprint(model)
    plain(model)
    assert fingerprint(model) == before


def test_a_frozen_parameter_stays_frozen_in_every_form() -> None:
    linear = nn.Linear(4, 3).requires_grad_(requires_grad=False)
    slot = slots(linear)["weight"]
    for form in (half(slot.value()), grid(slot.value())):
        attach(slot, form)
        assert not slot.latent.requires_grad
    bake(slot)
    assert not linear.weight.requires_grad
