"""Short floats against NumPy and against a table of every fp8 value."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from espalier.core.errors import UsageError
from espalier.core.forms import Mask
from espalier.core.inputs import Observed, QuantizedInput
from espalier.core.quantized import QuantizedWeight
from espalier.core.representation import Codebook, Dense, Masked, bfloat16_to_float32, float32_to_bfloat16
from espalier.quantize import Quantize
from espalier.quantize.half import Half, HalfInput, cast, levels


def fp8_table(exponent: int, mantissa: int, bias: int, top: float) -> np.ndarray:
    """Every non-negative value of an fp8 format by its definition."""
    found = [m * 2.0 ** (1 - bias - mantissa) for m in range(2**mantissa)]
    for e in range(1, 2**exponent):
        found += [(1 + m / 2**mantissa) * 2.0 ** (e - bias) for m in range(2**mantissa)]
    return np.array([value for value in found if value <= top])


TABLES = {"e4m3": fp8_table(4, 3, 7, 448.0), "e5m2": fp8_table(5, 2, 15, 57344.0)}


@pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
def test_fp8_holds_the_values_of_its_definition(kind):
    values, _ = levels(kind)
    table = TABLES[kind]
    assert values.tolist() == sorted({*table.tolist(), *(-table).tolist()})
    assert table[1] == {"e4m3": 2.0**-9, "e5m2": 2.0**-16}[kind]


@pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
def test_fp8_rounds_to_the_nearest_and_halfway_to_even(kind):
    table = TABLES[kind]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.exp2(torch.rand(4000, generator=generator) * 40 - 22)
    halves = torch.tensor((table[1:] + table[:-1]) / 2).float()
    x = torch.cat([drawn, halves, torch.nextafter(halves, torch.zeros(())), torch.nextafter(halves, 2 * halves)])
    gaps = np.abs(x.double().numpy()[:, None] - table[None])
    nearest = gaps.argmin(1)
    tie = (nearest + 1 < len(table)) & (gaps[np.arange(len(x)), np.minimum(nearest + 1, len(table) - 1)] == gaps.min(1))
    nearest = nearest + (tie & (nearest % 2 == 1))
    assert int(tie.sum()) == len(halves)
    assert np.array_equal(cast(x, kind).numpy(), table[nearest])
    assert np.array_equal(cast(-x, kind).numpy(), -table[nearest])
    values, bounds = levels(kind)
    signed = torch.cat([x, -x])
    assert torch.equal(values[torch.bucketize(signed, bounds)], cast(signed, kind))


def test_sixteen_bits_are_what_numpy_makes():
    x = torch.randn(5000, generator=torch.Generator().manual_seed(1)) * 100
    assert np.array_equal(cast(x, "fp16").numpy(), x.numpy().astype(np.float16).astype(np.float32))
    assert np.array_equal(cast(x, "bf16").numpy(), bfloat16_to_float32(float32_to_bfloat16(x.numpy())))
    assert cast(torch.tensor([1e6, -1e6]), "fp16").tolist() == [65504.0, -65504.0]
    assert bool(torch.isfinite(cast(torch.tensor([3.4e38]), "bf16")).all())


@pytest.mark.parametrize(("kind", "stored"), [("fp16", "float16"), ("bf16", "bfloat16")])
def test_sixteen_bits_are_stored_in_sixteen(kind, stored):
    weight = torch.randn(6, 7, generator=torch.Generator().manual_seed(2))
    form = QuantizedWeight(Half(format=kind), weight, 16).eval()
    frozen = form.freeze(weight)
    assert isinstance(frozen, Dense)
    assert frozen.stored == stored
    assert frozen.bits() == 16 * 42
    assert np.array_equal(frozen.dense(), form(weight).numpy())
    mask = torch.rand(6, 7, generator=torch.Generator().manual_seed(3)) < 0.4
    pruned = QuantizedWeight(Half(format=kind), weight, 16, inner=Mask(mask)).eval()
    kept = pruned.freeze(weight)
    assert isinstance(kept, Masked)
    assert kept.inner.bits() == 16 * int(mask.sum())
    assert np.array_equal(kept.dense(), pruned(weight).numpy())


@pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
def test_fp8_weights_reach_to_the_largest_value(kind):
    weight = torch.randn(20, 30, generator=torch.Generator().manual_seed(4)) * 0.01
    form = QuantizedWeight(Half(format=kind), weight, 8).eval()
    values = form(weight)
    assert torch.allclose(values.abs().max(), weight.abs().max(), rtol=1e-6)
    scale = float(weight.abs().max()) / TABLES[kind][-1]
    step = 2.0 ** -{"e4m3": 4, "e5m2": 3}[kind]
    small = TABLES[kind][1] * scale / 2
    assert bool(((values - weight).abs() <= weight.abs() * step * 1.001 + small).all())
    frozen = form.freeze(weight)
    assert isinstance(frozen, Codebook)
    assert frozen.indices.dtype == np.uint8
    assert np.array_equal(frozen.dense(), values.numpy())


@pytest.mark.parametrize("kind", ["fp16", "bf16", "e4m3", "e5m2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_inputs_in_training_are_inputs_in_use(kind, dtype):
    sample = torch.randn(2000, generator=torch.Generator().manual_seed(5)) * 4
    observed = Observed(sample, torch.stack(sample.aminmax())[None])
    quantizer = QuantizedInput(HalfInput(format=kind), 8 if kind.startswith("e") else 16, observed, signed=True)
    x = torch.cat([sample * 2, torch.zeros(3)]).to(dtype).requires_grad_()
    trained = quantizer(x)
    trained.sum().backward()
    quantizer.eval()
    assert torch.equal(trained, quantizer(x))
    assert trained.dtype == dtype
    top = float(sample.abs().max()) * 1.0001 if kind.startswith("e") else torch.inf
    assert x.grad is not None
    assert torch.equal(x.grad != 0, x.detach().double().abs() <= top)


def test_a_format_has_one_width():
    assert Half().widths == Half(format="bf16").widths == (16,)
    assert HalfInput(format="e5m2").widths == Half().replace(format="e4m3").widths == (8,)
    with pytest.raises(UsageError, match=r"half can do 16"):
        Quantize(weights=Half(), bits=8)
    with pytest.raises(UsageError, match="format"):
        Half(format="fp4")  # type: ignore[arg-type]
