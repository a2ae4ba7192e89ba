"""Observers against brute force: average, percentile, squared error, divergence."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from espalier.core.errors import UsageError
from espalier.core.inputs import Observed, QuantizedInput
from espalier.quantize.affine import Affine, AffineInput
from espalier.quantize.ema import Ema
from espalier.quantize.entropy import Entropy, clip, divergences, histograms
from espalier.quantize.mse import Mse, squared_error
from espalier.quantize.percentile import Percentile, quantile


def extremes_of(rows: Tensor) -> Tensor:
    return torch.stack(rows.aminmax(dim=1), -1)[:, None]


def test_ema_is_the_recursion_divided_by_its_weight():
    generator = torch.Generator().manual_seed(0)
    extremes = torch.randn(3, 7, 2, generator=generator).sort(-1).values
    low, high = Ema(decay=0.8).range(torch.zeros(3, 1), extremes, 8, symmetric=False)
    for row in range(3):
        for end, found in ((0, low), (1, high)):
            mean = weight = 0.0
            for value in extremes[row, :, end].tolist():
                mean, weight = 0.8 * mean + 0.2 * value, 0.8 * weight + 0.2
            assert math.isclose(float(found[row]), mean / weight, rel_tol=1e-5, abs_tol=1e-6)
    assert torch.allclose(Ema(decay=1.0).range(extremes, extremes, 8, symmetric=False)[0], extremes[..., 0].mean(1))
    assert torch.equal(Ema(decay=0.0).range(extremes, extremes, 8, symmetric=False)[1], extremes[:, -1, 1])


@pytest.mark.parametrize("share", [0.9, 0.999, 0.9999])
def test_percentile_takes_the_value_of_that_rank(share):
    rows = torch.randn(3, 2000, generator=torch.Generator().manual_seed(1))
    low, high = Percentile(share=share).range(rows, extremes_of(rows), 8, symmetric=False)
    ordered = np.sort(rows.numpy(), axis=1)
    rank = {0.9: 1800, 0.999: 1998, 0.9999: 2000}[share]
    assert np.array_equal(high.numpy(), ordered[:, rank - 1])
    assert np.array_equal(low.numpy(), ordered[:, 2000 - rank])
    low, high = Percentile(share=share).range(rows, extremes_of(rows), 8, symmetric=True)
    assert np.array_equal(high.numpy(), np.sort(np.abs(rows.numpy()), axis=1)[:, rank - 1])
    assert torch.equal(low, -high)


def test_percentile_is_not_one_rank_off_by_rounding():
    assert 0.55 * 100 > 55
    assert float(quantile(torch.arange(1.0, 101)[None], 0.55)) == 55


def nearest_error(row: np.ndarray, levels: np.ndarray) -> float:
    return float((np.abs(row[:, None] - levels[None]).min(1) ** 2).sum())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_mse_finds_the_best_of_all_candidates(bits, symmetric):
    rows = torch.randn(3, 200, generator=torch.Generator().manual_seed(2)) * torch.tensor([[1.0], [5.0], [0.01]])
    low, high = Mse(candidates=40).range(rows, extremes_of(rows), bits, symmetric=symmetric)
    for row, found_low, found_high in zip(rows.double().numpy(), low.tolist(), high.tolist(), strict=True):
        errors = []
        for step in range(1, 41):
            bottom, top = row.min() * step / 40, row.max() * step / 40
            if symmetric and bits > 1:
                last = 2 ** (bits - 1) - 1
                levels = np.arange(-last, last + 1) * max(-bottom, top) / last
            else:
                scale = (top - bottom) / (2**bits - 1)
                levels = (np.arange(2**bits) - np.clip(np.round(-bottom / scale), 0, 2**bits - 1)) * scale
            errors.append(nearest_error(row, levels))
        step = round(40 * found_high / row.max())
        assert math.isclose(found_low, row.min() * step / 40, rel_tol=1e-5)
        assert errors[step - 1] <= min(errors) * (1 + 1e-4)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_mse_of_a_symmetric_input_is_the_error_that_its_quantizer_makes(bits):
    """Of all shrunk ranges, the one that was chosen has the smallest error of the input's own 2^b codes."""
    values = torch.randn(3000, generator=torch.Generator().manual_seed(7)) - 0.8
    seen = Observed(values, torch.stack(values.aminmax())[None])
    quantizer = QuantizedInput(AffineInput(symmetric=True, observer=Mse(candidates=50)), bits, seen, signed=True)
    found = float((quantizer(values) - values).square().sum())
    span, errors = values.abs().max(), []
    for step in range(1, 51):
        quantizer.state["scale"].copy_(span * step / 50 / (2 ** (bits - 1) - 1))
        errors.append(float((quantizer(values) - values).square().sum()))
    assert found <= min(errors) * (1 + 1e-4)


def test_mse_in_parts_is_mse_in_one(monkeypatch):
    rows = torch.randn(9, 50, generator=torch.Generator().manual_seed(3))
    whole = Mse().range(rows, extremes_of(rows), 3, symmetric=True)
    monkeypatch.setattr("espalier.quantize.mse.CHUNK", 100)
    parts = Mse().range(rows, extremes_of(rows), 3, symmetric=True)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def reference_divergence(counts: list[float], i: int, levels: int) -> float:
    """The talk's loop for one clip, bin by bin."""
    reference = counts[:i]
    reference[-1] += sum(counts[i:])
    spread = [0.0] * i
    for level in range(levels):
        members = [j for j in range(i) if level * i <= j * levels < (level + 1) * i]
        filled = [j for j in members if counts[j]]
        for j in filled:
            spread[j] = sum(counts[k] for k in members) / len(filled)
    total, mass, found = sum(reference), sum(spread), 0.0
    for p, q in zip(reference, spread, strict=True):
        if p and not q:
            return math.inf
        if p:
            found += p / total * math.log((p / total) / (q / mass))
    return found


def test_entropy_is_the_divergence_bin_by_bin():
    generator = torch.Generator().manual_seed(4)
    counts = torch.poisson(torch.linspace(6, 0.3, 60).repeat(4, 1), generator=generator).double()
    counts[0, 40:58], counts[0, 59] = 0, 3
    found = divergences(counts, 8)
    for row in range(4):
        expected = [reference_divergence(counts[row].tolist(), i, 8) for i in range(8, 61)]
        assert np.allclose(found[row].numpy(), expected, atol=1e-12)
    assert bool(torch.isinf(found[0]).any())


def test_entropy_clips_a_lonely_outlier_and_nothing_else():
    values = torch.randn(1, 50_000, generator=torch.Generator().manual_seed(5))
    values[0, 0] = 60.0
    low, high = Entropy().range(values, extremes_of(values), 8, symmetric=True)
    assert 2.5 < float(high) < 6
    assert float(low) >= -float(high)
    even = torch.linspace(-1, 1, 20_001)[None]
    assert float(Entropy().range(even, extremes_of(even), 8, symmetric=True)[1]) == 1
    assert bool(torch.isinf(clip(values.abs(), 2**12, 2048)).all())


def test_zeros_are_no_part_of_the_histogram():
    values = torch.rand(2, 1000, generator=torch.Generator().manual_seed(6))
    padded = torch.cat([values, torch.zeros(2, 5000)], 1)
    assert torch.equal(histograms(values, 100)[0], histograms(padded, 100)[0])
    assert histograms(values, 100)[0].sum() == 2000


@pytest.mark.parametrize("observer", [Ema(), Percentile(), Mse(), Entropy(), Percentile(share=0.99)])
@pytest.mark.parametrize("bits", [1, 2, 8, 16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_observer_does_rows_apart_and_all_zero_rows(observer, bits, symmetric):
    rows = torch.randn(4, 300, generator=torch.Generator().manual_seed(7))
    rows[1], rows[2] = 0, rows[2].abs()
    low, high = observer.range(rows, extremes_of(rows), bits, symmetric=symmetric)
    assert low.shape == high.shape == (4,)
    assert bool((low <= high).all())
    assert bool(torch.isfinite(low + high).all())
    for row in range(4):
        alone = observer.range(rows[row][None], extremes_of(rows[row][None]), bits, symmetric=symmetric)
        assert torch.allclose(torch.stack(alone)[:, 0], torch.stack([low[row], high[row]]))
    weight = torch.randn(3, 1, generator=torch.Generator().manual_seed(8))
    state = Affine(observer=observer, symmetric=symmetric).start(weight, bits, 0, None)
    assert bool(torch.isfinite(state["scale"]).all())


def test_no_other_range_has_a_smaller_error_than_that_of_mse():
    rows = torch.randn(5, 4000, generator=torch.Generator().manual_seed(9)) ** 3
    extremes = extremes_of(rows)
    least = squared_error(rows, *Mse().range(rows, extremes, 4, symmetric=True), 4, symmetric=True)
    assert bool((least * 1.5 < squared_error(rows, *extremes[:, 0].unbind(-1), 4, symmetric=True)).all())
    for observer in (Entropy(), Percentile(share=0.999), Percentile(share=0.99)):
        found = squared_error(rows, *observer.range(rows, extremes, 4, symmetric=True), 4, symmetric=True)
        assert bool((least <= found * 1.01).all()), observer.id


def test_bad_observers_are_refused():
    with pytest.raises(UsageError, match=r"share=0\.4 clips half"):
        Percentile(share=0.4)
    with pytest.raises(UsageError, match="candidates=0"):
        Mse(candidates=0)
    with pytest.raises(UsageError, match="decay"):
        Ema(decay=1.5)


@pytest.mark.parametrize("per", ["tensor", "channel", "group"])
def test_pruned_weights_and_the_gap_of_the_last_group_are_not_observed(per):
    generator = torch.Generator().manual_seed(2)
    weight, kept = torch.randn(6, 50, generator=generator), torch.rand(6, 50, generator=generator) < 0.2
    weight, kept[5] = weight * kept, False
    observer = Percentile(share=0.7)
    method = Affine(observer=observer, per=per, group=20, symmetric=False)
    found = method.start(weight, 8, 0, kept)["scale"].reshape(-1)
    parts = {"tensor": [(weight, kept)], "channel": list(zip(weight, kept, strict=True))}.get(per) or [
        (weight[row, n : n + 20], kept[row, n : n + 20]) for row in range(6) for n in (0, 20, 40)
    ]
    for scale, (values, present) in zip(found, parts, strict=True):
        if present.any():
            row = values[present][None]
            low, high = observer.range(row, extremes_of(row), 8, symmetric=False)
            assert float(scale) == pytest.approx(float(high.clamp_min(0) - low.clamp_max(0)) / 255 or 1.0)
        else:
            assert float(scale) == 1


@pytest.mark.parametrize(("low", "high"), [(-1.0, 0.5), (-0.5, 1.0)])
def test_one_bit_of_a_symmetric_input_has_zero_among_its_codes(low, high):
    values = torch.tensor([low, 0.0, high])
    quantizer = QuantizedInput(AffineInput(symmetric=True), 1, Observed(values, values[[0, 2]][None]), signed=True)
    assert int(quantizer.state["zero"]) in (0, 1)
    assert float(quantizer(torch.zeros(1))) == 0
    assert len(quantizer(torch.linspace(-2, 2, 99)).unique()) == 2
