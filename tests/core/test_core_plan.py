"""Plans: every edit does what it says, travels as JSON, is replayed on a fresh model; forged ones are refused."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from espalier.core.edits import Remove, Replace, SetAttribute, Tie
from espalier.core.errors import (
    Corrupt,
    EspalierError,
    EspalierWarning,
    FileError,
    LimitExceeded,
    ModelError,
    PhaseError,
    UnknownNameError,
)
from espalier.core.forms import Mask, Shared
from espalier.core.keep import Keep
from espalier.core.norms import Fold, Normalise, scale_and_shift
from espalier.core.parametrize import attach, slots
from espalier.core.plan import EDITS, Plan, applied
from espalier.core.spec import SPEC_CLASSES, build
from espalier.testing import EXAMPLES, bits

BY_NAME = {example.name: example for example in EXAMPLES}


def normed(dimensions: int = 2, *, bias: bool = True, seed: int = 0) -> nn.Sequential:
    """Linear or convolution, then a batch norm with statistics of its own, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first = (
            nn.Linear(4, 5, bias=bias)
            if not dimensions
            else (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1](2, 5, 3, bias=bias)
        )
        norm = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dimensions](5)
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            nn.init.normal_(tensor)
        nn.init.uniform_(norm.running_var, 0.1, 3)
        return nn.Sequential(first, norm, nn.ReLU()).eval()


def example_input(dimensions: int) -> torch.Tensor:
    return torch.randn(3, 4) if not dimensions else torch.randn(3, 2, *[4] * dimensions)


SQUARE = {"class": "Linear", "args": {"in_features": 3, "out_features": 3}}
PLAN = Plan(
    (
        Keep(tensor="0.weight", dim=0, index=(0, 2, 5)),
        Keep(tensor="0.bias", dim=0, index=(0, 2, 5)),
        Keep(tensor="3.weight", dim=1, index=(0, 2, 5)),
        SetAttribute(path="0", name="out_features", value=3),
        SetAttribute(path="3", name="in_features", value=3),
        Replace(path="1", spec={"class": "Sequential", "children": [{"class": "GELU"}, SQUARE]}),
        Remove(path="2"),
    )
)  # fmt: skip


def test_a_plan_is_applied_and_replayed() -> None:
    model = BY_NAME["mlp"].build()
    kept = model[0].weight.detach()[[0, 2, 5]].clone()
    again = Plan.from_json(json.loads(json.dumps(PLAN.to_json())))
    assert again == PLAN
    assert again.apply(model) is model
    assert bits(model[0].weight) == bits(kept)
    assert (model[0].out_features, model[3].in_features) == (3, 3)
    assert isinstance(model[1][0], nn.GELU)
    assert isinstance(model[2], nn.Identity)
    assert model(torch.randn(2, 6)).shape == (2, 3)
    fresh = PLAN.apply(BY_NAME["mlp"].build())
    fresh.load_state_dict(model.state_dict())
    x = torch.randn(2, 6)
    assert bits(fresh.eval()(x)) == bits(model.eval()(x))


def test_plans_add_up_and_print_one_line_per_edit() -> None:
    one, two = Plan(PLAN.edits[:2]), Plan(PLAN.edits[2:])
    assert one + two == PLAN
    assert len(str(PLAN).splitlines()) == len(PLAN.edits)
    assert str(one).splitlines()[0] == "0.weight: keep 3 along dimension 0"
    assert Plan().apply(BY_NAME["mlp"].build()) is not None


def test_replace_takes_the_mode_of_what_it_replaces() -> None:
    model = BY_NAME["mlp"].build()
    model[1].eval()
    Replace(path="1", spec={"class": "Tanh"}).apply(model)
    assert not model[1].training
    assert model[0].training


def test_keep_of_tied_weights_and_buffers() -> None:
    tied = BY_NAME["tied"].build()
    Keep(tensor="embed.weight", dim=1, index=(0, 1)).apply(tied)
    assert tied.embed.weight is tied.head.weight
    assert tied.embed.weight.shape == (11, 2)
    norm = nn.Sequential(nn.BatchNorm2d(4))
    norm[0].running_mean.copy_(torch.arange(4.0))
    Keep(tensor="0.running_mean", dim=-1, index=(3, 1)).apply(norm)
    assert norm[0].running_mean.tolist() == [3, 1]
    frozen = BY_NAME["frozen"].build()
    Keep(tensor="0.weight", dim=0, index=(1,)).apply(frozen)
    assert not frozen[0].weight.requires_grad


def test_tie() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    Tie(tensor="1.weight", to="0.weight").apply(model)
    assert model[1].weight is model[0].weight
    assert len(list(model.parameters())) == 3


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dimensions", [0, 1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_fold_is_exact(dimensions: int, seed: int, bias: bool) -> None:
    model, x = normed(dimensions, bias=bias, seed=seed), example_input(dimensions)
    before = model(x)
    Fold(norm="1", into="0").apply(model)
    assert isinstance(model[1], nn.Identity)
    assert (model(x) - before).abs().max() <= 1e-5 * before.abs().max().clamp_min(1)


def test_fold_keeps_a_mask_and_refuses_codes() -> None:
    model, x = normed(), example_input(2)
    slot = slots(model)["0.weight"]
    mask = torch.rand(slot.shape) < 0.5
    attach(slot, Mask(mask))
    before = model(x)
    Fold(norm="1", into="0").apply(model)
    assert torch.allclose(model(x), before, atol=1e-5)
    assert not model[0].weight[~mask].any()
    coded = normed()
    slot = slots(coded)["0.weight"]
    attach(slot, Shared(torch.zeros(slot.shape, dtype=torch.int32), torch.ones(1), zero=False))
    with pytest.raises(PhaseError, match=r"folding 1 would change 0.weight"):
        Fold(norm="1", into="0").apply(coded)


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_normalise_is_the_same_function_with_nothing_left_to_store(dimensions: int) -> None:
    model, x = normed(dimensions), example_input(dimensions)
    before = model(x)
    edit = Normalise()
    assert edit.statistics(model) == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    edit.apply(model)
    assert (model(x) - before).abs().max() <= 1e-5 * before.abs().max().clamp_min(1)
    norm = model[1]
    assert not norm.running_mean.any()
    assert bits(norm.running_var) == bits(torch.full((5,), 1 - norm.eps))
    again = bits(norm.state_dict())
    edit.apply(model)
    assert bits(norm.state_dict()) == again or torch.allclose(model(x), before, atol=1e-5)


def test_normalise_leaves_norms_alone_that_have_nothing_to_move() -> None:
    model = nn.Sequential(
        nn.BatchNorm1d(3, affine=False), nn.BatchNorm1d(3, track_running_stats=False), nn.BatchNorm1d(3)
    )
    assert [path for path, _ in Normalise().norms(model)] == ["2"]
    assert Normalise(path="1*").statistics(model) == set()


def test_scale_and_shift() -> None:
    norm = nn.BatchNorm1d(2, affine=False, eps=0.0)
    norm.running_mean.copy_(torch.tensor([1.0, 2.0]))
    norm.running_var.copy_(torch.tensor([4.0, 16.0]))
    scale, shift = scale_and_shift(norm)
    assert scale.tolist() == [0.5, 0.25]
    assert shift.tolist() == [-0.5, -0.5]


@pytest.mark.parametrize(
    ("edit", "error", "words"),
    [
        (Keep(tensor="0.weigth", dim=0, index=(0,)), UnknownNameError, "0.weight"),
        (Keep(tensor="nowhere.weight", dim=0, index=(0,)), UnknownNameError, "nowhere"),
        (Keep(tensor="0.weight", dim=2, index=(0,)), ModelError, r"dimension 2 that 0.weight \(8, 6\) lacks"),
        (Keep(tensor="0.weight", dim=0, index=(8,)), ModelError, "lacks"),
        (Keep(tensor="0.weight", dim=0, index=(-1,)), ModelError, "lacks"),
        (Replace(path="9", spec={"class": "ReLU"}), UnknownNameError, "'9'"),
        (Remove(path="block"), UnknownNameError, "block"),
        (Fold(norm="1", into="0"), ModelError, "1 is no batch norm"),
        (Tie(tensor="0.weight", to="3.weight"), ModelError, "differ in shape"),
        (Tie(tensor="0.weight", to="3.weigth"), UnknownNameError, "3.weight"),
        (SetAttribute(path="0", name="out_feature", value=3), UnknownNameError, "no plain attribute"),
        (SetAttribute(path="0", name="forward", value=3), UnknownNameError, "no plain attribute"),
        (SetAttribute(path="0", name="_parameters", value=3), UnknownNameError, "no plain attribute"),
        (SetAttribute(path="0", name="out_features", value="many"), ModelError, "it holds a int"),
        (SetAttribute(path="0", name="out_features", value=True), ModelError, "it holds a int"),
        (Remove(path=""), ModelError, "whole model"),
    ],
)
def test_edits_that_do_not_fit_are_named(edit: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        edit.apply(BY_NAME["mlp"].build())


def test_keep_cuts_a_training_form_along() -> None:
    model = BY_NAME["mlp"].build()
    mask = torch.rand(8, 6, generator=torch.Generator().manual_seed(0)) > 0.5
    slot = slots(model)["0.weight"]
    attach(slot, Mask(mask.clone()))
    before, latent = slot.value().clone(), slot.latent
    Keep(tensor="0.weight", dim=0, index=(1, 5)).apply(model)
    cut = slots(model)["0.weight"]
    assert cut.latent is latent
    assert bits(cut.value()) == bits(before[[1, 5]])
    assert bits(cut.form.mask) == bits(mask[[1, 5]])


def test_indices_travel_as_runs() -> None:
    edit = Keep(tensor="0.weight", dim=0, index=(0, 1, 2, 5, 7, 8))
    assert edit.to_json()["index"] == "0-2,5,7-8"
    assert Plan.from_json([edit.to_json()]).edits == (edit,)
    for bad in ("0-", "a", "3-1-2", "-1", "0,,1", "0-99999999999"):
        with pytest.raises(FileError):
            Plan.from_json([{**edit.to_json(), "index": bad}])


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_the_optimizer_is_cut_along(kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    build = {"sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), "adam": torch.optim.Adam}[kind]
    optimizer = build(model.parameters())
    model(torch.randn(5, 4)).square().sum().backward()
    optimizer.step()
    key = {"sgd": "momentum_buffer", "adam": "exp_avg"}[kind]
    first, last = (optimizer.state[model[i].weight][key].clone() for i in (0, 2))
    plan = Plan(
        (
            Keep(tensor="0.weight", dim=0, index=(0, 3)),
            Keep(tensor="0.bias", dim=0, index=(0, 3)),
            Keep(tensor="2.weight", dim=1, index=(0, 3)),
            SetAttribute(path="0", name="out_features", value=2),
            SetAttribute(path="2", name="in_features", value=2),
        )
    )
    plan.apply(model, optimizer)
    assert bits(optimizer.state[model[0].weight][key]) == bits(first[[0, 3]])
    assert bits(optimizer.state[model[2].weight][key]) == bits(last[:, [0, 3]])
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.randn(5, 4)).square().sum().backward()
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert applied(model) == plan


@pytest.mark.parametrize(
    "data",
    [
        None,
        {},
        "keep",
        [1],
        [[]],
        [{}],
        [{"edit": "exec", "code": "1"}],
        [{"edit": "keep", "tensor": "w"}],
        [{"edit": "remove", "path": "a", "more": 1}],
        [{"edit": ["remove"], "path": "a"}],
        [{"edit": "keep", "tensor": 3, "dim": 0, "index": [0]}],
        [{"edit": "keep", "tensor": "w", "dim": "0", "index": [0]}],
        [{"edit": "keep", "tensor": "w", "dim": 0, "index": ["a"]}],
        [{"edit": "keep", "tensor": "w", "dim": 0, "index": 4}],
        [{"edit": "keep", "tensor": "w", "dim": True, "index": [1]}],
        [{"edit": "remove", "path": None}],
        [{"edit": "replace", "path": "a", "spec": "Linear"}],
        [{"edit": "tie", "tensor": "a", "to": {}}],
    ],
)
def test_hostile_plans_are_corrupt(data: Any) -> None:
    with pytest.raises(Corrupt):
        Plan.from_json(data)


@pytest.mark.parametrize(
    "spec",
    [
        {},
        {"class": "os.system"},
        {"class": "Linear"},
        {"class": "Linear", "args": {"in_features": -1, "out_features": 2}},
        {"class": "Linear", "args": {"in_features": "x", "out_features": 2}},
        {"class": "ReLU", "args": {"hook": 1}},
        {"class": "ReLU", "args": [1]},
        {"class": "ReLU", "args": "ab"},
        {"class": "Linear", "args": {"in_features": 2, "out_features": 2, "device": "nowhere"}},
        {"class": "Sequential", "children": [{"class": "Lin"}]},
        {"class": "Sequential", "children": [3]},
        {"class": "Sequential", "children": 3},
        {"class": ["ReLU"]},
    ],
)
def test_hostile_specs_are_corrupt(spec: dict[str, Any]) -> None:
    with pytest.raises(Corrupt):
        build(spec)


@pytest.mark.parametrize("width", [1 << 17, 1 << 40])
def test_huge_specs_are_refused_before_memory_is_taken(width: int) -> None:
    layer = {"class": "Linear", "args": {"in_features": width, "out_features": width}}
    with pytest.raises((LimitExceeded, Corrupt)):
        build(layer)
    with pytest.raises(LimitExceeded, match="at most"):
        build(
            {
                "class": "Sequential",
                "children": [{"class": "Linear", "args": {"in_features": 1 << 15, "out_features": 1 << 15}}] * 3,
            }
        )


def test_endless_specs_are_corrupt() -> None:
    spec: dict[str, Any] = {"class": "ReLU"}
    for _ in range(3000):
        spec = {"class": "Sequential", "children": [spec]}
    with pytest.raises(Corrupt):
        build(spec)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)


@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_any_json_is_a_plan_or_refused(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(sorted(EDITS)))
    edit = {"edit": kind} | {
        name: data.draw(json_values | st.sampled_from(["0", "0.weight", "3", "out_features"]))
        for name in EDITS[kind].__dataclass_fields__
    }
    with contextlib.suppress(EspalierError):
        Plan.from_json([edit]).apply(BY_NAME["mlp"].build())


def test_the_spec_classes_are_torch_modules_by_name() -> None:
    for name, cls in SPEC_CLASSES.items():
        assert getattr(nn, name) is cls


def test_fold_refuses_what_would_break_another_layer() -> None:
    model = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Linear(5, 5)).eval()
    model[2].weight = model[0].weight
    with pytest.raises(ModelError, match=r"is shared by 0.weight, 2.weight"):
        Fold(norm="1", into="0").apply(model)
    wide = nn.Sequential(nn.Linear(5, 4), nn.Flatten(0), nn.BatchNorm1d(20))
    with pytest.raises(ModelError, match=r"2 \(20 channels\) cannot be folded into 0"):
        Fold(norm="2", into="0").apply(wide)


def test_set_attribute_takes_lists_for_tuples() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 3), nn.Flatten())
    Plan.from_json([{"edit": "set", "path": "0", "name": "padding", "value": [1, 1]}]).apply(model)
    assert model[0].padding == (1, 1)


CUT = Plan(
    (
        Keep(tensor="0.weight", dim=0, index=(3, 0)),
        Keep(tensor="0.bias", dim=0, index=(3, 0)),
        Keep(tensor="2.weight", dim=1, index=(3, 0)),
        SetAttribute(path="0", name="out_features", value=2),
        SetAttribute(path="2", name="in_features", value=2),
    )
)


def trained(build: Any) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    optimizer = build(model.parameters())
    step(model, optimizer)
    return model, optimizer


def step(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(5, 4)).square().sum().backward()
    optimizer.step()


def test_factored_state_is_cut_where_it_has_the_dimension() -> None:
    model, optimizer = trained(torch.optim.Adafactor)
    first, last = (dict(optimizer.state[model[i].weight]) for i in (0, 2))
    CUT.apply(model, optimizer)
    cut = optimizer.state[model[0].weight]
    assert bits(cut["row_var"]) == bits(first["row_var"][[3, 0]])
    assert bits(cut["col_var"]) == bits(first["col_var"])
    cut = optimizer.state[model[2].weight]
    assert bits(cut["row_var"]) == bits(last["row_var"])
    assert bits(cut["col_var"]) == bits(last["col_var"][:, [3, 0]])
    step(model, optimizer)


def test_state_follows_an_order_too() -> None:
    model, optimizer = trained(torch.optim.Adam)
    before = optimizer.state[model[0].bias]["exp_avg"].clone()
    order = (5, 4, 3, 2, 1, 0)
    Plan((Keep(tensor="0.bias", dim=0, index=order),)).apply(model, optimizer)
    assert bits(optimizer.state[model[0].bias]["exp_avg"]) == bits(before[list(order)])


@pytest.mark.parametrize(
    "odd", [torch.ones(4), torch.ones(6, 6), [torch.ones(6, 4)]], ids=["other axes", "other sizes", "list"]
)
def test_state_that_cannot_be_cut_is_dropped_with_a_warning(odd: Any) -> None:
    model, optimizer = trained(torch.optim.Adam)
    optimizer.state[model[0].weight]["odd"] = odd
    with pytest.warns(EspalierWarning, match=r"Adam keeps state .*0\.weight: odd.*starts afresh"):
        CUT.apply(model, optimizer)
    assert model[0].weight not in optimizer.state
    assert optimizer.state[model[0].bias]["exp_avg"].shape == (2,)
    step(model, optimizer)


@pytest.mark.filterwarnings("error")
def test_the_warning_comes_before_anything_is_changed() -> None:
    model, optimizer = trained(torch.optim.Adam)
    optimizer.state[model[2].weight]["odd"] = torch.ones(4)
    before = bits(model.state_dict())
    with pytest.raises(EspalierWarning):
        CUT.apply(model, optimizer)
    assert bits(model.state_dict()) == before
    assert applied(model) == Plan()
    assert optimizer.state[model[0].weight]["exp_avg"].shape == (6, 4)


def test_a_table_is_not_cut_and_neither_is_its_state() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    index = torch.arange(24).reshape(6, 4) % 6
    attach(slots(model)["0.weight"], Shared(index, torch.linspace(-1, 1, 6), zero=False))
    table = slots(model)["0.weight"].latent
    optimizer = torch.optim.Adam(model.parameters())
    step(model, optimizer)
    before = optimizer.state[table]["exp_avg"].clone()
    CUT.apply(model, optimizer)
    assert bits(optimizer.state[table]["exp_avg"]) == bits(before)
    step(model, optimizer)


@pytest.mark.parametrize("name", ["1.weight", "1.bias"])
def test_norms_with_masks_are_normalised_too(name: str) -> None:
    model, x = normed(), example_input(2)
    attach(slots(model)[name], Mask(torch.tensor([True, False, True, True, False])))
    before = model(x)
    Plan((Normalise(),)).apply(model)
    assert torch.allclose(model(x), before, atol=1e-5)
    assert (model[1].weight[1] == 0) == (name == "1.weight")
