from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from espalier.core.errors import DataError, NeedError
from espalier.core.metric import Loss
from espalier.core.task import Task, classification
from espalier.measure import paired
from espalier.measure.pairing import sign_test, summarise


class Answers(nn.Module):
    """Answers class ``x[:, column]``."""

    def __init__(self, column: int) -> None:
        super().__init__()
        self.column = column

    def forward(self, x):
        return nn.functional.one_hot(x[:, self.column].long(), 4).float()


def table(rows: list[tuple[int, int, int]], size: int = 3) -> list:
    x = torch.tensor(rows, dtype=torch.float32)
    return [(x[i : i + size, :2], x[i : i + size, 2].long()) for i in range(0, len(rows), size)]


def test_discordant_samples_are_counted() -> None:
    # (original's answer, compressed's answer, truth): 2 lost, 1 gained, 1 both right, 1 both wrong
    rows = [(1, 0, 1), (2, 0, 2), (0, 3, 3), (1, 1, 1), (0, 1, 2)]
    found = paired(Answers(0), Answers(1), classification(test=table(rows)), "test")
    assert (found.lost, found.gained, found.count) == (2, 1, 5)
    assert found.drop == pytest.approx(100 * (2 - 1) / 5)
    d = np.array([100, 100, -100, 0, 0])
    assert found.stderr == pytest.approx(d.std(ddof=1) / math.sqrt(5))
    assert found.p == 1.0
    assert found.low <= found.drop <= found.high
    assert found.to_json()["lost"] == 2


def test_a_loss_that_grows_is_a_positive_drop() -> None:
    metric = Loss(lambda output, target: (output.argmax(1) - target).abs().double(), "distance")
    rows = [(1, 0, 1), (2, 2, 2), (3, 1, 3)]
    found = paired(Answers(0), Answers(1), Task(test=table(rows), metric=metric), "test")
    assert (found.lost, found.gained, found.drop) == (2, 0, pytest.approx(1.0))


def test_without_labels_the_original_is_always_right() -> None:
    rows = [(1, 0, 0), (2, 2, 0), (3, 3, 0), (3, 0, 0)]
    data = [x for x, _ in table(rows)]
    found = paired(Answers(0), Answers(1), Task(val=data))
    assert (found.lost, found.gained, found.drop) == (2, 0, 50.0)


def test_equal_models_differ_by_exactly_nothing() -> None:
    model = Answers(0).train()
    found = paired(model, model, classification(val=table([(1, 0, 1), (2, 0, 1)])))
    assert (found.drop, found.stderr, found.low, found.high, found.p) == (0, 0, 0, 0, 1)
    assert model.training


def test_missing_and_empty_splits() -> None:
    with pytest.raises(NeedError, match="test"):
        paired(Answers(0), Answers(1), classification(val=table([(1, 0, 1)])), "test")
    with pytest.raises(DataError, match="no batch"):
        paired(Answers(0), Answers(1), Task(val=[]))


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 40), st.integers(0, 40))
def test_the_sign_test_is_the_binomial(lost, gained) -> None:
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
    assert sign_test(lost, gained) == pytest.approx(expected, rel=1e-9)


def test_the_sign_test_takes_many_samples() -> None:
    assert sign_test(3000, 5000) < 1e-100
    assert 0 < sign_test(4900, 5100) < 0.06


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 60), st.integers(0, 60))
def test_the_interval_is_near_the_normal_one(lost, gained) -> None:
    drops = np.array([100.0] * lost + [-100.0] * gained + [0.0] * (2000 - lost - gained))
    found = summarise(drops)
    assert found.low <= found.drop <= found.high
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * found.stderr, rel=0.2, abs=0.06)


def test_one_sample_has_no_standard_error() -> None:
    assert summarise(np.array([100.0])).stderr == 0
