"""How sparsity grows: known points, monotone growth, and that training follows it and holds the masks."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.train.conftest import StoredContext
from torch import nn

from espalier.core.callback import Callback, Loop
from espalier.core.context import Context
from espalier.core.forms import Mask
from espalier.core.metric import Metric
from espalier.core.parametrize import slots
from espalier.core.recipe import step_from_data
from espalier.core.task import classification
from espalier.prune import (
    Cubic,
    Exponential,
    Global,
    GradientRegrowth,
    Layer,
    Linear,
    Listed,
    MomentumRegrowth,
    Movement,
    OneShot,
    Percentile,
    Prune,
    Random,
    Row,
    Schedule,
    Threshold,
)
from espalier.prune.regrowth import row_by_row
from espalier.prune.schedules import ramp
from espalier.testing import EXAMPLES, effective
from espalier.train import SGD, EarlyStopping, Finetune

BY_NAME = {example.name: example for example in EXAMPLES}


@pytest.mark.parametrize(
    ("schedule", "points"),
    [
        (OneShot(), {0.0: 0.8, 0.3: 0.8, 1.0: 0.8}),
        (Linear(), {0.0: 0.0, 0.35: 0.4, 0.7: 0.8, 1.0: 0.8}),
        (Linear(start=0.2, end=0.6), {0.0: 0.0, 0.2: 0.0, 0.3: 0.2, 0.4: 0.4, 0.6: 0.8, 0.9: 0.8}),
        (Cubic(), {0.0: 0.0, 0.35: 0.8 * 0.875, 0.7: 0.8, 1.0: 0.8}),
        (Cubic(start=0.0, end=1.0, initial=0.4), {0.0: 0.4, 0.5: 0.75, 1.0: 0.8}),
        (Cubic(initial=0.9), {0.0: 0.8, 0.5: 0.8, 1.0: 0.8}),
        (Listed(values=(0.2, 0.5, 0.8)), {0.0: 0.2, 0.33: 0.2, 0.34: 0.5, 0.66: 0.5, 0.67: 0.8, 1.0: 0.8}),
    ],
)
def test_known_points(schedule: Schedule, points: dict[float, float]) -> None:
    assert {t: schedule.sparsity(t, 0.8) for t in points} == pytest.approx(points)


def test_cubic_is_the_papers_formula() -> None:
    """Zhu, Gupta 2018, equation 1: s_t = s_f + (s_i - s_f)(1 - (t - t_0) / (n dt))^3."""
    s_i, s_f, t_0, n = 0.1, 0.9, 20, 60
    schedule = Cubic(start=t_0 / 100, end=(t_0 + n) / 100, initial=s_i)
    for t in range(t_0, t_0 + n + 1):
        expected = s_f + (s_i - s_f) * (1 - (t - t_0) / n) ** 3
        assert schedule.sparsity(t / 100, s_f) == pytest.approx(expected, abs=1e-12)


schedules = st.one_of(
    st.just(OneShot()),
    st.builds(Linear, start=st.floats(0, 0.4), end=st.floats(0.5, 1)),
    st.builds(Cubic, start=st.floats(0, 0.4), end=st.floats(0.5, 1), initial=st.floats(0, 0.99)),
    st.lists(st.floats(0, 0.99), min_size=1, max_size=5).map(lambda v: Listed(values=tuple(sorted(v)))),
)


@given(schedule=schedules, final=st.floats(0, 0.99), a=st.floats(0, 1), b=st.floats(0, 1))
def test_sparsity_never_shrinks_and_ends_where_it_should(schedule: Schedule, final: float, a: float, b: float) -> None:
    final = schedule.final if schedule.final is not None else final
    low, high = sorted((a, b))
    assert 0 <= schedule.sparsity(low, final) <= schedule.sparsity(high, final) + 1e-12
    assert schedule.sparsity(1.0, final) == pytest.approx(final, abs=1e-12)


def test_ramp() -> None:
    assert [ramp(t, 0.25, 0.75) for t in (0, 0.25, 0.5, 0.75, 1)] == [0, 0, 0.5, 1, 1]


# --- in training -------------------------------------------------------------------------------------------------


def net() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 3))


def task() -> Any:
    generator = torch.Generator().manual_seed(0)
    data = [(torch.randn(4, 10, generator=generator), torch.arange(4) % 3) for _ in range(10)]
    return classification(data, data[:1])


class Watch(Callback):
    """Notes the share of zeros after every step."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, float]] = []

    def after_step(self, loop: Loop) -> None:
        found = [weight for weight in effective(loop.model).values() if weight.ndim == 2]
        self.seen.append((loop.step, sum(int((w == 0).sum()) for w in found) / sum(w.numel() for w in found)))


class Watched(Prune):
    """Prune, watched."""

    def train(self, *args: Any, callbacks: Any = (), **options: Any) -> Any:
        return super().train(*args, callbacks=(*callbacks, WATCH[0]), **options)


WATCH = [Watch()]


@pytest.mark.parametrize(
    "schedule",
    [OneShot(), Linear(start=0.1), Cubic(), Exponential(), Listed(values=(0.25, 0.5, 0.75))],
    ids=lambda s: s.id,
)
@pytest.mark.parametrize("scope", [Layer(), Global()], ids=lambda s: s.id)
def test_masks_follow_the_schedule(schedule: Schedule, scope: Layer | Global) -> None:
    WATCH[0] = Watch()
    sparsity = None if schedule.final is not None else 0.75
    method = Watched(schedule=schedule, scope=scope, sparsity=sparsity, epochs=4, every=2, optimizer=SGD(), lr=0.05)
    result = method(net(), Context(task=task()))
    seen = WATCH[0].seen
    assert len(seen) == 40
    for step, found in seen:
        asked = schedule.sparsity(step // 2 * 2 / 40, 0.75)
        assert found == pytest.approx(asked, abs=2.1 / 260), f"after step {step}"
    weights = [w for w in effective(result).values() if w.ndim == 2]
    assert [int((w == 0).sum()) for w in weights] == [150, 45] or isinstance(scope, Global)
    assert sum(int((w == 0).sum()) for w in weights) == 195


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_masks_hold_through_fine_tuning(optimizer: str) -> None:
    pruned = Prune(sparsity=0.6)(net())
    tuning = step_from_data(
        {"train.finetune": {"epochs": 3, "lr": 0.05, "optimizer": {optimizer: {"weight_decay": 0.01}}}}
    )
    tuned = tuning(pruned, Context(task=task()))
    for name, weight in effective(pruned).items():
        if weight.ndim == 2:
            assert torch.equal(effective(tuned)[name] == 0, weight == 0)
            assert not torch.equal(effective(tuned)[name], weight)


def test_early_stopping_never_returns_a_model_less_sparse_than_asked() -> None:
    method = Prune(
        sparsity=0.9, schedule=Linear(end=0.6), epochs=5, stopping=EarlyStopping(patience=1), optimizer=SGD(), lr=0.5
    )
    result = method(net(), Context(task=task()))
    assert [int((w == 0).sum()) for w in effective(result).values() if w.ndim == 2] == [180, 54]


class Falling(Metric):
    """Every measurement is worse than the one before."""

    def __init__(self) -> None:
        self.calls = 0

    def per_sample(self, output: Any, target: Any) -> torch.Tensor:
        self.calls += 1
        return torch.full((len(output),), -float(self.calls))


@pytest.mark.parametrize(
    ("schedule", "settled"),
    [
        (OneShot(), 0),
        (Linear(end=0.6), 3),
        (Cubic(end=0.7), 4),
        (Listed(values=(0.5, 0.75)), 3),
        (Linear(end=1.0), 4),
        (Exponential(end=0.4), 2),
        (Percentile(rounds=2), 3),
    ],
    ids=lambda value: getattr(value, "id", value),
)
def test_epochs_of_a_growing_sparsity_are_no_candidates_for_the_best(schedule: Schedule, settled: int) -> None:
    found, left = [], []

    class Kept(Prune):
        def train(self, model: nn.Module, *args: Any, **options: Any) -> Any:
            found.append(super().train(model, *args, **options))
            left.append({name: weight == 0 for name, weight in effective(model).items() if weight.ndim == 2})
            return found[0]

    method = Kept(schedule=schedule, epochs=5, stopping=EarlyStopping(patience=None))
    result = method(net(), Context(task=dataclasses.replace(task(), metric=Falling())))
    assert found[0].best_epoch == settled + 1
    if settled < 4:  # the last epoch is what it is; any other was judged with the masks of the end
        assert all(torch.equal(gone, effective(result)[name] == 0) for name, gone in left[0].items())


@pytest.mark.parametrize("criterion", [Random(), Threshold(quality=0.5)], ids=lambda c: c.id)
def test_every_criterion_prunes_while_training(criterion: Any) -> None:
    method = Prune(criterion=criterion, schedule=Cubic(), epochs=2, every=3, lr=0.01)
    one, again = (method(net(), Context(task=task())) for _ in range(2))
    for name, weight in effective(one).items():
        assert torch.equal(weight, effective(again)[name])
        if weight.ndim == 2:
            assert 0 < int((weight == 0).sum()) < weight.numel()


@pytest.mark.parametrize("quality", [0.5, 1.0])
def test_a_threshold_does_not_run_away_while_training(quality: float) -> None:
    """Its spread is that of the dense weights: taken over what is left, it cut nearly everything in the end."""
    method = Prune(criterion=Threshold(quality=quality), every=2, lr=1e-3)
    at_once = {name: w == 0 for name, w in effective(method(net())).items()}
    trained = {
        (schedule.id, epochs): {
            name: weight == 0
            for name, weight in effective(
                method.replace(epochs=epochs, schedule=schedule)(net(), Context(task=task()))
            ).items()
        }
        for schedule in (OneShot(), Linear(), Listed(values=(0.2, 0.5)), Percentile())
        for epochs in (2, 10)
    }
    size = sum(gone.numel() for gone in at_once.values())
    for (schedule, _), found in trained.items():
        if schedule == "one-shot":
            assert all(torch.equal(gone, found[name]) for name, gone in at_once.items())
        assert sum(int((gone ^ found[name]).sum()) for name, gone in at_once.items()) < 0.06 * size, schedule


def test_a_cut_is_made_once_at_each_move_of_the_schedule() -> None:
    WATCH[0] = Watch()
    method = Watched(
        criterion=Threshold(), schedule=Listed(values=(0.25, 0.5)), epochs=4, every=1, optimizer=SGD(), lr=0.05
    )
    result = method(net(), Context(task=task()))
    shares = [share for _, share in WATCH[0].seen]
    assert len(set(shares[:19])) == len(set(shares[20:])) == 1
    assert shares[0] < shares[-1]
    found = [w for w in effective(result).values() if w.ndim == 2]
    assert sum(int((w == 0).sum()) for w in found) / 260 == shares[-1], "and not again at the end"


def test_the_floor_is_told_and_no_scores_are_kept_through_the_training() -> None:
    kept: list[Any] = []
    records: list[Any] = []

    class Kept(Prune):
        def train(self, *args: Any, callbacks: Any = (), **options: Any) -> Any:
            found = super().train(*args, callbacks=callbacks, **options)
            kept.extend(
                value for held in vars(callbacks[-1]).values() if isinstance(held, dict) for value in held.values()
            )
            return found

    class Recorded(Context):
        def perform(self, technique: Any, model: nn.Module) -> nn.Module:
            records.append(self.record)
            return super().perform(technique, model)

    method = Kept(sparsity=0.8, scope=Global(floor=0.2), epochs=2, schedule=Cubic(), lr=1e-4)
    method(net(), Recorded(task=task()))
    assert records[0].details["clamped"] == ["2.weight"]
    assert not [value for value in kept if isinstance(value, torch.Tensor) and value.is_floating_point()]


@pytest.mark.parametrize("regrowth", [MomentumRegrowth(), GradientRegrowth()], ids=lambda r: r.id)
def test_regrowth_leaves_every_row_as_sparse_as_the_scope_wants_it(regrowth: Any) -> None:
    method = Prune(
        sparsity=0.6, scope=Row(), regrow=0.3, regrowth=regrowth, epochs=4, every=2, optimizer=SGD(momentum=0.9), lr=0.1
    )
    exchanged, one_shot = method(net(), Context(task=task())), method.replace(epochs=0, regrow=0.0)(net())
    for name, count in (("0.weight", 6), ("2.weight", 12)):
        found, at_first = (slots(model)[name].form for model in (exchanged, one_shot))
        assert isinstance(found, Mask)
        assert isinstance(at_first, Mask)
        assert ((~found.mask).sum(1) == count).all()
        assert not torch.equal(found.mask, at_first.mask)


@given(rows=st.integers(1, 5), inputs=st.integers(1, 9), sparsity=st.floats(0, 1), seed=st.integers(0, 99))
def test_row_by_row_by_brute_force(rows: int, inputs: int, sparsity: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    wanted = torch.rand(rows, inputs, 2, generator=generator)
    kept, fence = (torch.rand(rows, inputs, 2, generator=generator) < 0.5 for _ in range(2))
    fence = fence | kept
    back = row_by_row(wanted, kept, fence, sparsity)
    for r in range(rows):
        free = [(float(wanted[r, i, j]), (i, j)) for i in range(inputs) for j in range(2) if (fence & ~kept)[r, i, j]]
        lacking = max(0, int((~kept[r]).sum()) - int(sparsity * inputs * 2 + 1e-9))
        best = {place for _, place in sorted(free, reverse=True)[:lacking]}
        assert {(i, j) for i in range(inputs) for j in range(2) if back[r, i, j]} == best


def test_rewinding_puts_weights_and_batch_norms_back() -> None:
    """With nothing trained after the last jump the weights, and the norms' statistics, are those of the epoch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(10, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 3))
    states: dict[int, dict[str, torch.Tensor]] = {}

    class AtStart(Callback):
        def on_epoch_start(self, loop: Loop) -> None:
            found = effective(loop.model) | dict(loop.model.named_buffers())
            states[loop.epoch] = {name: tensor.clone() for name, tensor in found.items()}

    class Followed(Prune):
        def train(self, *args: Any, callbacks: Any = (), **options: Any) -> Any:
            return super().train(*args, callbacks=(*callbacks, AtStart()), **options)

    method = Followed(
        schedule=Listed(values=(0.2, 0.5)), rewind="weights", rewind_epoch=1, epochs=4, optimizer=SGD(), lr=0.1
    )
    method(model, Context(task=task()))
    assert not torch.equal(states[3]["1.running_mean"], states[2]["1.running_mean"])
    for name in ("1.running_mean", "1.running_var", "1.num_batches_tracked", "1.weight", "3.bias"):
        assert torch.equal(states[2][name], states[1][name]), name
    left = states[2]["0.weight"] != 0
    assert int(left.sum()) == 100
    assert torch.equal(states[2]["0.weight"][left], states[1]["0.weight"][left])


@pytest.mark.parametrize(
    "fields",
    [
        {"criterion": Threshold(), "schedule": Cubic()},
        {"sparsity": 0.8, "scope": Global(floor=0.2)},
        {"criterion": Movement(), "schedule": Linear(end=0.5), "sparsity": 0.5},
        {"schedule": Listed(values=(0.2, 0.4, 0.6)), "rewind": "weights", "rewind_epoch": 1},
    ],
    ids=["threshold", "floor", "movement", "rewind"],
)
def test_a_killed_training_goes_on_as_if_nothing_had_happened(fields: dict[str, Any]) -> None:
    records: list[Any] = []

    class Stored(StoredContext):
        def perform(self, technique: Any, model: nn.Module) -> nn.Module:
            records.append(self.record)
            return super().perform(technique, model)

    step = Prune(epochs=4, every=3, lr=0.01, **fields)
    whole = step(net(), Stored(task=task()))
    for died in (1, 3):
        context = Stored(task=task())
        context.epochs().die_after = died
        with pytest.raises(KeyboardInterrupt):
            step(net(), context)
        resumed = step(net(), Stored(task=task(), stores=context.stores))
        for (name, one), other in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
            assert torch.equal(one, other), name
        for key in ("sparsity", "clamped"):
            assert records[-1].details.get(key) == records[0].details.get(key)


def test_one_shot_repairs_better_than_no_repair() -> None:
    pruned = Prune(sparsity=0.5)(net())
    repaired = Prune(sparsity=0.5, epochs=10, lr=0.01)(net(), Context(task=task()))
    whole = task()
    losses = []
    for model in (pruned, repaired):
        with torch.no_grad():
            losses.append(sum(float(whole.training_loss(model(b[0]), b)) for b in whole.data("train")))
    assert losses[1] < losses[0]


def test_a_frozen_layer_is_pruned_but_never_trained() -> None:
    example = BY_NAME["frozen"]
    model = example.build()
    result = Finetune(epochs=2, lr=0.1)(Prune(sparsity=0.5)(model), Context(task=example.task()))
    weight = effective(result)["0.weight"]
    kept = weight != 0
    assert int(kept.sum()) == 24
    assert torch.equal(weight[kept], model[0].weight[kept])
