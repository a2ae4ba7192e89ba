"""Sparse kernels: same outputs as dense, the right layout, and a sentence either way."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from espalier.core.context import Context
from espalier.core.parametrize import plain
from espalier.core.task import Task
from espalier.measure.zeros import SparseLinear, Zeros, edge_of, run_zeros
from espalier.prune import Blocks, Prune


@pytest.mark.parametrize("edge", [0, 4, 8, 16])
def test_same_outputs_as_dense(edge: int) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 32)
    with torch.no_grad():
        if edge:
            keep = (torch.rand(32 // edge, 64 // edge) < 0.4).repeat_interleave(edge, 0).repeat_interleave(edge, 1)
            keep[:edge, :edge] = True
        else:
            keep = torch.rand(32, 64) < 0.2
        layer.weight.mul_(keep)
    assert edge_of(layer.weight) == edge
    for shape in ((64,), (1, 64), (3, 5, 64)):
        x = torch.randn(*shape)
        assert torch.allclose(SparseLinear(layer, edge)(x), layer(x), atol=1e-5)


def test_a_network_is_timed_both_ways() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))
    sparse = plain(Prune(pattern=Blocks(height=32, width=32), sparsity=0.95, layers=("0.weight",))(model, Context()))
    found = run_zeros(sparse, Task(val=[torch.randn(4, 1024)]), seconds=0.2)
    assert found is not None
    assert [(layer.name, layer.layout) for layer in found.layers] == [("0", "blocks of 32")]
    assert found.difference < 1e-5
    assert found.sentence().startswith("zeros: ")
    assert found.to_json()["layers"][0]["zeros"] == pytest.approx(0.95, abs=0.01)


def test_without_zeros_there_is_nothing_to_run() -> None:
    model = nn.Sequential(nn.Linear(128, 128))
    assert run_zeros(model, Task(val=[torch.randn(4, 128)]), seconds=0.1) is None
    assert "not the network faster" in Zeros((), None, None, 0.0).sentence()
