"""Penalties: proximal maps against brute force, fixed points, gates by hand, digits, resume."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.prune.sparse_training import accuracy, cnn, digits, trained
from tests.train.conftest import StoredContext
from torch import Tensor, nn

from espalier.core.context import Context
from espalier.core.errors import PhaseError, UsageError
from espalier.core.forms import Mask
from espalier.core.method import Technique
from espalier.core.parametrize import slots
from espalier.core.selection import select
from espalier.core.task import Task
from espalier.prune import (
    L1,
    Backward,
    Dropout,
    Global,
    GroupLasso,
    Growing,
    HardConcrete,
    LossPrune,
    Prune,
    Random,
    Regularize,
    Scale,
    Slimming,
    TargetedDropout,
    Units,
    VariationalDropout,
)
from espalier.prune.group_lasso import block_soft_threshold
from espalier.prune.grouping import group_dims, grouped, ungrouped
from espalier.prune.growing import unimportant
from espalier.prune.hard_concrete import gate, open_probability
from espalier.prune.scale import batch_norms
from espalier.share import KMeans
from espalier.train import SGD, Constant
from espalier.train.proximal import soft_threshold, step_sizes

SEEDS = st.integers(0, 100)


@given(seed=SEEDS, threshold=st.floats(0, 2))
@settings(max_examples=25, deadline=None)
def test_proximal_maps_minimise(seed: int, threshold: float) -> None:
    """No other point nearby gives less of |u - w|^2 / 2 + t |u|, elementwise or in norm."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(4, 3, generator=generator).double()
    near = torch.randn(50, 4, 3, generator=generator).double() * 0.1

    def lasso(u: Tensor) -> Tensor:
        return (u - w).square().sum((-2, -1)) / 2 + threshold * u.abs().sum((-2, -1))

    def group(u: Tensor) -> Tensor:
        return (u - w).square().sum((-2, -1)) / 2 + threshold * u.norm(dim=-1).sum(-1)

    single, block = soft_threshold(w, threshold), block_soft_threshold(w, threshold, (1,))
    assert bool((lasso(single) <= lasso(single + near) + 1e-12).all())
    assert bool((group(block) <= group(block + near) + 1e-12).all())
    assert torch.equal(soft_threshold(-w, threshold), -single)


@pytest.mark.parametrize(
    "optimizer", [SGD(momentum=0.5, weight_decay=0.0), Regularize().optimizer.replace(weight_decay=0.0)]
)
def test_optimum_of_the_lasso_is_where_training_ends(optimizer) -> None:
    """One orthonormal problem: min |w - a|^2 / 2 + s |w|_1 has the closed form soft(a, s), with every optimizer."""
    a = torch.tensor([[1.0, -0.5, 0.2, -0.1, 0.05, 0.0]])
    model = nn.Sequential(nn.Linear(6, 1, bias=False))
    task = Task(train=[(torch.eye(6), a.T)] * 20, loss=lambda out, target: (out - target).square().sum() / 2)
    method = Regularize(
        epochs=30, lr=0.05, lr_schedule=Constant(), optimizer=optimizer, until=1.0, penalty=L1(strength=0.15)
    )
    found = slots(method(model, Context(task=task)))["0.weight"].value()
    assert torch.allclose(found, soft_threshold(a, 0.15), atol=2e-3)
    assert (found != 0).tolist() == [[True, True, True, False, False, False]]


def test_step_sizes_are_the_optimizers() -> None:
    parameter = nn.Parameter(torch.ones(2))
    assert step_sizes(torch.optim.SGD([parameter], lr=0.1, momentum=0.9), parameter) == pytest.approx(1.0)
    adam = torch.optim.Adam([parameter], lr=0.1)
    parameter.grad = torch.tensor([4.0, -1.0])
    before = parameter.detach().clone()
    adam.step()
    moved = (before - parameter.detach()) / parameter.grad
    assert torch.allclose(torch.as_tensor(step_sizes(adam, parameter)), moved, rtol=1e-4)
    assert step_sizes(adam, nn.Parameter(torch.ones(2))) == 0


def test_an_input_that_is_always_zero_does_not_decide_for_its_filter() -> None:
    """Its weight has no gradient, so Adam's step for it is boundless."""
    method, weight = GroupLasso(strength=0.01), torch.ones(1, 2, 4)
    step = torch.full((1, 2, 4), 0.1)
    step[..., 0] = 1e6
    found = method.proximal(weight, step)
    assert torch.allclose(found, torch.full((1, 2, 4), 1 - 0.01 * 2 * (0.1 / 0.75) / 2))


@pytest.mark.parametrize(
    ("of", "dims"), [("weights", ()), ("filters", (2, 3, 4)), ("channels", (1, 3, 4)), ("shapes", (1,))]
)
def test_groups(of, dims: tuple[int, ...]) -> None:
    assert group_dims(5, of) == dims


KINDS: dict[str, nn.Module] = {
    "linear": nn.Linear(6, 4, bias=False),
    "plain": nn.Conv2d(6, 4, 3, bias=False),
    "grouped": nn.Conv2d(6, 4, 3, groups=2, bias=False),
    "transposed": nn.ConvTranspose2d(6, 4, 3, bias=False),
    "transposed-grouped": nn.ConvTranspose2d(6, 4, 3, groups=2, bias=False),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("of", ["filters", "channels"])
def test_a_group_is_what_one_output_or_one_input_has(kind: str, of) -> None:
    """By the layer's own arithmetic: without a group exactly one output, or the reading of one input, is gone."""
    module = copy.deepcopy(KINDS[kind])
    (slot,) = slots(module).values()
    weight = grouped(slot, torch.rand(slot.shape) + 0.5)
    assert torch.equal(grouped(slot, ungrouped(slot, weight)), weight)
    dims = group_dims(weight.ndim, of)
    index = torch.arange(weight.sum(dims).numel()).reshape(weight.sum(dims, keepdim=True).shape).expand_as(weight)
    assert index.max() + 1 == (4 if of == "filters" else 6)
    one, shape = torch.eye(6), (6, 6) if kind == "linear" else (6, 6, 1, 1)
    spread = one.reshape(shape) * torch.ones(*shape[:2], *([5, 5] if kind != "linear" else []))
    for number in range(int(index.max()) + 1):
        with torch.no_grad():
            slot.latent.copy_(ungrouped(slot, weight * (index != number)))
            reads = module(spread).flatten(2).sum(2) if kind != "linear" else module(spread)  # (input, output)
        whole = reads != 0
        with torch.no_grad():
            slot.latent.copy_(ungrouped(slot, weight))
            all_of_it = (module(spread).flatten(2).sum(2) if kind != "linear" else module(spread)) != 0
        lost = (all_of_it & ~whole).nonzero()
        assert len(lost)
        assert len(set(lost[:, 1 if of == "filters" else 0].tolist())) == 1
        assert not whole[:, lost[0, 1]].any() if of == "filters" else not whole[lost[0, 0]].any()


def test_no_penalty_reaches_across_the_groups_of_a_convolution() -> None:
    """Of the first half of a grouped convolution's inputs nothing is worth keeping, of the second half everything."""
    weight = torch.cat([torch.full((1, 2, 3, 3, 3), 1e-3), torch.ones(1, 2, 3, 3, 3)])
    found = GroupLasso(strength=0.1, of="channels").proximal(weight, 0.1)
    assert not found[0].any()
    assert found[1].all()
    assert unimportant(weight, 0.5, group_dims(5, "channels"))[0].all()
    assert not unimportant(weight, 0.5, group_dims(5, "channels"))[1].any()


def still(model: nn.Module, x: Tensor) -> Task:
    """A task that pulls at nothing."""
    return Task(train=[(x,)] * 10, loss=lambda out, *_: out.sum() * 0, predict=lambda m, b: m(b[0]))


@pytest.mark.parametrize("penalty", [GroupLasso(of="channels"), HardConcrete(of="channels"), Growing(of="filters")])
def test_what_has_no_such_groups_is_listed(penalty) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.depth = nn.Embedding(7, 4), nn.Conv2d(4, 4, 3, groups=4, bias=False)
            self.last = nn.Conv2d(4, 2, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(self.depth(self.words(x).movedim(-1, 1)))
            return out

    context, x = Context(), torch.randint(0, 7, (2, 5, 5))
    context.task = still(Net(), x)
    model = Net()
    before = {name: slot.value().clone() for name, slot in slots(model).items()}
    result = slots(Regularize(penalty=penalty, epochs=1, optimizer=SGD(weight_decay=0)).transform(model, context))
    listed = {row["name"]: row["reason"] for row in context.record.skipped}
    assert "looked up" in listed["words.weight"]
    assert torch.equal(result["words.weight"].value(), before["words.weight"])
    if penalty.groups == "channels":
        assert "reads one input" in listed["depth.weight"]
        assert torch.equal(result["depth.weight"].value(), before["depth.weight"])


@pytest.mark.parametrize(
    "penalty",
    [L1(strength=1e3), *(GroupLasso(strength=1e3, of=of) for of in ("filters", "channels", "shapes")),
     *(HardConcrete(strength=10.0, speed=1e3, of=of) for of in ("weights", "filters", "channels")),
     Slimming(strength=1e3)],
    ids=lambda p: f"{p.id}-{p.groups}",
)  # fmt: skip
def test_a_layer_never_vanishes(penalty) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, groups=3, bias=False), nn.BatchNorm2d(6), nn.ConvTranspose2d(6, 4, 3, groups=2, bias=False),
        nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4),
    )  # fmt: skip
    method = Regularize(penalty=penalty, epochs=2, layers=("type:Conv2d", "type:ConvTranspose2d"))
    result = slots(method(model, Context(task=still(model, torch.randn(2, 3, 6, 6)))))
    for name in ("0.weight", "2.weight", "4.weight"):
        if name == "0.weight" and penalty.groups == "channels":
            continue  # each of its groups reads one input
        slot = result[name]
        weight = grouped(slot, slot.value())
        left = (
            (weight != 0).float().sum(group_dims(weight.ndim, penalty.groups))
            if penalty.groups != "weights"
            else weight
        )
        if not isinstance(penalty, Slimming):
            assert int((left != 0).sum()) == 1, name
        else:
            assert int((weight != 0).flatten(2).any(2).sum()) == 1
            assert int((result[f"{int(name[0]) + 1}.weight"].value() != 0).sum()) == 1


@pytest.mark.parametrize("until", [0.3, 0.5, 1.0])
def test_growing_ends_at_its_ceiling(until: float) -> None:
    """Nothing else pulls, so what is left is the product of the shrinkages: the last of them is the ceiling's."""
    model, lr, ceiling = nn.Linear(4, 3, bias=False), 0.1, 2.0
    context = Context(task=still(model, torch.randn(2, 4)))
    Regularize(
        penalty=Growing(ceiling=ceiling), epochs=2, until=until, lr=lr, lr_schedule=Constant(),
        optimizer=SGD(momentum=0.0, weight_decay=0.0),
    ).transform(model, context)  # fmt: skip
    steps = round(until * 20)
    left = math.prod(1 / (1 + lr * ceiling * step / steps) for step in range(1, steps + 1))
    assert context.record.details["norm left of what was removed"]["weight"] == pytest.approx(left, rel=1e-5)


def test_group_lasso_weighs_groups_by_the_root_of_their_size() -> None:
    weight = torch.randn(1, 3, 4, 2, 2).double()
    found = GroupLasso(strength=0.1).proximal(weight, 0.5)
    for before, after in zip(weight[0], found[0], strict=True):
        assert torch.allclose(after, before * max(0.0, 1 - 0.5 * 0.1 * 4 / float(before.norm())))


def test_growing_picks_the_smallest_groups() -> None:
    weight = torch.tensor([[3.0, -3.0], [0.1, 0.2], [1.0, -1.0], [0.2, 0.3]])
    assert unimportant(weight, 0.5, (1,))[:, 0].tolist() == [False, True, False, True]
    assert int(unimportant(weight, 0.3, ()).sum()) == 2


def test_hard_concrete_by_hand() -> None:
    """Eqs. 10-12: the gate for one noise, and P(z > 0) against a count of draws."""
    u, log_alpha = 0.3, 0.5
    s = 1 / (1 + math.exp(-(math.log(u) - math.log(1 - u) + log_alpha) / (2 / 3)))
    assert float(gate(torch.tensor(log_alpha), torch.tensor(u))) == pytest.approx(s * 1.2 - 0.1, abs=1e-6)
    noise = torch.rand(200_000, generator=torch.Generator().manual_seed(0)).clamp(1e-6, 1 - 1e-6)
    for value in (-3.0, 0.0, 1.5):
        drawn = (gate(torch.full_like(noise, value), noise) > 0).float().mean()
        assert float(open_probability(torch.tensor(value))) == pytest.approx(float(drawn), abs=0.005)


def test_scale_reads_the_batch_norm_that_follows() -> None:
    model = cnn()
    with torch.no_grad():
        model[1].weight.copy_(torch.arange(8) - 4)
    context = Context(task=digits())
    scores = Scale().scores(model, select(model, ("*",)), context)
    assert set(scores) == {"0.weight", "4.weight"}
    assert scores["0.weight"].tolist() == [4, 3, 2, 1, 0, 1, 2, 3]
    assert [row["name"] for row in context.record.skipped] == ["8.weight"]
    pruned = Prune(criterion=Scale(), pattern=Units(), sparsity=0.25, layers=("0",))(model, Context(task=digits()))
    gone = (slots(pruned)["0.weight"].value().flatten(1) == 0).all(1)
    assert gone.nonzero().flatten().tolist() == [3, 4]


class _Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(144, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.head((self.norm(y) + y).flatten(1))


def test_an_output_that_is_read_twice_has_no_scale() -> None:
    model, context = _Branching(), Context(task=digits())
    assert batch_norms(model, select(model, ("conv",)), context) == {}
    assert "only reader" in context.record.skipped[0]["reason"]


def test_slimming_leaves_channels_that_do_nothing() -> None:
    """Gamma and filter are zero together, and removing the filter's weights changes no output."""
    context = Context(task=digits())
    method = Regularize(epochs=4, lr=3e-3, penalty=Slimming(strength=0.5))
    result = method(trained("cnn"), context)
    found = slots(result)
    silent = 0
    for layer, norm in (("0.weight", "1.weight"), ("4.weight", "5.weight")):
        gone = found[norm].value() == 0
        silent += int(gone.sum())
        assert torch.equal((found[layer].value().flatten(1) == 0).all(1), gone)
    assert silent >= 3
    assert accuracy(result) > 90


RULES = {
    "l1": (Regularize(penalty=L1(strength=0.015)), Random(), None),
    "group-lasso": (Regularize(penalty=GroupLasso(strength=0.04), optimizer=SGD(), layers=("1",)), Random(), Units()),
    "growing": (Regularize(penalty=Growing(sparsity=0.9)), Random(), None),
    "l0": (Regularize(penalty=HardConcrete(strength=5e-3)), Random(), None),
    "targeted": (Dropout(rule=TargetedDropout(sparsity=0.9)), Random(), None),
    "variational": (Dropout(rule=VariationalDropout(strength=10.0)), Random(), None),
}


@pytest.mark.parametrize("name", RULES)
def test_digits_become_sparse_and_beat_random_pruning(name: str) -> None:
    technique, criterion, pattern = RULES[name]
    technique = technique.replace(epochs=8, lr=0.03 if isinstance(technique.optimizer, SGD) else 3e-3)
    result = technique(trained("mlp"), Context(task=digits()))
    chosen = select(result, technique.layers)
    sparsity = sum(int((s.value() == 0).sum()) for s in chosen) / sum(s.value().numel() for s in chosen)
    assert sparsity > 0.5
    other = Prune(
        criterion=criterion, sparsity=sparsity, epochs=8, lr=technique.lr, scope=Global(), layers=technique.layers,
        optimizer=technique.optimizer,
    )  # fmt: skip
    other = other.replace(pattern=pattern) if pattern is not None else other
    random = other(trained("mlp"), Context(task=digits()))
    assert accuracy(result) > accuracy(random), (sparsity, accuracy(result), accuracy(random))
    assert all(slot.form is None or isinstance(slot.form, Mask) for slot in slots(result).values())


RESUMED: list[Technique] = [
    *(Regularize(penalty=part) for part in (L1(strength=0.01), GroupLasso(), HardConcrete(strength=1e-3))),
    *(Regularize(penalty=part) for part in (Growing(of="filters"), Slimming(strength=0.1))),
    *(Dropout(rule=part) for part in (TargetedDropout(), TargetedDropout(of="units"), VariationalDropout())),
    *(Backward(simplify=0.1), LossPrune(sparsity=0.5)),
]


@pytest.mark.parametrize(
    "technique", RESUMED, ids=lambda t: f"{t.id}-{type(getattr(t, 'penalty', getattr(t, 'rule', t))).__name__}"
)
def test_resumed_equals_uninterrupted(technique: Technique) -> None:
    splits = digits()
    task = Task(train=list(splits.train)[:6], val=splits.val, loss=splits.loss)
    technique = technique.replace(epochs=4, lr=3e-3)
    whole_context = StoredContext(task=task)
    whole = technique(trained("cnn"), whole_context)
    for died in (1, 3):
        context = StoredContext(task=task)
        context.epochs().die_after = died
        with pytest.raises(KeyboardInterrupt):
            technique(trained("cnn"), context)
        resumed = technique(trained("cnn"), StoredContext(task=task, stores=context.stores))
        for (name, one), other in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
            assert torch.equal(one, other), name


def test_refusals() -> None:
    with pytest.raises(UsageError, match="epochs=0"):
        Regularize(epochs=0)
    shared = KMeans()(trained("mlp"), Context(task=digits()))
    with pytest.raises(PhaseError, match="densify"):
        Regularize(epochs=1)(shared, Context(task=digits()))


def test_earlier_masks_hold() -> None:
    pruned = Prune(sparsity=0.5)(trained("mlp"), Context(task=digits()))
    before = {name: slot.value() == 0 for name, slot in slots(pruned).items() if slot.form is not None}
    for technique in (Regularize(penalty=HardConcrete()), Dropout(rule=VariationalDropout()), Regularize()):
        after = slots(technique.replace(epochs=1)(pruned, Context(task=digits())))
        assert all(bool((after[name].value()[gone] == 0).all()) for name, gone in before.items())
