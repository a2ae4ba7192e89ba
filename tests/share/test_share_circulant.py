"""Circulant layers: blocks by size, and the product by FFT."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from espalier.core.context import Context
from espalier.core.errors import ModelError
from espalier.core.model import digest
from espalier.core.parametrize import slots
from espalier.core.structures.form import StructuredWeight
from espalier.quantize import Quantize
from espalier.share import Circulant, by_fft
from espalier.share.by_fft import CirculantLinear


def block_of(model: nn.Module, name: str = "0.weight") -> int:
    form = slots(model)[name].form
    assert isinstance(form, StructuredWeight)
    return int(form.structure.options()["block"])


def test_the_block_is_given_or_follows_what_is_kept() -> None:
    model = nn.Sequential(nn.Linear(24, 12))
    assert block_of(Circulant(keep=0.25)(model, Context())) == 4
    assert block_of(Circulant(keep=1 / 12)(model, Context())) == 12
    assert block_of(Circulant(block=5)(model, Context())) == 5
    assert block_of(Circulant(block=1000)(model, Context())) == 24  # the whole layer, as Cheng et al. have it


def test_a_circulant_matrix_is_found_exactly() -> None:
    model, column = nn.Sequential(nn.Linear(6, 6)), torch.randn(6)
    model[0].weight.data = torch.stack([column.roll(j) for j in range(6)], 1)
    shared = Circulant(block=6)(model, Context())
    assert torch.allclose(slots(shared)["0.weight"].value(), model[0].weight, atol=1e-6)
    assert torch.allclose(slots(shared)["0.weight"].latent, column, atol=1e-6)


def test_flips_belong_to_the_layer_and_the_seed() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    options = [
        slots(Circulant(flips=True)(model, Context(seed=seed)))[name].form.structure.options()  # type: ignore[union-attr]
        for seed in (0, 1)
        for name in ("0.weight", "1.weight")
    ]
    assert len({option["seed"] for option in options}) == 4


@pytest.mark.parametrize("flips", [False, True])
@pytest.mark.parametrize(("into", "out", "block"), [(12, 12, 12), (10, 7, 4), (7, 10, 3), (9, 4, 9)])
def test_by_fft_answers_the_same(into: int, out: int, block: int, flips: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(into, out), nn.ReLU(), nn.Linear(out, 3, bias=False))
    shared = Circulant(block=block, flips=flips, layers=("0",))(model, Context())
    before = digest(shared)
    faster = by_fft(shared)
    assert isinstance(faster[0], CirculantLinear)  # type: ignore[index]
    assert isinstance(faster[2], nn.Linear)  # type: ignore[index]
    for shape in ((5, into), (2, 3, into), (into,)):
        x = torch.randn(shape)
        assert torch.allclose(faster(x), shared(x), atol=1e-5)
    assert digest(shared) == before


def test_by_fft_takes_layers_that_run_twice_and_quantized_numbers() -> None:
    layer = nn.Linear(8, 8)
    shared = Circulant()(nn.Sequential(layer, nn.ReLU(), layer), Context())
    coarse = Quantize(bits=4, ends="same")(shared, Context())
    for model in (shared, coarse):
        faster = by_fft(model)
        assert faster[0] is faster[2]  # type: ignore[index]
        x = torch.randn(4, 8)
        assert torch.allclose(faster(x), model(x), atol=1e-5)


def test_by_fft_refuses_a_model_without_such_layers() -> None:
    for model in (nn.Sequential(nn.Linear(8, 8)), Circulant()(nn.Sequential(nn.Conv2d(8, 8, 3)), Context())):
        with pytest.raises(ModelError, match="circulant"):
            by_fft(model)


class Owners(nn.Module):
    """Attention and a layer of a transformer, which read weights themselves, and a plain layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.plain = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.plain(self.block(self.attention(x, x, x)[0]))
        return found


def test_by_fft_leaves_alone_what_its_owner_reads() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 16)
    shared = Circulant()(Owners(), Context()).eval()
    faster = by_fft(shared).eval()
    assert [name for name, module in faster.named_modules() if isinstance(module, CirculantLinear)] == ["plain"]
    with torch.no_grad():
        assert torch.allclose(faster(x), shared(x), atol=1e-5)
    with pytest.raises(ModelError, match="outside of attention"):
        by_fft(Circulant(layers=("attention.*", "block.*"))(Owners(), Context()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_by_fft_of_other_types_of_numbers(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    shared = Circulant(flips=True)(nn.Sequential(nn.Linear(16, 12)).to(dtype), Context())
    x = torch.randn(3, 16, dtype=dtype)
    answer = by_fft(shared)(x)
    assert answer.dtype == dtype
    assert torch.allclose(answer, shared(x), atol=1e-12 if dtype == torch.float64 else 2e-2)
