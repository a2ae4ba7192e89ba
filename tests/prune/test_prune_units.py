"""Output units: embeddings have none; scores of the geometric median compare across layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from espalier.core.context import Context
from espalier.core.parametrize import slots
from espalier.core.record import Record
from espalier.core.selection import select
from espalier.prune import GeometricMedian, Global, Prune, Units, fpgm
from espalier.prune.fpgm import distances, relative
from espalier.prune.parts import Pattern
from espalier.testing import effective


class Words(nn.Module):
    """An embedding alone, one tied to the last layer, a bag, and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.tied = nn.Embedding(9, 4), nn.Embedding(9, 4)
        self.bag = nn.EmbeddingBag(9, 4)
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 9, bias=False)
        self.head.weight = self.tied.weight


EMBEDDINGS = {"words.weight", "tied.weight", "bag.weight"}


def test_words_are_no_units() -> None:
    model = Words()
    refused = {name for name, slot in slots(model).items() if Units().unfit(slot)}
    assert refused == EMBEDDINGS


@pytest.mark.skipif(not hasattr(Pattern, "unfit"), reason="prune.py does not ask the pattern about a slot yet")
def test_embeddings_are_listed_and_left_alone() -> None:
    model, context = Words(), Context(record=Record("", ""))
    before = effective(model)
    after = effective(Prune(pattern=Units(), sparsity=0.5, layers=("*", "layer")).transform(model, context))
    listed = {row["name"] for row in context.record.skipped if "looked up" in row["reason"]}
    assert listed == EMBEDDINGS
    assert all(torch.equal(before[name], after[name]) for name in EMBEDDINGS)
    assert int((after["layer.weight"] == 0).all(1).sum()) == 2


def test_no_distances_between_words(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    monkeypatch.setattr(fpgm, "distances", lambda filters: (rows.append(len(filters)), distances(filters))[1])
    model, context = Words(), Context()
    scores = GeometricMedian().scores(model, select(model, ("*",)), context)
    GeometricMedian().scores(model, select(model, ("*",)), context)
    assert set(scores) == {"layer.weight"}
    assert rows == [4, 4]
    assert [row["name"] for row in context.record.skipped] == ["words.weight", "tied.weight", "bag.weight"]


@pytest.mark.parametrize(("count", "width", "scale"), [(4, 3, 1.0), (50, 3, 1.0), (4, 300, 1.0), (4, 3, 1e3)])
def test_relative_distances_keep_the_order_and_have_mean_one(count: int, width: int, scale: float) -> None:
    filters = scale * torch.randn(count, width, generator=torch.Generator().manual_seed(count)).double()
    found, summed = relative(filters), (filters[:, None] - filters[None]).norm(dim=2).sum(1)
    assert float(found.mean()) == pytest.approx(1)
    assert torch.equal(found.argsort(), summed.argsort())
    assert torch.allclose(found, summed / summed.mean())


def test_equal_filters_have_no_distance() -> None:
    assert relative(torch.ones(3, 2)).tolist() == [0, 0, 0]


def test_wide_layers_do_not_outweigh_narrow_ones() -> None:
    """Layers alike in all but width and scale lose alike; by sums of distances the narrow one goes first."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24, bias=False), nn.Linear(24, 240, bias=False), nn.Linear(240, 2))
    with torch.no_grad():
        model[0].weight.normal_()
        model[1].weight.normal_().mul_(3)
    method = Prune(criterion=GeometricMedian(), pattern=Units(), scope=Global(), sparsity=0.5, layers=("0", "1"))
    pruned = effective(method(model))
    for name in ("0.weight", "1.weight"):
        assert 0.2 < float((pruned[name] == 0).all(1).float().mean()) < 0.8
