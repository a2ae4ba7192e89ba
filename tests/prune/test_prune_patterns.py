"""What goes together: brute force over the groups of every pattern, refusals, and combinations that make no sense."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from espalier.core.context import Context
from espalier.core.errors import NumericError, UsageError
from espalier.core.method import Technique
from espalier.core.parametrize import slots
from espalier.core.record import Record
from espalier.core.selection import Selection
from espalier.core.task import classification
from espalier.prune import (
    NM,
    OBS,
    Apart,
    Blocks,
    Criterion,
    Exponential,
    Global,
    KernelParts,
    Layer,
    Linear,
    Listed,
    Percentile,
    Prune,
    Random,
    Row,
    Schedule,
    Singular,
    Tensors,
    Threshold,
    Units,
    Weights,
)
from espalier.prune.masks import as_stored, outputs_first
from espalier.prune.n_m import lowest
from espalier.prune.parts import Pattern, Reduction, Scores
from espalier.prune.singular import without
from espalier.testing import effective

REDUCTIONS: tuple[Reduction, ...] = ("sum", "mean", "l1", "l2")


class Watching(Context):
    """Keeps the records of the steps."""

    def perform(self, technique: Technique, model: nn.Module) -> nn.Module:
        RECORDS.append(self.record)
        return super().perform(technique, model)


RECORDS: list[Record] = []


def weights_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(weight: Tensor) -> nn.Module:
    kinds: dict[int, Any] = {2: nn.Linear, 3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
    outputs, inputs, *kernel = weight.shape
    module = kinds[weight.ndim](inputs, outputs, *([tuple(kernel)] if kernel else []), bias=False)
    with torch.no_grad():
        module.weight.copy_(weight)
    return module  # type: ignore[no-any-return]


def combined(values: np.ndarray[Any, Any], reduction: Reduction) -> float:
    return {
        "sum": values.sum(),
        "mean": values.mean(),
        "l1": np.abs(values).sum(),
        "l2": math.sqrt((values**2).sum()),
    }[reduction]


def groups(pattern: Pattern, shape: tuple[int, ...]) -> Iterator[tuple[Any, ...]]:
    """The index of every group, in the order of the pooled scores."""
    outputs = range(shape[0])
    if isinstance(pattern, Units):
        yield from ((o,) for o in outputs)
    elif isinstance(pattern, KernelParts):
        every = slice(None)
        kernel = [range(size) for size in shape[2:]]
        if pattern.part == "kernel":
            yield from itertools.product(outputs, range(shape[1]))
        elif pattern.part == "stripe":
            yield from ((o, every, *place) for o, *place in itertools.product(outputs, *kernel))
        elif pattern.part == "row":
            yield from ((o, every, y) for o, y in itertools.product(outputs, kernel[0]))
        else:
            yield from ((o, every, every, x) for o, x in itertools.product(outputs, kernel[1]))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    "pattern", [Units(), *(KernelParts(part=part) for part in ("kernel", "row", "column", "stripe"))],
    ids=lambda p: getattr(p, "part", "units"),
)  # fmt: skip
def test_groups_by_brute_force(pattern: Pattern, reduction: Reduction) -> None:
    weight = weights_of(3, 4, 2, 5)
    pooled = pattern.pool(weight, reduction).reshape(-1)
    expected = [
        combined(weight[index].numpy().astype(np.float64), reduction) for index in groups(pattern, (3, 4, 2, 5))
    ]
    assert pooled.tolist() == pytest.approx(expected, rel=1e-4)
    for position, index in enumerate(groups(pattern, (3, 4, 2, 5))):
        removed = torch.zeros(len(expected), dtype=torch.bool)
        removed[position] = True
        shape = pattern.pool(weight, reduction).shape
        mask = torch.zeros(3, 4, 2, 5, dtype=torch.bool)
        mask[index] = True
        assert torch.equal(pattern.spread(removed.reshape(shape), weight.shape), mask)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@given(
    rows=st.integers(1, 7), inputs=st.integers(1, 4), kernel=st.integers(1, 3),
    height=st.integers(1, 4), width=st.integers(1, 5),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_blocks_and_their_borders(
    reduction: Reduction, rows: int, inputs: int, kernel: int, height: int, width: int
) -> None:
    weight = weights_of(rows, inputs, kernel)
    pattern, matrix = Blocks(height=height, width=width), weight.flatten(1).numpy().astype(np.float64)
    pooled = pattern.pool(weight, reduction)
    for i, j in itertools.product(*map(range, pooled.shape)):
        block = matrix[i * height : (i + 1) * height, j * width : (j + 1) * width]
        share = height * width / block.size
        whole = {"l2": math.sqrt(share), "mean": 1.0}.get(reduction, share)
        assert float(pooled[i, j]) == pytest.approx(combined(block, reduction) * whole, rel=1e-4, abs=1e-6)
        removed = torch.zeros_like(pooled, dtype=torch.bool)
        removed[i, j] = True
        mask = pattern.spread(removed, weight.shape).flatten(1)
        assert int(mask.sum()) == block.size
        assert bool(mask[i * height : (i + 1) * height, j * width : (j + 1) * width].all())


@given(outputs=st.integers(1, 4), inputs=st.integers(2, 13), n=st.integers(1, 4), extra=st.integers(1, 4),
       kernel=st.booleans(), seed=st.integers(0, 30))  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_n_of_m_is_the_best_mask_of_every_group(
    outputs: int, inputs: int, n: int, extra: int, kernel: bool, seed: int
) -> None:
    m = n + extra
    scores = weights_of(outputs, inputs, *([2] if kernel else []), seed=seed).abs()
    gone = lowest(scores, n, m)
    columns, masks = scores.movedim(1, -1).reshape(-1, inputs), gone.movedim(1, -1).reshape(-1, inputs)
    for row, mask in zip(columns, masks, strict=True):
        for start in range(0, inputs - m + 1, m):
            group = row[start : start + m]
            kept = group[~mask[start : start + m]]
            assert len(kept) == n
            best = max(float(group[list(choice)].sum()) for choice in itertools.combinations(range(m), n))
            assert float(kept.sum()) == pytest.approx(best)
        assert not mask[inputs // m * m :].any(), "inputs beyond the last whole group stay"


def test_n_of_m_grows_inside_its_groups() -> None:
    pattern, scores = NM(n=2, m=4), weights_of(6, 8).abs()
    before = torch.zeros_like(scores, dtype=torch.bool)
    for share in (0.0, 0.3, 0.7, 1.0):
        now = pattern.removed(scores, share)
        assert not (before & ~now).any()
        assert int(now.sum()) == int(share * 24 + 1e-9)
        before = now
    assert torch.equal(before, lowest(scores, 2, 4))


@pytest.mark.parametrize("schedule", [Percentile(), Listed(values=(0.25, 0.5)), Exponential()], ids=lambda s: s.id)
@pytest.mark.parametrize("epochs", [0, 4])
def test_n_of_m_ends_at_the_whole_pattern_whatever_the_schedule_ends_at(schedule: Schedule, epochs: int) -> None:
    torch.manual_seed(0)
    model, data = nn.Linear(16, 4), [(torch.randn(5, 16), torch.arange(5) % 4)] * 3
    pruned = Prune(pattern=NM(), schedule=schedule, epochs=epochs)(model, Context(task=classification(data)))
    assert ((effective(pruned)["weight"].reshape(4, 4, 4) != 0).sum(-1) == 2).all()


def test_n_of_m_on_every_layer() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 6, 3, groups=2), nn.Flatten(), nn.Linear(10, 4))
    RECORDS.clear()
    pruned = Prune(pattern=NM())(model, Watching())
    assert [entry["name"] for entry in RECORDS[0].skipped] == ["0.weight"]
    assert "3 inputs hold no whole group of 4" in RECORDS[0].skipped[0]["reason"]
    weights = effective(pruned)
    transposed = weights["1.weight"].reshape(2, 4, 3, 3, 3)  # groups, inputs, outputs, kernel
    assert ((transposed != 0).sum(1) == 2).all()
    assert ((weights["3.weight"][:, :8].reshape(4, 2, 4) != 0).sum(-1) == 2).all()
    assert (weights["3.weight"][:, 8:] != 0).all()


def test_outputs_first_and_back() -> None:
    module = nn.ConvTranspose2d(6, 4, 3, groups=2, bias=False)
    slot = next(iter(slots(module).values()))
    first = outputs_first(slot, slot.value())
    assert first.shape == (4, 3, 3, 3)
    assert torch.equal(as_stored(slot, first), slot.value())
    with torch.no_grad():  # silence one output through its row: its channel of the output must be zero
        keep = torch.ones(4, 1, 1, 1)
        keep[1] = 0
        module.weight.copy_(as_stored(slot, first * keep))
    output = module(torch.randn(1, 6, 4, 4))
    assert [bool((output[0, c] == 0).all()) for c in range(4)] == [c == 1 for c in range(4)]


@pytest.mark.parametrize("shape", [(6, 4), (3, 2, 3, 3)])
@given(count=st.integers(0, 6))
@settings(max_examples=10, deadline=None)
def test_singular_values_are_those_of_the_truncated_matrix(shape: tuple[int, ...], count: int) -> None:
    weight = weights_of(*shape)
    values = np.linalg.svd(weight.flatten(1).numpy().astype(np.float64), compute_uv=False)
    pooled = Singular().pool(weight, "l1")
    assert pooled.tolist() == pytest.approx(values.tolist(), rel=1e-5)
    removed = torch.arange(len(values)) >= len(values) - min(count, len(values))
    rest = without(weight, removed)
    assert float((weight - rest).square().sum()) == pytest.approx(float((values[removed.numpy()] ** 2).sum()), abs=1e-4)
    if not removed.all():
        assert int(torch.linalg.matrix_rank(rest.flatten(1), rtol=1e-5)) == int((~removed).sum())


def test_singular_as_a_step() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5))
    RECORDS.clear()
    pruned = Prune(pattern=Singular(), sparsity=0.5)(model, Watching())
    assert int(torch.linalg.matrix_rank(pruned[0].weight, rtol=1e-5)) == 3
    assert RECORDS[0].details["sparsity"] == pytest.approx({"0.weight": 0.5, "2.weight": 0.4})
    assert all(slot.form is None for slot in slots(pruned).values())


def test_whole_tensors_vectors_only_where_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        for factor, linear in zip((1.0, 0.01, 2.0), model, strict=True):
            linear.weight.copy_(torch.full((4, 4), factor))
            linear.bias.fill_(1e-4)
    pruned = Prune(pattern=Tensors(), scope=Global(), sparsity=0.34)(model)
    assert [bool((w == 0).all()) for w in effective(pruned).values()] == [False, False, True, False, False, False]
    named = Prune(pattern=Tensors(), scope=Global(), sparsity=0.5, layers=("type:Linear", "1.bias"))(model)
    assert [name for name, w in effective(named).items() if (w == 0).all()] == ["1.weight", "1.bias"]


def test_units_leave_the_outputs_of_the_model_alone_unless_named() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))
    RECORDS.clear()
    pruned = effective(Prune(pattern=Units(), sparsity=0.5)(model, Watching()))
    assert int((pruned["0.weight"] == 0).all(1).sum()) == 3
    assert (pruned["1.weight"] != 0).all()
    assert RECORDS[0].skipped[0]["name"] == "1.weight"
    named = effective(Prune(pattern=Units(), sparsity=0.5, layers=("*", "1"))(model))
    assert int((named["1.weight"] == 0).all(1).sum()) == 2


@dataclass(frozen=True, kw_only=True)
class LastUnitsFirst(Criterion):
    """Units by their position."""

    id: ClassVar[str] = "last-units-first"
    of: ClassVar[Any] = "units"

    def scores(self, model: nn.Module, selection: Selection, context: Context) -> Scores:
        return {
            slot.name: -torch.arange(len(outputs_first(slot, slot.value())), dtype=torch.float32) for slot in selection
        }


def test_criteria_of_units() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 2, groups=2), nn.Conv2d(6, 4, 1), nn.Linear(3, 3))
    pruned = effective(Prune(criterion=LastUnitsFirst(), pattern=Units())(model))
    assert (pruned["1.weight"] == 0).all((1, 2, 3)).tolist() == [False, False, True, True]
    assert (pruned["0.weight"] == 0).all((2, 3)).tolist() == [[False] * 3] * 2 + [[True] * 3] * 2
    with pytest.raises(UsageError, match="last-units-first scores output units; pattern weights does not"):
        Prune(criterion=LastUnitsFirst())


@pytest.mark.parametrize(
    ("pattern", "module", "reason"),
    [
        (KernelParts(), nn.Linear(3, 2), "it has no kernel"),
        (KernelParts(part="row"), nn.Conv1d(3, 2, 3), "its kernel has 1 dimensions; a row needs two"),
        (KernelParts(), nn.Conv2d(3, 2, 1), "would be the whole filter"),
        (NM(n=1, m=5), nn.Linear(4, 2), "4 inputs hold no whole group of 5"),
    ],
)
def test_a_weight_without_such_groups_is_listed(pattern: Pattern, module: nn.Module, reason: str) -> None:
    RECORDS.clear()
    with pytest.warns(UserWarning, match="changed nothing"):
        Prune(pattern=pattern)(module, Watching())
    assert reason in RECORDS[0].skipped[0]["reason"]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"pattern": NM(), "sparsity": 0.5}, "pattern n-m decides the sparsity itself"),
        ({"pattern": NM(), "scope": Global()}, "scope=global has no say"),
        ({"pattern": Blocks(), "criterion": Threshold()}, "criterion threshold cuts single weights"),
        ({"pattern": Units(), "scope": Row()}, "the groups of pattern units are not parts of one"),
        ({"pattern": Tensors()}, "give scope=global or apart"),
        ({"pattern": Singular(), "criterion": Random()}, "criterion random has no say"),
        ({"pattern": Blocks(), "criterion": OBS()}, "solves layer by layer"),
        ({"pattern": NM(), "criterion": OBS(), "schedule": Linear(), "epochs": 1}, "schedule=one-shot"),
        ({"regrow": 0.1}, "regrow needs epochs"),
        ({"regrow": 0.1, "pattern": Blocks(), "epochs": 1}, "regrow exchanges single weights"),
        ({"rewind": "weights", "epochs": 1, "schedule": Linear()}, "goes back after every round"),
        ({"rewind": "weights", "epochs": 4}, "later than epoch 0, and there is none.*schedule=one-shot"),
        ({"rewind": "lr", "epochs": 4}, "rewind=lr goes back .* and there is none"),
        ({"rewind": "lr", "schedule": Listed()}, "got epochs=0, schedule=listed"),
        ({"rewind": "weights", "epochs": 4, "rewind_epoch": 4, "schedule": Listed()}, "never comes.* give 3 at most"),
        ({"rewind": "weights", "epochs": 6, "rewind_epoch": 4, "schedule": Listed()}, "later than epoch 4"),
        ({"pattern": NM(), "scope": Layer(floor=0.1)}, "pattern n-m keeps .* floor=0.1 has no say"),
        ({"criterion": OBS(), "scope": Layer(floor=0.1)}, "criterion obs removes .* floor=0.1 has no say"),
        ({"pattern": Tensors(), "scope": Global(floor=0.1)}, "pattern tensors removes .* floor=0.1 has no say"),
    ],
)
def test_combinations_that_make_no_sense_say_so(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        Prune(**fields)
    with pytest.raises(UsageError, match="n=4 must be below m=4"):
        NM(n=4)


@pytest.mark.parametrize("pattern", [Weights(), Blocks(height=2, width=3), KernelParts(), Units()], ids=lambda p: p.id)
@pytest.mark.parametrize("scope", [Layer(), Row(), Global(), Apart()], ids=lambda s: s.id)
def test_what_an_earlier_step_removed_stays_and_counts_once(pattern: Pattern, scope: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 6, 3))
    if isinstance(scope, Row) and isinstance(pattern, Units):
        return
    first = effective(Prune(sparsity=0.3)(model))
    second = effective(Prune(sparsity=0.5, pattern=pattern, scope=scope, layers=("*", "0"))(Prune(sparsity=0.3)(model)))
    for name, weight in first.items():
        assert not (second[name][weight == 0]).any()
    pooled = {n: pattern.pool((w != 0).float(), "sum") for n, w in second.items() if w.ndim > 1}
    gone = sum(int((p == 0).sum()) for p in pooled.values()) / sum(p.numel() for p in pooled.values())
    assert gone == pytest.approx(0.5, abs=0.12)


@dataclass(frozen=True, kw_only=True)
class Broken(Criterion):
    """NaN in the second layer, nothing for the third."""

    id: ClassVar[str] = "broken"
    nan: ClassVar[bool] = True

    def scores(self, model: nn.Module, selection: Selection, context: Context) -> Scores:
        found = {slot.name: slot.value().abs() for slot in selection if slot.name != "2.weight"}
        if self.nan:
            found["1.weight"][0, 0] = math.nan
        return found


class Silent(Broken):
    nan = False


def test_scores_that_are_none() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    with pytest.raises(NumericError, match=r"criterion broken gives NaN for 1.weight \(1 of 9 scores\)"):
        Prune(criterion=Broken())(model)
    RECORDS.clear()
    pruned = Prune(criterion=Silent())(model, Watching())
    assert RECORDS[0].skipped == [{"name": "2.weight", "reason": "criterion broken has no scores for it"}]
    assert slots(pruned)["2.weight"].form is None
