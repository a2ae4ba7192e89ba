"""How many weights go, and which: exact counts, nested masks, thresholds, reproducible chance."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from espalier.core.context import Context
from espalier.core.errors import EspalierWarning, NumericError, UnknownNameError, UsageError
from espalier.core.forms import Mask
from espalier.core.method import Technique
from espalier.core.parametrize import slots
from espalier.core.record import Counts, Record
from espalier.core.selection import Selection
from espalier.prune import Criterion, Cubic, Global, Layer, Listed, Prune, Random, Row, Threshold, Weights
from espalier.prune.magnitude import magnitude
from espalier.prune.parts import Scores
from espalier.prune.threshold import threshold
from espalier.testing import EXAMPLES, effective

BY_NAME = {example.name: example for example in EXAMPLES}
sparsities = st.floats(0, 1, exclude_max=True)


def net(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(7, 9), nn.ReLU(), nn.Linear(9, 5), nn.ReLU(), nn.Linear(5, 3))


def zeros(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight == 0 for name, weight in effective(model).items() if weight.ndim >= 2}


@given(sparsity=sparsities, seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_layer_scope_is_exact_in_every_layer(sparsity: float, seed: int) -> None:
    model = net(seed)
    for name, gone in zeros(Prune(sparsity=sparsity)(model)).items():
        assert int(gone.sum()) == min(gone.numel() - 1, math.floor(sparsity * gone.numel() + 1e-9))
        weight = effective(model)[name]
        if gone.any() and not gone.all():
            assert weight[gone].abs().max() <= weight[~gone].abs().min()


@given(sparsity=st.floats(0, 0.8), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_global_scope_is_exact_over_all_layers(sparsity: float, seed: int) -> None:
    model = net(seed)
    gone = torch.cat([mask.reshape(-1) for mask in zeros(Prune(sparsity=sparsity, scope=Global())(model)).values()])
    weights = torch.cat([w.reshape(-1) for w in effective(model).values() if w.ndim >= 2])
    assert int(gone.sum()) == math.floor(sparsity * gone.numel() + 1e-9)
    if gone.any() and not gone.all():
        assert weights[gone].abs().max() <= weights[~gone].abs().min()


def test_known_mask() -> None:
    model = nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, -1.0, 2.0], [-0.5, 5.0, 0.1]]))
    assert Prune(sparsity=0.5)(model).weight.tolist() == [[3, 0, 2], [0, 5, 0]]
    assert magnitude(torch.tensor([-2.0, 1.0])).tolist() == [2, 1]


def test_ties_are_broken_by_position_so_the_count_is_exact() -> None:
    model = nn.Linear(4, 2, bias=False)
    nn.init.ones_(model.weight)
    assert Prune(sparsity=0.5)(model).weight.tolist() == [[0] * 4, [1] * 4]


@pytest.mark.parametrize("scope", [Layer(), Global()])
@pytest.mark.parametrize("criterion", [Random(), Prune().criterion], ids=lambda c: c.id)
@given(low=sparsities, high=sparsities)
@settings(max_examples=15, deadline=None)
def test_masks_nest_in_sparsity(scope: Layer | Global, criterion: Criterion, low: float, high: float) -> None:
    low, high = sorted((low, high))
    less, more = (zeros(Prune(sparsity=s, scope=scope, criterion=criterion)(net())) for s in (low, high))
    assert all(not (less[name] & ~more[name]).any() for name in less)


@given(low=sparsities, high=sparsities)
@settings(max_examples=15, deadline=None)
def test_pruning_again_starts_from_what_is_there(low: float, high: float) -> None:
    """What is gone stays gone: a second step adds to the first, whatever it ranks by; a smaller one changes nothing."""
    first = Prune(sparsity=low)(net())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EspalierWarning)
        second = Prune(sparsity=high, criterion=Random())(first)
    for name, gone in zeros(first).items():
        assert not (gone & ~zeros(second)[name]).any()
        assert int(zeros(second)[name].sum()) == max(
            min(gone.numel() - 1, math.floor(s * gone.numel() + 1e-9)) for s in (low, high)
        )


@dataclass(frozen=True, kw_only=True)
class LargestFirst(Criterion):
    """Negative scores, under which what is gone already would rank last."""

    id: ClassVar[str] = "largest-first"

    def scores(self, model: nn.Module, selection: Selection, context: Context) -> Scores:
        return {slot.name: -slot.value().abs() for slot in selection}


@pytest.mark.parametrize("scope", [Layer(), Global()])
def test_what_is_gone_counts_whatever_the_scores_are(scope: Layer | Global) -> None:
    method = Prune(criterion=LargestFirst(), sparsity=0.5, scope=scope)
    once = method(net())
    with pytest.warns(EspalierWarning, match="changed nothing"):
        twice = method(once)
    assert sum(int(gone.sum()) for gone in zeros(once).values()) in (60, 61)
    for name, gone in zeros(once).items():
        assert torch.equal(zeros(twice)[name], gone)


def test_sparsity_per_pattern() -> None:
    model = net()
    method = Prune(sparsity={"type:Linear": 0.5, "0": 0.25, "#-1": 0.9})
    gone = zeros(method(model))
    assert {name: int(mask.sum()) for name, mask in gone.items()} == {"0.weight": 15, "2.weight": 22, "4.weight": 13}
    only = zeros(Prune(sparsity={"0": 0.25}, layers=("0", "2"))(model))
    assert {name: int(mask.sum()) for name, mask in only.items()} == {
        "0.weight": 15, "2.weight": 22, "4.weight": 0,
    }, "without a pattern the criterion's default"  # fmt: skip
    with pytest.raises(UnknownNameError, match=r"prune.prune: no weight answers to 'fc'"):
        Prune(sparsity={"fc": 0.5})(model)


def test_only_the_chosen_layers_and_the_rest_is_listed_with_a_reason() -> None:
    captured: list[Record] = []

    class Watching(Context):
        def perform(self, technique: Technique, model: nn.Module) -> nn.Module:
            captured.append(self.record)
            return super().perform(technique, model)

    result = Prune(layers=("2",), sparsity=0.5)(net(), Watching())
    assert {name for name, gone in zeros(result).items() if gone.any()} == {"2.weight"}
    assert captured[0].skipped == [
        {"name": n, "reason": "not among the chosen layers"} for n in ("0.weight", "4.weight")
    ]
    assert captured[0].details["sparsity"] == {"2.weight": pytest.approx(22 / 45)}
    assert slots(result)["0.weight"].form is None
    with pytest.raises(UnknownNameError, match="Did you mean"):
        Prune(layers=("2.wieght",))(net())


@pytest.mark.parametrize("name", ["tied", "twice", "recurrent", "attention", "convolution"])
def test_every_weight_is_pruned_once(name: str) -> None:
    example = BY_NAME[name]
    model = example.build()
    result = Prune(sparsity=0.5)(model, Context(task=example.task()))
    expected = sum(w.numel() // 2 for w in effective(model).values() if w.ndim >= 2)
    removed = {n: int((w == 0).sum() - (effective(model)[n] == 0).sum()) for n, w in effective(result).items()}
    assert sum(removed.values()) == expected
    assert Counts.of(model).nonzero - Counts.of(result).nonzero == expected


def test_extremes() -> None:
    """Nothing goes, or all but the best weight of every layer: an empty layer would cut the network."""
    assert not zeros(Prune(sparsity=0.0)(net()))["0.weight"].any()
    for name, gone in zeros(Prune(sparsity=0.9999)(net())).items():
        assert int((~gone).sum()) == 1
        assert effective(net())[name][~gone].abs() == effective(net())[name].abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    for scope in (Layer(), Global()):
        result = Prune(sparsity=0.5, scope=scope)(net().to(dtype))
        assert {w.dtype for w in effective(result).values()} == {dtype}
        assert sum(int(gone.sum()) for gone in zeros(result).values()) in (60, 61)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_cannot_be_ranked_is_refused(bad: float) -> None:
    model = net()
    with torch.no_grad():
        model[2].weight[0, 0] = bad
    with pytest.raises(NumericError, match=r"2.weight holds NaN or infinity; prune.prune cannot rank"):
        Prune()(model)


# --- threshold ---------------------------------------------------------------------------------------------------


@given(value=st.floats(1e-3, 2), seed=st.integers(0, 50))
@settings(max_examples=25, deadline=None)
def test_absolute_threshold(value: float, seed: int) -> None:
    model = net(seed)
    result = Prune(criterion=Threshold(value=value))(model)
    for name, gone in zeros(result).items():
        size = effective(model)[name].abs()
        assert torch.equal(gone, (size / value < 1) & (size < size.max())), "all below it, but never the last one"


@pytest.mark.parametrize("quality", [0.1, 0.5, 1.0, 2.0])
def test_quality_times_the_standard_deviation(quality: float) -> None:
    model = net()
    for name, gone in zeros(Prune(criterion=Threshold(quality=quality))(model)).items():
        size = np.abs(weight := effective(model)[name].numpy())
        assert np.array_equal(gone.numpy(), (size < quality * weight.std()) & (size < size.max()))


@pytest.mark.parametrize("floor", [0.0, 0.25])
def test_a_threshold_above_all_weights_leaves_the_floor_of_each_layer_and_says_so(floor: float) -> None:
    records: list[Record] = []

    class Watching(Context):
        def perform(self, technique: Technique, model: nn.Module) -> nn.Module:
            records.append(self.record)
            return super().perform(technique, model)

    method = Prune(criterion=Threshold(value=100.0), scope=Layer(floor=floor))
    for name, gone in zeros(method(net(), Watching())).items():
        kept = max(1, math.ceil(floor * gone.numel()))
        size = effective(net())[name].abs()
        assert int((~gone).sum()) == kept
        assert size[gone].max() <= size[~gone].min()
    assert records[0].details["clamped"] == ["0.weight", "2.weight", "4.weight"]
    method.replace(criterion=Threshold(quality=0.1))(net(), Watching())
    assert "clamped" not in records[1].details


def test_the_deviation_is_that_of_the_weights_that_are_there_at_the_start() -> None:
    weight = torch.tensor([0.0, 0.0, 1.0, -1.0])
    assert threshold(weight, None, 0.5) == 0.5
    assert threshold(weight, 0.3, 0.5) == 0.3
    assert threshold(torch.zeros(3), None, 1.0) == 0.0
    model = nn.Linear(3, 2)
    nn.init.constant_(model.weight, 0.5)
    result = Prune(criterion=Threshold())(model)
    assert not zeros(result)["weight"].any(), "equal weights have no spread: nothing lies below a threshold of zero"


# --- chance ------------------------------------------------------------------------------------------------------


def test_random_belongs_to_seed_and_place() -> None:
    def gone(seed: int, *steps: Prune) -> Tensor:
        return zeros(steps[0](net(), Context(seed=seed)))["0.weight"]

    method = Prune(criterion=Random(), sparsity=0.5)
    assert torch.equal(gone(0, method), gone(0, method))
    assert not torch.equal(gone(0, method), gone(1, method))
    twins = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9))
    one, other = zeros(method(twins)).values()
    assert not torch.equal(one, other)


def test_random_ignores_the_weights() -> None:
    method = Prune(criterion=Random(), sparsity=0.5)
    assert torch.equal(zeros(method(net(0)))["0.weight"], zeros(method(net(1)))["0.weight"])


# --- what does not go together -----------------------------------------------------------------------------------


def test_conflicts_are_named() -> None:
    with pytest.raises(UsageError, match="criterion threshold decides the sparsity itself"):
        Prune(criterion=Threshold(), sparsity=0.5)
    for scope in (Global(), Row()):
        with pytest.raises(UsageError, match=f"threshold cuts each layer .* scope={scope.id} has no say; give scope=l"):
            Prune(criterion=Threshold(), scope=scope)
    with pytest.raises(UsageError, match="a sparsity per pattern needs scope=layer; got scope=global"):
        Prune(sparsity={"*": 0.5}, scope=Global())
    with pytest.raises(UsageError, match=r"schedule listed ends at 0.9; leave sparsity=0.5 unset"):
        Prune(schedule=Listed(), sparsity=0.5)
    assert Prune(schedule=Listed(), sparsity=0.9).sparsity == 0.9
    with pytest.raises(UsageError, match=r"start=0.8 must lie before end=0.7"):
        Cubic(start=0.8)
    for values in ((), (0.5, 0.4)):
        with pytest.raises(UsageError, match="rising order"):
            Listed(values=values)


def test_needs_training_data_only_to_train() -> None:
    assert Prune().needs == frozenset()
    assert Prune(epochs=1).needs == {"train"}


@given(scores=st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_single_weights_are_their_own_groups(scores: list[float]) -> None:
    tensor = torch.tensor(scores)
    assert Weights().pool(tensor, "sum") is tensor
    assert torch.equal(Weights().pool(-tensor, "l2"), tensor)
    assert torch.equal(Weights().spread(tensor > 0.5, tensor.shape), tensor > 0.5)


def test_scopes_of_nothing() -> None:
    assert Global().removed({}, 0.5) == {}
    assert Layer().removed({}, 0.5) == {}


def test_the_mask_is_the_form() -> None:
    result = Prune(sparsity=0.5)(net())
    assert {slot.phase for slot in slots(result).values() if len(slot.shape) == 2} == {"mask"}
    assert all(isinstance(slot.form, Mask) for slot in slots(result).values() if len(slot.shape) == 2)
