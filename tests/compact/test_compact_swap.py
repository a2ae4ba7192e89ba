"""Swapping trained layers: regression lowers the error, nothing grows, what is left alone is said, files hold it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.compact import (
    AsymmetricKernels,
    Block,
    Bottleneck,
    DepthwiseSeparable,
    Fire,
    Ghost,
    GlobalPooling,
    InvertedResidual,
    Shuffle,
    Swap,
)
from espalier.compact.feature_maps import feature_maps
from espalier.compact.parts import Layer
from espalier.compact.regression import Pairs, error, regress, renormalise, solve_last
from espalier.compact.seen import seen
from espalier.compact.starting import settle
from espalier.core.blocks import Add, Branches, ChannelShuffle, First
from espalier.core.context import Context
from espalier.core.errors import EspalierWarning, NeedError, NoEffectWarning, NumericError, PhaseError, UnknownNameError
from espalier.core.method import Technique
from espalier.core.plan import Plan, applied
from espalier.core.recipe import FileOptions
from espalier.core.record import Record
from espalier.core.task import Task, classification
from espalier.data import standard
from espalier.prune import Prune
from espalier.runs.files import freeze_model, load, write_self_contained, write_weights
from espalier.train import Finetune


def small() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(inplace=True),
        nn.Conv2d(12, 16, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.ReLU(), nn.Flatten(), nn.Dropout(0.1), nn.Linear(256, 10),
    )  # fmt: skip


@pytest.fixture(scope="module")
def digits() -> Task:
    data = standard("digits")
    return classification(data.train, data.val, data.test)


@pytest.fixture(scope="module")
def trained(digits: Task) -> nn.Module:
    torch.manual_seed(0)
    return Finetune(epochs=2, lr=3e-3)(small(), Context(task=digits)).eval()


def records(technique: Technique, model: nn.Module, task: Task) -> tuple[nn.Module, Record]:
    kept: list[Record] = []

    class Watching(Context):
        def perform(self, technique: Technique, model: nn.Module) -> nn.Module:
            kept.append(self.record)
            return super().perform(technique, model)

    return technique(model, Watching(task=task)), kept[0]


def swapped(record: Record) -> dict[str, dict[str, Any]]:
    return {row["layer"]: row for row in record.details["swapped"]}


@pytest.mark.parametrize(
    "block",
    [DepthwiseSeparable(), DepthwiseSeparable(norm=True, activation="relu"), InvertedResidual(expansion=1.0), Shuffle(),
     Ghost(), Fire(), Bottleneck(), AsymmetricKernels()],
    ids=lambda b: b.id + "-norm" * getattr(b, "norm", False),
)  # fmt: skip
def test_regression_lowers_the_error(block: Block, trained: nn.Module, digits: Task) -> None:
    method = Swap(block=block, layers=("3", "6"), regression=30, batches=3)
    result, record = records(method, trained, digits)
    rows = swapped(record)
    assert list(rows) == ["3", "6"]
    for path, row in rows.items():
        assert row["numbers"][1] < row["numbers"][0]
        assert row["numbers"][1] == sum(p.numel() for p in result.get_submodule(path).parameters())
        assert row["error"]["regressed"] <= row["error"]["start"]
    assert rows["6"]["error"]["regressed"] < 0.97 * rows["6"]["error"]["start"]
    assert digits.measure(result, "val").value > 40


def test_files_and_plans_hold_it(trained: nn.Module, digits: Task, tmp_path: Path) -> None:
    result = Swap(block=Fire(norm=True), regression=5, batches=1)(trained, Context(task=digits)).eval()
    assert sum(p.numel() for p in result.parameters()) < sum(p.numel() for p in trained.parameters())
    replayed = Plan.from_json(applied(result).to_json()).apply(small()).eval()
    replayed.load_state_dict(result.state_dict())
    x = digits.example()[0][:7]
    frozen = freeze_model(result, digits)
    write_self_contained(frozen, tmp_path / "a", FileOptions(), "fp32")
    write_weights(frozen, tmp_path / "b", FileOptions(), "fp32")
    with torch.no_grad():
        wanted = result(x)
        assert torch.equal(replayed(x), wanted)
        for loaded in (load(tmp_path / "a"), load(tmp_path / "b", into=small())):
            torch.testing.assert_close(loaded.eval()(x), wanted, atol=1e-3, rtol=1e-3)


def test_global_pooling_stands_for_the_layer_behind_the_flattening(trained: nn.Module, digits: Task) -> None:
    assert feature_maps(trained, Context(task=digits)) == {"10": (16, 4, 4)}
    result, record = records(Swap(block=GlobalPooling()), trained, digits)
    assert list(swapped(record)) == ["10"]
    assert swapped(record)["10"]["numbers"] == [2570, 170]
    assert "fully connected" in " ".join(row["reason"] for row in record.skipped)
    assert digits.measure(result, "val").value > 60


class ChannelsLast(nn.Module):
    """Flattened as (height, width, channels)."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.body, self.head = how, nn.Conv2d(1, 6, 3), nn.Linear(216, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        if self.how == "transpose":
            return self.head(F.relu(x.transpose(1, 2)).flatten(1))
        moved = x.permute(0, 2, 3, 1)
        return self.head(moved.flatten(1) if self.how == "flatten" else moved.reshape(x.shape[0], -1))


@pytest.mark.parametrize("how", ["flatten", "reshape", "transpose"])
def test_maps_with_channels_last_are_not_pooled(how: str, digits: Task) -> None:
    torch.manual_seed(0)
    assert feature_maps(ChannelsLast(how), Context(task=digits)) == {}


class Functional(nn.Module):
    """Flattened by a view, on batches of any size; a second linear layer that reads no map."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.one, self.two = nn.Conv2d(1, 6, 3), nn.Linear(216, 10), nn.Linear(10, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.body(x))
        return self.two(F.relu(self.one(F.relu(x.view(x.shape[0], -1)))))


def test_maps_are_found_behind_views_and_activations(digits: Task) -> None:
    torch.manual_seed(0)
    assert feature_maps(Functional(), Context(task=digits)) == {"one": (6, 6, 6)}


def test_a_model_that_cannot_be_traced_is_left_alone(digits: Task) -> None:
    class Loose(Functional):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if float(x.sum()) > -1e9 else x

    torch.manual_seed(0)
    with pytest.warns(NoEffectWarning, match="flattened"):
        _, record = records(Swap(block=GlobalPooling()), Loose(), digits)
    assert "cannot be traced" in record.notes[0]


def test_the_same_seed_gives_the_same_bits(trained: nn.Module, digits: Task) -> None:
    method = Swap(block=InvertedResidual(expansion=1.0, norm=True), layers=("3",), regression=5, batches=1)
    first, again, other = (method(trained, Context(task=digits, seed=seed)).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_with_epochs_it_is_fine_tuned(trained: nn.Module, digits: Task) -> None:
    short = Swap(block=Shuffle(), regression=0, batches=1)
    before, after = (records(short.replace(epochs=n), trained, digits) for n in (0, 1))
    assert "history" not in before[1].details
    assert len(after[1].details["history"]) == 1
    assert digits.measure(after[0], "val").value > digits.measure(before[0], "val").value


class Awkward(nn.Module):
    """Layers that must stay, one for each reason."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Conv2d(4, 4, 3, padding=1)
        self.again = self.shared
        self.tied, self.twin = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.twin.weight = self.tied.weight
        self.frozen = nn.Conv2d(4, 4, 3, padding=1).requires_grad_(requires_grad=False)
        self.hooked = nn.Conv2d(4, 4, 3, padding=1)
        self.hooked.register_forward_hook(lambda *_: None)
        self.unused = nn.Conv2d(4, 4, 3)
        self.uneven = nn.Conv2d(4, 4, 4, padding="same")
        self.up = nn.ConvTranspose2d(4, 4, 3, padding=1)
        self.pointwise = nn.Conv2d(4, 4, 1)
        self.tiny = nn.Conv2d(4, 1, 3, padding=1)
        self.good = nn.Conv2d(1, 4, 3, padding=1)
        self.twofold = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.again(self.shared(self.good(x)))
        h = self.up(self.uneven(self.hooked(self.frozen(self.twin(self.tied(h))))))
        h = self.twofold(self.twofold(h))
        return self.head((self.tiny(h) + self.pointwise(h)).mean((2, 3)))


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
def test_what_must_stay_stays_and_is_said() -> None:
    torch.manual_seed(0)
    data = [(torch.randn(6, 1, 6, 6), torch.arange(6) % 3) for _ in range(2)]
    result, record = records(Swap(regression=2), Awkward(), classification(data, data))
    assert sorted(swapped(record)) == ["good", "twofold"]  # the second runs twice under one name
    reasons = {row["name"].removesuffix(".weight"): row["reason"] for row in record.skipped}
    for name, words in {
        "shared": "other owners", "tied": "other owners", "frozen": "frozen", "hooked": "hooks",
        "unused": "does not call", "uneven": "more padding on one side", "up": "ConvTranspose2d", "pointwise": "1x1",
        "head": "no convolution", "tiny": "would hold",
    }.items():  # fmt: skip
        assert words in reasons[name], name
    assert result.twin.weight is result.tied.weight


def test_a_bias_of_two_layers_keeps_both() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
    model[2].bias = model[0].bias
    with pytest.warns(NoEffectWarning, match="other owners"):
        records(Swap(regression=0), model, Task(train=[(torch.randn(20, 4, 6, 6),)]))


def test_nothing_grows(digits: Task, trained: nn.Module) -> None:
    with pytest.warns(NoEffectWarning, match="the block would hold"):
        records(Swap(block=InvertedResidual(expansion=6.0), layers=("3",)), trained, digits)


def test_a_layer_that_the_model_reads_is_left_alone_by_name(digits: Task) -> None:
    class Reading(Functional):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.body.weight.sum()

    torch.manual_seed(0)
    with pytest.warns(NoEffectWarning, match=r"reads more of it than its output \(AttributeError"):
        _, record = records(Swap(regression=1), Reading(), digits)
    assert record.skipped[0]["name"] == "one.weight"
    assert record.skipped[-1]["name"] == "body.weight"
    vectors = [(torch.randn(8, 4, 8), torch.arange(8) % 3) for _ in range(2)]
    encoder = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 64, batch_first=True), nn.Flatten(), nn.Linear(32, 9))
    result, record = records(Swap(block=Bottleneck(), regression=1), encoder, classification(vectors))
    assert list(swapped(record)) == ["2"]
    assert isinstance(result[0].linear1, nn.Linear)


def test_masked_weights_are_refused_or_given_up(trained: nn.Module, digits: Task) -> None:
    pruned = Prune(sparsity=0.5)(trained, Context(task=digits))
    method = Swap(layers=("3",), regression=1, batches=1)
    with pytest.raises(PhaseError, match=r"3.weight"):
        method(pruned, Context(task=digits))
    assert isinstance(method.replace(densify=True)(pruned, Context(task=digits))[3], nn.Sequential)


def test_bad_input_gets_a_sentence(trained: nn.Module, digits: Task) -> None:
    with pytest.raises(NeedError, match="training data"):
        Swap()(trained, Context(task=dataclasses.replace(digits, train=None)))
    with pytest.raises(UnknownNameError, match="'33'"):
        Swap(layers=("33",))(trained, Context(task=digits))
    broken = classification([(torch.full((4, 1, 8, 8), torch.nan), torch.arange(4))])
    with pytest.raises(NumericError, match="NaN"):
        Swap()(trained, Context(task=broken))


def test_of_large_inputs_a_part_is_kept(monkeypatch: Any, trained: nn.Module, digits: Task) -> None:
    sizes: list[int] = []
    whole = regress

    def watching(block: nn.Module, pairs: Pairs, **fields: Any) -> tuple[float, float]:
        sizes.append(len(pairs))
        return whole(block, pairs, **fields)

    monkeypatch.setattr("espalier.compact.swap.regress", watching)
    monkeypatch.setattr("espalier.compact.seen.MEMORY", 2 * 9 * (12 + 16) * 64)
    Swap(layers=("3",), regression=1, batches=2)(trained, Context(task=digits))
    assert sizes == [18]


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
def test_pairs_are_inputs_now_and_outputs_before(trained: nn.Module, digits: Task) -> None:
    """In-place activations behind a layer do not reach what was kept; layers that run twice are seen twice."""
    torch.manual_seed(0)
    now = Finetune(epochs=1, lr=1e-2)(trained, Context(task=digits)).eval()
    context = Context(task=dataclasses.replace(digits, train=list(digits.data("val"))[:3]))
    pairs = seen(now, trained, "3", context, 2)
    assert pairs is not None
    x = torch.cat([batch[0] for batch in list(digits.data("val"))[:2]])
    with torch.no_grad():
        torch.testing.assert_close(pairs.x, now[:3](x))
        torch.testing.assert_close(pairs.y, trained[:4](x))
    data = [(torch.randn(6, 1, 6, 6), torch.arange(6) % 3) for _ in range(2)]
    twice = seen(Awkward().eval(), Awkward().eval(), "twofold", Context(task=classification(data)), 2)
    assert twice is not None
    assert len(twice) == 24


# --- the regression and the start, alone -----------------------------------------------------------------------------


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def quiet(*_: int) -> None:
    pass


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_last_layer_is_solved_by_least_squares(bias: bool, groups: int) -> None:
    """Against torch's own solver, on unfolded patches."""
    torch.manual_seed(0)
    x, y = torch.randn(12, 4, 6, 6), torch.randn(12, 6, 4, 4)
    layer = nn.Conv2d(4, 6, 3, groups=groups, bias=bias)
    solve_last(nn.Sequential(layer), Pairs(x, y), rng())
    for group in range(groups):
        part = x.chunk(groups, 1)[group]
        rows = F.unfold(part, 3).transpose(1, 2).flatten(0, 1)
        rows = torch.cat([rows, torch.ones(len(rows), 1)], 1) if bias else rows
        wanted = y.chunk(groups, 1)[group].flatten(2).transpose(1, 2).flatten(0, 1)
        best = torch.linalg.lstsq(rows, wanted).solution
        missed = (rows @ best - wanted).square().mean()
        got = layer(x).chunk(groups, 1)[group].flatten(2).transpose(1, 2).flatten(0, 1)
        assert float((got - wanted).square().mean().detach()) == pytest.approx(float(missed), rel=1e-4)


def test_branches_and_shuffles_at_the_end_are_solved_too() -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 3, 5, 5)
    goal = nn.Sequential(Branches(nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 3, padding=1)), ChannelShuffle(2))
    block = nn.Sequential(Branches(nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 3, padding=1)), ChannelShuffle(2))
    pairs = Pairs(x, goal(x).detach())
    solve_last(block, pairs, rng())
    assert error(block, pairs) < 1e-6
    split = nn.Sequential(Branches(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 1), sizes=(1, 2)))
    goal = nn.Sequential(Branches(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 1), sizes=(1, 2)))
    pairs = Pairs(x, goal(x).detach())
    solve_last(split, pairs, rng())
    assert error(split, pairs) < 1e-6


def test_inputs_that_were_never_seen_keep_their_weights() -> None:
    torch.manual_seed(0)
    x = torch.randn(30, 4)
    x[:, 2] = 0
    layer = nn.Linear(4, 2)
    before = layer.weight[:, 2].detach().clone()
    solve_last(layer, Pairs(x, torch.randn(30, 2)), rng())
    torch.testing.assert_close(layer.weight[:, 2].detach(), before)
    dead = nn.Linear(4, 2, bias=False)
    before = dead.weight.detach().clone()
    solve_last(dead, Pairs(torch.zeros(30, 4), torch.randn(30, 2)), rng())
    assert torch.equal(dead.weight, before)


def test_a_regression_that_makes_it_worse_is_not_kept() -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 6)
    block = nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 4))
    pairs = Pairs(x, block(x).detach())
    before = {name: value.clone() for name, value in block.state_dict().items()}
    first, last = regress(block, pairs, steps=3, lr=10.0, samples=8, rng=rng(), tell=quiet)
    assert first == last == 0.0
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())


def test_error_is_the_share_of_the_variance() -> None:
    x = torch.randn(50, 3, generator=rng())
    assert error(nn.Identity(), Pairs(x, x)) == 0
    mean = nn.Linear(3, 3)
    with torch.no_grad():
        mean.weight.zero_()
        mean.bias.copy_(x.mean(0))
    assert error(mean, Pairs(x, x)) == pytest.approx(1, rel=1e-5)
    fit, held = Pairs(x, x).split()
    assert (len(fit), len(held)) == (40, 10)
    assert not {*map(tuple, fit.x.tolist())} & {*map(tuple, held.x.tolist())}


@pytest.mark.parametrize(("count", "held"), [(1, 1), (2, 1), (5, 3), (9, 5), (10, 2)])
def test_what_is_judged_on_is_never_fitted_on(count: int, held: int) -> None:
    x = torch.arange(float(count))[:, None]
    fit, judged = Pairs(x, x).split()
    assert len(judged) == held
    assert sorted(fit.x.flatten().tolist() + judged.x.flatten().tolist()) == x.flatten().tolist()


@pytest.mark.parametrize("count", [1, 2, 4])
def test_few_samples_do_no_harm(count: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU())
    task = Task(train=[(torch.randn(count, 32, 4, 4),)])
    started, _ = records(Swap(least_squares=False, regression=0), model, task)
    found, record = records(Swap(), model, task)
    fresh = torch.randn(64, 32, 4, 4)
    pairs = Pairs(fresh, model[0](fresh).detach())
    assert error(found[0], pairs) < 1.5 * error(started[0], pairs)  # type: ignore[index]
    assert any("one sample is too few" in note for note in record.notes) == (count == 1)


def test_a_block_worse_than_the_mean_is_said() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU())
    with torch.no_grad():
        model[0].weight.copy_(torch.linalg.qr(torch.randn(32, 32))[0])
    task = Task(train=[(torch.randn(40, 32) + 10 * torch.randn(32),)])
    method = Swap(block=Bottleneck(width=0.1, activation="relu"), least_squares=False, regression=0)
    with pytest.warns(EspalierWarning, match="more than their mean would"):
        _, record = records(method, model, task)
    assert swapped(record)["0"]["error"]["regressed"] >= 1


def test_shortcuts_and_outputs_that_are_cut_off_are_solved_too() -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 3, 5, 5)
    around = nn.Sequential(Add(nn.Identity(), nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU(), nn.Conv2d(2, 3, 1))))
    goal = 2 * x + 1
    before = error(around, Pairs(x, goal))
    solve_last(around, Pairs(x, goal), rng())
    assert error(around, Pairs(x, goal)) < 0.7 * before
    first = nn.Conv2d(3, 4, 1)
    cut, wanted = (
        nn.Sequential(first, Branches(nn.Identity(), nn.Conv2d(4, 4, 3, padding=1, groups=4)), First(7)) for _ in "ab"
    )
    pairs = Pairs(x, wanted(x).detach())
    solve_last(cut, pairs, rng())
    assert error(cut, pairs) < 1e-6


def test_what_least_squares_cannot_solve_is_said() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv3d(6, 6, 3, padding=1), nn.ReLU())
    _, record = records(Swap(regression=2), model, Task(train=[(torch.randn(12, 6, 4, 4, 4).cumsum(-1),)]))
    assert record.notes == ["0: least squares solve no Conv3d; only the steps of Adam fit its block."]


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6])
def test_settling_lets_everything_through(norm: bool, activation: type[nn.Module]) -> None:
    """The block with activations and batch norms equals the same block without."""
    torch.manual_seed(0)
    one, two, three = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(4, 4, 1)
    linear = nn.Sequential(one, ChannelShuffle(2), Branches(nn.Sequential(two, nn.Conv2d(8, 2, 1))))
    x = 5 * torch.randn(6, 3, 7, 7) + 1
    with torch.no_grad():
        wanted = linear(x)
    between = [nn.BatchNorm2d(8)] if norm else []
    block = nn.Sequential(
        one, *between, activation(), ChannelShuffle(2), Branches(nn.Sequential(two, linear[2][0][1]))
    ).eval()
    settle(block, x)
    with torch.no_grad():
        torch.testing.assert_close(block(x), wanted, atol=1e-3, rtol=1e-3)
    around = Add(nn.Identity(), nn.Sequential(nn.Conv2d(4, 4, 1), activation(), three)).eval()
    y = torch.randn(6, 4, 7, 7)
    with torch.no_grad():
        wanted = y + three(around[1][0](y))
        settle(around, y)
        torch.testing.assert_close(around(y), wanted, atol=1e-4, rtol=1e-4)


def test_a_linear_block_is_left_as_it_is() -> None:
    block = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1))
    before = {name: value.clone() for name, value in block.state_dict().items()}
    settle(block, torch.randn(2, 2, 3, 3))
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())


def test_statistics_are_those_of_the_inputs() -> None:
    torch.manual_seed(0)
    x = 3 * torch.randn(32, 2, 4, 4) + 1
    norm = nn.BatchNorm2d(2)
    block = nn.Sequential(nn.Conv2d(2, 2, 1), norm).eval()
    renormalise(block, x)
    with torch.no_grad():
        inner = block[0](x)
    torch.testing.assert_close(norm.running_mean, inner.mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, inner.transpose(0, 1).flatten(1).var(1))
    assert norm.momentum == 0.1
    assert not block.training


def test_a_layer_knows_itself() -> None:
    layer = Layer.of(nn.Conv2d(4, 6, (3, 5), stride=2, padding=(1, 2), bias=False))
    assert (layer.taps, layer.middle_tap, layer.elements, layer.keeps_size) == (15, 7, 360, False)
    assert Layer.of(nn.Conv2d(4, 4, 3, padding="same", dilation=2)).padding == (2, 2)
    assert Layer.of(nn.Conv2d(4, 4, 3, padding="valid")).padding == (0, 0)
    assert Layer.of(nn.Conv2d(4, 4, 3, padding=1)).same
    assert Layer.of(nn.Linear(3, 2)).elements == 8
