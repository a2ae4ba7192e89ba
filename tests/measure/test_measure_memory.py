from __future__ import annotations

import torch
from torch import nn

from espalier.measure import PeakMemory, peak_memory


def test_a_chain_holds_two_activations_at_a_time() -> None:
    model = nn.Sequential(nn.Linear(100, 1000), nn.Linear(1000, 10), nn.Linear(10, 1000), nn.Linear(1000, 10))
    x = torch.zeros(4, 100)
    weights = sum(p.numel() * 4 for p in model.parameters())
    found = peak_memory(model, lambda m: m(x), (x,))
    # the input is alive throughout; 4x10 and 4x1000 stand beside it at the worst moment
    assert found == PeakMemory(weights, 4 * (4 * 100 + 4 * 1000 + 4 * 10))
    assert found.total == weights + found.activations
    assert found.to_json() == {"weights": weights, "activations": found.activations, "bytes": found.total}
    assert model.training


def test_views_and_in_place_operators_take_nothing() -> None:
    x = torch.zeros(8, 16)
    model = nn.Sequential(nn.Flatten(), nn.Unflatten(1, (4, 4)), nn.ReLU(inplace=True))
    assert peak_memory(model, lambda m: m(x), (x,)) == PeakMemory(0, 8 * 16 * 4)
    assert peak_memory(nn.ReLU(), lambda m: m(x), (x,)) == PeakMemory(0, 2 * 8 * 16 * 4)


def test_what_the_call_keeps_stays_counted() -> None:
    kept = []

    def call(_: nn.Module) -> None:
        kept.extend(torch.zeros(100) for _i in range(5))

    assert peak_memory(nn.Identity(), call).activations == 2000
    assert peak_memory(nn.Identity(), lambda _: [torch.zeros(100) for _i in range(5)] and None).activations == 2000
    assert peak_memory(nn.Identity(), lambda _: [torch.zeros(100).sum() for _i in range(5)]).activations < 450


def test_tied_weights_and_buffers_count_once() -> None:
    model = nn.Sequential(nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False), nn.BatchNorm1d(5))
    model[1].weight = model[0].weight
    assert peak_memory(model, lambda m: None).weights == 100 + 4 * 20 + 8


def test_it_repeats_exactly() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(1352, 3)
    )
    x = torch.randn(2, 1, 28, 28)
    assert len({peak_memory(model, lambda m: m(x), (x,)) for _ in range(4)}) == 1
