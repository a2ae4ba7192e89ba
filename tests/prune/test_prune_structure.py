"""Units that are removed: who scores them, when they go, and that a killed training goes on where it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.train.conftest import StoredContext
from torch import Tensor, nn

from espalier.core.context import Context
from espalier.core.errors import ModelError, NumericError
from espalier.core.model import copy_model
from espalier.core.recipe import FileOptions
from espalier.core.task import Task, classification
from espalier.graph.channels.surgery import groups_of
from espalier.prune import (
    ActivationMean,
    Channels,
    Exponential,
    Global,
    Heads,
    Layer,
    Linear,
    Listed,
    Movement,
    Percentile,
    Prune,
    Random,
    Saliency,
    Scale,
)
from espalier.prune.analysis import analyse
from espalier.prune.parts import Scope
from espalier.prune.preview import preview
from espalier.prune.unit_removal import Removal
from espalier.prune.unit_scores import transposed_weights, unit_scores
from espalier.runs.files import freeze_model, write_weights
from espalier.train import EarlyStopping


def task(shape: tuple[int, ...] = (3, 8, 8), n: int = 64) -> Task:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, *shape, generator=g), torch.randint(4, (n,), generator=g)
    batches = [(x[i : i + 16], y[i : i + 16]) for i in range(0, n, 16)]
    return classification(batches, batches[:2])


def cnn() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4),
    )  # fmt: skip


def widths(model: nn.Module) -> list[int]:
    return [len(p) for name, p in model.named_parameters() if name.endswith("weight") and p.ndim > 1][:-1]


@pytest.mark.parametrize(("inner", "groups"), [(6, 1), (8, 1), (8, 2)])
def test_units_of_a_transposed_convolution_are_its_outputs(inner: int, groups: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, inner, 2, groups=groups), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inner, 4),
    )  # fmt: skip
    found = groups_of(model, (torch.randn(3, 3, 8, 8),))
    own = torch.arange(1.0, inner + 1)
    scores = unit_scores(found.groups, {"2.weight": own}, ActivationMean(), transposed_weights(model))
    reached = [g for g in found.groups if any(p.tensor == "6.weight" for p in g.places) and g.name in scores]
    assert [len(scores[g.name]) for g in reached] == [reached[0].size]
    expected = own.reshape(groups, -1).mean(0) if groups > 1 and reached[0].size < inner else own
    assert torch.equal(scores[reached[0].name], expected.double())
    Prune(criterion=ActivationMean(), pattern=Channels())(model, Context(task=task()))


def test_a_group_without_scores_stays_whole_and_is_listed() -> None:
    for scope in (Layer(), Global()):
        context = Context(task=task())
        smaller = Prune(criterion=Scale(), pattern=Channels(), scope=scope).transform(cnn(), context)
        assert widths(smaller) == [4, 12]
        assert any("no scores for its units" in row["reason"] for row in context.record.skipped)


def test_a_criterion_that_scores_nothing_says_so() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 4, 16, batch_first=True), nn.Flatten(), nn.Linear(40, 4))
    with pytest.raises(ModelError, match="saliency scores no group"):
        Prune(criterion=Saliency(), pattern=Heads())(model, Context(task=task((5, 8))))


def test_coupled_layers_count_alike_whatever_their_scale() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.o = nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Any:
            return self.o(torch.relu(self.a(x) + self.b(x)))

    group = groups_of(Sum(), (torch.randn(3, 5),)).groups
    small, large = torch.arange(1.0, 7), 1000 * torch.arange(6.0, 0, -1)
    scores = unit_scores(group, {"a.weight": small, "b.weight": large}, ActivationMean())
    assert torch.allclose(scores[group[0].name], torch.full((6,), float(scores[group[0].name][0])).double())


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Listed(values=(0.25, 0.5, 0.75)), [6, 4, 2]),
        (Percentile(percent=0.5, rounds=2), [4, 4, 2]),
        (Linear(end=1.0), [6, 4, 2]),
    ],
)
def test_rounds_take_place_when_they_are_due(schedule: Any, expected: list[int]) -> None:
    seen: list[int] = []
    model = cnn()
    sparsity = None if schedule.final is not None else 0.75
    step = Prune(pattern=Channels(), schedule=schedule, epochs=3, sparsity=sparsity, lr=1e-4)
    model.register_forward_pre_hook(lambda module, _: seen.append(len(module[0].weight)) if module.training else None)
    step.transform(model, Context(task=task()))
    per_epoch = [seen[i] for i in (0, 4, 8)]
    assert per_epoch == expected


@pytest.mark.parametrize("epochs", [1, 3])
def test_what_the_schedule_did_not_reach_goes_at_the_end(epochs: int) -> None:
    context = Context(task=task())
    step = Prune(criterion=Movement(), pattern=Channels(), schedule=Linear(), sparsity=0.5, epochs=epochs)
    assert widths(step.transform(cnn(), context)) == [4, 6]
    assert any("before the schedule" in note for note in context.record.notes) == (epochs == 1)


@pytest.mark.parametrize(
    "step",
    [
        Prune(pattern=Channels(), schedule=Linear(end=1.0), sparsity=0.6, epochs=4, lr=1e-3),
        Prune(criterion=Movement(), pattern=Channels(), schedule=Linear(), sparsity=0.5, epochs=4, lr=1e-3),
        Prune(pattern=Channels(), schedule=Listed(values=(0.25, 0.5)), epochs=4, lr=1e-3, stopping=EarlyStopping()),
    ],
)
def test_a_killed_training_goes_on_to_the_same_weights(step: Prune) -> None:
    whole = step(cnn(), StoredContext(task=task()))
    for died in (1, 3):
        context = StoredContext(task=task())
        context.epochs().die_after = died
        with pytest.raises(KeyboardInterrupt):
            step(cnn(), context)
        resumed = step(cnn(), StoredContext(task=task(), stores=context.stores))
        for (name, one), other in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
            assert torch.equal(one, other), name


def test_code_that_follows_by_luck_is_found_out_before_training() -> None:
    """Half of the width fits half of the heads; what the rounds leave does not."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.Linear(8, 16), layer, nn.Flatten(), nn.Linear(80, 4))
    context = Context(task=task((5, 8)))
    step = Prune(pattern=Channels(), schedule=Listed(values=(0.3, 0.6)), epochs=2)
    step.transform(model, context)
    assert any("its graph is trained instead" in note for note in context.record.notes)
    assert [group["after"] for group in context.record.details["groups"]] == [7, 10, 2]


def test_code_that_stops_following_in_training_is_an_error_of_the_model() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Any:
            if len(self.a.weight) == 5:
                raise RuntimeError("five")
            return self.b(torch.relu(self.a(x)))

    step = Prune(pattern=Channels(), schedule=Listed(values=(0.25, 0.375)), epochs=2)
    with pytest.raises(ModelError, match=r"the code of Odd fails \(RuntimeError: five\).*epochs=0"):
        step.transform(Odd(), Context(task=task((6,))))


def test_folding_the_mean_makes_constant_units_free() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4),
    )  # fmt: skip
    with torch.no_grad():
        for layer, constant in ((0, 3), (6, 4)):
            model[layer].weight[:constant] = 0.0  # those units say their bias, whatever comes in
            model[layer].bias[:constant] = 1.5
    data, step = task(), Prune(pattern=Channels(fold=True), sparsity=0.5, layers=("0.weight", "6.weight"))
    context = Context(task=data)
    folded = step.transform(copy_model(model), context)
    plain = step.replace(pattern=Channels())(model, Context(task=data))
    x = next(iter(data.data("val")))[0]
    assert widths(folded) == [3, 5, 4]
    assert torch.allclose(folded(x), model(x), atol=1e-5)
    assert not torch.allclose(plain(x), model(x), atol=1e-2)
    assert context.record.details["folded"] == ["2.bias", "8.bias"]


def test_a_multiple_is_kept_or_the_group_stays_whole() -> None:
    for multiple, expected in ((4, [4, 8]), (8, [8, 8]), (16, [8, 12])):
        step = Prune(pattern=Channels(multiple=multiple), sparsity=0.4)
        assert widths(step(cnn(), Context(task=task()))) == expected


def test_what_may_stay_is_never_exceeded() -> None:
    model = cnn()
    count = sum(p.numel() for p in model.parameters())
    for sparsity in (0.2, 0.35, 0.5, 0.7):
        smaller = Prune(pattern=Channels(measure="parameters"), sparsity=sparsity)(model, Context(task=task()))
        left = sum(p.numel() for p in smaller.parameters())
        assert (1 - sparsity - 0.08) * count < left <= (1 - sparsity) * count


MEASURES = ("units", "parameters", "macs", "bytes", "ms")


@pytest.fixture
def milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that tells the number of parameters."""

    def counted(removal: Removal, chosen: Any) -> float:
        return sum(p.numel() for p in removal.small(chosen).parameters()) / 100

    monkeypatch.setattr(Removal, "_milliseconds", counted)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.usefixtures("milliseconds")
def test_shares_are_of_the_start_of_the_step(measure: Any) -> None:
    """Also in the last of several rounds, also after a resume; and the record says what there was and is."""
    pattern = Channels(measure=measure)
    step = Prune(pattern=pattern, schedule=Listed(values=(0.25, 0.4, 0.5)), epochs=3, lr=1e-4)
    whole = Removal.of(step, pattern, cnn(), Context(task=task())).left()
    died = StoredContext(task=task())
    died.epochs().die_after = 2
    with pytest.raises(KeyboardInterrupt):
        step.transform(cnn(), died)
    for context in (StoredContext(task=task()), StoredContext(task=task(), stores=died.stores)):
        smaller = step.transform(cnn(), context)
        left = Removal.of(step, pattern, smaller, context).left()
        assert context.record.details["measure"] == {
            "name": measure, "before": whole, "after": left, "asked": 0.5 * whole,
        }  # fmt: skip
        assert 0.38 * whole < left <= 0.51 * whole  # trained weights take a few bytes more or less


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.usefixtures("milliseconds")
def test_a_plan_and_a_run_say_the_same(measure: Any) -> None:
    step = Prune(pattern=Channels(measure=measure), sparsity=0.5)
    context = Context(task=task())
    step.transform(cnn(), context)
    planned, done = preview(step, cnn(), Context(task=task())).to_json(), context.record.details
    for name in ("parameters", "macs"):
        assert planned[name] == tuple(done[name].values())
    assert [row["after"] for row in planned["groups"]] == [row["after"] for row in done["groups"]]
    assert planned["measure"] == pytest.approx(done["measure"], abs=16 if measure == "bytes" else 1e-9)


@pytest.mark.parametrize("scope", [Layer(floor=0.5), Global(floor=0.5)])
def test_the_floor_is_a_share_of_the_start(scope: Scope) -> None:
    step = Prune(pattern=Channels(), scope=scope, schedule=Listed(values=(0.5, 0.7, 0.9)), epochs=3, lr=1e-4)
    assert widths(step.transform(cnn(), Context(task=task()))) == [4, 6]


def test_what_is_down_to_one_unit_still_counts() -> None:
    pattern = Channels()
    step = Prune(pattern=pattern, scope=Global(), sparsity=0.7)
    removal = Removal.of(step, pattern, cnn(), Context(task=task()))
    (name,) = (group.name for group in removal.candidates() if group.size == 12)
    removal.take({name: np.arange(12) < 11})
    assert (widths(removal.model), removal.left()) == ([8, 1], 9)
    removal.take(removal.choose(0.7, removal.scores()))
    assert (widths(removal.model), removal.left()) == ([5, 1], 6)
    assert removal.report()["measure"]["before"] == 20


def test_a_target_out_of_reach_is_noted_once() -> None:
    context = Context(task=task())
    step = Prune(pattern=Channels(measure="parameters"), schedule=Listed(values=(0.97, 0.98, 0.99)), epochs=3, lr=1e-4)
    step.transform(cnn(), context)
    assert sum("cannot be reached" in note for note in context.record.notes) == 1


def test_rounding_is_no_early_end() -> None:
    context = Context(task=task())
    step = Prune(pattern=Channels(), schedule=Exponential(end=0.5), sparsity=0.1, epochs=3, lr=1e-4)
    assert step.schedule.sparsity(1.0, 0.1) < 0.1
    step.transform(cnn(), context)
    assert not context.record.notes


def test_bytes_are_those_of_the_file(tmp_path: Path) -> None:
    context, model = Context(task=task()), cnn()
    for tensor in (*model[1].parameters(), model[1].running_mean, model[1].running_var):
        tensor.data.uniform_(1, 2)
    smaller = Prune(pattern=Channels(measure="bytes")).transform(model, context)
    info = write_weights(freeze_model(smaller, None), tmp_path / "weights", FileOptions(), "fp16")
    header = 20  # what it holds of the plan
    assert info.bytes - info.plans - header == pytest.approx(context.record.details["measure"]["after"], abs=4)


def test_infinite_weights_are_not_ranked() -> None:
    model = cnn()
    model[3].weight.data[0, 0, 0, 0] = torch.inf
    with pytest.raises(NumericError, match=r"infinity for 3\.weight"):
        Prune(pattern=Channels())(model, Context(task=task()))


def test_without_training_data_the_statistics_stay_and_that_is_said() -> None:
    context = Context(task=Task(val=task().val))
    Prune(pattern=Channels()).transform(cnn(), context)
    assert any("no training data" in note for note in context.record.notes)


def test_a_kept_analysis_belongs_to_one_model_and_one_way_to_score() -> None:
    context = StoredContext(task=task())
    model, store = cnn(), context.epochs("sensitivity")
    step = Prune(pattern=Channels())

    def values(method: Prune, network: nn.Module) -> Any:
        return analyse(Removal.of(method, method.pattern, network, context), store=store)["groups"]  # type: ignore[arg-type]

    values(step, model)
    number, tensors, kept = store.load() or (0, {}, {})
    kept["rows"][0]["values"] = ["kept"]
    store.save(number, tensors, kept)
    assert values(step, model)[0]["values"] == ["kept"]
    for other in (step.replace(criterion=Random()), step.replace(pattern=Channels(normalise=False))):
        store.save(number, tensors, kept)
        assert values(other, model)[0]["values"] != ["kept"]
    store.save(number, tensors, kept)
    model[7].weight.data.mul_(-1)
    assert values(step, model)[0]["values"] != ["kept"]
